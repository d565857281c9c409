"""The fast path by itself: what C serves, what it leaves to Python, and that nothing is under way when it says so."""

from __future__ import annotations

import os
import resource
import struct
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import pytest

from devices.vmbus.packets import PACKET_INBAND
from pyvmm.core._hot import BlockTable, FastDisk, Ring, StorageQueue, SynIC
from pyvmm.core.memory import PAGE_SIZE, GuestMemory
from tests.fakes.ring import MASK, OUT, GuestRing
from tests.fakes.scsi import read10, write10
from tests.fakes.storvsc import (
    READ_TYPE,
    UNKNOWN_TYPE,
    WRITE_TYPE,
    scsi_packet,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pyvmm.core._hot import Packet

MIB = 1 << 20
PAGES = (100, 101, 40, 60, 61, 62, 63, 20)
PRESENT, PARTIAL = 6, 7


FLUSH = struct.pack(">BBIxHx", 0x35, 0, 0, 0)


class Rig:
    """A queue between a guest's rings and a file, with nobody who answers for Python."""

    def __init__(self, fd: int, size: int, ring_pages: int = 5, io_uring: bool = True, **how: object) -> None:
        self.memory = GuestMemory(1 << 20)
        self.to_host = GuestRing(self.memory, range(1, 1 + ring_pages))
        self.to_guest = GuestRing(self.memory, range(200, 200 + ring_pages))
        for ring in (self.to_host, self.to_guest):
            ring.init()
        self.rings = Ring(self.memory.hot, self.to_host.numbers), Ring(self.memory.hot, self.to_guest.numbers)
        self.rings[0].init_incoming()
        self.doorbell = os.eventfd(0, os.EFD_CLOEXEC)
        self.disk = FastDisk(fd, size, 512, True, **how)  # type: ignore[arg-type]
        self.queue = StorageQueue(self.memory.hot, *self.rings, self.doorbell, io_uring=io_uring)
        self.queue.set_disk(0, self.disk)

    def send(self, number: int, cdb: bytes, size: int, direction: int, page: int = 100) -> None:
        pages = range(page, page + (size + PAGE_SIZE - 1) // PAGE_SIZE)
        fits, _ = self.to_host.write(scsi_packet(number, cdb, size, direction, pages))
        assert fits

    def answers(self) -> list[int]:
        """Transaction ids of what was completed, all without an error."""
        packets, _ = self.to_guest.read()
        for _, _, _, _, payload in packets:
            assert payload[:12] == struct.pack("<III", 1, 0, 0) and payload[14] == 1
        return [packet[2] for packet in packets]

    def run(self) -> tuple[int, list[Packet], list[Packet]]:
        """Serve until the queue has nothing to do or needs Python; what it leaves to that."""
        while True:
            idle, left, packets, unsent, _ = self.queue.serve()
            if idle or left or packets or unsent:
                return left, packets, unsent


@contextmanager
def file_of(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("disk")
    try:
        os.write(fd, content)
        yield fd
    finally:
        os.close(fd)


@pytest.fixture(name="fd")
def make_file() -> Iterator[int]:
    with file_of(b"".join(bytes((number,)) * 512 for number in range(64))) as fd:
        yield fd


@pytest.fixture(params=[True, False], ids=["io_uring", "no io_uring"])
def io_uring(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def settle(rig: Rig) -> None:
    """Return once the kernel is done with what it has, and its end was served."""
    rig.queue.drain()
    assert rig.run() == (0, [], [])


def left_to_python(rig: Rig) -> list[int]:
    """Transaction ids of what C took and gave up, once nothing is under way."""
    at_once = rig.run()[1]
    rig.queue.drain()
    return [packet[2] for packet in at_once + rig.run()[1]]


# What C serves ------------------------------------------------------------------------------------------


def test_this_host_has_io_uring_for_the_tests(fd: int) -> None:
    # Otherwise half of the tests here would test the other half again.
    assert Rig(fd, 64 * 512).queue.io_uring
    assert not Rig(fd, 64 * 512, io_uring=False).queue.io_uring


def test_reads_and_writes_need_no_python(fd: int, io_uring: bool) -> None:
    rig = Rig(fd, 64 * 512, io_uring=io_uring)
    rig.send(1, read10(3, 2), 1024, READ_TYPE)
    rig.memory.write(110 * PAGE_SIZE, b"w" * 512)
    rig.send(2, write10(9, 1), 512, WRITE_TYPE, 110)
    rig.run()
    settle(rig)
    assert sorted(rig.answers()) == [1, 2]
    assert rig.memory.read(100 * PAGE_SIZE, 1024) == b"\3" * 512 + b"\4" * 512
    assert os.pread(fd, 512, 9 * 512) == b"w" * 512
    reads, writes, flushes = rig.queue.take_counters(0)
    assert (reads[:2], writes[:2], flushes[:2]) == ((1, 1024), (1, 512), (0, 0))
    assert sum(reads[2]) == sum(writes[2]) == 1
    assert rig.queue.take_counters(0)[0][:2] == (0, 0)
    assert rig.queue.inspect() == {"packets_in": 2, "packets_out": 2, "signals": 0}


def test_flushes_and_durable_writes_go_through_io_uring_or_to_python(fd: int, io_uring: bool) -> None:
    rig = Rig(fd, 64 * 512, io_uring=io_uring)
    rig.to_host.write(scsi_packet(1, FLUSH, 0, UNKNOWN_TYPE, ()))
    rig.memory.write(100 * PAGE_SIZE, b"f" * 512)
    rig.send(2, write10(5, 1, flags=8), 512, WRITE_TYPE)
    if not io_uring:
        assert rig.run() == (1, [], [])
        assert rig.rings[0].read(1)[0][0][2] == 1
        assert rig.run() == (1, [], [])
        return
    rig.run()
    settle(rig)
    assert sorted(rig.answers()) == [1, 2]
    assert os.pread(fd, 512, 5 * 512) == b"f" * 512
    assert rig.queue.take_counters(0)[2][:2] == (1, 0)


@pytest.mark.parametrize("cdb", [FLUSH, write10(5, 1, flags=8)], ids=["flush", "durable write"])
def test_no_flush_succeeds_after_one_that_failed(fd: int, cdb: bytes) -> None:
    """The kernel tells of lost data once; here a pipe stands for the file that lost it, since it cannot be flushed."""
    rig = Rig(fd, 64 * 512)
    pipe = os.pipe()
    saved = os.dup(fd)
    os.dup2(pipe[0], fd)
    rig.send(1, cdb, 0 if cdb is FLUSH else 512, UNKNOWN_TYPE if cdb is FLUSH else WRITE_TYPE)
    assert left_to_python(rig) == [1] and rig.disk.flush_failed
    os.dup2(saved, fd)
    rig.send(2, FLUSH, 0, UNKNOWN_TYPE)
    assert left_to_python(rig) == [2] and rig.answers() == []
    for number in (*pipe, saved):
        os.close(number)


def test_a_disk_that_must_not_be_written_has_python_say_so(fd: int) -> None:
    rig = Rig(fd, 64 * 512)
    rig.disk.writable = False
    rig.send(1, write10(5, 1), 512, WRITE_TYPE)
    assert rig.run() == (1, [], [])
    rig.disk.writable = True
    rig.run()
    settle(rig)
    assert rig.answers() == [1]


def test_the_size_may_change(fd: int) -> None:
    rig = Rig(fd, 64 * 512)
    rig.disk.size = 10 * 512
    rig.send(1, read10(9, 2), 1024, READ_TYPE)
    assert rig.run() == (1, [], [])
    rig.disk.size = 11 * 512
    rig.run()
    settle(rig)
    assert rig.answers() == [1]


def test_a_closed_disk_is_pythons(fd: int) -> None:
    rig = Rig(fd, 64 * 512)
    rig.disk.close()
    rig.send(1, read10(3, 1), 512, READ_TYPE)
    assert rig.run() == (1, [], [])


def test_path_and_target_count_unless_there_is_one_target_only(fd: int) -> None:
    rig = Rig(fd, 64 * 512)
    packet = scsi_packet(1, read10(3, 1), 512, READ_TYPE, [100], target=1, path=2)
    rig.to_host.write(packet)
    assert rig.run() == (1, [], [])
    rig.queue.any_target = True
    rig.run()
    settle(rig)
    assert rig.answers() == [1]


def test_what_is_behind_a_packet_for_python_waits_for_it(fd: int) -> None:
    rig = Rig(fd, 64 * 512)
    rig.send(1, bytes(6), 0, UNKNOWN_TYPE)
    rig.send(2, read10(3, 1), 512, READ_TYPE)
    assert rig.run() == (1, [], [])
    assert [packet[2] for packet in rig.rings[0].read(1)[0]] == [1]
    rig.run()
    settle(rig)
    assert rig.answers() == [2]


# By a table ---------------------------------------------------------------------------------------------

# Blocks of 1 MiB, two to a chunk: present, zero, (bitmap), partial, present.


def table_rig(io_uring: bool = True, zero_when_absent: bool = True) -> tuple[Rig, BlockTable, int]:
    fd = os.memfd_create("image")
    os.ftruncate(fd, 8 * MIB)
    table = BlockTable(6)
    for index, entry in enumerate([5 << 20 | PRESENT, 2, 0, 4 << 20 | PARTIAL, 3 << 20 | PRESENT, 0]):
        table.set(index, entry)
    rig = Rig(
        fd,
        4 * MIB,
        io_uring=io_uring,
        table=table,
        block_size=MIB,
        chunk_ratio=2,
        zero_when_absent=zero_when_absent,
    )
    return rig, table, fd


def test_present_blocks_are_where_the_table_says(io_uring: bool) -> None:
    rig, _, fd = table_rig(io_uring)
    os.pwrite(fd, b"first" * 100, 5 * MIB + 512)
    rig.send(1, read10(1, 1), 512, READ_TYPE)
    rig.memory.write(110 * PAGE_SIZE, b"z" * 512)
    rig.send(2, write10(3 * 2048 + 7, 1), 512, WRITE_TYPE, 110)
    rig.run()
    settle(rig)
    assert sorted(rig.answers()) == [1, 2]
    assert rig.memory.read(100 * PAGE_SIZE, 500) == b"first" * 100
    assert os.pread(fd, 512, 3 * MIB + 7 * 512) == b"z" * 512
    os.close(fd)


def test_a_transfer_over_two_blocks_is_cut(io_uring: bool) -> None:
    rig, table, fd = table_rig(io_uring)
    os.pwrite(fd, b"a" * 1024, 6 * MIB - 1024)
    rig.memory.write(100 * PAGE_SIZE, b"\xff" * 4096)
    rig.send(1, read10(2046, 4), 2048, READ_TYPE)  # the second block reads as zeros
    rig.run()
    settle(rig)
    assert rig.answers() == [1]
    assert rig.memory.read(100 * PAGE_SIZE, 2049) == b"a" * 1024 + bytes(1024) + b"\xff"
    table.set(1, 7 << 20 | PRESENT)
    rig.memory.write(100 * PAGE_SIZE, b"b" * 1024 + b"c" * 1024)
    rig.send(2, write10(2046, 4), 2048, WRITE_TYPE)
    rig.run()
    settle(rig)
    assert os.pread(fd, 1024, 6 * MIB - 1024) + os.pread(fd, 1024, 7 * MIB) == b"b" * 1024 + b"c" * 1024
    os.close(fd)


@pytest.mark.parametrize(
    ("cdb", "direction"),
    [
        (write10(2048, 1), WRITE_TYPE),  # absent: to be allocated first
        (write10(2047, 2), WRITE_TYPE),
        (read10(4096, 1), READ_TYPE),  # partial: some of it may be the parent's
        (read10(4095, 2), READ_TYPE),
        (write10(0, 1, flags=8), WRITE_TYPE),  # the table itself has to be durable too
        (FLUSH, UNKNOWN_TYPE),
    ],
)
def test_what_needs_the_format_is_pythons(cdb: bytes, direction: int) -> None:
    rig, _, fd = table_rig()
    rig.send(1, cdb, 0 if cdb is FLUSH else 1024, direction)
    assert rig.run() == (1, [], [])
    os.close(fd)


def test_absent_blocks_of_a_disk_with_a_parent_are_pythons() -> None:
    rig, _, fd = table_rig(zero_when_absent=False)
    rig.send(1, read10(2048, 1), 512, READ_TYPE)
    assert rig.run() == (1, [], [])
    os.close(fd)


def test_a_table_shorter_than_the_disk_is_harmless() -> None:
    rig, _, fd = table_rig()
    rig.disk.size = 1 << 40
    rig.send(1, read10(2048 * 5, 1), 512, READ_TYPE)
    assert rig.run() == (1, [], [])
    os.close(fd)


def test_values_that_make_no_disk_are_refused() -> None:
    for fd, size, sector_size in ((-1, 512, 512), (0, 2**63, 512), (0, 512, 0), (0, 512, 8192)):
        with pytest.raises(ValueError, match="a disk has"):
            FastDisk(fd, size, sector_size, True)
    with pytest.raises(ValueError, match="a disk has"):
        FastDisk(0, 512, 512, True, table=BlockTable(1), block_size=MIB)
    with pytest.raises(TypeError):
        FastDisk(0, 512, 512, True, table=cast("BlockTable", 7))


# Trouble at the host ------------------------------------------------------------------------------------


def test_a_file_that_ends_too_soon_is_pythons(fd: int, io_uring: bool) -> None:
    rig = Rig(fd, 64 * 512, io_uring=io_uring)
    os.ftruncate(fd, 3 * 512)
    rig.send(1, read10(2, 2), 1024, READ_TYPE)
    packets: list[Packet] = []
    while not packets:  # io_uring may need a while
        left, packets, unsent = rig.run()
        assert (left, unsent, rig.answers()) == (0, [], [])
        rig.queue.drain()
    assert packets == [scsi_packet(1, read10(2, 2), 1024, READ_TYPE, [100])]


def test_a_write_that_the_host_refuses_is_pythons(tmp_path: Path, io_uring: bool) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_RDWR)
    rig = Rig(fd, 1 << 20, io_uring=io_uring)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        rig.send(1, write10(8, 16), 8192, WRITE_TYPE)  # half of it is beyond the limit
        rig.send(2, write10(64, 1), 512, WRITE_TYPE)
        found: list[Packet] = []
        while len(found) < 2:
            found += rig.run()[1]
            rig.queue.drain()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(packet[2] for packet in found) == [1, 2]
    assert rig.answers() == []
    os.close(fd)


# Under way ----------------------------------------------------------------------------------------------


class PipeRig(Rig):
    """A queue whose reads wait for as long as the test wants: the disk is a pipe."""

    def __init__(self) -> None:
        self.source, self.sink = os.pipe()
        self.table = BlockTable(1)
        self.table.set(0, PRESENT)
        super().__init__(self.source, 1 << 20, table=self.table, block_size=MIB, chunk_ratio=1)

    def start(self, number: int = 1) -> None:
        self.send(number, read10(0, 8), 4096, READ_TYPE, 100 + number)
        assert self.run() == (0, [], [])
        assert self.answers() == []

    def let_go(self) -> None:
        os.write(self.sink, b"p" * 4096)

    def close(self) -> None:
        os.close(self.sink)
        os.close(self.source)


@pytest.fixture(name="pipe")
def make_pipe() -> Iterator[PipeRig]:
    rig = PipeRig()
    yield rig
    rig.close()


def test_the_doorbell_tells_of_a_completion(pipe: PipeRig) -> None:
    pipe.start()
    pipe.let_go()
    assert os.eventfd_read(pipe.doorbell) >= 1
    assert pipe.run() == (0, [], [])
    assert pipe.answers() == [1]
    assert pipe.memory.read(101 * PAGE_SIZE, 4096) == b"p" * 4096


def test_reads_overtake_one_that_waits(pipe: PipeRig, fd: int) -> None:
    pipe.queue.set_disk(1, FastDisk(fd, 64 * 512, 512, True))
    pipe.start()
    fits, _ = pipe.to_host.write(scsi_packet(2, read10(3, 1), 512, READ_TYPE, [50], lun=1))
    assert fits
    answers: list[int] = []
    while not answers:  # the other one may have gone to another thread of the kernel
        pipe.run()
        answers = pipe.answers()
    assert answers == [2]
    pipe.let_go()


def test_a_control_packet_waits_for_what_is_under_way(pipe: PipeRig) -> None:
    pipe.start()
    pipe.to_host.write((PACKET_INBAND, 1, 2, b"", struct.pack("<III", 6, 1, 0) + bytes(0x34)))
    assert pipe.run() == (0, [], [])
    pipe.let_go()
    os.eventfd_read(pipe.doorbell)
    assert pipe.run() == (1, [], [])
    assert pipe.answers() == [1]


@pytest.mark.parametrize("how", ["drain", "quiesce", "set_disk", "close", "table"])
def test_waiting_ends_with_what_is_under_way_and_not_before(pipe: PipeRig, how: str) -> None:
    wait = {
        "drain": pipe.queue.drain,
        "quiesce": pipe.queue.quiesce,
        "set_disk": lambda: pipe.queue.set_disk(0, None),
        "close": pipe.disk.close,
        "table": pipe.table.drain,
    }[how]
    pipe.start()
    waiting, ended = threading.Event(), threading.Event()

    def work() -> None:
        waiting.set()
        wait()
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    waiting.wait()
    assert not ended.wait(0.05)
    pipe.let_go()
    thread.join(30)
    assert ended.is_set()
    assert pipe.memory.read(101 * PAGE_SIZE, 4096) == b"p" * 4096


def test_nobody_waits_for_another_disk(pipe: PipeRig, fd: int) -> None:
    other = FastDisk(fd, 64 * 512, 512, True)
    pipe.queue.set_disk(1, other)
    pipe.start()
    pipe.queue.set_disk(2, other)
    BlockTable(1).drain()
    other.close()
    pipe.queue.set_disk(1, None)
    assert pipe.run() == (0, [], []) and pipe.answers() == []
    pipe.let_go()


def test_quiesce_returns_what_was_not_sent(pipe: PipeRig) -> None:
    pipe.start()
    pipe.let_go()
    packets, unsent = pipe.queue.quiesce()
    assert (packets, [packet[2] for packet in unsent]) == ([], [1])
    assert pipe.run() == (0, [], []) and pipe.answers() == []


def test_an_error_found_while_others_wait_is_kept_for_the_worker(pipe: PipeRig) -> None:
    pipe.start()
    os.write(pipe.sink, b"short")
    pipe.queue.drain()
    assert os.eventfd_read(pipe.doorbell) >= 1
    left, packets, unsent = pipe.run()
    assert (left, [packet[2] for packet in packets], unsent) == (0, [1], [])


def test_a_queue_forgotten_with_something_under_way_waits_for_it() -> None:
    pipe = PipeRig()
    pipe.start()
    memory = pipe.memory
    timer = threading.Timer(0.05, pipe.let_go)
    timer.start()
    del pipe.queue
    assert memory.read(101 * PAGE_SIZE, 4096) == b"p" * 4096
    timer.join()
    pipe.close()


def test_more_than_the_queue_holds_stays_in_the_ring() -> None:
    pipe = PipeRig()
    # A ring for more than the 256 requests that may be under way.
    pages = GuestMemory(1 << 20)
    pipe.to_host = GuestRing(pages, range(100))
    pipe.to_host.init()
    pipe.queue = StorageQueue(pipe.memory.hot, Ring(pages.hot, range(100)), pipe.rings[1], pipe.doorbell)
    pipe.queue.set_disk(0, pipe.disk)
    for number in range(300):
        pipe.send(number, read10(0, 1), 512, READ_TYPE)
    assert pipe.run() == (0, [], [])
    assert pipe.queue.inspect()["packets_in"] == 256
    done: list[int] = []
    while len(done) < 300:
        os.write(pipe.sink, b"q" * 512)
        os.eventfd_read(pipe.doorbell)
        pipe.run()
        done += pipe.answers()
    assert sorted(done) == list(range(300))
    pipe.close()


# Rings --------------------------------------------------------------------------------------------------


def test_a_full_ring_gives_completions_back(fd: int) -> None:
    rig = Rig(fd, 64 * 512, ring_pages=2, io_uring=False)
    per_ring = (PAGE_SIZE - 8) // 88
    sent = 0
    for _ in range(4):
        while rig.to_host.write(scsi_packet(sent, read10(1, 1), 512, READ_TYPE, [100]))[0]:
            sent += 1
        left, packets, unsent = rig.run()
        if unsent:
            break
    assert (left, packets) == (0, [])
    done = rig.answers()
    assert len(done) == per_ring
    assert [packet[2] for packet in unsent] == list(range(per_ring, per_ring + len(unsent)))
    assert unsent[0][4][:16] == struct.pack("<IIIHBB", 1, 0, 0, 0x34, 1, 0)


def test_the_guest_need_not_signal_while_it_is_served_and_must_when_it_is_not(fd: int) -> None:
    rig = Rig(fd, 64 * 512, io_uring=False)
    rig.send(1, read10(1, 1), 512, READ_TYPE)
    rig.send(2, bytes(6), 0, UNKNOWN_TYPE)
    assert rig.run() == (1, [], [])
    assert rig.to_host.word(MASK) == 1
    rig.rings[0].read(1)
    assert rig.run() == (0, [], [])
    assert rig.to_host.word(MASK) == 0


def test_completions_of_a_batch_ask_for_one_signal(fd: int) -> None:
    rig = Rig(fd, 64 * 512, io_uring=False)
    for number in range(10):
        rig.send(number, read10(1, 1), 512, READ_TYPE)
    *_, signal = rig.queue.serve()
    assert signal
    assert rig.answers() == list(range(10))
    *_, signal = rig.queue.serve()
    assert not signal


def test_a_target_is_signalled_without_python(fd: int) -> None:
    rig = Rig(fd, 64 * 512, io_uring=False)
    synic = SynIC(rig.memory.hot, -1, 0, 0)
    for msr, value in ((0x40000080, 1), (0x40000082, 70 * PAGE_SIZE | 1), (0x40000092, 0x31)):
        assert synic.write_msr(msr, value, 0)
    rig.queue.set_target(synic, 2, 9)
    rig.send(1, read10(1, 1), 512, READ_TYPE)
    *_, signal = rig.queue.serve()
    assert not signal
    assert rig.memory.read(70 * PAGE_SIZE + 2 * 256 + 1, 1) == b"\x02"
    assert synic.take_interrupts() == [0x31]
    assert rig.queue.inspect()["signals"] == 1
    for bad in ((synic, 16, 0), (synic, 2, 2048)):
        with pytest.raises(ValueError, match="no event flag"):
            rig.queue.set_target(*bad)


@pytest.mark.parametrize("index", [4, 1 << 20, 0xFFFFFFF8])
def test_an_index_that_is_none_is_pythons_to_name(fd: int, index: int) -> None:
    rig = Rig(fd, 64 * 512, io_uring=False)
    rig.to_host.set_word(0, index)
    assert rig.run()[0] == 1


def test_a_read_index_that_is_none_gives_completions_back(fd: int) -> None:
    rig = Rig(fd, 64 * 512, io_uring=False)
    rig.send(1, read10(1, 1), 512, READ_TYPE)
    rig.to_guest.set_word(OUT, 12)
    left, packets, unsent = rig.run()
    assert (left, packets, len(unsent)) == (0, [], 1)
