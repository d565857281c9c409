"""Lanes, tasks, limits and statistics: what stands between a packet and its completion."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.synthetic.storvsp import tasks as tasks_module
from devices.synthetic.storvsp.lane import Lane
from devices.synthetic.storvsp.lun import Lun
from devices.synthetic.storvsp.qos import BURST_S, Bucket, Limits
from devices.synthetic.storvsp.scsi import Target
from devices.synthetic.storvsp.statistics import BUCKETS, FLUSH, READ, Statistics
from devices.synthetic.storvsp.tasks import Task, Tasks
from pyvmm.core.worker import Timer
from tests.fakes.disks import MemoryDisk

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 30.0
SECOND = 1_000_000_000


# Lanes --------------------------------------------------------------------------------------------------


def test_a_lane_does_as_many_jobs_at_once_as_it_has_threads() -> None:
    lane = Lane("lane", 3)
    together = threading.Barrier(3)
    done: list[int] = []

    def job() -> None:
        together.wait(PATIENCE)  # broken unless three are here
        done.append(1)

    for _ in range(6):
        lane.submit(job)
    lane.close()
    assert done == [1] * 6


def test_a_lane_of_one_thread_keeps_the_order_and_closing_it_loses_no_job() -> None:
    lane = Lane("lane", 1)
    before = threading.active_count()
    done: list[int] = []
    for number in range(100):
        lane.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    assert threading.active_count() == before + 1
    lane.close()
    assert done == list(range(100))
    assert threading.active_count() == before


def test_a_lane_without_jobs_has_no_threads() -> None:
    before = threading.active_count()
    lane = Lane("lane", 4)
    assert threading.active_count() == before
    lane.close()


# Tasks --------------------------------------------------------------------------------------------------


class Timers:
    """Remembers what is to be called later."""

    def __init__(self) -> None:
        self.pending: list[Timer] = []

    def later(self, action: Callable[[], None]) -> Timer:
        self.pending.append(Timer(0, action))
        return self.pending[-1]

    def ring(self) -> None:
        for timer in self.pending:
            if timer.action is not None:
                timer.action()


class Desk:
    """Tasks of two channels and two LUNs, and which of them have run."""

    def __init__(self) -> None:
        self.tasks = Tasks()
        self.luns = [Lun(Target(MemoryDisk(512), bytes(16))) for _ in range(2)]
        self.ran: list[str] = []
        self.timers = Timers()

    def task(self, name: str, lun: int | None = 0, channel: str = "a") -> Task:
        task = Task(cast("Any", channel), None if lun is None else self.luns[lun])
        task.run = lambda: self.ran.append(name)
        return task

    def take(self, name: str, lun: int = 0, channel: str = "a") -> Task:
        task = self.task(name, lun, channel)
        assert self.tasks.admit(task, self.luns[lun])
        return task

    def delayed(self, name: str, lun: int = 0, channel: str = "a") -> Task:
        task = self.take(name, lun, channel)

        def run() -> None:
            self.ran.append(name)
            self.tasks.done(task)

        task.run = run
        self.tasks.delay(task, self.timers.later)
        return task


def test_tasks_of_one_lun_are_bounded_and_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "MAX_OF_LUN", 2)
    monkeypatch.setattr(tasks_module, "MAX_OF_CONTROLLER", 3)
    desk = Desk()
    first = desk.take("1")
    desk.take("2")
    assert not desk.tasks.admit(desk.task("3"), desk.luns[0])
    desk.take("4", lun=1)
    assert not desk.tasks.admit(desk.task("5", lun=1), desk.luns[1])
    desk.tasks.done(first)
    desk.take("6")
    assert len(desk.tasks) == 3


def test_a_last_task_runs_once_all_before_it_are_done_and_no_later() -> None:
    desk = Desk()
    first, second, other = desk.take("1"), desk.take("2"), desk.take("other", lun=1)
    assert desk.tasks.admit_last(desk.task("reset lun", None), desk.luns[0])
    assert desk.tasks.admit_last(desk.task("reset all", None), None)
    desk.take("after")
    desk.tasks.done(first)
    assert desk.ran == []
    desk.tasks.done(second)
    assert desk.ran == ["reset lun"]
    desk.tasks.done(other)
    assert desk.ran == ["reset lun"]  # the other reset waits for this one, which has not been answered


def test_a_last_task_with_none_before_it_runs_at_once() -> None:
    desk = Desk()
    desk.take("other", lun=1)
    assert desk.tasks.admit_last(desk.task("reset", None), desk.luns[0])
    assert desk.ran == ["reset"]


def test_last_tasks_are_bounded() -> None:
    desk = Desk()
    desk.take("1")
    for _ in range(tasks_module.MAX_WAITING):
        assert desk.tasks.admit_last(desk.task("reset", None), None)
    assert not desk.tasks.admit_last(desk.task("reset", None), None)


def test_a_delayed_task_runs_when_its_time_has_come_and_once() -> None:
    desk = Desk()
    desk.delayed("1")
    assert desk.ran == []
    desk.timers.ring()
    desk.timers.ring()
    assert desk.ran == ["1"] and len(desk.tasks) == 0


def test_whoever_waits_lets_delayed_tasks_run_at_once() -> None:
    desk = Desk()
    desk.delayed("mine")
    desk.delayed("other", lun=1)
    desk.tasks.wait(lambda task: task.lun is desk.luns[0])
    assert desk.ran == ["mine"]
    assert desk.tasks.admit_last(desk.task("reset", None), None)
    assert desk.ran == ["mine", "other", "reset"]
    desk.timers.ring()
    assert desk.ran == ["mine", "other", "reset"]


def test_a_task_that_somebody_waits_for_is_not_delayed() -> None:
    desk = Desk()
    task = desk.take("awaited")
    desk.tasks.admit_last(desk.task("reset", None), None)
    desk.tasks.delay(task, desk.timers.later)
    going = desk.take("going", lun=1)
    desk.luns[1].gone = True
    desk.tasks.delay(going, desk.timers.later)
    assert desk.ran == ["awaited", "going"] and desk.timers.pending == []


def test_tasks_of_an_abandoned_channel_are_dropped_if_delayed_and_else_waited_for() -> None:
    desk = Desk()
    desk.delayed("dropped")
    desk.delayed("kept", channel="b")
    busy = desk.take("busy")
    abandoned = threading.Event()

    def abandon() -> None:
        desk.tasks.abandon(cast("Any", "a"))
        abandoned.set()

    thread = threading.Thread(target=abandon)
    thread.start()
    assert not abandoned.wait(0.05)
    desk.tasks.done(busy)
    assert abandoned.wait(PATIENCE)
    thread.join(PATIENCE)
    desk.timers.ring()
    assert desk.ran == ["kept"]


# Limits -------------------------------------------------------------------------------------------------


def test_a_limited_disk_gets_its_rate_after_a_short_burst() -> None:
    limits = Limits(iops=100)
    starts = [limits.take(0, 4096) for _ in range(111)]
    assert starts[:11] == [0] * 11  # a tenth of a second's worth, and the one that the last of them puts off
    assert starts[-1] == SECOND
    assert sorted(starts) == starts


def test_bytes_are_limited_as_well_and_the_stricter_limit_counts() -> None:
    limits = Limits(iops=1000, bandwidth=1 << 20)
    for _ in range(3):
        limits.take(0, 1 << 20)
    assert limits.take(0, 512) == 3 * SECOND - int(BURST_S * SECOND)
    limits = Limits(iops=10, bandwidth=1 << 30)
    assert [limits.take(0, 512) for _ in range(12)][-1] == SECOND


def test_an_idle_disk_saves_up_no_more_than_the_burst() -> None:
    limits = Limits(iops=10)
    limits.take(0, 0)
    hour = 3600 * SECOND
    assert [limits.take(hour, 0) for _ in range(3)] == [hour, hour, hour + SECOND // 10]


@given(
    rate=st.integers(10, 10**6),
    work=st.lists(st.tuples(st.integers(0, 10**10), st.integers(1, 10**5)), min_size=1, max_size=60),
)
def test_no_schedule_exceeds_rate_and_burst(rate: int, work: list[tuple[int, int]]) -> None:
    bucket, now, begun = Bucket(rate), 0, []
    for pause, tokens in work:
        now += pause
        begun.append((bucket.take(now, tokens), tokens))
        assert begun[-1][0] >= now
    # Whatever began within any window, but for the last one, fits the window and a burst.
    for first in range(len(begun)):
        for last in range(first, len(begun)):
            seconds = (begun[last][0] - begun[first][0]) / 1e9 + BURST_S
            assert sum(tokens for _, tokens in begun[first:last]) <= seconds * rate * 1.000001 + 1


def test_limits_can_be_inspected() -> None:
    assert Limits(iops=5).inspect() == {"iops": 5, "bandwidth": None}


# Statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latency_ns", "below_us"),
    [(0, 1), (999, 1), (1000, 2), (1999, 2), (2000, 4), (1_023_999, 1024), (1_024_000, 2048), (1 << 62, 1 << 31)],
)
def test_a_latency_is_counted_below_the_next_power_of_two(latency_ns: int, below_us: int) -> None:
    statistics = Statistics()
    statistics.count(READ, latency_ns, reads=1, bytes_read=512)
    found = statistics.inspect()
    assert found["latency_us"] == {"read": {str(below_us): 1}, "write": {}, "flush": {}}
    assert (found["commands"], found["reads"], found["bytes_read"], found["errors"]) == (1, 1, 512, 0)
    assert below_us < 1 << BUCKETS


def test_counting_from_many_threads_loses_nothing() -> None:
    statistics = Statistics()

    def work() -> None:
        for _ in range(2000):
            statistics.count(FLUSH, 5000, flushes=1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert statistics.inspect()["latency_us"]["flush"] == {"8": 8000}
