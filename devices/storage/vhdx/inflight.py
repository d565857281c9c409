"""Waiting until I/O is over that may still use a block's old place in the file."""

from __future__ import annotations

import threading


class InFlight:
    """Counts the I/O under way, so that `drain` can wait for what began before it.

    To be used around looking a block up and the I/O on it; whoever is inside must not wait for a caller of `drain`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._generation = 0
        self._counts = [0, 0]  # I/O that began in even and in odd generations

    def enter(self) -> int:
        """Begin; returns what `leave` wants."""
        with self._lock:
            turn = self._generation & 1
            self._counts[turn] += 1
            return turn

    def leave(self, turn: int) -> None:
        with self._lock:
            self._counts[turn] -= 1
            if not self._counts[turn]:
                self._changed.notify_all()

    def drain(self) -> None:
        """Return once all I/O that began before this call is over. One caller at a time."""
        with self._changed:
            turn = self._generation & 1
            self._generation += 1
            while self._counts[turn]:
                self._changed.wait()
