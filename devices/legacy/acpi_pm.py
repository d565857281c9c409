"""ACPI fixed hardware: PM1a event and control registers and the power management timer.

ACPI specification 6.4, sections 4.8.3.1 to 4.8.3.3. There is no SMI command port: ACPI mode is always on.
"""

from __future__ import annotations

import threading

from devices.legacy.ports import BytePorts
from devices.saved import check_version, saved_int
from pyvmm.core.bus import BusHandler
from pyvmm.core.clock import Clock
from pyvmm.core.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from devices.legacy.ports import PortRange
    from pyvmm.core.irq import IrqLine

PM1_EVENT_PORT, PM1_CONTROL_PORT, PM_TIMER_PORT = 0x600, 0x604, 0x608
SCI_IRQ = 9
#: SLP_TYP of the soft-off state: the first element of the DSDT's `_S5` package.
S5_SLEEP_TYPE = 5
PM_TIMER_HZ = 3_579_545

TIMER_STATUS, POWER_BUTTON = 1 << 0, 1 << 8
_EVENTS = TIMER_STATUS | 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10
SCI_ENABLE, SLEEP_ENABLE = 1 << 0, 1 << 13
_COUNT_MASK = 0xFFFF_FFFF


class _TimerPort(BusHandler):
    """The PM timer's register: 32 bits that have to be read at one moment."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count

    def read(self, offset: int, size: int) -> int:
        return self._count() >> (8 * offset)

    def write(self, offset: int, size: int, value: int) -> None:
        """Read-only."""


class AcpiPm(Device):
    """`on_poweroff` is called on the VP's thread when the guest enters S5.

    The timer counts 32 bits (FADT flag TMR_VAL_EXT; without it a guest takes 24 of them) and follows `clock`.
    Its carry bit is looked at whenever the guest reads or writes the event registers.
    """

    name = "acpi-pm"

    def __init__(self, sci: IrqLine, on_poweroff: Callable[[], None], clock: Clock | None = None) -> None:
        self._sci = sci
        self._on_poweroff = on_poweroff
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._power_on()

    def _power_on(self) -> None:
        self._status = 0
        self._enable = 0
        self._control = SCI_ENABLE
        self._level = False
        self._start_ns = self._clock.now_ns()
        self._start_count = 0
        self._carry = 0

    def ports(self) -> list[PortRange]:
        """The I/O ports to register."""
        return [
            (PM1_EVENT_PORT, 4, BytePorts(self._read_event, self._write_event), "ACPI PM1a event"),
            (PM1_CONTROL_PORT, 2, BytePorts(self._read_control, self._write_control), "ACPI PM1a control"),
            (PM_TIMER_PORT, 4, _TimerPort(self.timer), "ACPI PM timer"),
        ]

    def timer(self) -> int:
        """The PM timer's count now, 32 bits."""
        elapsed = self._clock.now_ns() - self._start_ns
        return (self._start_count + elapsed * PM_TIMER_HZ // 1_000_000_000) & _COUNT_MASK

    def press_power_button(self) -> None:
        """Tell the guest that somebody pressed the power button. Any thread."""
        with self._lock:
            self._status |= POWER_BUTTON
            self._update_sci()

    def _read_event(self, offset: int) -> int:
        if offset > 3:
            return 0xFF
        with self._lock:
            self._check_carry()
            return (self._enable << 16 | self._status) >> (8 * offset) & 0xFF

    def _write_event(self, offset: int, value: int) -> None:
        with self._lock:
            self._check_carry()
            if offset < 2:
                self._status &= ~(value << (8 * offset))  # write 1 to clear
            elif offset < 4:
                shift = 8 * (offset - 2)
                self._enable = (self._enable & ~(0xFF << shift) | value << shift) & _EVENTS
            self._update_sci()

    def _check_carry(self) -> None:
        carry = self.timer() >> 31
        if carry != self._carry:
            self._carry = carry
            self._status |= TIMER_STATUS
            self._update_sci()

    def _read_control(self, offset: int) -> int:
        return self._control >> (8 * offset) & 0xFF if offset < 2 else 0xFF

    def _write_control(self, offset: int, value: int) -> None:
        if offset > 1:
            return
        with self._lock:
            shift = 8 * offset
            written = self._control & ~(0xFF << shift) | value << shift
            self._control = written & 0x1C02 | SCI_ENABLE  # sleep type and bus master reload are kept
        if written & SLEEP_ENABLE and written >> 10 & 7 == S5_SLEEP_TYPE:
            self._on_poweroff()

    def _update_sci(self) -> None:
        level = bool(self._status & self._enable)
        if level != self._level:
            self._level = level
            self._sci.set(level)

    def reset(self) -> None:
        with self._lock:
            self._power_on()
            self._sci.set(False)

    def resume(self) -> None:
        with self._lock:
            self._sci.set(self._level)

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {
                "version": 1,
                "status": self._status,
                "enable": self._enable,
                "control": self._control,
                "timer": self.timer(),
                "carry": self._carry,
            }

    def restore(self, state: dict[str, Any]) -> None:
        check_version(state, 1)
        status = saved_int(state, "status", 0, 0xFFFF)
        enable = saved_int(state, "enable", 0, 0xFFFF)
        control = saved_int(state, "control", 0, 0xFFFF)
        count = saved_int(state, "timer", 0, _COUNT_MASK)
        carry = saved_int(state, "carry", 0, 1)
        with self._lock:
            self._status, self._enable, self._carry = status, enable & _EVENTS, carry
            self._control = control & 0x1C02 | SCI_ENABLE
            self._start_ns, self._start_count = self._clock.now_ns(), count
            self._level = bool(self._status & self._enable)

    def inspect(self) -> dict[str, Any]:
        with self._lock:
            return {
                "status": self._status,
                "enable": self._enable,
                "control": self._control,
                "timer": self.timer(),
                "sci": self._level,
            }
