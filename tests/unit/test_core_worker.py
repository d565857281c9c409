"""Workers: what they call, when they stop calling it, and what they give back."""

from __future__ import annotations

import os
import queue
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.core.worker import Worker
from tests.fakes.board import ManualClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE_S = 20


class Shop:
    """A running worker and what came out of its callbacks."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.clock = ManualClock()
        self.worker = Worker("shop", self.errors.append, self.clock)
        self.calls: list[Any] = []

    def note(self, what: Any) -> Callable[[], None]:
        return lambda: self.calls.append(what)

    def settle(self) -> list[Any]:
        """Let the worker do what it has to do; return what it did."""
        self.worker.run(lambda: None)
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    shop.worker.start()
    yield shop
    shop.worker.stop()


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def in_thread(action: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def finish(thread: threading.Thread) -> None:
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it hangs"


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_calls_happen_in_order_on_the_workers_thread(shop: Shop) -> None:
    for number in range(100):
        shop.worker.call_soon(shop.note(number))
    assert shop.settle() == list(range(100))
    assert shop.worker.run(lambda: threading.current_thread().name) == "shop"


def test_calls_made_before_the_start_happen_after_it() -> None:
    shop = Shop()
    shop.worker.call_soon(shop.note("early"))
    shop.worker.start()
    assert shop.settle() == ["early"]
    shop.worker.stop()


def test_there_is_no_thread_before_there_is_something_to_do(shop: Shop) -> None:
    before = threading.active_count()
    shop.worker.call_soon(shop.note("first"))
    assert threading.active_count() == before + 1
    assert shop.settle() == ["first"]


def test_run_gives_the_result_or_the_exception(shop: Shop) -> None:
    def fail() -> None:
        raise KeyError("mine")

    assert shop.worker.run(lambda: 42) == 42
    with pytest.raises(KeyError, match="mine"):
        shop.worker.run(fail)
    assert not shop.errors


def test_run_on_the_workers_own_thread_does_not_wait_for_itself(shop: Shop) -> None:
    assert shop.worker.run(lambda: shop.worker.run(lambda: 1) + 1) == 2


def test_an_exception_goes_to_the_owner_and_the_worker_goes_on(shop: Shop) -> None:
    error = ValueError("broken device")

    def fail() -> None:
        raise error

    shop.worker.call_soon(fail)
    shop.worker.call_soon(shop.note("next"))
    assert shop.settle() == ["next"]
    assert shop.errors == [error]


def test_an_eventfd_calls_once_however_often_it_was_signalled(shop: Shop, eventfd: int) -> None:
    os.eventfd_write(eventfd, 3)
    shop.worker.add_event(eventfd, shop.note("rung"))
    while not (calls := shop.settle()):
        pass
    assert calls == ["rung"]
    with pytest.raises(BlockingIOError):
        os.eventfd_read(eventfd)
    os.eventfd_write(eventfd, 1)
    while not (calls := shop.settle()):
        pass
    assert calls == ["rung"]


def test_an_event_removed_by_the_callback_before_it_is_neither_called_nor_read(shop: Shop, eventfd: int) -> None:
    other = os.eventfd(0, os.EFD_NONBLOCK)

    def first() -> None:
        # Whichever comes first removes the other, which is ready as well.
        shop.calls.append("one of them")
        for fd in (eventfd, other):
            shop.worker.remove_event(fd)

    def register() -> None:
        os.eventfd_write(eventfd, 1)
        os.eventfd_write(other, 1)
        shop.worker.add_event(eventfd, first)
        shop.worker.add_event(other, first)

    shop.worker.run(register)
    while not shop.calls:
        shop.worker.run(lambda: None)
    shop.worker.run(lambda: None)
    assert shop.settle() == ["one of them"]
    left = 0
    for fd in (eventfd, other):
        try:
            left += os.eventfd_read(fd)
        except BlockingIOError:
            pass
    assert left == 1
    os.close(other)


def test_removing_an_unknown_event_is_harmless(shop: Shop, eventfd: int) -> None:
    shop.worker.remove_event(eventfd)


def test_timers_come_in_the_order_of_their_deadlines_once_the_clock_is_there(shop: Shop) -> None:
    now = shop.clock.now_ns()
    shop.worker.call_at(now + 300, shop.note("late"))
    shop.worker.call_at(now + 100, shop.note("early"))
    shop.worker.call_at(now + 200, shop.note("cancelled")).cancel()
    assert shop.settle() == []
    shop.clock.advance(100)
    assert shop.settle() == ["early"]
    shop.clock.advance(1000)
    assert shop.settle() == ["late"]


def test_a_timer_fires_by_itself_on_the_hosts_clock() -> None:
    fired = threading.Event()
    worker = Worker("clock", lambda error: None)
    worker.start()
    worker.call_at(0, fired.set)
    assert fired.wait(PATIENCE_S)
    worker.stop()


def test_a_deadline_beyond_what_epoll_can_wait_for_is_fine(shop: Shop) -> None:
    shop.worker.call_at(shop.clock.now_ns() + 10**18, shop.note("in thirty years"))
    shop.worker.run(lambda: None)
    shop.worker.run(lambda: None)
    assert shop.settle() == []
    assert not shop.errors


def test_cancelled_timers_do_not_pile_up(shop: Shop) -> None:
    far = shop.clock.now_ns() + 10**15
    shop.worker.call_at(far - 1, shop.note("kept"))
    for _ in range(10_000):
        shop.worker.call_at(far, shop.note("never")).cancel()
    assert len(shop.worker._timers) < 200
    shop.clock.advance(10**15)
    assert shop.settle() == ["kept"]


def test_pause_waits_for_the_current_callback_and_then_nothing_is_called(shop: Shop, eventfd: int) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        leave.wait(PATIENCE_S)
        shop.calls.append("slow")

    shop.worker.add_event(eventfd, shop.note("event"))
    shop.worker.call_soon(slow)
    assert entered.wait(PATIENCE_S)
    pausing = in_thread(shop.worker.pause)
    leave.set()
    finish(pausing)
    assert shop.calls == ["slow"]
    shop.worker.call_soon(shop.note("call"))
    shop.worker.call_at(0, shop.note("timer"))
    os.eventfd_write(eventfd, 1)
    shop.worker.pause()  # the second time is harmless, and proves that the thread has not moved
    assert shop.calls == ["slow"]
    shop.worker.resume()
    shop.worker.run(lambda: None)
    shop.worker.run(lambda: None)
    assert sorted(shop.settle()) == ["call", "event", "slow", "timer"]


def test_several_threads_may_pause_at_once(shop: Shop) -> None:
    for _ in range(50):
        for thread in [in_thread(shop.worker.pause) for _ in range(4)]:
            finish(thread)
        shop.worker.resume()
        assert shop.worker.run(lambda: True)


def test_a_pause_before_the_start_holds_the_thread_from_the_start() -> None:
    shop = Shop()
    shop.worker.call_soon(shop.note("call"))
    shop.worker.pause()
    shop.worker.start()
    shop.worker.pause()
    assert shop.calls == []
    shop.worker.resume()
    assert shop.settle() == ["call"]
    shop.worker.stop()


def test_a_worker_cannot_pause_itself(shop: Shop) -> None:
    with pytest.raises(RuntimeError, match="cannot pause itself"):
        shop.worker.run(shop.worker.pause)


def test_stop_ends_a_paused_worker(shop: Shop) -> None:
    shop.worker.pause()
    finish(in_thread(shop.worker.stop))


def test_stop_from_the_workers_own_thread_ends_it(shop: Shop) -> None:
    shop.worker.call_soon(shop.worker.stop)
    shop.worker._thread.join(PATIENCE_S)
    assert not shop.worker._thread.is_alive()
    shop.worker.stop()


def test_stop_closes_the_files_started_or_not() -> None:
    before = open_files()
    for start in (True, False):
        worker = Worker("files", lambda error: None)
        assert open_files() == before + 2
        if start:
            worker.start()
        worker.stop()
        assert open_files() == before
        worker.stop()
        assert open_files() == before


def test_an_ended_worker_touches_no_file_that_has_its_old_numbers() -> None:
    worker = Worker("ended", lambda error: None)
    wake = worker._wake
    worker.start()
    worker.stop()
    reused = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        os.dup2(reused, wake)
        worker.call_soon(lambda: None)
        worker.call_at(0, lambda: None)
        worker.remove_event(wake)
        worker.pause()
        worker.resume()
        worker.stop()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(wake)
    finally:
        os.close(reused)
        if wake != reused:
            os.close(wake)


def test_run_fails_rather_than_waits_for_an_ended_worker(shop: Shop) -> None:
    shop.worker.stop()
    with pytest.raises(RuntimeError, match="shop has ended"):
        shop.worker.run(lambda: 1)


def test_a_stop_ends_the_wait_of_run_on_a_paused_worker(shop: Shop) -> None:
    shop.worker.pause()
    failures: list[BaseException] = []

    def caller() -> None:
        try:
            shop.worker.run(lambda: 1)
        except RuntimeError as error:
            failures.append(error)

    waiting = in_thread(caller)
    while not shop.worker._waiting and not failures:
        pass
    shop.worker.stop()
    finish(waiting)
    assert len(failures) == 1


def test_a_file_calls_when_it_has_something_new_to_read(shop: Shop) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    found: queue.Queue[bytes] = queue.Queue()
    with ours, theirs:
        shop.worker.add_file(ours.fileno(), lambda: found.put(ours.recv(16)))
        for data in (b"first", b"second"):
            theirs.send(data)
            assert found.get(timeout=PATIENCE_S) == data
        shop.worker.run(lambda: shop.worker.remove_event(ours.fileno()))
        theirs.send(b"unread")
        shop.settle()
        assert found.empty() and ours.recv(16) == b"unread"
