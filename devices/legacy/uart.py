"""The 16550A serial port.

Registers and interrupts follow the National Semiconductor PC16550D data sheet. A byte is sent in no time:
the transmitter is always empty. Received bytes raise the character timeout at once when they stay below
the FIFO's trigger level.
"""

from __future__ import annotations

import threading

from devices.legacy.ports import BytePorts
from devices.saved import check_version, saved_bool, saved_bytes, saved_int
from pyvmm.core.clock import Clock
from pyvmm.core.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.core.irq import IrqLine

# Register offsets (with DLAB clear) and their bits; data sheet table II.
_DATA, _IER, _IIR_FCR, _LCR, _MCR, _LSR, _MSR, _SCR = range(8)
IER_RDA, IER_THRE, IER_LINE, IER_MODEM = 1, 2, 4, 8
FCR_ENABLE, FCR_CLEAR_RX = 1, 2
LCR_DLAB = 0x80
MCR_OUT2, MCR_LOOP = 0x08, 0x10
LSR_DATA, LSR_OVERRUN, LSR_TX_IDLE = 0x01, 0x02, 0x60
IIR_NONE, IIR_MODEM, IIR_THRE, IIR_RDA, IIR_LINE, IIR_TIMEOUT, IIR_FIFOS = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C, 0xC0

_FIFO_SIZE = 16
_TRIGGER_LEVELS = (1, 4, 8, 14)
_MODEM_READY = 0xB0  # carrier, data set ready, clear to send

_BACKLOG_LIMIT = 4096
_FLUSH_BYTES = 1024
_FLUSH_DELAY_NS = 5_000_000


