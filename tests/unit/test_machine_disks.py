"""A machine's disks at their places, without a machine."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from devices.storage.mmc import MediumLocked
from devices.storage.raw import RawDisk
from pyvmm.machine.config import ConfigError, DiskConfig, parse_cdrom
from pyvmm.machine.disks import Disks, Slot

if TYPE_CHECKING:
    from devices.storage.backend import Disk


class Controllers:
    """Stands in for SyntheticDevices; remembers which places came and went."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []
        self.locked = False

    def plug(self, slot: Slot) -> None:
        self.seen.append(("plug", slot.controller, slot.lun))

    def resize(self, slot: Slot, size: int) -> None:
        assert slot.disk is not None
        if size < slot.disk.size:
            raise ValueError("can only grow")
        slot.disk.resize(size)

    def change_disc(self, slot: Slot, disc: Disk | None, force: bool) -> Disk | None:
        if self.locked and not force:
            raise MediumLocked
        return slot.disk

    def unplug(self, slot: Slot) -> None:
        self.seen.append(("unplug", slot.controller, slot.lun))
        if slot.disk is not None:
            os.fstat(cast("RawDisk", slot.disk)._file.fd)  # still open


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{number}.img" for number in range(4)]
    for path in paths:
        path.write_bytes(bytes(512))
    return [str(path) for path in paths]


def disks(*configs: DiskConfig, synthetic: Controllers | None = None, board: Controllers | None = None) -> Disks:
    return Disks(configs, lambda: cast("Any", synthetic), lambda: cast("Any", board))


def places(found: Disks) -> dict[int, dict[int, str]]:
    return {
        controller: {lun: os.path.basename(slot.disk.path) for lun, slot in slots.items() if slot.disk is not None}
        for controller, slots in found.controllers().items()
    }


def test_disks_take_free_places_around_those_that_have_one(images: list[str]) -> None:
    first, second, third, fourth = images
    found = disks(DiskConfig(first), DiskConfig(second, lun=0), DiskConfig(third, controller=2), DiskConfig(fourth))
    assert places(found) == {0: {0: "1.img", 1: "0.img", 2: "3.img"}, 2: {0: "2.img"}}
    found.close()


def test_the_first_controller_is_there_without_a_disk() -> None:
    assert places(disks()) == {0: {}}


def test_a_disk_that_cannot_be_opened_leaves_none_open(images: list[str]) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="in use by another VM"):
        disks(DiskConfig(images[0]), DiskConfig(images[0]))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_disks_are_plugged_in_and_out_at_their_places(images: list[str]) -> None:
    controllers = Controllers()
    found = disks(DiskConfig(images[0]), synthetic=controllers)
    assert found.add(DiskConfig(images[1], controller=3, lun=9)) == {"controller": 3, "lun": 9, "path": images[1]}
    assert found.add(DiskConfig(images[2]))["lun"] == 1
    for bad, why in ((DiskConfig(images[3], lun=1), "LUN 1 of controller 0 is taken"), (DiskConfig("/no"), "no such")):
        with pytest.raises(ConfigError, match=why):
            found.add(bad)
    assert found.remove(0, 0) == {"controller": 0, "lun": 0, "path": images[0]}
    assert controllers.seen == [("plug", 3, 9), ("plug", 0, 1), ("unplug", 0, 0)]
    with pytest.raises(ConfigError, match="no disk at LUN 0"):
        found.remove(0, 0)
    assert found.add(DiskConfig(images[0]))["lun"] == 0  # the place is free, and the image not locked any more
    found.close()


