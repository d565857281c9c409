"""A board for device tests: clocks that stand still, timers fired by hand, interrupt lines that remember."""

from __future__ import annotations

from pyvmm.core.bus import Bus
from pyvmm.core.clock import Clock
from pyvmm.core.irq import IrqLine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class ManualClock(Clock):
    """Time that only moves by `advance`; UTC starts at `utc_seconds` after 1970."""

    def __init__(self, utc_seconds: int = 1_600_000_000) -> None:
        self._now = 1_000_000_000
        self._utc_offset = utc_seconds * 1_000_000_000 - self._now

    def now_ns(self) -> int:
        return self._now

    def utc_ns(self) -> int:
        return self._now + self._utc_offset

    def advance(self, nanoseconds: int) -> None:
        self._now += nanoseconds


class ManualTimers:
    """Has `call_at` as a worker has; calls what is due in `advance`, with the clock at each deadline in turn."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.pending: list[tuple[int, Callable[[], None]]] = []

    def call_at(self, deadline_ns: int, action: Callable[[], None]) -> None:
        self.pending.append((deadline_ns, action))

    def advance(self, nanoseconds: int) -> None:
        end = self.clock.now_ns() + nanoseconds
        while self.pending:
            self.pending.sort(key=lambda entry: entry[0])
            if self.pending[0][0] > end:
                break
            deadline, action = self.pending.pop(0)
            self.clock.advance(max(0, deadline - self.clock.now_ns()))
            action()
        self.clock.advance(end - self.clock.now_ns())


class RecordingLine(IrqLine):
    """An interrupt line that counts its rising edges."""

    def __init__(self) -> None:
        self.level = False
        self.edges = 0

    def set(self, level: bool) -> None:
        if level and not self.level:
            self.edges += 1
        self.level = level


def board_bus(*devices: Any) -> Bus:
    """An I/O bus with the ports of `devices`."""
    bus = Bus("pio")
    for device in devices:
        for base, length, handler, name in device.ports():
            bus.register(base, length, handler, name)
    return bus