class Uart(Device, BytePorts):
    """One serial port: eight ports from its base address, one interrupt line.

    What the guest sends goes to `sink`, gathered: at the latest 5 ms after its first byte or when 1 KiB is there,
    if `call_at` (as `pyvmm.core.worker.Worker.call_at`) is given, else byte by byte. `sink` may block, which
    holds the guest back; it is never called by two threads at once.
    """

    def __init__(
        self,
        name: str,
        irq: IrqLine,
        sink: Callable[[bytes], object],
        clock: Clock | None = None,
        call_at: Callable[[int, Callable[[], None]], object] | None = None,
    ) -> None:
        super().__init__(self._read_register, self._write_register)
        self.name = name
        self._irq = irq
        self._sink = sink
        self._clock = clock or Clock()
        self._call_at = call_at
        self._lock = threading.Lock()
        self._sink_lock = threading.Lock()
        self._output = bytearray()
        self._backlog = bytearray()
        self._paused = False
        self._sent = 0
        self._received = 0
        self._power_on()

    def _power_on(self) -> None:
        self._ier = 0
        self._fcr = 0
        self._lcr = 0
        self._mcr = 0
        self._scratch = 0
        self._divisor = 0x000C
        self._lsr = LSR_TX_IDLE
        self._msr = _MODEM_READY
        self._fifo = bytearray()
        self._thre_pending = False
        self._line = False
        self._plain_transmit = True  # register 0 is the transmitter and leads outside

    # What the guest does. The two overrides are the paths of a polled console: one call for a byte or a status.

    def read(self, offset: int, size: int) -> int:
        if offset == _LSR and size == 1 and not self._lsr & LSR_OVERRUN:
            return self._lsr
        return super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset or size != 1 or not self._plain_transmit:
            super().write(offset, size, value)
            return
        with self._lock:
            gathered = self._transmit(value & 0xFF)
        if gathered == 1 or gathered >= _FLUSH_BYTES:
            self._output_grew(gathered)

    def _output_grew(self, gathered: int) -> None:
        if self._call_at is None or gathered >= _FLUSH_BYTES:
            self.flush()
        elif gathered == 1:
            self._call_at(self._clock.now_ns() + _FLUSH_DELAY_NS, self.flush)

    def _read_register(self, offset: int) -> int:
        with self._lock:
            if offset == _DATA:
                return self._divisor & 0xFF if self._lcr & LCR_DLAB else self._take_received()
            if offset == _IER:
                return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier
            if offset == _IIR_FCR:
                return self._read_iir()
            if offset == _LCR:
                return self._lcr
            if offset == _MCR:
                return self._mcr
            if offset == _LSR:
                value = self._lsr
                self._lsr &= ~LSR_OVERRUN
                self._update_line()
                return value
            if offset == _MSR:
                value = self._msr
                self._msr &= 0xF0
                self._update_line()
                return value
            return self._scratch if offset == _SCR else 0xFF

    def _write_register(self, offset: int, value: int) -> None:
        gathered = 0
        with self._lock:
            if offset == _DATA:
                if self._lcr & LCR_DLAB:
                    self._divisor = self._divisor & 0xFF00 | value
                else:
                    gathered = self._transmit(value)
            elif offset == _IER:
                if self._lcr & LCR_DLAB:
                    self._divisor = self._divisor & 0x00FF | value << 8
                else:
                    # Enabling the interrupt with an empty transmitter raises it, each time.
                    if value & ~self._ier & IER_THRE:
                        self._thre_pending = True
                    self._ier = value & 0x0F
            elif offset == _IIR_FCR:
                self._write_fcr(value)
            elif offset == _LCR:
                self._lcr = value
            elif offset == _MCR:
                self._write_mcr(value & 0x1F)
            elif offset == _SCR:
                self._scratch = value
            self._plain_transmit = not (self._lcr & LCR_DLAB or self._mcr & MCR_LOOP)
            self._update_line()
        if gathered:
            self._output_grew(gathered)

    def _transmit(self, value: int) -> int:
        """Send a byte; return how many wait for the sink now, 0 if it was looped back."""
        if not self._thre_pending:
            self._thre_pending = True
            self._update_line()
        if not self._mcr & MCR_LOOP:
            self._output.append(value)
            return len(self._output)
        if len(self._fifo) < self._fifo_size():
            self._fifo.append(value)
            self._lsr |= LSR_DATA
        else:
            self._lsr |= LSR_OVERRUN
        return 0

    def _take_received(self) -> int:
        value = self._fifo.pop(0) if self._fifo else 0
        self._fill_fifo()
        self._update_line()
        return value

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THRE:
            self._thre_pending = False
            self._update_line()
        return cause | (IIR_FIFOS if self._fcr & FCR_ENABLE else 0)

    def _write_fcr(self, value: int) -> None:
        if not value & FCR_ENABLE:
            value = 0  # the other bits are only taken together with this one
        if value & FCR_CLEAR_RX or (value ^ self._fcr) & FCR_ENABLE:
            self._fifo.clear()
        self._fcr = value & 0xC9
        self._fill_fifo()

    def _write_mcr(self, value: int) -> None:
        self._mcr = value
        if value & MCR_LOOP:
            # RTS, DTR, OUT1, OUT2 come back as CTS, DSR, RI, DCD.
            lines = (value & 2) << 3 | (value & 1) << 5 | (value & 4) << 4 | (value & 8) << 4
        else:
            lines = _MODEM_READY
        changed = (self._msr ^ lines) & 0xF0
        if lines & 0x40:
            changed &= ~0x40  # only the ring indicator's trailing edge counts
        self._msr = lines | self._msr & 0x0F | changed >> 4
        self._fill_fifo()

    # Interrupts and the receive FIFO; the lock is held.

    def _fifo_size(self) -> int:
        return _FIFO_SIZE if self._fcr & FCR_ENABLE else 1

    def _fill_fifo(self) -> None:
        """Move input into the FIFO while there is room; looped back, the line is cut off."""
        room = self._fifo_size() - len(self._fifo)
        if self._backlog and room > 0 and not self._paused and not self._mcr & MCR_LOOP:
            self._fifo += self._backlog[:room]
            del self._backlog[:room]
        self._lsr = self._lsr | LSR_DATA if self._fifo else self._lsr & ~LSR_DATA

    def _cause(self) -> int:
        enabled = self._ier
        if enabled & IER_LINE and self._lsr & LSR_OVERRUN:
            return IIR_LINE
        if enabled & IER_RDA and self._fifo:
            level = _TRIGGER_LEVELS[self._fcr >> 6] if self._fcr & FCR_ENABLE else 1
            return IIR_RDA if len(self._fifo) >= level else IIR_TIMEOUT
        if enabled & IER_THRE and self._thre_pending:
            return IIR_THRE
        if enabled & IER_MODEM and self._msr & 0x0F:
            return IIR_MODEM
        return IIR_NONE

    def _update_line(self) -> None:
        # On a PC the interrupt pin reaches the interrupt controller through a gate that OUT2 opens.
        level = bool(self._mcr & MCR_OUT2) and self._cause() != IIR_NONE
        if level != self._line:
            self._line = level
            self._irq.set(level)

    # What the host does.

    def receive(self, data: bytes) -> int:
        """Take input for the guest; return how many bytes there was room for. Any thread."""
        with self._lock:
            taken = min(len(data), _BACKLOG_LIMIT - len(self._backlog))
            self._backlog += data[:taken]
            self._received += taken
            self._fill_fifo()
            if not self._paused:
                self._update_line()
        return taken

    def flush(self) -> None:
        """Give the sink what the guest has sent. Any thread."""
        with self._sink_lock:
            with self._lock:
                chunk, self._output = self._output, bytearray()
                self._sent += len(chunk)
            if chunk:
                self._sink(bytes(chunk))

    # Life cycle.

    def reset(self) -> None:
        self.flush()
        with self._lock:
            self._power_on()
            self._irq.set(False)

    def pause(self) -> None:
        with self._lock:
            self._paused = True
        self.flush()

    def resume(self) -> None:
        with self._lock:
            self._paused = False
            self._fill_fifo()
            self._irq.set(self._line)
            self._update_line()

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {
                "version": 1,
                "ier": self._ier,
                "fcr": self._fcr,
                "lcr": self._lcr,
                "mcr": self._mcr,
                "lsr": self._lsr,
                "msr": self._msr,
                "scratch": self._scratch,
                "divisor": self._divisor,
                "fifo": bytes(self._fifo),
                "backlog": bytes(self._backlog),
                "thre_pending": self._thre_pending,
                "line": self._line,
            }

    def restore(self, state: dict[str, Any]) -> None:
        check_version(state, 1)
        registers = {key: saved_int(state, key, 0, 0xFF) for key in ("ier", "fcr", "lcr", "mcr", "lsr", "msr")}
        scratch = saved_int(state, "scratch", 0, 0xFF)
        divisor = saved_int(state, "divisor", 0, 0xFFFF)
        fifo = saved_bytes(state, "fifo", 0, _FIFO_SIZE)
        backlog = saved_bytes(state, "backlog", 0, _BACKLOG_LIMIT)
        thre_pending = saved_bool(state, "thre_pending")
        line = saved_bool(state, "line")
        with self._lock:
            self._ier = registers["ier"] & 0x0F
            self._fcr = registers["fcr"] & 0xC9
            self._lcr = registers["lcr"]
            self._mcr = registers["mcr"] & 0x1F
            self._lsr = LSR_TX_IDLE | registers["lsr"] & LSR_OVERRUN | (LSR_DATA if fifo else 0)
            self._msr = registers["msr"]
            self._scratch = scratch
            self._divisor = divisor
            self._fifo = bytearray(fifo)
            self._backlog = bytearray(backlog)
            self._thre_pending = thre_pending
            self._line = line
            self._plain_transmit = not (self._lcr & LCR_DLAB or self._mcr & MCR_LOOP)

    def inspect(self) -> dict[str, Any]:
        with self._lock:
            return {
                "divisor": self._divisor,
                "line_control": self._lcr,
                "modem_control": self._mcr,
                "interrupt_enable": self._ier,
                "interrupt": self._line,
                "fifos": bool(self._fcr & FCR_ENABLE),
                "bytes_sent": self._sent + len(self._output),
                "bytes_received": self._received,
                "input_waiting": len(self._fifo) + len(self._backlog),
            }
