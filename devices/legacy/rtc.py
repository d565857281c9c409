"""The MC146818 real-time clock and its CMOS memory, ports 0x70 and 0x71.

Registers and interrupts follow the Motorola MC146818A data sheet; the memory size bytes are those that
SeaBIOS reads (its docs and `src/fw/paravirt.c`), and the century is where ACPI's FADT says it is, byte 0x32.
The day of the week always fits the date.
"""

from __future__ import annotations

import threading
import time

from devices.legacy.ports import BytePorts
from devices.saved import check_version, saved_bytes, saved_int
from pyvmm.core.clock import Clock
from pyvmm.core.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from devices.legacy.ports import PortRange
    from pyvmm.core.irq import IrqLine

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = range(10, 14)
CENTURY = 0x32
_TIME_REGISTERS = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)

A_UPDATE = 0x80
B_24_HOURS, B_BINARY, B_SET = 0x02, 0x04, 0x80
# Interrupt enables in register B and flags in register C have the same places.
UPDATE_ENDED, ALARM, PERIODIC, _ANY = 0x10, 0x20, 0x40, 0x70
C_INTERRUPT = 0x80
D_VALID = 0x80

_SECOND = 1_000_000_000
# With a 32.768 kHz crystal an update takes 1984 us and is announced 244 us before.
_UPDATE_NS = 2_228_000
# What the seven time registers can express: 1 Jan 0000 to 31 Dec 9999, in seconds since 1970.
_EARLIEST, _LATEST = -62_167_219_200, 253_402_300_799
_OFFSET_LIMIT = 1 << 70

Fields = tuple[int, int, int, int, int, int]
"""Year, month, day, hour, minute, second."""


def _days(year: int, month: int, day: int) -> int:
    """Days from 1 Jan 1970 to a date of the Gregorian calendar; the day may lie outside its month."""
    year -= month <= 2
    era_day = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    return year * 365 + year // 4 - year // 100 + year // 400 + era_day - 719468


def _seconds(fields: Fields) -> int:
    year, month, day, hour, minute, second = fields
    return _days(year, min(max(month, 1), 12), day) * 86400 + hour * 3600 + minute * 60 + second


