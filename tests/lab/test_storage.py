"""A stock guest that lives on our disks: its root on a VHDX, verified load, disks that come, go, grow and fail.

PYVMM_FIO_SECONDS sets how long each verified load lasts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from guests import linux
from tests.lab import storage_session
from tests.lab.conftest import Session, StartSession, guest_script, told

_FIO_SECONDS = int(os.environ.get("PYVMM_FIO_SECONDS", "10"))

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1200 + 4 * _FIO_SECONDS)]

_LEGS = ("storvsp", "ide-piix", "ide-vmbus")


@pytest.fixture(scope="module")
def session(lab_session: StartSession, tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("root")
    raw, root = folder / "root.img", folder / "root.vhdx"
    linux.write_root(raw, guest_script("storage_guest.sh"), 192, programs=("fio",))
    subprocess.run([sys.executable, "-m", "pyvmm", "disk", "convert", str(raw), str(root)], check=True)
    images = linux.build(extra_modules=("ata_piix",))
    return lab_session(
        *("-m", "tests.lab.storage_session"),
        *(str(images.vmlinux), str(images.initrd), str(root), str(_FIO_SECONDS)),
        timeout=1000 + 4 * _FIO_SECONDS,
    )


@pytest.fixture(scope="module")
def life(session: Session) -> dict[str, Any]:
    report: dict[str, Any] = session.report("storvsp")
    return report


@pytest.mark.parametrize(
    ("leg", "driver"), [("storvsp", "storvsc_host"), ("ide-piix", "ata_piix"), ("ide-vmbus", "storvsc_host")]
)
def test_root_file_system_is_on_our_disk_by_the_stock_driver(session: Session, leg: str, driver: str) -> None:
    report = session.report(leg)
    assert told(report, "root").startswith("sd")
    assert told(report, "driver") == driver
    assert told(report, "taint") == "0"
    assert report["exit"] == 0


def test_mixed_load_reads_back_what_it_wrote(session: Session) -> None:
    for leg, name in zip(_LEGS, ("load", "root", "root"), strict=True):
        report = session.report(leg)
        assert told(report, f"fio_{name}") == "0 0", report["console"][-3000:]
        assert "total=" in told(report, f"fio_{name}_io")


def test_load_is_on_a_disk_of_4096_byte_sectors(life: dict[str, Any]) -> None:
    assert told(life, "load_sector") == "4096"


def test_root_disk_serves_while_another_is_under_load(life: dict[str, Any]) -> None:
    assert told(life, "root_sum") == told(life, "root_sum_again")


def test_disk_comes_and_goes_under_load(life: dict[str, Any]) -> None:
    assert life["steps"]["add"]["exit"] == 0 and life["steps"]["remove"]["exit"] == 0
    assert told(life, "added") and told(life, "added_written") == "1" and told(life, "removed") == "1"


def test_disk_grows_while_the_guest_runs(life: dict[str, Any]) -> None:
    assert life["steps"]["grow"]["exit"] == 0
    assert told(life, "grown") == str(384 << 20)
    assert told(life, "grown_written") == "1"


def test_error_of_the_host_is_an_error_in_the_guest_which_survives_it(life: dict[str, Any]) -> None:
    assert told(life, "before_failure") == "0"
    assert told(life, "failure_seen") == "1"
    assert int(told(life, "failure_message")) >= 1
    assert told(life, "healed") == "1"


def test_killed_vm_keeps_every_flushed_write(session: Session) -> None:
    report = session.report("killed")
    assert report["exit"] == -signal.SIGKILL
    assert report["flushed"] >= storage_session.KILLED_AFTER, report["console"]
    assert report["lost"] == []


def test_images_are_sound_afterwards(session: Session) -> None:
    for leg in (*_LEGS, "killed"):
        for name, check in session.report(leg)["checks"].items():
            assert check["exit"] == 0, f"{name}: {check['says']}"
