"""A thread that waits for eventfds, timers and calls from other threads."""

from __future__ import annotations

import heapq
import os
import select
import threading

from pyvmm.core.clock import Clock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")


#: epoll counts milliseconds in an int: wake up before that overflows, and wait again.
_LONGEST_WAIT_S = 3600.0
_SWEEP_MINIMUM = 64


class Timer:
    """A pending `Worker.call_at`; `cancel` makes it do nothing."""

    __slots__ = ("action", "deadline")

    def __init__(self, deadline: int, action: Callable[[], None]) -> None:
        self.deadline = deadline
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Drop the call; harmless if it has happened."""
        self.action = None

    def __lt__(self, other: Timer) -> bool:
        return self.deadline < other.deadline


class Worker:
    """One thread with an epoll set.

    Callbacks run on that thread, one at a time. An exception that a callback lets out goes to `on_error`
    (on the worker's thread) and the worker goes on. The thread is only made once it has something to do.
    """

    def __init__(
        self,
        name: str,
        on_error: Callable[[BaseException], None],
        clock: Clock | None = None,
    ) -> None:
        self.name = name
        self._on_error = on_error
        self._clock = clock or Clock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # -1 once the worker has ended
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._events: dict[int, Callable[[], None]] = {}
        self._files: set[int] = set()  # those of them that are no eventfds
        self._calls: list[Callable[[], None]] = []
        self._timers: list[Timer] = []
        self._sweep_at = _SWEEP_MINIMUM
        self._waiting: set[threading.Event] = set()  # callers of `run`
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # tells of the three below
        self._held = False  # somebody wants it paused
        self._parked = True  # the thread calls nothing until it has taken the lock
        self._stopping = False
        self._started = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        """Begin to call what is asked for."""
        with self._lock:
            self._started = True
            if self._events or self._calls or self._timers:
                self._need_thread()

    def add_event(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever the eventfd `fd`, which must not block, is signalled; its count is read first."""
        with self._lock:
            self._events[fd] = callback
            self._epoll.register(fd, select.EPOLLIN)
            self._need_thread()

    def add_file(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` each time that `fd` has something to read that it had not before (edge-triggered)."""
        with self._lock:
            self._files.add(fd)
            self._events[fd] = callback
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)
            self._need_thread()

    def remove_event(self, fd: int) -> None:
        """Forget `fd`. After this returns on the worker's own thread, its callback is not called again."""
        with self._lock:
            self._events.pop(fd, None)
            self._files.discard(fd)
        try:
            self._epoll.unregister(fd)
        except (OSError, ValueError):
            pass

    def call_soon(self, action: Callable[[], None]) -> None:
        """Run `action` on the worker's thread; any thread. Nothing happens if the worker has ended."""
        with self._lock:
            self._add_call(action)

    def call_at(self, deadline_ns: int, action: Callable[[], None]) -> Timer:
        """Run `action` once the clock's `now_ns` reaches `deadline_ns`; may be called from any thread."""
        timer = Timer(deadline_ns, action)
        with self._lock:
            heapq.heappush(self._timers, timer)
            if len(self._timers) >= self._sweep_at:  # cancelled timers must not pile up until they are due
                self._timers = [entry for entry in self._timers if entry.action is not None]
                heapq.heapify(self._timers)
                self._sweep_at = max(_SWEEP_MINIMUM, 2 * len(self._timers))
            self._need_thread()
            self._kick()
        return timer

    def run(self, action: Callable[[], T]) -> T:
        """Run `action` on the worker's thread and return its result, or raise what it raised.

        Waits while the worker is paused. Raises RuntimeError if the worker ends first.
        """
        if threading.current_thread() is self._thread:
            return action()
        done = threading.Event()
        result: list[T] = []
        error: list[BaseException] = []

        def call() -> None:
            try:
                result.append(action())
            except BaseException as exc:  # noqa: BLE001 - handed to the caller
                error.append(exc)
            done.set()

        with self._lock:
            if self._wake >= 0:
                self._waiting.add(done)
                self._add_call(call)
            else:
                done.set()
        done.wait()
        with self._lock:
            self._waiting.discard(done)
        if error:
            raise error[0]
        if not result:
            raise RuntimeError(f"worker {self.name} has ended")
        return result[0]

    def pause(self) -> None:
        """Stop calling anything; return once the current callback, if any, is over. Harmless the second time."""
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"worker {self.name} cannot pause itself")
        with self._changed:
            self._held = True
            self._kick()
            while self._held and not self._parked:
                self._changed.wait()

    def resume(self) -> None:
        """Go on after `pause`."""
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def stop(self) -> None:
        """End the thread and close its files; from another thread, return once it has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._kick()
        if self._thread.ident is None:
            self._close()
        elif threading.current_thread() is not self._thread:
            self._thread.join()

    # The lock is held in these three.

    def _need_thread(self) -> None:
        if self._started and not self._stopping and self._thread.ident is None:
            self._thread.start()

    def _add_call(self, action: Callable[[], None]) -> None:
        if self._wake >= 0:
            self._calls.append(action)
            self._need_thread()
            self._kick()

    def _kick(self) -> None:
        if self._wake >= 0:  # afterwards the number may be another file's
            os.eventfd_write(self._wake, 1)

    def _timeout(self) -> float:
        with self._lock:
            if self._calls:
                return 0
            while self._timers and self._timers[0].action is None:
                heapq.heappop(self._timers)
            if not self._timers:
                return -1
            return min(max(0, self._timers[0].deadline - self._clock.now_ns()) / 1e9, _LONGEST_WAIT_S)

    def _due(self) -> list[Callable[[], None]]:
        with self._lock:
            due, self._calls = self._calls, []
            now = self._clock.now_ns()
            while self._timers and self._timers[0].deadline <= now:
                action = heapq.heappop(self._timers).action
                if action is not None:
                    due.append(action)
        return due

    def _main(self) -> None:
        while self._may_go_on():
            ready = self._epoll.poll(self._timeout())
            if self._held or self._stopping:
                continue
            for action in self._due():
                self._call(action)
            for fd, _ in ready:
                with self._lock:
                    callback = self._events.get(fd)
                    counts = fd not in self._files
                if callback is None and fd != self._wake:  # removed meanwhile; the number may be another file's
                    continue
                try:
                    if counts:
                        os.eventfd_read(fd)
                except OSError:  # read by somebody else meanwhile
                    continue
                if callback is not None:
                    self._call(callback)
        self._close()

    def _may_go_on(self) -> bool:
        if self._held or self._stopping or self._parked:
            with self._changed:
                while self._held and not self._stopping:
                    self._parked = True
                    self._changed.notify_all()
                    self._changed.wait()
                self._parked = False
        return not self._stopping

    def _close(self) -> None:
        with self._changed:
            if self._wake >= 0:
                self._epoll.close()
                os.close(self._wake)
                self._wake = -1
            self._calls.clear()
            self._timers.clear()
            self._parked = True
            self._changed.notify_all()
            for done in self._waiting:
                done.set()

    def _call(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - handed to the owner
            self._on_error(error)
