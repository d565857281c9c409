"""A stock Debian guest with an IDE disk and an IDE CD drive, in the lab: by ata_piix with and without DMA, then by
hv_storvsc."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guests import linux
from tests.lab.conftest import told

if TYPE_CHECKING:
    from tests.lab.conftest import Session, StartSession

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

WAYS = ("ata", "pio", "vmbus")


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two discs of 512 and 768 KiB."""
    folder = tmp_path_factory.mktemp("discs")
    paths = [folder / "first.iso", folder / "second.iso"]
    for path, size in zip(paths, (512 << 10, 768 << 10), strict=True):
        path.write_bytes(os.urandom(size))
    return paths


@pytest.fixture(scope="module")
def session(lab_session: StartSession, discs: list[Path]) -> Session:
    images = linux.build(Path(__file__).with_name("ide_guest.sh"), extra_modules=("ata_piix", "sr_mod"))
    words = ("-m", "tests.lab.ide_session", str(images.vmlinux), str(images.initrd), *map(str, discs))
    return lab_session(*words, timeout=700)


def boot(session: Session, way: str) -> dict[str, Any]:
    """What one boot left."""
    report: dict[str, Any] = session.report(way)
    told(report, "end")
    assert report["exit"] == 0, report["stderr"]
    return report


def drives(session: Session, way: str) -> list[dict[str, Any]]:
    """What pyvmm tells of the IDE drives at the end."""
    channels = boot(session, way)["report"]["board"]["devices"]["pci"]["07.1"]["channels"]
    return [drive for channel in channels for drive in channel["drives"] if drive is not None]


@pytest.mark.parametrize("way", WAYS)
def test_the_disk_is_found_once_by_the_driver_that_is_to_have_it(session: Session, way: str) -> None:
    found = boot(session, way)
    disks = {name: value for name, value in found["results"].items() if name.startswith("disk_")}
    assert disks == {"disk_sda": f"{'vmbus' if way == 'vmbus' else 'ata'} 65536", "disk_sr0": "ata 1024"}
    assert told(found, "model").strip() == ("Virtual Disk" if way == "vmbus" else "Virtual HD")


@pytest.mark.parametrize("way", WAYS)
def test_the_controller_is_a_piix4_that_gives_its_driver_no_trouble(session: Session, way: str) -> None:
    found = boot(session, way)
    assert told(found, "driver") == "ata_piix"
    assert told(found, "pci_07.1") == "0x8086 0x7111"
    assert told(found, "ata_troubles") == "0", told(found, "ata_log")


@pytest.mark.parametrize(("way", "mode"), [("ata", "0x42"), ("pio", "0x0c")])  # Ultra DMA 2, PIO 4
def test_disk_and_drive_are_used_in_the_mode_that_the_kernel_chose(session: Session, way: str, mode: str) -> None:
    disk, drive = drives(session, way)
    assert (disk["mode"], drive["mode"]) == (mode, mode)
    assert disk["reads"] and disk["writes"] and disk["flushes"] and drive["reads"]
    assert disk["errors"] == drive["errors"] == 0


def test_with_vmbus_nothing_of_the_disk_goes_through_the_controller(session: Session) -> None:
    disk, drive = drives(session, "vmbus")
    assert disk["reads"] == disk["writes"] == 0
    assert drive["reads"]


def test_what_one_driver_writes_the_others_read(session: Session) -> None:
    made = told(boot(session, "ata"), "made")
    assert len(made) == 64
    assert told(boot(session, "pio"), "found") == told(boot(session, "vmbus"), "found") == made
    assert told(boot(session, "pio"), "found_notes").split() == ["ata"]
    assert told(boot(session, "vmbus"), "found_notes").split() == ["ata", "pio"]


def test_what_the_guest_trims_becomes_a_hole(session: Session) -> None:
    assert "bytes trimmed" in told(boot(session, "ata"), "trimmed")
    assert drives(session, "ata")[0]["trims"]
    assert 8 << 20 < boot(session, "ata")["stored"] < 16 << 20


@pytest.mark.parametrize("way", WAYS)
def test_the_disc_is_read_and_so_is_another_one_that_is_put_in(session: Session, discs: list[Path], way: str) -> None:
    found = boot(session, way)
    sums = [hashlib.sha256(disc.read_bytes()).hexdigest() for disc in discs]
    assert [told(found, "cd"), told(found, "other_cd")] == sums
    assert boot(session, way)["steps"]["insert"]["reply"]["ok"]