class Rtc(Device):
    """The clock shows UTC of the host plus what the guest set it ahead.

    `memory_below_4g` and `memory_above_4g` are RAM in bytes, told to firmware through CMOS memory. Interrupts
    need `call_at` (as `pyvmm.core.worker.Worker.call_at`); without it only the flags in register C are set.
    """

    name = "rtc"

    def __init__(
        self,
        irq: IrqLine,
        memory_below_4g: int,
        memory_above_4g: int = 0,
        cpus: int = 1,
        clock: Clock | None = None,
        call_at: Callable[[int, Callable[[], None]], object] | None = None,
    ) -> None:
        self._irq = irq
        self._clock = clock or Clock()
        self._call_at = call_at
        self._lock = threading.Lock()
        self._paused = False
        self._offset_ns = 0
        self._armed: int | None = None  # when the timer goes off; a timer that finds another value does nothing
        self._cmos = bytearray(128)
        self._set_sizes(memory_below_4g, memory_above_4g, cpus)
        self._power_on()

    def _set_sizes(self, below: int, above: int, cpus: int) -> None:
        cmos = self._cmos
        cmos[0x14] = 0x06  # a mouse port and a floating-point unit
        cmos[0x15:0x17] = (640).to_bytes(2, "little")
        extended = min(max(below - (1 << 20), 0) >> 10, 0xFFFF).to_bytes(2, "little")
        cmos[0x17:0x19] = extended
        cmos[0x30:0x32] = extended
        cmos[0x34:0x36] = min(max(below - (16 << 20), 0) >> 16, 0xFFFF).to_bytes(2, "little")
        cmos[0x5B:0x5E] = min(above >> 16, 0xFFFFFF).to_bytes(3, "little")
        cmos[0x5F] = min(cpus - 1, 0xFF)

    def _power_on(self) -> None:
        self._index = 0
        self._cmos[REGISTER_A] = 0x26
        self._cmos[REGISTER_B] = B_24_HOURS
        self._cmos[REGISTER_C] = 0
        self._cmos[REGISTER_D] = D_VALID
        self._line = False
        self._seen_ns = self._now_ns()

    def ports(self) -> list[PortRange]:
        """The I/O ports to register."""
        return [(0x70, 2, BytePorts(self._read_port, self._write_port), self.name)]

    def _read_port(self, offset: int) -> int:
        return self._read_cmos(self._index) if offset else 0xFF

    def _write_port(self, offset: int, value: int) -> None:
        if offset:
            self._write_cmos(self._index, value)
        else:
            self._index = value & 0x7F  # bit 7 would mask NMIs; nothing here raises any

    def _read_cmos(self, index: int) -> int:
        with self._lock:
            now = self._now_ns()
            if index in _TIME_REGISTERS:
                if not self._cmos[REGISTER_B] & B_SET:
                    self._show_time(now // _SECOND)
                return self._cmos[index]
            if index == REGISTER_A:
                updating = not self._cmos[REGISTER_B] & B_SET and now % _SECOND >= _SECOND - _UPDATE_NS
                return self._cmos[REGISTER_A] | (A_UPDATE if updating else 0)
            if index == REGISTER_C:
                self._raise_flags(now)
                value = self._cmos[REGISTER_C]
                self._cmos[REGISTER_C] = 0
                self._update_line()
                self._arm(now)
                return value
            return self._cmos[index]

    def _write_cmos(self, index: int, value: int) -> None:
        with self._lock:
            now = self._now_ns()
            if index in _TIME_REGISTERS:
                stopped = self._cmos[REGISTER_B] & B_SET
                if not stopped:
                    self._show_time(now // _SECOND)
                self._cmos[index] = value
                if not stopped:
                    self._take_time(now)
            elif index in (REGISTER_A, REGISTER_B):
                self._raise_flags(now)
                if index == REGISTER_A:
                    self._cmos[REGISTER_A] = value & ~A_UPDATE
                else:
                    self._write_register_b(value, now)
                self._update_line()
            elif index not in (REGISTER_C, REGISTER_D):
                self._cmos[index] = value
            if index <= REGISTER_B:
                self._arm(self._now_ns())

    def _write_register_b(self, value: int, now: int) -> None:
        before = self._cmos[REGISTER_B]
        if value & B_SET:
            if not before & B_SET:
                self._show_time(now // _SECOND)
            value &= ~UPDATE_ENDED  # the data sheet: setting SET clears the update-ended enable
        self._cmos[REGISTER_B] = value
        if before & B_SET and not value & B_SET:
            self._take_time(now)

    # Time and its two codings; the lock is held.

    def _now_ns(self) -> int:
        """The time that the clock shows, in nanoseconds since 1970."""
        now = self._clock.utc_ns() + self._offset_ns
        return min(max(now, _EARLIEST * _SECOND), _LATEST * _SECOND)

    def _encode(self, value: int) -> int:
        return value if self._cmos[REGISTER_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._cmos[REGISTER_B] & B_BINARY else (value >> 4) * 10 + (value & 0x0F)

    def _encode_hour(self, hour: int) -> int:
        if self._cmos[REGISTER_B] & B_24_HOURS:
            return self._encode(hour)
        return self._encode((hour + 11) % 12 + 1) | (0x80 if hour >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self._cmos[REGISTER_B] & B_24_HOURS:
            return self._decode(value)
        return self._decode(value & 0x7F) % 12 + (12 if value & 0x80 else 0)

    def _show_time(self, seconds: int) -> None:
        """Put a time into the time registers."""
        date = time.gmtime(seconds)
        cmos = self._cmos
        cmos[SECONDS] = self._encode(date.tm_sec)
        cmos[MINUTES] = self._encode(date.tm_min)
        cmos[HOURS] = self._encode_hour(date.tm_hour)
        cmos[WEEKDAY] = self._encode((date.tm_wday + 1) % 7 + 1)  # Sunday is day 1
        cmos[DAY] = self._encode(date.tm_mday)
        cmos[MONTH] = self._encode(date.tm_mon)
        cmos[YEAR] = self._encode(date.tm_year % 100)
        cmos[CENTURY] = self._encode(date.tm_year // 100)

    def _take_time(self, now: int) -> None:
        """Go on from what the time registers hold."""
        cmos = self._cmos
        fields = (
            self._decode(cmos[CENTURY]) * 100 + self._decode(cmos[YEAR]),
            self._decode(cmos[MONTH]),
            self._decode(cmos[DAY]),
            self._decode_hour(cmos[HOURS]),
            self._decode(cmos[MINUTES]),
            self._decode(cmos[SECONDS]),
        )
        shift = _seconds(fields) - now // _SECOND
        if shift:
            self._offset_ns = now + shift * _SECOND - self._clock.utc_ns()
            self._seen_ns = self._now_ns()

    # Flags and interrupts; the lock is held.

    def _period_ns(self) -> int:
        """The periodic interrupt's period, 0 when it is off."""
        rate = self._cmos[REGISTER_A] & 0x0F
        if rate == 0:
            return 0
        return (1 << (rate + 6 if rate < 3 else rate - 1)) * _SECOND // 32768

    def _next_alarm(self, after: int) -> int | None:
        """The first second later than `after` that the alarm registers match; None if there is none."""
        cmos = self._cmos
        hour = None if cmos[HOURS_ALARM] >= 0xC0 else self._decode_hour(cmos[HOURS_ALARM])
        minute = None if cmos[MINUTES_ALARM] >= 0xC0 else self._decode(cmos[MINUTES_ALARM])
        second = None if cmos[SECONDS_ALARM] >= 0xC0 else self._decode(cmos[SECONDS_ALARM])
        if (hour or 0) > 23 or (minute or 0) > 59 or (second or 0) > 59:
            return None
        start = after + 1
        midnight = start - start % 86400
        for day in (midnight, midnight + 86400):
            for h in range(24) if hour is None else (hour,):
                if day + h * 3600 + 3599 < start:
                    continue
                for m in range(60) if minute is None else (minute,):
                    first = day + h * 3600 + m * 60
                    match = max(first, start) if second is None else first + second
                    if start <= match < first + 60:
                        return match
        return None

    def _raise_flags(self, now: int) -> None:
        """Set the flags in register C of all that happened since the last call."""
        seen, self._seen_ns = self._seen_ns, now
        if now <= seen:
            return
        flags = 0
        period = self._period_ns()
        if period and now // period != seen // period:
            flags |= PERIODIC
        if not self._cmos[REGISTER_B] & B_SET and now // _SECOND != seen // _SECOND:
            flags |= UPDATE_ENDED
            alarm = self._next_alarm(seen // _SECOND)
            if alarm is not None and alarm <= now // _SECOND:
                flags |= ALARM
        self._cmos[REGISTER_C] |= flags

    def _update_line(self) -> None:
        level = bool(self._cmos[REGISTER_C] & self._cmos[REGISTER_B] & _ANY)
        if level:
            self._cmos[REGISTER_C] |= C_INTERRUPT
        else:
            self._cmos[REGISTER_C] &= ~C_INTERRUPT & 0xFF
        if level != self._line:
            self._line = level
            self._irq.set(level)

    def _arm(self, now: int) -> None:
        """Have the timer go off by the next enabled interrupt, unless one waits to be acknowledged.

        A timer that goes off too early is harmless, so one that runs is only replaced by an earlier one, and none runs
        for more than a second: whatever the guest writes, timers do not pile up.
        """
        enabled = self._cmos[REGISTER_B] & _ANY
        if self._call_at is None or self._paused or not enabled or self._cmos[REGISTER_C] & C_INTERRUPT:
            return
        times = []
        period = self._period_ns()
        if enabled & PERIODIC and period:
            times.append(now - now % period + period)
        alarmed = enabled & ALARM and self._next_alarm(now // _SECOND) is not None
        if not self._cmos[REGISTER_B] & B_SET and (enabled & UPDATE_ENDED or alarmed):
            times.append(now - now % _SECOND + _SECOND)
        if not times:
            return
        deadline = self._clock.now_ns() + min(times) - now
        if self._armed is None or deadline < self._armed:
            self._armed = deadline
            self._call_at(deadline, lambda: self._timer(deadline))

    def _timer(self, deadline: int) -> None:
        with self._lock:
            if deadline != self._armed:
                return
            self._armed = None
            if not self._paused:
                now = self._now_ns()
                self._raise_flags(now)
                self._update_line()
                self._arm(now)

    # Life cycle.

    def reset(self) -> None:
        """The board's reset: CMOS memory, the time and the shutdown status byte (0x0f) live on their battery."""
        with self._lock:
            self._power_on()
            self._irq.set(False)

    def pause(self) -> None:
        with self._lock:
            self._paused = True

    def resume(self) -> None:
        with self._lock:
            self._paused = False
            now = self._now_ns()
            self._seen_ns = now  # interrupts missed in the pause are not made up for
            self._irq.set(self._line)
            self._update_line()
            self._arm(now)

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {"version": 1, "index": self._index, "offset_ns": self._offset_ns, "cmos": bytes(self._cmos)}

    def restore(self, state: dict[str, Any]) -> None:
        check_version(state, 1)
        index = saved_int(state, "index", 0, 0x7F)
        offset_ns = saved_int(state, "offset_ns", -_OFFSET_LIMIT, _OFFSET_LIMIT)
        cmos = saved_bytes(state, "cmos", 128, 128)
        with self._lock:
            self._index = index
            self._offset_ns = offset_ns
            self._cmos[:] = cmos
            self._line = bool(cmos[REGISTER_C] & C_INTERRUPT)
            self._seen_ns = self._now_ns()

    def inspect(self) -> dict[str, Any]:
        with self._lock:
            now = self._now_ns() // _SECOND
            return {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
                "ahead_of_host_seconds": self._offset_ns / _SECOND,
                "register_a": self._cmos[REGISTER_A],
                "register_b": self._cmos[REGISTER_B],
                "register_c": self._cmos[REGISTER_C],
                "shutdown_status": self._cmos[0x0F],
            }
