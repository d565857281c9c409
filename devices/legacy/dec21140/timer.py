"""CSR11, the general-purpose timer.

Source: 21140A Hardware Reference Manual, chapter 3.
"""

from __future__ import annotations

from devices.legacy.dec21140.registers import TIMER_CONTINUOUS, TIMER_MASK
from devices.saved import check_version, saved_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.core.clock import Clock

#: A guest that wants interrupts more often has to do with these.
_SHORTEST_NS = 1_000_000


class GeneralPurposeTimer:
    """Counts down and calls `on_expire`, once or again and again.

    `call_at` is that of a worker; the owner's lock is held in all methods and in what `call_at` calls.
    """

    def __init__(
        self, clock: Clock, call_at: Callable[[int, Callable[[], None]], object], on_expire: Callable[[], None]
    ) -> None:
        self._clock = clock
        self._call_at = call_at
        self._on_expire = on_expire
        self._run = 0  # tells which call was asked for last
        self.stop()

    def stop(self) -> None:
        """Count no more."""
        self._run += 1
        self._value, self._tick_ns, self._deadline_ns = 0, 1, 0

    def write(self, value: int, tick_ns: int) -> None:
        """Start with a value of CSR11, counting every `tick_ns`; zero stops."""
        self.stop()
        if value & TIMER_MASK:
            self._value, self._tick_ns = value, tick_ns
            self._start(self._period_ns())

    def read(self) -> int:
        """What CSR11 shows."""
        left = max(0, self._deadline_ns - self._clock.now_ns()) // self._tick_ns if self._value else 0
        return self._value & TIMER_CONTINUOUS | min(left, TIMER_MASK)

    def _start(self, delay_ns: int) -> None:
        self._deadline_ns = self._clock.now_ns() + delay_ns
        run = self._run
        self._call_at(self._deadline_ns, lambda: self._due(run))

    def _due(self, run: int) -> None:
        if run != self._run:
            return
        if self._value & TIMER_CONTINUOUS:
            self._start(self._period_ns())
        else:
            self.stop()
        self._on_expire()

    def _period_ns(self) -> int:
        return max((self._value & TIMER_MASK) * self._tick_ns, _SHORTEST_NS)

    def save(self) -> dict[str, Any]:
        """Return the state as plain data."""
        left = max(0, self._deadline_ns - self._clock.now_ns()) if self._value else 0
        return {"version": 1, "value": self._value, "tick": self._tick_ns, "left": left}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; raise ValueError if it does not fit."""
        check_version(state, 1)
        value = saved_int(state, "value", 0, TIMER_CONTINUOUS | TIMER_MASK)
        tick_ns = saved_int(state, "tick", 1, 1_000_000)
        left = saved_int(state, "left", 0, TIMER_MASK * tick_ns + _SHORTEST_NS)
        self.stop()
        if value:
            self._value, self._tick_ns = value, tick_ns
            self._start(left)
