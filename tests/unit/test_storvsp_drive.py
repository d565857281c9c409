"""CD and DVD drives on a SCSI controller."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.storage.mmc import MediumLocked
from tests.fakes.disks import MemoryDisk
from tests.fakes.scsi import EXAMPLES, HOSTILE_CDBS, read10
from tests.fakes.storvsc import READ_TYPE, StorVsc
from tests.fakes.storvsp_bus import PATIENCE
from tests.fakes.storvsp_bus import Rig as BusRig
from tests.fakes.storvsp_rig import INQUIRY, SIZE, TEST_UNIT_READY, Rig

if TYPE_CHECKING:
    from collections.abc import Iterator

SECTORS = SIZE // 2048
EJECT, LOAD = bytes((0x1B, 0, 0, 0, 2, 0)), bytes((0x1B, 0, 0, 0, 3, 0))
LOCK, UNLOCK = bytes((0x1E, 0, 0, 0, 1, 0)), bytes((0x1E, 0, 0, 0, 0, 0))
CHANGED, NO_MEDIUM, TRAY_OPEN = (6, 0x28, 0), (2, 0x3A, 1), (2, 0x3A, 2)


class Disc(MemoryDisk):
    """A disc whose every byte is `fill`."""

    def __init__(self, fill: bytes) -> None:
        super().__init__(SIZE, readonly=True, name=f"disc {fill.decode()}")
        self.format = "iso"
        self.optical = True
        self.sector_size = self.physical_sector_size = 2048
        self.data[:] = fill * SIZE


def ready(guest: StorVsc) -> StorVsc:
    """The driver has heard of what there was to hear."""
    for _ in range(3):
        if guest.command(TEST_UNIT_READY).srb_status == 1:
            break
    return guest


@pytest.fixture
def rig() -> Rig:
    rig = Rig({0: Disc(b"a"), 1: MemoryDisk(SIZE)})
    ready(rig.ready())
    return rig


def events(guest: StorVsc) -> tuple[int, int]:
    """Media event and status of GET EVENT STATUS NOTIFICATION."""
    data = guest.read(struct.pack(">BBxxBxxHx", 0x4A, 1, 0x10, 8), 8).data
    return data[4], data[5]


def test_an_optical_image_makes_a_drive_with_a_disc(rig: Rig) -> None:
    inquiry = rig.guest.read(INQUIRY, 36).data
    assert inquiry[0] == 5 and inquiry[1] == 0x80 and inquiry[8:16] == b"Msft    "
    assert rig.guest.read(bytes((0x25, *bytes(9))), 8).data == struct.pack(">II", SECTORS - 1, 2048)
    result = rig.guest.read(read10(SECTORS - 2, 2), 4096)
    assert result.srb_status == 1 and result.data == b"a" * 4096
    assert rig.guest.read(read10(SECTORS - 1, 2), 4096).code == (5, 0x21, 0)
    found = rig.vsp.inspect()["luns"]["0"]
    assert found["disc"]["path"] == "disc a" and found["reads"] == 1 and found["errors"] >= 1


def test_another_disc_is_news_to_the_guest(rig: Rig) -> None:
    old = rig.vsp.change_disc(0, Disc(b"b"))
    assert old is not None and old.path == "disc a"
    assert rig.guest.read(read10(0, 1), 2048).code == CHANGED
    assert rig.guest.read(read10(0, 1), 2048).data == b"b" * 2048
    assert events(rig.guest) == (2, 2)


def test_a_drive_without_disc_says_so_until_one_is_inserted(rig: Rig) -> None:
    rig.vsp.change_disc(0, None)
    assert rig.guest.command(TEST_UNIT_READY).code == CHANGED
    assert rig.guest.command(TEST_UNIT_READY).code == rig.guest.read(read10(0, 1), 2048).code == NO_MEDIUM
    assert rig.vsp.inspect()["luns"]["0"]["disc"] is None
    assert rig.vsp.change_disc(0, Disc(b"c")) is None
    assert ready(rig.guest).read(read10(0, 1), 2048).data == b"c" * 2048


def test_a_guest_that_locks_its_drive_is_asked_before_the_disc_goes(rig: Rig) -> None:
    assert rig.guest.command(LOCK).srb_status == 1
    events(rig.guest)
    with pytest.raises(MediumLocked):
        rig.vsp.change_disc(0, None)
    assert rig.guest.command(EJECT).code == (5, 0x53, 2)
    assert events(rig.guest) == (1, 2)  # eject request
    assert rig.guest.read(read10(0, 1), 2048).data == b"a" * 2048
    assert rig.guest.command(UNLOCK).srb_status == 1
    assert rig.guest.command(EJECT).srb_status == 1
    assert rig.guest.command(TEST_UNIT_READY).code == TRAY_OPEN
    assert rig.guest.command(LOAD).srb_status == 1
    assert ready(rig.guest).read(read10(0, 1), 2048).data == b"a" * 2048


def test_force_takes_the_disc_from_a_guest_that_has_locked_it(rig: Rig) -> None:
    rig.guest.command(LOCK)
    assert rig.vsp.change_disc(0, None, force=True) is not None
    assert rig.guest.command(TEST_UNIT_READY).code == CHANGED
    assert rig.guest.command(TEST_UNIT_READY).code == NO_MEDIUM


def test_only_drives_have_discs_and_only_disks_grow(rig: Rig) -> None:
    with pytest.raises(ValueError, match="no CD or DVD drive is at LUN 1"):
        rig.vsp.change_disc(1, None)
    with pytest.raises(ValueError, match="a CD or DVD drive is at LUN 0"):
        rig.vsp.resize_disk(0, 2 * SIZE)
    with pytest.raises(ValueError, match="no disk at LUN 9"):
        rig.vsp.change_disc(9, None)


def test_a_drive_is_removed_with_or_without_a_disc(rig: Rig) -> None:
    rig.vsp.change_disc(0, None)
    assert rig.vsp.remove_disk(0) is None
    rig.vsp.add_disk(0, Disc(b"d"))
    gone = rig.vsp.remove_disk(0)
    assert gone is not None and gone.path == "disc d"


def test_a_drive_goes_on_after_save_and_restore_with_another_disc_too() -> None:
    rig = Rig({0: Disc(b"a")})
    ready(rig.ready()).command(LOCK)
    name = rig.guest.read(bytes((0x12, 1, 0x83, 0, 255, 0)), 255).data
    state = rig.vsp.save()
    moved = Rig({0: Disc(b"e")})
    moved.end.close()
    moved.vsp.restore(state)
    moved.vsp.reattach(cast("Any", moved.end.device))
    assert moved.guest.read(bytes((0x12, 1, 0x83, 0, 255, 0)), 255).data == name
    assert moved.guest.command(EJECT).code == (5, 0x53, 2)
    assert moved.guest.read(read10(0, 1), 2048).data == b"e" * 2048


@pytest.fixture
def bus_rig() -> Iterator[BusRig]:
    rig = BusRig({0: Disc(b"a")})
    rig.driver.initialize()
    ready(rig.driver)
    yield rig
    rig.stop()


def test_a_disc_leaves_once_the_last_read_from_it_is_over(bus_rig: BusRig) -> None:
    first = cast("Disc", bus_rig.vsp._commands.luns[0].disk)
    first.gate.clear()
    slow = bus_rig.driver.start(read10(0, 1), 2048, READ_TYPE)
    assert first.reached.wait(PATIENCE)
    gone = threading.Event()

    def change() -> None:
        bus_rig.vsp.change_disc(0, Disc(b"b"))
        first.close()  # it would object to being read now
        gone.set()

    thread = threading.Thread(target=change)
    thread.start()
    assert not gone.wait(0.05)
    # The new disc is there already for commands that come now.
    assert bus_rig.driver.command(TEST_UNIT_READY).code == CHANGED
    assert bus_rig.driver.read(read10(0, 1), 2048, offset=2048).data == b"b" * 2048
    first.gate.set()
    assert gone.wait(PATIENCE)
    thread.join(PATIENCE)
    assert bus_rig.driver.finish(slow, 2048).data == b"a" * 2048


def test_discs_change_under_load_without_a_read_from_a_closed_one(bus_rig: BusRig) -> None:
    stop = threading.Event()
    seen: set[bytes | tuple[int, int, int]] = set()

    def load() -> None:
        while not stop.is_set():
            result = bus_rig.driver.read(read10(0, 2), 4096)
            seen.add(result.data[:1] if result.srb_status == 1 else result.code)
            assert result.srb_status != 1 or len(set(result.data)) == 1

    loader = threading.Thread(target=load)
    loader.start()
    for number in range(60):
        old = bus_rig.vsp.change_disc(0, Disc(b"xy"[number % 2 : number % 2 + 1]) if number % 3 else None)
        if old is not None:
            old.close()
    stop.set()
    loader.join(PATIENCE)
    assert not loader.is_alive()
    assert seen <= {b"a", b"x", b"y", CHANGED, NO_MEDIUM}


@settings(deadline=None, max_examples=EXAMPLES)
@given(
    commands=st.lists(
        st.tuples(HOSTILE_CDBS.filter(bool), st.integers(0, 8192), st.sampled_from([0, 1, 2]), st.integers(0, 2)),
        max_size=6,
    )
)
def test_any_commands_to_drive_disk_or_nothing_are_answered(commands: list[tuple[bytes, int, int, int]]) -> None:
    rig = Rig({0: Disc(b"a"), 1: MemoryDisk(8192)})
    guest = rig.ready()
    before = bytes(rig.memory.view(0, 16 * 4096))
    for cdb, size, direction, lun in commands:
        result = guest.finish(guest.start(cdb, size, direction, lun))
        assert result.transferred <= size or result.srb_status & 0x80
        assert (result.srb_status & 0x80 != 0) == (result.scsi_status == 2)
    assert rig.end.broken is None and rig.memory.view(0, 16 * 4096) == before
