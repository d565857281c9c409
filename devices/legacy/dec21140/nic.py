"""The legacy network adapter on the PCI bus: a 21140A whose cable is a port of a network.

Sources: 21140A Hardware Reference Manual, chapter 3 (configuration registers); what Linux guests of Virtual PC and
Hyper-V report of it (lspci, dmesg): 00:0a.0, further adapters as functions 1 to 3 of the same device, revision 0x20.
"""

from __future__ import annotations

import os
import threading

from devices.legacy.dec21140 import registers as reg
from devices.legacy.dec21140.chip import BUSY, MORE, Chip
from devices.legacy.dec21140.lists import MAX_FRAME
from devices.legacy.dec21140.serial_rom import SUBSYSTEM
from devices.legacy.pci import BUS_MASTER, COMMAND, IO_SPACE, MEMORY_SPACE, ROM_BAR, SUBSYSTEM_IDS, Bar, PciFunction
from devices.network.port import GSO_NONE, VNET_HEADER_SIZE, VNET_NEEDS_CSUM, Nic
from pyvmm.core.bus import BusHandler

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from devices.network.port import Port
    from pyvmm.core.clock import Clock
    from pyvmm.core.memory import GuestMemory
    from pyvmm.core.worker import Worker

_MEMORY_SIZE = 4096
#: Bits of CBER: 256 KiB of boot ROM, of which there is nothing on the board.
_ROM_MASK = 0xFFFC_0001
_PARITY, _SERR, _INVALIDATE = 0x40, 0x100, 0x10
#: Frames that one call of the worker moves each way, so that others have their turn.
_BATCH = 64
#: How long a frame waits for room at the other end, and how often it is tried meanwhile.
_PATIENCE_NS, _RETRY_NS = 20_000_000, 1_000_000
_NO_HEADER = bytes(VNET_HEADER_SIZE)
_HEADER = 14


