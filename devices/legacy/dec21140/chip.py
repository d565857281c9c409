"""The 21140A as a state machine: its registers, and the receive and transmit processes. No I/O here.

Source: 21140A Hardware Reference Manual, chapters 3 (registers) and 4 (lists, processes).
"""

from __future__ import annotations

import struct
import threading

from devices.legacy.dec21140 import phy, serial_rom
from devices.legacy.dec21140 import registers as reg
from devices.legacy.dec21140.address_filter import SETUP_SIZE, AddressFilter
from devices.legacy.dec21140.descriptors import ERROR_SUMMARY, JABBER, LOSS_OF_CARRIER, NO_CARRIER, SETUP_DONE
from devices.legacy.dec21140.lists import (
    JABBERING,
    NOTHING,
    PARTIAL,
    SETUP_FRAME,
    Outgoing,
    ReceiveList,
    TransmitList,
)
from devices.legacy.dec21140.timer import GeneralPurposeTimer
from devices.saved import check_version, saved_bool, saved_bytes, saved_int
from pyvmm.core.memory import GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.core.clock import Clock
    from pyvmm.core.memory import GuestMemory

#: What `Chip.transmit` says: there may be more, nothing more can be done, or the network takes nothing now.
MORE, IDLE, BUSY = range(3)

# CSR9.
_SROM_SELECTED = 1 << 11
_SROM_PINS = serial_rom.SELECT | serial_rom.CLOCK | serial_rom.TO_ROM
_PHY_PINS = phy.CLOCK | phy.TO_PHY | phy.READING
#: Of a tick of CSR11: 100 Mb/s, 10 Mb/s by MII, 10 Mb/s serial.
_TICK_100_NS, _TICK_10_NS, _TICK_SERIAL_NS = 81_920, 819_200, 204_800
#: By CSR0<19:17>. A guest that wants its list looked at more often than each millisecond has to do with that.
_AUTO_POLL_NS = (0, 1_000_000, 1_000_000, 1_600_000, 1_000_000, 1_000_000, 1_000_000, 1_000_000)
#: Drivers that wait for TPS and RPS do so for 10 ms and more.
_TOLD_AFTER_NS = 5_000_000
_CSR_FORMAT = f"<{reg.CSRS}I"
_COUNTERS = ("sent", "sent_bytes", "received", "received_bytes", "filtered", "no_carrier", "missed")