def test_a_flush_that_fails_at_the_end_is_told_and_all_disks_are_closed(
    images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    found = disks(*map(DiskConfig, images), synthetic=Controllers())

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fdatasync", fail)
    with pytest.raises(ConfigError, match=r"3.img: the guest's last writes may be lost: Input/output error"):
        found.remove(0, 3)
    assert found.close() == f"{images[0]}: the guest's last writes may be lost: Input/output error"
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert found.close() is None


def test_a_disk_grows_and_what_cannot_be_is_refused(images: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = disks(DiskConfig(images[0]), synthetic=Controllers())
    assert found.resize(0, 0, 4096) == {"controller": 0, "lun": 0, "path": images[0], "size": 4096}
    assert os.stat(images[0]).st_size == 4096
    for lun, size, why in (
        (0, 512, "can only grow"),
        (0, 5000, "not a multiple of the 512-byte sector"),
        (1, 1, "no disk"),
    ):
        with pytest.raises(ConfigError, match=why):
            found.resize(0, lun, size)

    def full(*_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("os.ftruncate", full)
    with pytest.raises(ConfigError, match="cannot be resized: File too large"):
        found.resize(0, 0, 8192)
    found.close()


def test_discs_are_changed_in_their_drive_and_closed(images: list[str], tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    discs = [str(tmp_path / name) for name in ("a.iso", "b.img")]
    for disc in discs:
        Path(disc).write_bytes(bytes(4096))
    controllers = Controllers()
    found = disks(DiskConfig(discs[0]), DiskConfig(images[0]), synthetic=controllers)
    assert found.insert(0, 0, discs[1])["path"] == discs[1]
    slot = found.controllers()[0][0]
    assert slot.disk is not None and (slot.disk.path, slot.disk.format) == (discs[1], "iso")
    controllers.locked = True
    with pytest.raises(ConfigError, match=r"has locked the drive.*--force"):
        found.eject(0, 0)
    with pytest.raises(ConfigError, match=r"has locked the drive.*--force"):
        found.insert(0, 0, discs[0])
    assert slot.disk.path == discs[1]
    assert found.eject(0, 0, force=True) == {"controller": 0, "lun": 0, "path": discs[1]}
    assert slot.disk is None
    controllers.locked = False
    with pytest.raises(ConfigError, match="is empty"):
        found.eject(0, 0)
    with pytest.raises(ConfigError, match="no such file"):
        found.insert(0, 0, "/no.iso")
    with pytest.raises(ConfigError, match="a hard disk, not a CD or DVD drive"):
        found.eject(0, 1)
    assert found.remove(0, 0)["path"] is None
    found.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_ide_disks_have_places_of_their_own_and_fill_them_in_order(images: list[str]) -> None:
    first, second, third, fourth = images
    found = disks(
        DiskConfig(first, bus="ide"),
        DiskConfig(second),
        DiskConfig(third, bus="ide", lun=1),
        DiskConfig(fourth, bus="ide"),
    )
    assert places(found) == {0: {0: "1.img"}}
    assert {place: os.path.basename(disk.path) for place, disk in found.ide().items()} == {
        (0, 0): "0.img",
        (0, 1): "2.img",
        (1, 0): "3.img",
    }
    found.close()


def test_an_ide_disk_needs_a_free_place(images: list[str]) -> None:
    first, second, third, _ = images
    with pytest.raises(ConfigError, match="no place is free from IDE channel 1 on"):
        disks(*(DiskConfig(image, bus="ide", controller=1) for image in (first, second, third)))


def test_ide_disks_do_not_come_later(images: list[str]) -> None:
    found = disks(synthetic=Controllers())
    with pytest.raises(ConfigError, match="there from the start"):
        found.add(DiskConfig(images[0], bus="ide"))
    found.close()


def test_a_disc_in_an_ide_drive_is_changed_by_the_board(tmp_path: Path) -> None:
    discs = [str(tmp_path / name) for name in ("a.iso", "b.iso")]
    for disc in discs:
        Path(disc).write_bytes(bytes(4096))
    found = disks(parse_cdrom(discs[0]), board=Controllers())
    assert found.insert(1, 0, discs[1], "ide")["path"] == discs[1]
    assert found.ide()[1, 0].path == discs[1]
    with pytest.raises(ConfigError, match="no disk at LUN 0 of controller 1"):
        found.eject(1, 0)
    assert found.eject(1, 0, bus="ide")["path"] == discs[1]
    assert found.ide() == {}
    found.close()
