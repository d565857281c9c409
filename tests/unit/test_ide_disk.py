"""IDE hard disks through the controller's ports: commands, PIO, errors, resets."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes.disks import MemoryDisk
from tests.fakes.ide import BSY, DRQ, ERR, MIB, READY, IdeGuest, identify, text

if TYPE_CHECKING:
    from collections.abc import Callable

UNC, IDNF, ABRT = 0x40, 0x10, 0x04
SECTORS = 2 * MIB // 512
LARGE = 200 << 30


@pytest.fixture
def disk() -> MemoryDisk:
    disk = MemoryDisk(2 * MIB)
    disk.data[:] = os.urandom(2 * MIB)
    return disk


@pytest.fixture
def guest(disk: MemoryDisk) -> IdeGuest:
    return IdeGuest({(0, 0): disk})


def test_identify_tells_what_the_disk_is(guest: IdeGuest, disk: MemoryDisk) -> None:
    found = identify(guest)
    assert text(found, 27, 20) == "Virtual HD"
    assert text(found, 10, 10) == disk.identity.hex()[:20]
    assert found[60] | found[61] << 16 == SECTORS
    assert found[100] | found[101] << 16 == SECTORS
    assert found[1] * found[3] * found[6] <= SECTORS
    assert found[49] & 0x0300 == 0x0300, "DMA and LBA"
    assert found[83] & 0x7400 == 0x7400, "48-bit addresses, FLUSH CACHE and its EXT form"
    assert found[106] == 0x6003, "eight logical sectors in a physical one"
    assert found[169] == 1, "TRIM"


def test_identify_of_a_large_disk_has_the_geometry_that_stands_for_large() -> None:
    disk = MemoryDisk(0)
    disk.size = LARGE
    found = identify(IdeGuest({(0, 0): disk}))
    assert (found[1], found[3], found[6]) == (16383, 16, 63)
    assert found[60] | found[61] << 16 == 0x0FFF_FFFF
    assert found[100] | found[101] << 16 | found[102] << 32 == LARGE // 512


@pytest.mark.parametrize(
    ("code", "wide", "count"),
    [(0x20, False, 1), (0x21, False, 7), (0x20, False, 256), (0x24, True, 3), (0x24, True, 600)],
)
def test_sectors_are_read_one_by_one(guest: IdeGuest, disk: MemoryDisk, code: int, wide: bool, count: int) -> None:
    assert guest.read_sectors(5, count, code, wide) == disk.data[5 * 512 : (5 + count) * 512]


@pytest.mark.parametrize(("code", "wide", "count"), [(0xC4, False, 16), (0xC4, False, 13), (0x29, True, 300)])
def test_multiple_sectors_are_read_in_blocks(
    guest: IdeGuest, disk: MemoryDisk, code: int, wide: bool, count: int
) -> None:
    assert guest.command(0xC6, count=8) == READY
    before = guest.line.edges
    assert guest.read_sectors(9, count, code, wide, block=8 * 512) == disk.data[9 * 512 : (9 + count) * 512]
    assert guest.line.edges - before == -(-count // 8), "one interrupt for each block"
    assert identify(guest)[59] == 0x0108


@pytest.mark.parametrize(
    ("code", "wide", "count", "block"),
    [(0x30, False, 1, 1), (0x30, False, 5, 1), (0x34, True, 300, 1), (0xC5, False, 13, 8), (0x39, True, 520, 8)],
)
def test_written_sectors_are_on_the_disk(
    guest: IdeGuest, disk: MemoryDisk, code: int, wide: bool, count: int, block: int
) -> None:
    guest.command(0xC6, count=8)
    data = os.urandom(count * 512)
    guest.write_sectors(11, data, code, wide, block * 512)
    assert disk.data[11 * 512 : (11 + count) * 512] == data


def test_a_count_of_zero_is_the_largest(guest: IdeGuest, disk: MemoryDisk) -> None:
    guest.command(0x20, count=0)
    assert guest.data(256 * 512) == disk.data[: 256 * 512]
    assert guest.status() == READY


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_data_register_may_be_read_by_words_of_any_size(guest: IdeGuest, disk: MemoryDisk, size: int) -> None:
    guest.command(0x20, lba=3, count=1)
    data = b"".join(guest.pio.read(0x1F0, size).to_bytes(size, "little") for _ in range(512 // size))
    assert data == disk.data[3 * 512 : 4 * 512]


def test_a_string_instruction_may_read_on_across_blocks(guest: IdeGuest, disk: MemoryDisk) -> None:
    guest.command(0x20, lba=0, count=4)
    assert guest.data(1000) + guest.data(1048) == disk.data[:2048]


def test_data_that_is_not_there_reads_as_zeros_and_is_not_written(guest: IdeGuest, disk: MemoryDisk) -> None:
    before = bytes(disk.data)
    assert guest.data(8) == bytes(8)
    guest.give(b"x" * 600)
    guest.command(0x20, lba=0, count=1)
    assert guest.data(520) == before[:512] + bytes(8)
    assert disk.data == before


def test_cylinders_heads_and_sectors_address_the_same_sectors(guest: IdeGuest, disk: MemoryDisk) -> None:
    cylinders, heads, per_track = (identify(guest)[word] for word in (1, 3, 6))
    assert cylinders > 2 and heads > 2
    lba = (2 * heads + 1) * per_track + 4
    for register, value in ((2, 1), (3, 5), (4, 2), (5, 0), (6, 0xA1)):
        guest.put(register, value)
    guest.put(7, 0x20)
    assert guest.data(512) == disk.data[lba * 512 : (lba + 1) * 512]
    for register, value in ((2, 1), (3, 0), (6, 0xA1)):  # sectors count from 1
        guest.put(register, value)
    guest.put(7, 0x20)
    assert (guest.status(), guest.error()) == (READY | ERR, IDNF)


def test_another_translation_addresses_other_sectors(guest: IdeGuest, disk: MemoryDisk) -> None:
    guest.put(2, 32)
    guest.put(6, 0xA7)
    guest.put(7, 0x91)
    assert guest.status() == READY
    assert identify(guest)[54:57] == (SECTORS // 256, 8, 32)
    for register, value in ((2, 1), (3, 1), (4, 1), (5, 0), (6, 0xA0)):
        guest.put(register, value)
    guest.put(7, 0x20)
    assert guest.data(512) == disk.data[256 * 512 : 257 * 512]


@pytest.mark.parametrize("code", [0x20, 0x24, 0x30, 0xC8, 0x25, 0x40, 0x42])
@pytest.mark.parametrize(("lba", "count"), [(SECTORS, 1), (SECTORS - 1, 2), (0x0FFF_FFFF, 1)])
def test_sectors_beyond_the_end_are_not_found(guest: IdeGuest, code: int, lba: int, count: int) -> None:
    guest.command(code, lba, count, wide=code in (0x24, 0x25, 0x42))
    assert guest.line.level
    assert (guest.status(), guest.error()) == (READY | ERR, IDNF)
    assert not guest.line.level


@pytest.mark.parametrize("code", [0x00, 0x08, 0xA1, 0xA0, 0x5C, 0xF5, 0xFF, 0xC4, 0xC5, 0x29])
def test_unknown_and_packet_commands_and_multiples_without_a_block_size_are_aborted(guest: IdeGuest, code: int) -> None:
    guest.command(0xC6, count=0)
    guest.command(code, count=1)
    assert guest.line.level
    assert (guest.status(), guest.error()) == (READY | ERR, ABRT)


def test_a_bad_block_size_is_aborted(guest: IdeGuest) -> None:
    for count in (3, 129, 255):
        guest.command(0xC6, count=count)
        assert guest.error() == ABRT


def test_read_and_write_errors_of_the_host_are_the_disks(guest: IdeGuest, disk: MemoryDisk) -> None:
    disk.fail = OSError(errno.EIO, "broken")
    guest.command(0x20, lba=1, count=1)
    assert guest.line.level
    assert (guest.status(), guest.error()) == (READY | ERR, UNC)
    guest.command(0x30, lba=1, count=1)
    guest.give(bytes(512))
    assert (guest.status(), guest.error()) == (READY | ERR, ABRT)
    guest.command(0xE7)
    assert (guest.status(), guest.error()) == (READY | ERR, ABRT)
    guest.command(0x40, lba=1, count=1)
    assert (guest.status(), guest.error()) == (READY | ERR, UNC)
    disk.fail = None
    assert len(guest.read_sectors(1, 1)) == 512


def test_a_readonly_disk_takes_no_writes() -> None:
    disk = MemoryDisk(MIB, readonly=True)
    guest = IdeGuest({(0, 0): disk})
    for code in (0x30, 0x34, 0xCA, 0x35, 0x06):
        guest.command(code, lba=0, count=1, features=1)
        assert guest.error() == ABRT
    guest.command(0xE7)
    assert guest.status() == READY
    assert identify(guest)[169] == 0


def test_flushes_reach_the_disk(guest: IdeGuest, disk: MemoryDisk) -> None:
    for code in (0xE7, 0xEA, 0xE0):
        guest.command(code)
        assert guest.status() == READY
    assert disk.flushes == 3


def test_without_write_cache_every_write_is_flushed(guest: IdeGuest, disk: MemoryDisk) -> None:
    guest.command(0xEF, features=0x82)
    assert identify(guest)[85] & 0x20 == 0
    guest.write_sectors(0, bytes(512))
    assert disk.flushes == 1
    guest.command(0xEF, features=0x02)
    guest.write_sectors(0, bytes(512))
    assert disk.flushes == 1


def test_transfer_modes_are_set_and_shown(guest: IdeGuest) -> None:
    guest.command(0xEF, features=0x03, count=0x42)
    found = identify(guest)
    assert (found[63], found[88]) == (0x0007, 0x0407)
    guest.command(0xEF, features=0x03, count=0x21)
    found = identify(guest)
    assert (found[63], found[88]) == (0x0207, 0x0007)
    guest.command(0xEF, features=0x03, count=0x45)
    assert guest.error() == ABRT


def test_power_commands_keep_the_state_they_report(guest: IdeGuest) -> None:
    guest.command(0xE5)
    assert guest.get(2) == 0xFF
    guest.command(0xE2)
    guest.command(0xE5)
    assert guest.get(2) == 0x00
    guest.read_sectors(0, 1)
    guest.command(0xE5)
    assert guest.get(2) == 0xFF


def smart(guest: IdeGuest, feature: int, key: int = 0xC24F) -> int:
    guest.command(0xB0, lba=key << 8, features=feature)
    return guest.status()


def test_smart_says_that_all_is_well(guest: IdeGuest) -> None:
    assert smart(guest, 0xDA) == READY
    assert (guest.get(4), guest.get(5)) == (0x4F, 0xC2)
    assert smart(guest, 0xD0) == READY | DRQ
    assert sum(guest.data(512)) & 0xFF == 0
    assert smart(guest, 0xD9) == READY
    assert smart(guest, 0xDA) == READY | ERR
    assert smart(guest, 0xD8) == READY
    assert smart(guest, 0xDA, key=0x1234) == READY | ERR


def test_the_native_size_is_the_last_sector(guest: IdeGuest) -> None:
    guest.command(0xF8)
    assert guest.get(3) | guest.get(4) << 8 | guest.get(5) << 16 == SECTORS - 1
    guest.command(0x27, wide=True)
    guest.control(0x80)
    assert (guest.get(3), guest.get(5)) == (0, 0)


def test_the_high_order_byte_shows_what_was_written_before(guest: IdeGuest) -> None:
    guest.put(2, 0x12)
    guest.put(2, 0x34)
    assert guest.get(2) == 0x34
    guest.control(0x80)
    assert guest.get(2) == 0x12
    guest.put(3, 0)
    assert guest.get(2) == 0x34, "any write ends it"


def test_interrupts_come_once_and_end_with_the_status(guest: IdeGuest) -> None:
    guest.command(0xE5)
    assert guest.line.level
    guest.alternate()
    assert guest.line.level
    guest.status()
    assert not guest.line.level


def test_interrupts_can_be_held_back(guest: IdeGuest) -> None:
    guest.control(0x02)
    guest.command(0xE5)
    assert not guest.line.level
    guest.control(0x00)
    assert guest.line.level, "what waited comes once it may"


def test_the_channel_is_busy_until_the_disk_is_done(disk: MemoryDisk) -> None:
    guest = IdeGuest({(0, 0): disk}, lazy=True)
    assert guest.command(0x20, lba=1, count=1) & BSY
    assert guest.data(2) == b"\0\0"
    guest.put(2, 0x77)
    assert guest.get(2) == 1, "registers of a busy disk are its own"
    assert guest.command(0xEC) & BSY, "and it takes no commands"
    guest.work()
    assert guest.alternate() == READY | DRQ
    assert guest.data(512) == disk.data[512:1024]


def test_a_software_reset_ends_a_command_whose_disk_does_not_answer(disk: MemoryDisk) -> None:
    guest = IdeGuest({(0, 0): disk}, lazy=True)
    guest.command(0x20, lba=1, count=1)
    guest.control(0x04)
    assert guest.alternate() == BSY
    guest.control(0x00)
    assert guest.alternate() == READY
    assert tuple(map(guest.get, (1, 2, 3, 4, 5))) == (1, 1, 1, 0, 0)
    edges = guest.line.edges
    guest.command(0x20, lba=2, count=1)
    guest.work()
    assert guest.line.edges == edges + 1, "of the first command nothing is heard any more"
    assert guest.data(512) == disk.data[1024:1536]


def test_diagnostics_pass_and_leave_the_signature(guest: IdeGuest) -> None:
    guest.put(6, 0xF0)
    guest.put(7, 0x90)
    assert guest.line.level
    assert guest.status() == READY
    assert tuple(map(guest.get, (1, 2, 3, 4, 5, 6))) == (1, 1, 1, 0, 0, 0xA0)


def test_two_disks_of_a_channel_keep_apart() -> None:
    first, second = MemoryDisk(MIB, name="first"), MemoryDisk(MIB, name="second")
    guest = IdeGuest({(0, 0): first, (0, 1): second})
    assert identify(guest, 1)[93] == 0x6100
    guest.command(0x30, lba=4, count=1, unit=1)
    guest.give(b"2" * 512)
    guest.command(0x30, lba=4, count=1, unit=0)
    guest.give(b"1" * 512)
    assert (first.data[2048], second.data[2048]) == (ord("1"), ord("2"))


def test_where_no_disk_is_registers_are_zero(guest: IdeGuest) -> None:
    guest.put(6, 0xF0)
    guest.put(2, 0x55)
    assert (guest.get(2), guest.status()) == (0, 0)
    guest.put(7, 0xEC)
    assert guest.status() == 0
    guest.channel = 1
    guest.put(2, 0x55)
    assert (guest.get(2), guest.status()) == (0, 0)
    guest.control(0x04)
    guest.control(0x00)
    guest.put(7, 0x90)
    assert guest.status() == 0


def test_a_channel_that_is_not_decoded_is_nobodys(guest: IdeGuest) -> None:
    guest.pio.write(0xCF8, 4, 0x8000_3940)
    guest.pio.write(0xCFC, 2, 0)
    assert guest.status() == 0xFF
    guest.pio.write(0xCFC, 2, 0x8000)
    assert guest.status() == READY


def test_a_saved_transfer_goes_on_elsewhere(guest: IdeGuest, disk: MemoryDisk) -> None:
    guest.command(0xC6, count=8)
    guest.command(0xEF, features=0x82)
    guest.command(0xC4, lba=10, count=20)
    taken = guest.data(5000)
    guest.bus.pause()
    other = IdeGuest({(0, 0): disk})
    other.bus.restore(guest.bus.save())
    other.bus.resume()
    assert other.line.level == guest.line.level
    assert taken + other.data(20 * 512 - 5000) == disk.data[10 * 512 : 30 * 512]
    assert identify(other)[59] == 0x0108 and identify(other)[85] & 0x20 == 0


def test_a_pause_waits_for_what_the_disk_does(disk: MemoryDisk) -> None:
    guest = IdeGuest({(0, 0): disk}, lazy=True)
    guest.command(0x20, lba=1, count=1)
    guest.bus.pause()
    assert guest.workers[0].paused
    state = guest.bus.save()
    other = IdeGuest({(0, 0): disk})
    other.bus.restore(state)
    assert other.data(512) == disk.data[512:1024]


def _smaller(state: dict[str, Any]) -> None:
    state["channels"][0]["drives"][0]["size"] = 512


def _gone(state: dict[str, Any]) -> None:
    state["channels"][0]["drives"][0] = None


def _beyond(state: dict[str, Any]) -> None:
    state["channels"][0]["transfer"].update(offset=2 * MIB, left=512)


def _overrun(state: dict[str, Any]) -> None:
    state["channels"][0]["transfer"].update(end=1 << 20)


def _other_device(state: dict[str, Any]) -> None:
    state["channels"][0].update(active=1)


def _mode(state: dict[str, Any]) -> None:
    state["channels"][0]["drives"][0]["mode"] = "fast"


@pytest.mark.parametrize("damage", [_smaller, _gone, _beyond, _overrun, _other_device, _mode])
def test_saved_state_that_does_not_fit_is_refused(
    guest: IdeGuest, disk: MemoryDisk, damage: Callable[[dict[str, Any]], None]
) -> None:
    guest.command(0x20, lba=10, count=20)
    state = guest.ide.save()
    damage(state)
    with pytest.raises(ValueError):
        IdeGuest({(0, 0): disk}).ide.restore(state)


def test_a_reset_of_the_board_forgets_all(guest: IdeGuest) -> None:
    guest.command(0xC6, count=8)
    guest.command(0x20, lba=0, count=2)
    guest.bus.reset()
    assert not guest.line.level
    assert guest.status() == READY
    assert guest.data(2) == b"\0\0"
    assert identify(guest)[59] == 0x0110