class Chip:
    """One 21140A with its serial ROM and PHY.

    `interrupt` drives the interrupt pin. `wake` asks for `transmit` to be called, and for frames to be offered again to
    `receive`; both are called with the lock held. Other methods may be called from any thread.
    """

    def __init__(
        self,
        mac: bytes,
        memory: GuestMemory,
        clock: Clock,
        call_at: Callable[[int, Callable[[], None]], object],
        interrupt: Callable[[bool], None],
        wake: Callable[[], None],
    ) -> None:
        self._lock = threading.Lock()
        self._interrupt = interrupt
        self._wake = wake
        self._filter = AddressFilter()
        self._rom = serial_rom.SerialRom(mac)
        self._phy = phy.Phy()
        self._transmit_list = TransmitList(memory)
        self._receive_list = ReceiveList(memory)

        self._clock = clock
        self._call_at = call_at
        self._timer = GeneralPurposeTimer(clock, self._call_locked, lambda: self._raise(reg.GTE))
        self._bus_master = False
        self._level = False
        self.counters = dict.fromkeys(_COUNTERS, 0)
        self._reset()

    def _call_locked(self, deadline_ns: int, action: Callable[[], None]) -> None:
        def call() -> None:
            with self._lock:
                action()

        self._call_at(deadline_ns, call)

    def _reset(self) -> None:
        self._csr = list(reg.AFTER_RESET)
        self._status = 0
        self._receiving, self._transmitting = reg.STOPPED, reg.STOPPED
        #: A bus error was met: only a reset helps.
        self._failed = False
        self._untold = 0  # of TPS and RPS
        self._missed = 0
        self._directions, self._outputs = 0, 0
        self._signal_lost = False
        self._filter.reset()
        self._timer.stop()
        for process in (self._transmit_list, self._receive_list):
            process.start(0)
            process.skip = 0
        self._update_line()

    # Registers --------------------------------------------------------------------------------------------

    def read(self, number: int) -> int:
        """Read CSR `number`."""
        with self._lock:
            if number == reg.STATUS:
                return self._read_status()
            if number == reg.OPERATION:
                return self._csr[number] | self._filter.mode
            if number == reg.MISSED:
                missed, self._missed = self._missed, 0
                return self._csr[number] | missed
            if number == reg.SERIAL:
                return self._read_serial()
            if number == reg.TIMER:
                return self._csr[number] | self._timer.read()
            if number == reg.PINS:
                return self._csr[number] | self._read_pins()
            return self._csr[number]

    def write(self, number: int, value: int) -> None:
        """Write CSR `number`."""
        with self._lock:
            if number == reg.TIMER:
                self._timer.write(value & reg.WRITABLE[number], self._tick_ns())
                return
            mask = reg.WRITABLE[number]
            before = self._csr[number]
            self._csr[number] = before & ~mask | value & mask
            if number == reg.BUS_MODE:
                self._write_bus_mode(value)
            elif number == reg.TRANSMIT_POLL:
                self._resume_transmitting()
            elif number == reg.RECEIVE_POLL:
                self._wake()
            elif number == reg.RECEIVE_LIST:
                self._receive_list.start(value & mask)
            elif number == reg.TRANSMIT_LIST:
                self._transmit_list.start(value & mask)
            elif number == reg.STATUS:
                self._status &= ~value
                self._update_line()
            elif number == reg.OPERATION:
                self._write_operation(before)
            elif number == reg.INTERRUPTS:
                self._update_line()
            elif number == reg.SERIAL:
                self._write_serial(value)
            elif number == reg.PINS:
                self._write_pins(value)

    def _write_bus_mode(self, value: int) -> None:
        if value & reg.SOFTWARE_RESET:
            self._reset()
            return
        skip = 4 * (value >> reg.SKIP_SHIFT & reg.SKIP_MASK)
        self._transmit_list.skip = self._receive_list.skip = skip

    def _write_operation(self, before: int) -> None:
        changed = before ^ self._csr[reg.OPERATION]
        if changed & reg.SR:
            if not before & reg.SR:
                self._receiving = reg.STOPPED if self._failed else reg.RECEIVE_WAITING
                self._wake()
                self._untold &= ~reg.RPS
            elif self._receiving != reg.STOPPED:
                self._receiving = reg.STOPPED
                self._tell_later(reg.RPS)
        if changed & reg.ST:
            if not before & reg.ST:
                self._transmitting = reg.STOPPED if self._failed else reg.TRANSMIT_RUNNING
                self._wake()
                self._untold &= ~reg.TPS
            elif self._transmitting != reg.STOPPED:
                self._transmitting = reg.STOPPED
                self._tell_later(reg.TPS)

    def _tell_later(self, event: int) -> None:
        """A process has stopped, as its state shows; the event of that follows.

        Linux's interrupt handler starts the processes again on it, and who has stopped them and waits would miss it.
        """
        self._untold |= event
        self._call_locked(self._clock.now_ns() + _TOLD_AFTER_NS, self._tell)

    def _tell(self) -> None:
        events, self._untold = self._untold, 0
        self._raise(events)

    def _resume_transmitting(self) -> None:
        if self._transmitting == reg.TRANSMIT_SUSPENDED:
            self._transmitting = reg.TRANSMIT_RUNNING
        if self._transmitting == reg.TRANSMIT_RUNNING:
            self._wake()

    def _read_status(self) -> int:
        status = reg.STATUS_ONES | self._status | self._summary()
        status |= self._receiving << reg.RECEIVE_SHIFT | self._transmitting << reg.TRANSMIT_SHIFT
        return status | (reg.MASTER_ABORT << reg.ERROR_SHIFT if self._status & reg.FBE else 0)

    def _read_serial(self) -> int:
        value = self._csr[reg.SERIAL] & ~(serial_rom.FROM_ROM | phy.FROM_PHY)
        value |= serial_rom.FROM_ROM if self._rom.output else 0
        return value | (phy.FROM_PHY if self._phy.output else 0)

    def _write_serial(self, value: int) -> None:
        self._rom.drive(value & _SROM_PINS if value & _SROM_SELECTED else 0)
        self._phy.drive(value & _PHY_PINS)

    def _read_pins(self) -> int:
        inputs = serial_rom.PIN_NO_LINK_10
        if self._phy.link and not self._signal_lost:
            inputs |= serial_rom.PIN_SIGNAL
        self._signal_lost = False
        return self._outputs & self._directions | inputs & ~self._directions

    def _write_pins(self, value: int) -> None:
        if value & reg.PIN_DIRECTIONS:
            self._directions = value & 0xFF
        else:
            self._outputs = value & 0xFF

    def _tick_ns(self) -> int:
        if not self._csr[reg.OPERATION] & reg.PS:
            return _TICK_SERIAL_NS
        return _TICK_10_NS if self._csr[reg.OPERATION] & reg.TTM else _TICK_100_NS

    # Interrupts -------------------------------------------------------------------------------------------

    def _summary(self) -> int:
        unmasked = self._status & self._csr[reg.INTERRUPTS]
        return (reg.NIS if unmasked & reg.NORMAL else 0) | (reg.AIS if unmasked & reg.ABNORMAL else 0)

    def _update_line(self) -> None:
        level = bool(self._summary() & self._csr[reg.INTERRUPTS])
        if level != self._level:
            self._level = level
            self._interrupt(level)

    def _raise(self, events: int) -> None:
        self._status |= events
        self._update_line()

    def _fail(self) -> None:
        """The bus did not answer: the chip keeps off it until it is reset."""
        self._failed = True
        self._receiving = self._transmitting = reg.STOPPED
        self._raise(reg.FBE)

    # Transmitting -----------------------------------------------------------------------------------------

    def transmit(self, send: Callable[[bytes], bool]) -> int:
        """Carry out what comes next in the transmit list; return MORE, IDLE or BUSY.

        `send` gets a frame without its FCS and returns whether it took it; if not, the frame comes again.
        """
        with self._lock:
            if self._transmitting != reg.TRANSMIT_RUNNING or not self._bus_master:
                return IDLE
            try:
                request = self._transmit_list.peek()
                if request is None or request.kind == PARTIAL:
                    self._transmitting = reg.TRANSMIT_SUSPENDED
                    self._raise(reg.TU if request is None else reg.TU | reg.UNF)
                    return IDLE
                return self._carry_out(request, send)
            except GuestMemoryError:
                self._fail()
                return IDLE

    def _carry_out(self, request: Outgoing, send: Callable[[bytes], bool]) -> int:
        status = 0
        if request.kind == SETUP_FRAME:
            if len(request.data) == SETUP_SIZE:
                self._filter.set_up(request.data, request.filtering_type)
            status = SETUP_DONE
        elif request.kind == JABBERING:
            status = ERROR_SUMMARY | JABBER
        elif request.kind != NOTHING:
            loopback = self._csr[reg.OPERATION] >> reg.LOOPBACK_SHIFT & reg.LOOPBACK_MASK
            if loopback:
                if not self._receive(request.data, loopback):
                    self._miss(1)
            elif not self._phy.link:
                status = ERROR_SUMMARY | LOSS_OF_CARRIER | NO_CARRIER
                self.counters["no_carrier"] += 1
            elif send(request.data):
                self.counters["sent"] += 1
                self.counters["sent_bytes"] += len(request.data)
            else:
                return BUSY
        self._transmit_list.close(request, status)
        if request.on_completion:
            self._raise(reg.TI)
        if request.kind == JABBERING:
            self._transmitting = reg.STOPPED
            self._raise(reg.TJT | reg.TPS)
        return MORE

    def auto_poll_ns(self) -> int:
        """When the guest wants `auto_poll` to be called, in nanoseconds from now; 0 for never."""
        with self._lock:
            return self._auto_poll_ns()

    def auto_poll(self) -> None:
        """Look at a transmit list again at which nothing was to be done, if the guest wants that."""
        with self._lock:
            if self._auto_poll_ns():
                self._transmitting = reg.TRANSMIT_RUNNING

    def _auto_poll_ns(self) -> int:
        if self._transmitting != reg.TRANSMIT_SUSPENDED:
            return 0
        return _AUTO_POLL_NS[self._csr[reg.BUS_MODE] >> reg.AUTO_POLL_SHIFT & reg.AUTO_POLL_MASK]

    # Receiving --------------------------------------------------------------------------------------------

    def receive(self, frame: bytes) -> bool:
        """Take a frame without its FCS from the network; False if the guest has no room for it now."""
        with self._lock:
            try:
                return not self._bus_master or self._receive(frame, 0)
            except GuestMemoryError:
                self._fail()
                return True

    def _receive(self, frame: bytes, data_type: int) -> bool:
        if self._receiving == reg.STOPPED:
            return True
        operation = self._csr[reg.OPERATION]
        failed = not self._filter.takes(frame[:6])
        if failed and not (operation & (reg.PR | reg.RA) or (operation & reg.PM and frame[0] & 1)):
            self.counters["filtered"] += 1
            return True
        if not self._receive_list.store(frame, data_type, failed):
            if self._receiving != reg.RECEIVE_SUSPENDED:
                self._receiving = reg.RECEIVE_SUSPENDED
                self._raise(reg.RU)
            return False
        self._receiving = reg.RECEIVE_WAITING
        self.counters["received"] += 1
        self.counters["received_bytes"] += len(frame)
        self._raise(reg.RI)
        return True

    def miss(self, frames: int) -> None:
        """Frames were lost as the guest had no room for them for too long."""
        with self._lock:
            self._miss(frames)

    def _miss(self, frames: int) -> None:
        self.counters["missed"] += frames
        missed = (self._missed & reg.MISSED_MASK) + frames
        overflow = self._missed & reg.MISSED_OVERFLOW or (reg.MISSED_OVERFLOW if missed > reg.MISSED_MASK else 0)
        self._missed = missed & reg.MISSED_MASK | overflow

    # Around it --------------------------------------------------------------------------------------------

    def set_link(self, up: bool) -> None:
        """The cable is plugged in or not. A guest that looks afterwards hears of a loss even if it is over."""
        with self._lock:
            self._signal_lost |= self._phy.link and not up
            self._phy.set_link(up)

    def set_bus_master(self, allowed: bool) -> None:
        """Whether the chip may reach memory."""
        with self._lock:
            if allowed and not self._bus_master:
                self._wake()
            self._bus_master = allowed

    def reset(self) -> None:
        """The power-on state."""
        with self._lock:
            self._reset()

    def resume(self) -> None:
        """Drive the interrupt pin again, and go on."""
        with self._lock:
            self._interrupt(self._level)
            self._wake()

    def save(self) -> dict[str, Any]:
        """Return the state, but for the link, as plain data."""
        with self._lock:
            return {
                "version": 1,
                "csr": struct.pack(_CSR_FORMAT, *self._csr),
                "status": self._status,
                "receiving": self._receiving,
                "transmitting": self._transmitting,
                "failed": self._failed,
                "untold": self._untold,
                "missed": self._missed,
                "directions": self._directions,
                "outputs": self._outputs,
                "signal_lost": self._signal_lost,
                "receive_list": self._receive_list.save(),
                "transmit_list": self._transmit_list.save(),
                "filter": self._filter.save(),
                "rom": self._rom.save(),
                "phy": self._phy.save(),
                "timer": self._timer.save(),
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; raise ValueError if it does not fit."""
        check_version(state, 1)
        size = struct.calcsize(_CSR_FORMAT)
        csr = struct.unpack(_CSR_FORMAT, saved_bytes(state, "csr", size, size))
        for number, value in enumerate(csr):
            if (value ^ reg.AFTER_RESET[number]) & ~reg.WRITABLE[number]:
                raise ValueError(f"saved state: CSR{number} cannot be {value:#x}")
        with self._lock:
            self._csr = list(csr)
            self._status = saved_int(state, "status", 0, reg.EVENTS)
            self._receiving = saved_int(state, "receiving", 0, 7)
            self._transmitting = saved_int(state, "transmitting", 0, 7)
            self._failed = saved_bool(state, "failed")
            self._untold = saved_int(state, "untold", 0, reg.TPS | reg.RPS)
            self._missed = saved_int(state, "missed", 0, reg.MISSED_OVERFLOW | reg.MISSED_MASK)
            self._directions = saved_int(state, "directions", 0, 0xFF)
            self._outputs = saved_int(state, "outputs", 0, 0xFF)
            self._signal_lost = saved_bool(state, "signal_lost")
            for key, part in (
                ("receive_list", self._receive_list),
                ("transmit_list", self._transmit_list),
                ("filter", self._filter),
                ("rom", self._rom),
                ("phy", self._phy),
                ("timer", self._timer),
            ):
                saved = state.get(key)
                if type(saved) is not dict:
                    raise ValueError(f"saved state: no {key} of a 21140")
                part.restore(saved)
            self._level = bool(self._summary() & self._csr[reg.INTERRUPTS])
            if self._untold:
                self._tell_later(self._untold)

    def inspect(self) -> dict[str, Any]:
        """Return live state for people and tools, as plain JSON data."""
        with self._lock:
            return {
                "status": f"{self._read_status():#x}",
                "operation": f"{self._csr[reg.OPERATION] | self._filter.mode:#x}",
                "interrupts": f"{self._csr[reg.INTERRUPTS]:#x}",
                "receive_list": f"{self._receive_list.position:#x}",
                "transmit_list": f"{self._transmit_list.position:#x}",
                **self.counters,
            }
