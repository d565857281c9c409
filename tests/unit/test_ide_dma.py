"""IDE by bus master: data, hostile tables, stops and resets in the middle, any sequence of port accesses."""

from __future__ import annotations

import errno
import os
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.legacy.ide.ata import COUNTERS
from devices.storage.cdb import Op
from tests.fakes.disks import MemoryDisk, disc
from tests.fakes.ide import BSY, DRQ, ERR, MIB, READY, TABLE, IdeGuest

ACTIVE, ERROR, INTERRUPT = 1, 2, 4
UNC, IDNF, ABRT = 0x40, 0x10, 0x04
READ, WRITE = 0x25, 0x35
BUFFER = 0x10000


@pytest.fixture
def disk() -> MemoryDisk:
    disk = MemoryDisk(4 * MIB)
    disk.data[:] = os.urandom(4 * MIB)
    return disk


@pytest.fixture
def guest(disk: MemoryDisk) -> IdeGuest:
    return IdeGuest({(0, 0): disk})


def test_sectors_go_to_the_regions_of_the_table(guest: IdeGuest, disk: MemoryDisk) -> None:
    status = guest.dma(READ, 7, 8, (BUFFER, 512), (BUFFER + 0x2000, 1024), (BUFFER + 0x1000, 2560))
    assert status == INTERRUPT
    assert guest.line.level
    assert guest.status() == READY
    expected = disk.data[7 * 512 : 15 * 512]
    assert guest.memory.read(BUFFER, 512) == expected[:512]
    assert guest.memory.read(BUFFER + 0x2000, 1024) == expected[512:1536]
    assert guest.memory.read(BUFFER + 0x1000, 2560) == expected[1536:]


@pytest.mark.parametrize(("code", "wide"), [(0x35, True), (0xCA, False), (0x3D, True)])
def test_sectors_come_from_the_regions_of_the_table(guest: IdeGuest, disk: MemoryDisk, code: int, wide: bool) -> None:
    data = os.urandom(4096)
    guest.memory.write(BUFFER, data)
    assert guest.dma(code, 100, 8, (BUFFER + 2048, 2048), (BUFFER, 2048), wide=wide) == INTERRUPT
    assert disk.data[51200:55296] == data[2048:] + data[:2048]
    assert disk.flushes == (code == 0x3D)


def test_a_length_of_zero_is_64_kib_and_transfers_have_several_steps(guest: IdeGuest, disk: MemoryDisk) -> None:
    regions = [(0x20000, 0)] * 48
    assert guest.dma(READ, 0, 48 * 128, *regions) == INTERRUPT
    assert guest.memory.read(0x20000, 1 << 16) == disk.data[47 << 16 : 48 << 16]


def test_the_bus_master_may_be_started_first(guest: IdeGuest, disk: MemoryDisk) -> None:
    guest.table((BUFFER, 512))
    guest.start()
    guest.command(READ, 3, 1, wide=True)
    assert guest.stop() == INTERRUPT
    assert guest.memory.read(BUFFER, 512) == disk.data[1536:2048]


def test_a_transfer_waits_for_a_start_of_its_own(guest: IdeGuest, disk: MemoryDisk) -> None:
    guest.table((BUFFER, 512))
    guest.command(READ, 3, 1, wide=True)
    guest.start()
    assert guest.status() == READY
    guest.command(READ, 4, 1, wide=True)  # the start bit of the first one is still set
    assert guest.alternate() == READY | DRQ
    guest.stop()
    guest.start()
    assert guest.memory.read(BUFFER, 512) == disk.data[2048:2560]


def test_a_table_with_room_left_leaves_the_bus_master_active(guest: IdeGuest) -> None:
    assert guest.dma(READ, 0, 1, (BUFFER, 1024)) == INTERRUPT | ACTIVE
    assert guest.status() == READY


def test_a_table_that_is_too_short_moves_nothing_and_tells_by_silence(guest: IdeGuest) -> None:
    guest.memory.write(BUFFER, b"x" * 512)
    assert guest.dma(READ, 0, 2, (BUFFER, 512)) == 0
    assert not guest.line.level
    assert guest.status() == READY
    assert guest.memory.read(BUFFER, 512) == b"x" * 512


@pytest.mark.parametrize("region", [(MIB, 512), (MIB - 256, 512), (0xFFFF_FFFE, 512), (0xFEE0_0000, 512)])
@pytest.mark.parametrize("code", [READ, WRITE])
def test_regions_outside_ram_are_a_dma_error(
    guest: IdeGuest, disk: MemoryDisk, code: int, region: tuple[int, int]
) -> None:
    before = bytes(disk.data)
    assert guest.dma(code, 0, 2, (BUFFER, 512), region) == INTERRUPT | ERROR
    assert (guest.status(), guest.error()) == (READY | ERR, ABRT)
    assert disk.data == before


