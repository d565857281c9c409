"""A guest's driver of the 21140, without a machine, and the network at the end of its cable."""

from __future__ import annotations

import os
import select
import socket
import struct
import zlib
from typing import TYPE_CHECKING, Any, cast

from devices.legacy.chipset import IsaBridge
from devices.legacy.dec21140 import descriptors as d
from devices.legacy.dec21140 import registers as reg
from devices.legacy.dec21140.nic import Dec21140
from devices.legacy.pci import COMMAND, PciBus
from devices.network.port import VNET_HEADER_SIZE, Port
from pyvmm.core.bus import Bus
from pyvmm.core.memory import GuestMemory
from tests.fakes.board import ManualClock, ManualTimers, RecordingLine
from tests.fakes.ide import ManualWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MIB = 1 << 20
PORTS, MMIO = 0xEC00, 0xC000_0000
MAC = bytes.fromhex("00155d000102")
BROADCAST = b"\xff" * 6
#: Where the driver keeps its lists and buffers.
RECEIVE_RING, TRANSMIT_RING, SETUP, TRANSMIT_BUFFERS, RECEIVE_BUFFERS = 0x1000, 0x2000, 0x3000, 0x10000, 0x40000
BUFFER = 0x800
EVERYTHING = 0x0001_FFFF
STATES = 7 << reg.RECEIVE_SHIFT | 7 << reg.TRANSMIT_SHIFT


class TulipWorker(ManualWorker):
    """A worker whose files are looked at in `work`, and whose timers are moved by hand."""

    def __init__(self, name: str, clock: ManualClock) -> None:
        super().__init__(name)
        self.timers = ManualTimers(clock)
        self.call_at = self.timers.call_at
        self.files: dict[int, Callable[[], None]] = {}

    def add_file(self, fd: int, callback: Callable[[], None]) -> None:
        self.files[fd] = callback

    def remove_event(self, fd: int) -> None:
        del self.files[fd]

    def work(self) -> None:
        super().work()
        for fd, callback in list(self.files.items()):
            if select.select([fd], [], [], 0)[0]:
                callback()
        super().work()


class Wire(Port):
    """A port; `other` is the network's end."""

    def __init__(self) -> None:
        self.other, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.other, near):
            end.setblocking(False)
        super().__init__(near.detach(), "test network")
        self.offloads: int | None = None

    def set_offloads(self, offloads: int) -> None:
        self.offloads = offloads

    def close(self) -> None:
        self.other.close()
        os.close(self.fd)

    def give(self, frame: bytes, header: bytes = bytes(VNET_HEADER_SIZE)) -> None:
        """A frame comes from the network."""
        self.other.send(header + frame)

    def sent(self) -> list[bytes]:
        """What the NIC sent since."""
        frames: list[bytes] = []
        while True:
            try:
                data = self.other.recv(1 << 16)
            except BlockingIOError:
                return frames
            assert data[:VNET_HEADER_SIZE] == bytes(VNET_HEADER_SIZE)
            frames.append(data[VNET_HEADER_SIZE:])


def frame(payload: bytes = b"data", to: bytes = MAC, source: bytes = b"\x02\0\0\0\0\x01", kind: int = 0x0800) -> bytes:
    return to + source + struct.pack(">H", kind) + payload


def on_wire(data: bytes) -> bytes:
    """A frame with its padding and FCS."""
    data = data.ljust(60, b"\0")
    return data + zlib.crc32(data).to_bytes(4, "little")


