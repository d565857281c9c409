"""Tracing on request, and rate-limited notes about what a guest does wrong."""

from __future__ import annotations

import sys

from pyvmm.core.clock import Clock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TextIO

CATEGORIES = ("msr", "hypercall", "synic", "vmbus", "io", "storvsp", "netvsp")


class Tracer:
    """Writes a line per event of the chosen categories.

    Each category is an attribute, so that a caller pays one attribute test when it is off:
    ``if tracer.vmbus: tracer.line("vmbus", ...)``. Raises ValueError for an unknown category.
    """

    def __init__(
        self,
        categories: Iterable[str] = (),
        stream: TextIO | None = None,
        clock: Clock | None = None,
    ) -> None:
        chosen = set(categories)
        if "all" in chosen:
            chosen = set(CATEGORIES)
        unknown = chosen.difference(CATEGORIES)
        if unknown:
            raise ValueError(f"unknown trace category {sorted(unknown)[0]!r}; choose from {', '.join(CATEGORIES)}, all")
        self.msr = "msr" in chosen
        self.hypercall = "hypercall" in chosen
        self.synic = "synic" in chosen
        self.vmbus = "vmbus" in chosen
        self.io = "io" in chosen
        self.storvsp = "storvsp" in chosen
        self.netvsp = "netvsp" in chosen
        self._stream = stream
        self._clock = clock or Clock()
        self._start = self._clock.now_ns()

    def line(self, category: str, text: str) -> None:
        """Write one line, stamped with the seconds since the tracer was made."""
        seconds = (self._clock.now_ns() - self._start) / 1e9
        _write(self._stream, f"[{seconds:11.6f}] {category}: {text}\n")


class GuestLog:
    """Notes about a misbehaving guest: at most `burst` lines in `period_ns`, then a count of what was dropped."""

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Clock | None = None,
        burst: int = 20,
        period_ns: int = 5_000_000_000,
    ) -> None:
        self._stream = stream
        self._clock = clock or Clock()
        self._burst = burst
        self._period_ns = period_ns
        self._window = self._clock.now_ns()
        self._written = 0
        self._told = 0  # of the dropped ones
        #: Notes dropped so far.
        self.dropped = 0

    def warn(self, source: str, text: str) -> None:
        """Write ``pyvmm: source: text`` unless the guest has caused too many lines lately."""
        now = self._clock.now_ns()
        if now - self._window >= self._period_ns:
            self._window, self._written = now, 0
            if self.dropped > self._told:
                _write(self._stream, f"pyvmm: {self.dropped - self._told} notes like the ones above were dropped\n")
                self._told = self.dropped
        if self._written >= self._burst:
            self.dropped += 1
            return
        self._written += 1
        _write(self._stream, f"pyvmm: {source}: {text}\n")


def _write(stream: TextIO | None, line: str) -> None:
    try:
        (stream or sys.stderr).write(line)
    except (OSError, ValueError):  # nobody reads it any more, which must not end the guest
        pass