@pytest.mark.parametrize("table", [MIB, MIB - 4, 0xFFFF_FFFC])
def test_a_table_outside_ram_is_a_dma_error(guest: IdeGuest, table: int) -> None:
    guest.pio.write(guest.master + 4, 4, table)
    guest.command(READ, 0, 1, wide=True)
    guest.start()
    assert guest.stop() == INTERRUPT | ERROR


def test_a_table_without_an_end_is_not_followed_for_ever(guest: IdeGuest) -> None:
    for page in range(0x20000, 0x30000, 0x1000):
        guest.memory.write(page, struct.pack("<II", 0x1000, 2) * 512)
    guest.pio.write(guest.master + 4, 4, 0x20000)
    guest.command(READ, 0, 64, wide=True)
    guest.start()
    assert guest.stop() == 0, "16 KiB of the 32 fit into a table of 64 KiB"


def test_a_transfer_in_the_wrong_direction_is_a_dma_error(guest: IdeGuest, disk: MemoryDisk) -> None:
    before = bytes(disk.data)
    guest.table((BUFFER, 512))
    guest.command(WRITE, 0, 1, wide=True)
    guest.start(to_memory=True)
    assert guest.stop() == INTERRUPT | ERROR
    assert disk.data == before


def test_errors_of_the_host_end_the_transfer(guest: IdeGuest, disk: MemoryDisk) -> None:
    disk.fail = OSError(errno.EIO, "broken")
    assert guest.dma(READ, 0, 1, (BUFFER, 512)) == INTERRUPT
    assert (guest.status(), guest.error()) == (READY | ERR, UNC)
    assert guest.dma(WRITE, 0, 1, (BUFFER, 512)) == INTERRUPT
    assert (guest.status(), guest.error()) == (READY | ERR, ABRT)


@pytest.mark.parametrize("way", ["stop", "reset", "board"])
def test_a_transfer_that_was_given_up_does_not_touch_memory_any_more(disk: MemoryDisk, way: str) -> None:
    guest = IdeGuest({(0, 0): disk}, lazy=True)
    guest.memory.write(BUFFER, b"mine" * 128)
    guest.table((BUFFER, 512))
    guest.command(READ, 0, 1, wide=True)
    disk.gate.clear()
    guest.start()
    thread = threading.Thread(target=guest.work)
    thread.start()
    assert disk.reached.wait(10)
    assert guest.alternate() & BSY
    if way == "stop":
        assert guest.stop() == ACTIVE
    elif way == "reset":
        guest.control(0x04)
        guest.control(0x00)
    else:
        guest.bus.reset()
    assert not guest.alternate() & BSY
    disk.gate.set()
    thread.join()
    assert guest.memory.read(BUFFER, 512) == b"mine" * 128
    guest.lazy = False
    guest.stop()
    assert guest.dma(READ, 0, 1, (BUFFER, 512)) == INTERRUPT
    assert guest.memory.read(BUFFER, 512) == disk.data[:512]


def test_a_waiting_transfer_is_saved_with_its_bus_master(guest: IdeGuest, disk: MemoryDisk) -> None:
    guest.table((BUFFER, 512))
    assert guest.command(READ, 9, 1, wide=True) == READY | DRQ
    other = IdeGuest({(0, 0): disk})
    other.memory.write(TABLE, guest.memory.read(TABLE, 8))
    other.bus.restore(guest.bus.save())
    other.start()
    assert other.stop() == INTERRUPT
    assert other.memory.read(BUFFER, 512) == disk.data[9 * 512 : 10 * 512]


def trim(guest: IdeGuest, *ranges: tuple[int, int], blocks: int = 1, features: int = 1) -> int:
    data = b"".join(struct.pack("<Q", lba | count << 48) for lba, count in ranges)
    guest.memory.write(BUFFER, data.ljust(512 * blocks, b"\0"))
    return guest.dma(0x06, 0, blocks, (BUFFER, 512 * blocks), features=features)


def test_trimmed_sectors_are_given_back(guest: IdeGuest, disk: MemoryDisk) -> None:
    before = bytes(disk.data)
    assert trim(guest, (8, 8), (100, 1)) == INTERRUPT
    assert guest.status() == READY
    assert not any(disk.data[4096:8192]) and not any(disk.data[51200:51712])
    assert disk.data[8192:51200] == before[8192:51200]


