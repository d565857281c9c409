"""Commands that overtake each other, wait for their turn, or are waited for, on a real bus with real threads."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest

from devices.synthetic.storvsp import tasks
from devices.synthetic.storvsp.qos import Limits
from tests.fakes.board import ManualClock
from tests.fakes.disks import MemoryDisk
from tests.fakes.scsi import read10, write10
from tests.fakes.storvsc import READ_TYPE, WRITE_TYPE
from tests.fakes.storvsp_bus import PATIENCE, Rig
from tests.fakes.storvsp_rig import RESET_BUS, RESET_LUN, SIZE, TEST_UNIT_READY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SYNCHRONIZE = bytes((0x35, *bytes(9)))
SUCCESS, BUSY, TASK_SET_FULL = 0x01, 0x05, 0x28
SECOND = 1_000_000_000


@pytest.fixture
def make() -> Iterator[Any]:
    rigs: list[Rig] = []

    def build(*args: Any, **how: Any) -> Rig:
        rigs.append(Rig(*args, **how))
        rigs[-1].driver.initialize()
        return rigs[-1]

    yield build
    for rig in rigs:
        for unit in rig.vsp._commands.luns.values():
            if isinstance(unit.disk, MemoryDisk):
                unit.disk.gate.set()
        rig.stop()


def gated(*operations: str) -> MemoryDisk:
    """A disk on which these operations wait until its gate is set."""
    disk = MemoryDisk(SIZE)
    disk.gated = set(operations)
    disk.gate.clear()
    return disk


def in_background(action: Callable[[], object]) -> tuple[threading.Thread, threading.Event]:
    ended = threading.Event()

    def run() -> None:
        action()
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended


def reset(rig: Rig, operation: int, lun: int = 0) -> int:
    """Send a reset and return its id, without waiting."""
    body = bytes(7) + bytes((lun,)) + bytes(0x34 - 8)
    return rig.driver.submit(6, b"", operation.to_bytes(4, "little") + b"\1\0\0\0" + bytes(4) + body)


@pytest.mark.parametrize(
    ("slow", "operation"), [(SYNCHRONIZE, "flush"), (write10(0, 1, flags=0x08), "flush")], ids=["flush", "fua"]
)
def test_reads_and_writes_overtake_slow_commands(make: Any, slow: bytes, operation: str) -> None:
    disk = gated(operation)
    driver = make({0: disk}).driver
    size = 512 if slow[0] == 0x2A else 0
    requests = [driver.start(slow, size, WRITE_TYPE) for _ in range(10)]
    assert disk.reached.wait(PATIENCE)
    assert driver.write(write10(8, 1), b"overtake" * 64).srb_status == SUCCESS
    assert driver.read(read10(8, 1), 512).data == b"overtake" * 64
    assert driver.command(TEST_UNIT_READY).srb_status == SUCCESS
    assert not any(request in driver._done for request in requests)
    disk.gate.set()
    assert [driver.finish(request).srb_status for request in requests] == [SUCCESS] * 10


def test_a_disk_that_hangs_does_not_hold_up_answers_without_the_disk(make: Any) -> None:
    disk = gated("read")
    driver = make({0: disk}).driver
    requests = [driver.start(read10(0, 1), 512, READ_TYPE) for _ in range(50)]
    assert driver.command(TEST_UNIT_READY).srb_status == SUCCESS
    assert driver.read(bytes((0x12, 0, 0, 0, 36, 0)), 36).data[8:12] == b"Msft"
    disk.gate.set()
    assert [driver.finish(request).srb_status for request in requests] == [SUCCESS] * 50


def test_a_disk_that_hangs_does_not_hold_up_another(make: Any) -> None:
    stuck, other = gated("read", "flush"), MemoryDisk(SIZE)
    driver = make({0: stuck, 1: other}).driver
    requests = [driver.start(read10(0, 1), 512, READ_TYPE) for _ in range(20)]
    requests += [driver.start(SYNCHRONIZE) for _ in range(20)]
    assert driver.write(write10(8, 1), b"go on..." * 64, lun=1).srb_status == SUCCESS
    assert driver.read(read10(8, 1), 512, lun=1).data == b"go on..." * 64
    assert driver.command(SYNCHRONIZE, lun=1).srb_status == SUCCESS and other.flushes == 1
    stuck.gate.set()
    assert [driver.finish(request).srb_status for request in requests] == [SUCCESS] * 40


def test_threads_of_a_removed_disk_end(make: Any) -> None:
    rig = make({0: MemoryDisk(SIZE), 1: MemoryDisk(SIZE)})
    before = threading.active_count()
    for _ in range(10):
        rig.driver.read(read10(0, 1), 512, lun=1)
        rig.driver.command(SYNCHRONIZE, lun=1)
    assert threading.active_count() > before
    rig.vsp.remove_disk(1)
    assert threading.active_count() == before


def test_more_commands_than_the_bound_are_told_to_come_again(make: Any) -> None:
    disk = gated("read")
    rig = make({0: disk, 1: MemoryDisk(SIZE)})
    driver = rig.driver
    requests = [driver.start(read10(0, 1), 512, READ_TYPE) for _ in range(tasks.MAX_OF_LUN)]
    refused = driver.read(read10(0, 1), 512)
    assert (refused.srb_status, refused.scsi_status, refused.nt_status) == (BUSY, TASK_SET_FULL, 0x80000011)
    assert rig.vsp.inspect()["in_flight"] == tasks.MAX_OF_LUN
    disk.gate.set()
    assert {driver.finish(request).srb_status for request in requests} == {SUCCESS}
    assert driver.read(read10(0, 1), 512).srb_status == SUCCESS


@pytest.mark.parametrize("operation", [RESET_BUS, RESET_LUN])
def test_a_reset_is_answered_after_the_commands_before_it(make: Any, operation: int) -> None:
    disk = gated("flush")
    driver = (rig := make({0: disk})).driver
    flush = driver.start(SYNCHRONIZE)
    request = reset(rig, operation)
    assert driver.command(TEST_UNIT_READY).srb_status == SUCCESS
    assert request not in driver._done
    disk.gate.set()
    driver.collect(request)
    assert flush in driver._done


def test_a_reset_of_one_lun_does_not_wait_for_another(make: Any) -> None:
    disk = gated("flush")
    rig = make({0: disk, 1: MemoryDisk(SIZE)})
    flush = rig.driver.start(SYNCHRONIZE)
    rig.driver.collect(reset(rig, RESET_LUN, lun=1))
    assert flush not in rig.driver._done
    disk.gate.set()
    assert rig.driver.finish(flush).srb_status == SUCCESS


def test_too_many_resets_at_once_are_refused(make: Any) -> None:
    disk = gated("flush")
    rig = make({0: disk})
    rig.driver.start(SYNCHRONIZE)
    requests = [reset(rig, RESET_BUS) for _ in range(tasks.MAX_WAITING)]
    assert rig.driver.collect(reset(rig, RESET_BUS))[8:12] == (0x80000011).to_bytes(4, "little")
    disk.gate.set()
    assert all(rig.driver.collect(request)[8:12] == bytes(4) for request in requests)


def test_closing_the_channel_waits_for_what_still_touches_guest_memory(make: Any) -> None:
    disk = gated("read")
    rig = make({0: disk})
    rig.driver.start(read10(0, 1), 512, READ_TYPE)
    assert disk.reached.wait(PATIENCE)
    closer, closed = in_background(rig.bus.reset)
    assert not closed.wait(0.05)
    disk.gate.set()
    assert closed.wait(PATIENCE)
    closer.join(PATIENCE)
    assert rig.vsp.inspect()["in_flight"] == 0


def test_a_bug_in_a_disk_ends_the_vm_and_not_in_a_hang() -> None:
    class Buggy(MemoryDisk):
        def flush(self) -> None:
            raise ValueError("a bug")

    rig = Rig({0: Buggy(SIZE)})
    rig.driver.initialize()
    rig.driver.start(SYNCHRONIZE)
    while not rig.errors:
        rig.driver.command(TEST_UNIT_READY)
    rig.bus.pause()
    assert [str(error) for error in rig.errors] == ["a bug"]
    rig.errors.clear()
    rig.stop()


# Limits -------------------------------------------------------------------------------------------------


class LimitedRig:
    """LUN 0 does 10 commands/s by a clock that only moves when told; LUN 1 has no limit."""

    def __init__(self, make: Any) -> None:
        self.clock = ManualClock()
        self.rig: Rig = make({1: MemoryDisk(SIZE)}, clock=self.clock)
        self.disk = MemoryDisk(SIZE)
        self.rig.vsp.add_disk(0, self.disk, Limits(iops=10))
        self.driver = self.rig.driver
        #: Two may begin at once, one is delayed.
        self.requests = [self.driver.start(read10(0, 1), 512, READ_TYPE) for _ in range(3)]

    def settle(self) -> None:
        """The host has dealt with all sent so far that need not wait."""
        assert self.driver.command(TEST_UNIT_READY, lun=1).srb_status == SUCCESS
        for request in self.requests[:2]:
            self.driver.finish(request)

    @property
    def delayed(self) -> bool:
        return self.requests[2] not in self.driver._done


def test_a_command_over_the_limit_waits_and_holds_up_nothing_else(make: Any) -> None:
    limited = LimitedRig(make)
    limited.settle()
    assert limited.driver.write(write10(0, 1), bytes(512), lun=1).srb_status == SUCCESS
    assert limited.driver.command(TEST_UNIT_READY).srb_status == SUCCESS  # no data, so no limit
    assert limited.delayed
    limited.clock.advance(SECOND // 10)
    limited.rig.vsp.workers[0].run(lambda: None)  # has it look at the clock
    assert limited.driver.finish(limited.requests[2]).srb_status == SUCCESS
    latency = limited.rig.vsp.inspect()["luns"]["0"]["latency_us"]["read"]
    assert latency == {"1": 2, "131072": 1}


def test_bytes_are_limited_as_they_are_moved_and_holes_move_none(make: Any) -> None:
    clock = ManualClock()
    rig = make({}, clock=clock)
    rig.vsp.add_disk(0, MemoryDisk(SIZE), Limits(bandwidth=64 << 10))
    driver = rig.driver
    driver.poke(bytes(512))
    hole = struct.pack(">BBQIxx", 0x93, 0x08, 0, 2048)  # WRITE SAME with UNMAP
    for _ in range(3):
        assert driver.finish(driver.start(hole, 512, WRITE_TYPE)).srb_status == SUCCESS
    assert driver.read(read10(0, 32), 16384).srb_status == SUCCESS
    late = driver.start(read10(0, 1), 512, READ_TYPE)
    assert driver.command(TEST_UNIT_READY).srb_status == SUCCESS and late not in driver._done
    clock.advance(SECOND)
    rig.vsp.workers[0].run(lambda: None)
    assert driver.finish(late).srb_status == SUCCESS


@pytest.mark.parametrize("what", ["pause", "remove", "reset bus"])
def test_delayed_commands_run_at_once_when_waited_for(make: Any, what: str) -> None:
    limited = LimitedRig(make)
    limited.settle()
    assert limited.delayed
    if what == "pause":
        limited.rig.bus.pause()
        limited.rig.bus.resume()
    elif what == "remove":
        limited.rig.vsp.remove_disk(0)
    else:
        limited.driver.collect(reset(limited.rig, RESET_BUS))
    assert limited.driver.finish(limited.requests[2]).srb_status == SUCCESS


def test_delayed_commands_of_a_closed_channel_never_run(make: Any) -> None:
    limited = LimitedRig(make)
    limited.settle()
    limited.rig.bus.reset()
    assert limited.rig.vsp.inspect()["in_flight"] == 0
    limited.disk.close()  # it would object to being read
    limited.clock.advance(SECOND)
    limited.rig.vsp.workers[0].run(lambda: None)