class _Registers(BusHandler):
    """The CSRs, which only double words change."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip

    def read(self, offset: int, size: int) -> int:
        if offset >= reg.SPACE:
            return reg.ONES
        return self.chip.read(offset >> 3) >> 8 * (offset & 3) if not offset & 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset < reg.SPACE and not offset & 7 and size >= 4:
            self.chip.write(offset >> 3, value & reg.ONES)


class Dec21140(PciFunction, Nic):
    """A legacy NIC called `name` with the address `mac`. `worker` is its own; it moves the frames."""

    def __init__(self, name: str, mac: bytes, memory: GuestMemory, worker: Worker, clock: Clock) -> None:
        super().__init__(name, (0x1011, 0x0009), 0x020000, 0x20)
        self.mac = mac
        self._worker = worker
        self._clock = clock
        self.chip = Chip(mac, memory, clock, worker.call_at, self._interrupt_is, self._wake)
        self.define(COMMAND, 2, IO_SPACE | MEMORY_SPACE, 0x7 | _PARITY | _SERR | _INVALIDATE)
        self.define(0x0C, 2, 0, 0xFFFF)  # cache line size, latency timer
        for index, value in enumerate(SUBSYSTEM):
            self.define(SUBSYSTEM_IDS + 2 * index, 2, value)
        self.define(ROM_BAR, 4, 0, _ROM_MASK)
        self.define(0x3E, 2, 0x2814)  # the latencies that it wants
        self.define(0x40, 4, 0, 0xC000_FF00)  # CFDD: sleep and snooze, and a byte for drivers
        #: Guards the port, and what waits to pass it.
        self._lock = threading.Lock()
        self._port: Port | None = None
        self._link = True
        self._woken = False
        self._buffer = bytearray(VNET_HEADER_SIZE + MAX_FRAME + 1)
        self._held: bytes | None = None  # a frame for which the guest has no room
        self._receive_until: int | None = None  # when that is missed, and when what cannot be sent is dropped
        self._send_until: int | None = None
        self._waiting = False
        self._dropped = 0
        worker.start()

    def place_registers(self, ports: int, memory: int, number: int) -> None:
        """Say where the registers stand at power-on: those of the NIC `number` from `ports` and `memory` on."""
        registers = _Registers(self.chip)
        self.define_bar(0, Bar(reg.SPACE, registers, f"{self.name} registers"), ports + number * reg.SPACE)
        base = memory + number * _MEMORY_SIZE
        self.define_bar(1, Bar(_MEMORY_SIZE, registers, f"{self.name} registers", memory=True), base)

    def write_config(self, offset: int, value: int) -> None:
        super().write_config(offset, value)
        if offset == COMMAND:
            self.chip.set_bus_master(bool(self.command & BUS_MASTER))

    def _interrupt_is(self, level: bool) -> None:
        self.interrupt.set(level)

    # Frames: on the worker --------------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._worker.call_soon(self._work)

    def _work(self) -> None:
        self._woken = False
        self._transmit()
        self._receive()

    def _try_again_in(self, delay_ns: int) -> None:
        if not self._waiting:
            self._waiting = True
            self._worker.call_at(self._clock.now_ns() + delay_ns, self._try_again)

    def _try_again(self) -> None:
        self._waiting = False
        self.chip.auto_poll()
        self._work()

    def _transmit(self) -> None:
        for _ in range(_BATCH):
            with self._lock:
                done = self.chip.transmit(self._send)
            if done == MORE:
                continue
            delay_ns = _RETRY_NS if done == BUSY else self.chip.auto_poll_ns()
            if delay_ns:
                self._try_again_in(delay_ns)
            return
        self._wake()

    def _send(self, frame: bytes) -> bool:
        assert self._port is not None  # the chip sends only while there is a link
        try:
            os.write(self._port.fd, _NO_HEADER + frame)
        except BlockingIOError:
            now = self._clock.now_ns()
            if self._send_until is None:
                self._send_until = now + _PATIENCE_NS
            if now < self._send_until:
                return False
            self._dropped += 1
        except OSError:  # the network is gone, or does not want it
            self._dropped += 1
        self._send_until = None
        return True

    def _receive(self) -> None:
        for _ in range(_BATCH):
            with self._lock:
                frame, self._held = self._held, None
                if frame is None:
                    frame = self._next_frame()
                if frame is None:
                    return
                if self._offer(frame):
                    continue
                self._held = frame
            self._try_again_in(_RETRY_NS)
            return
        self._wake()

    def _offer(self, frame: bytes) -> bool:
        """Give a frame to the chip; return whether it is done with."""
        if not frame:
            self._dropped += 1
        elif self.chip.receive(frame):
            self._receive_until = None
        else:
            now = self._clock.now_ns()
            if self._receive_until is None:
                self._receive_until = now + _PATIENCE_NS
            if now < self._receive_until:
                return False
            self.chip.miss(1)
        return True

    def _next_frame(self) -> bytes | None:
        """Read a frame; None if there is none, empty if it is none for this NIC."""
        if self._port is None:
            return None
        try:
            size = os.readv(self._port.fd, [self._buffer])
        except OSError:  # for now, or for good
            return None
        if not size:
            return None
        whole = not self._buffer[0] & VNET_NEEDS_CSUM and self._buffer[1] == GSO_NONE
        if not whole or not self._link or not _HEADER <= size - VNET_HEADER_SIZE <= MAX_FRAME:
            return b""
        return bytes(self._buffer[VNET_HEADER_SIZE:size])

    # The cable: any thread --------------------------------------------------------------------------------

    def connect(self, port: Port | None) -> Port | None:
        if port is not None:
            port.set_offloads(0)
        with self._lock:
            before, self._port = self._port, None
            self._held = self._send_until = self._receive_until = None
            self.chip.set_link(False)
            if before is not None:
                self._worker.remove_event(before.fd)
            self._port = port
            if port is not None:
                self._worker.add_file(port.fd, self._receive)
            self.chip.set_link(self._carrier())
        return before

    def set_link(self, up: bool) -> None:
        with self._lock:
            self._link = up
            self.chip.set_link(self._carrier())

    def _carrier(self) -> bool:
        return self._link and self._port is not None

    # Life cycle -------------------------------------------------------------------------------------------

    def reset(self) -> None:
        super().reset()
        self.chip.reset()
        self.chip.set_bus_master(bool(self.command & BUS_MASTER))

    def pause(self) -> None:
        self._worker.pause()

    def resume(self) -> None:
        self.chip.resume()  # edges that came meanwhile are looked for
        self._worker.resume()

    def close(self) -> None:
        self._worker.stop()

    def save(self) -> dict[str, Any]:
        return {**super().save(), "chip": self.chip.save()}

    def restore(self, state: dict[str, Any]) -> None:
        chip = state.get("chip")
        if type(chip) is not dict:
            raise ValueError(f"saved state: {self.name} has no 21140")
        super().restore(state)
        self.chip.restore(chip)
        self.chip.set_bus_master(bool(self.command & BUS_MASTER))

    def inspect(self) -> dict[str, Any]:
        port = self._port
        return {
            **super().inspect(),
            "mac": self.mac.hex(":"),
            "link": self._carrier(),
            "port": port.inspect() if port is not None else None,
            **self.chip.inspect(),
            "dropped": self._dropped,
        }
