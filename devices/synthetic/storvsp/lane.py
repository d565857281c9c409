"""Threads that carry jobs out, in the order in which they were handed over."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Lane:
    """`size` threads, which the first jobs make. Jobs must not raise."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self._size = size
        # Its waiting is in C: that costs half of what a condition does.
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()  # held to make a thread

    def submit(self, job: Callable[[], object]) -> None:
        """Have `job` carried out; any thread, but not after `close`."""
        self._jobs.put(job)
        if len(self._threads) < self._size:
            with self._lock:
                if len(self._threads) < self._size:
                    name = f"{self.name}.{len(self._threads)}"
                    self._threads.append(threading.Thread(target=self._main, name=name, daemon=True))
                    self._threads[-1].start()

    def close(self) -> None:
        """End the threads, once they have done all jobs."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _main(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
