"""The lab itself: an ordinary KVM, this checkout, output and exit status passed through."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.lab.conftest import Session, StartSession

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def session(lab_session: StartSession) -> Session:
    return lab_session("-m", "tests.lab.lab_session", timeout=100)


def test_exit_status_and_both_streams_arrive_unchanged(session: Session) -> None:
    assert session.returncode == 7, session.output_end()
    assert session.stdout == bytes(range(256)) * 4096
    assert session.stderr == b"to stderr\n"


def test_inside_is_an_ordinary_kvm_with_nested_paging(session: Session) -> None:
    report = session.report("lab")
    assert report["kvm_api"] == 12
    assert report["nested_paging"] in ("1", "Y")


def test_checkout_devices_and_modules_are_there(session: Session) -> None:
    report = session.report("lab")
    assert report["folder"] == os.getcwd()
    assert report["in_lab"] == "1"
    assert report["tun"]
    assert report["vlan"]
    assert report["terminals"] == 2


def test_nothing_but_results_is_written_to_the_host(session: Session) -> None:
    assert session.results.joinpath("lab.json").exists()
    assert not Path("written-in-the-lab").exists()
