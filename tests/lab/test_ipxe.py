"""Debian's iPXE, started by SeaBIOS, boots from the network by its own driver for VMBus NICs, in the lab."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.lab.conftest import StartSession

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def report(lab_session: StartSession) -> dict[str, Any]:
    """What the network's server saw, and what the VM told."""
    found: dict[str, Any] = lab_session("-m", "tests.lab.ipxe_session", timeout=240).report("ipxe")
    return found


def test_it_gets_an_address_and_files(report: dict[str, Any]) -> None:
    assert "DHCPACK(ipxe0) 10.78.0.50 00:15:5d:00:00:01" in report["server"]
    assert "sent /tmp/tftp/boot.ipxe to 10.78.0.50" in report["server"]
    assert "sent /tmp/tftp/second to 10.78.0.50" in report["server"]


def test_the_script_that_it_got_runs_to_its_end(report: dict[str, Any]) -> None:
    assert report["exit"] == 3, report["stderr"]


def test_its_driver_speaks_version_1_and_takes_no_offloads(report: dict[str, Any]) -> None:
    assert "nic0.0 INIT 0x2 0x2 -> 02000000 02000000" in report["stderr"]
    nic = report["report"]["synthetic"]["devices"]["nic0"]
    assert nic["received_frames"] > 20  # more than its receive buffer has sections
    assert (nic["sent_invalid"], nic["received_errors"]) == (0, 0)
    assert not any(name.startswith("RECEIVE") for name in nic["offloads"])