def test_trims_beyond_the_end_or_of_another_kind_are_refused(guest: IdeGuest, disk: MemoryDisk) -> None:
    before = bytes(disk.data)
    trim(guest, (0, 1), (4 * MIB // 512, 1))
    assert (guest.status(), guest.error()) == (READY | ERR, IDNF)
    trim(guest, (0, 1), features=2)
    assert guest.error() == ABRT
    trim(guest, (0, 1), blocks=9)
    assert guest.error() == ABRT
    assert disk.data == before


def test_what_was_done_is_counted(guest: IdeGuest, disk: MemoryDisk) -> None:
    guest.dma(READ, 0, 8, (BUFFER, 4096))
    guest.dma(WRITE, 0, 2, (BUFFER, 1024))
    guest.read_sectors(0, 3)
    guest.command(0xE7)
    trim(guest, (0, 1))
    disk.fail = OSError(errno.EIO, "broken")
    guest.dma(READ, 0, 8, (BUFFER, 4096))
    found = guest.ide.inspect()["channels"][0]["drives"][0]
    counted = {name: found[name] for name in COUNTERS}
    assert counted == {
        "reads": 2,
        "writes": 1,
        "bytes_read": 4096 + 1536,
        "bytes_written": 1024,
        "flushes": 1,
        "trims": 1,
        "errors": 1,
    }


def test_bus_master_registers_are_there_by_bytes_and_double_words(guest: IdeGuest) -> None:
    guest.pio.write(guest.master + 4, 4, 0x1234_5677)
    assert guest.pio.read(guest.master + 4, 4) == 0x1234_5674
    assert guest.pio.read(guest.master + 6, 2) == 0x1234
    assert guest.pio.read(guest.master + 2, 1) == 0x60
    guest.pio.write(guest.master, 1, 0xFF)
    assert guest.pio.read(guest.master, 1) == 0x09


PORTS = [*range(0x1F0, 0x1F8), 0x3F6, *range(0xFFA0, 0xFFA8), *range(0x170, 0x178), 0x376, *range(0xFFA8, 0xFFB0)]
COMMANDS = [0x20, 0x24, 0x30, 0x34, 0xC4, 0xC5, 0xC6, 0x25, 0x35, 0x06, 0xE7, 0xEC, 0xA0, 0xA1, 0x08, 0x90, 0xB0, 0xEF]
ACCESS = st.one_of(
    st.tuples(st.just("w"), st.sampled_from(PORTS), st.sampled_from([1, 2, 4]), st.integers(0, (1 << 32) - 1)),
    st.tuples(st.just("w"), st.sampled_from([0x1F7, 0x177]), st.just(1), st.sampled_from(COMMANDS)),
    st.tuples(st.just("w"), st.sampled_from([0xFFA4, 0xFFAC]), st.just(4), st.sampled_from([TABLE, MIB - 8])),
    st.tuples(st.just("w"), st.sampled_from([0xFFA0, 0xFFA8]), st.just(1), st.sampled_from([0, 1, 9])),
    st.tuples(st.just("r"), st.sampled_from(PORTS), st.sampled_from([1, 2, 4]), st.just(0)),
    st.tuples(st.just("i"), st.sampled_from([0x1F0, 0x170, 0x1F7]), st.sampled_from([1, 2, 4]), st.integers(1, 600)),
    st.tuples(st.just("o"), st.sampled_from([0x1F0, 0x170, 0x1F2]), st.sampled_from([1, 2, 4]), st.integers(1, 600)),
    st.tuples(st.just("packet"), st.sampled_from(sorted(Op)), st.integers(0, 60), st.integers(0, 1)),
    st.tuples(st.just("work"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("save"), st.just(0), st.just(0), st.just(0)),
)


def drives() -> dict[tuple[int, int], MemoryDisk]:
    return {(0, 0): MemoryDisk(MIB, name="a"), (0, 1): MemoryDisk(64 << 10, name="b"), (1, 0): disc(40)}


@settings(max_examples=int(os.environ.get("PYVMM_EXAMPLES", "150")), deadline=None)
@given(st.lists(ACCESS, max_size=60), st.binary(max_size=64))
def test_any_accesses_leave_a_controller_that_a_reset_brings_back(
    accesses: list[tuple[str, int, int, int]], table: bytes
) -> None:
    guest = IdeGuest(drives(), lazy=True)
    guest.memory.write(TABLE, table)
    for kind, port, size, value in accesses:
        if kind == "w":
            guest.pio.write(port, size, value & (1 << 8 * size) - 1)
        elif kind == "r":
            guest.pio.read(port, size)
        elif kind == "i":
            assert len(guest.pio.read_string(port, size, value)) == size * value
        elif kind == "o":
            guest.pio.write_string(port, size, b"\x5a" * (size * value))
        elif kind == "packet":
            guest.pio.write(0x176, 1, 0xA0)
            guest.pio.write(0x171, 1, value)
            guest.pio.write(0x177, 1, 0xA0)
            guest.pio.write_string(0x170, 2, bytes((port, 0, 0, 0, 0, size, 0, 0, 2, 0, 0, 0)))
        elif kind == "work":
            guest.work()
        else:
            guest.bus.pause()
            other = IdeGuest(drives(), lazy=True)
            other.memory.write(TABLE, guest.memory.read(TABLE, 512))
            other.bus.restore(guest.bus.save())
            assert other.bus.save() == guest.bus.save()
            guest = other
    guest.work()
    for channel in (0, 1):
        guest.channel = channel
        guest.control(0x04)
        guest.control(0x00)
        guest.pio.write(guest.master, 1, 0)
    guest.channel, guest.lazy = 0, False
    assert guest.alternate() == READY
    guest.dma(READ, 0, 1, (BUFFER, 512))
    assert guest.status() == READY