class TulipGuest:
    """Drives one NIC. `ring` is how many descriptors each list has."""

    def __init__(self, ring: int = 4, mac: bytes = MAC) -> None:
        self.memory = GuestMemory(MIB)
        self.clock = ManualClock()
        self.pio, self.mmio = Bus("pio"), Bus("mmio")
        self.bus = PciBus(self.pio, self.mmio)
        for port in self.bus.ports():
            self.pio.register(*port)
        self.lines = [RecordingLine() for _ in range(16)]
        self.bridge = IsaBridge((10, 10, 11, 11), lambda number: self.lines[number])
        self.bus.add(7, 0, self.bridge)
        self.worker = TulipWorker("nic", self.clock)
        self.nic = Dec21140("nic0", mac, self.memory, cast("Any", self.worker), self.clock)
        self.nic.place_registers(PORTS, MMIO, 0)
        self.nic.connect_interrupt(0, self.bridge.pin(10, 0), self.bridge.irq(10, 0))
        self.bus.add(10, 0, self.nic)
        self.bus.reset()
        self.wire: Wire | None = None
        self.ring = ring
        self.next_receive = self.next_transmit = 0

    @property
    def line(self) -> RecordingLine:
        return self.lines[10]

    def plug(self) -> Wire:
        """Plug a cable in."""
        self.wire = Wire()
        self.nic.connect(self.wire)
        return self.wire

    def close(self) -> None:
        wire = self.nic.connect(None)
        if wire is not None:
            wire.close()

    def work(self) -> None:
        self.worker.work()

    def advance(self, nanoseconds: int) -> None:
        """Let time pass."""
        self.worker.timers.advance(nanoseconds)
        self.work()

    # Registers.

    def config(self, register: int, value: int, size: int = 2) -> None:
        self.pio.write(0xCF8, 4, 1 << 31 | 10 << 11 | register & 0xFC)
        self.pio.write(0xCFC + register % 4, size, value)

    def get(self, number: int) -> int:
        return self.pio.read(PORTS + 8 * number, 4)

    def put(self, number: int, value: int) -> None:
        self.pio.write(PORTS + 8 * number, 4, value)

    def status(self) -> int:
        """CSR5's events."""
        return self.get(reg.STATUS) & EVERYTHING

    def states(self) -> tuple[int, int]:
        """Of the receive and the transmit process."""
        status = self.get(reg.STATUS)
        return status >> reg.RECEIVE_SHIFT & 7, status >> reg.TRANSMIT_SHIFT & 7

    def acknowledge(self) -> int:
        """Clear CSR5's events, and return them."""
        status = self.status()
        self.put(reg.STATUS, status)
        return status

    # The driver.

    def start(self, setup: bool = True, receive_control: int = BUFFER - 4) -> None:
        """Make lists and start both processes, as drivers do, with a filter for the own address and broadcasts."""
        self.config(COMMAND, 7)
        for index in range(self.ring):
            end = d.END_OF_RING if index == self.ring - 1 else 0
            buffer = RECEIVE_BUFFERS + index * BUFFER
            self.descriptor(RECEIVE_RING + 16 * index, d.OWN, receive_control | end, buffer)
            self.descriptor(TRANSMIT_RING + 16 * index, 0, end)
        self.put(reg.RECEIVE_LIST, RECEIVE_RING)
        self.put(reg.TRANSMIT_LIST, TRANSMIT_RING)
        self.put(reg.INTERRUPTS, EVERYTHING)
        if setup:
            self.set_filter([MAC, BROADCAST])
        self.put(reg.OPERATION, reg.SR | reg.ST)
        self.work()
        self.acknowledge()

    def descriptor(self, at: int, status: int, control: int, buffer1: int = 0, buffer2: int = 0) -> None:
        self.memory.write(at, struct.pack("<IIII", status, control, buffer1, buffer2))

    def status_of(self, at: int) -> int:
        return int.from_bytes(self.memory.read(at, 4), "little")

    def add(self, control: int, buffer1: int = 0, buffer2: int = 0) -> int:
        """Give the transmit process the next descriptor of its ring; return where that is."""
        at = TRANSMIT_RING + 16 * self.next_transmit
        end = d.END_OF_RING if self.next_transmit == self.ring - 1 else 0
        self.descriptor(at, d.OWN, control | end, buffer1, buffer2)
        self.next_transmit = (self.next_transmit + 1) % self.ring
        return at

    def set_filter(self, addresses: Sequence[bytes], kind: int = 0) -> int:
        """Put a perfect-filtering setup frame on the list; return its descriptor."""
        table = [*addresses, *[addresses[-1]] * (16 - len(addresses))]
        return self.set_up(b"".join(spread(address) for address in table), kind)

    def set_up(self, data: bytes, kind: int) -> int:
        self.memory.write(SETUP, data)
        bits = (d.FILTER_TYPE1 if kind & 2 else 0) | (d.FILTER_TYPE0 if kind & 1 else 0)
        return self.add(d.SETUP | bits | len(data), SETUP)

    def send(self, data: bytes, flags: int = 0) -> int:
        """Send a frame from one buffer; return its descriptor."""
        buffer = TRANSMIT_BUFFERS + self.next_transmit * BUFFER
        self.memory.write(buffer, data)
        at = self.add(d.FIRST_SEGMENT | d.LAST_SEGMENT | flags | len(data), buffer)
        self.demand()
        return at

    def demand(self) -> None:
        """A transmit poll demand."""
        self.put(reg.TRANSMIT_POLL, 1)
        self.work()

    def received(self) -> list[tuple[int, bytes]]:
        """Take what came, one buffer each, and give the descriptors back: RDES0, and the frame with its FCS."""
        frames: list[tuple[int, bytes]] = []
        while True:
            at = RECEIVE_RING + 16 * self.next_receive
            status = self.status_of(at)
            if status & d.OWN:
                return frames
            assert status & (d.FIRST | d.LAST) == d.FIRST | d.LAST
            buffer = RECEIVE_BUFFERS + self.next_receive * BUFFER
            frames.append((status, self.memory.read(buffer, status >> d.LENGTH_SHIFT & 0x3FFF)))
            self.memory.write(at, struct.pack("<I", d.OWN))
            self.next_receive = (self.next_receive + 1) % self.ring


def spread(data: bytes) -> bytes:
    """Two bytes in each double word, as in setup frames."""
    return b"".join(data[at : at + 2] * 2 for at in range(0, len(data), 2))
