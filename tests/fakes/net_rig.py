"""The guest's side of the NIC's data path, told as Linux's netvsc tells it, over rings without a bus."""

from __future__ import annotations

import os
import select
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from devices.vmbus.packets import (
    COMPLETION_REQUESTED,
    PACKET_COMPLETION,
    PACKET_GPA_DIRECT,
    PACKET_INBAND,
    PACKET_TRANSFER_PAGES,
)
from pyvmm.core._hot import NetDevice, NetQueue, Ring
from pyvmm.core.memory import PAGE_SIZE, GuestMemory
from tests.fakes.ring import GuestRing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pyvmm.core._hot import Packet

RNDIS, COMPLETE = 107, 108
SUCCESS, INVALID = 1, 5
NO_SECTION = 0xFFFFFFFF
VNET = struct.Struct("<BBHHHH")
PLAIN = VNET.pack(0, 0, 0, 0, 0, 0)

MAC = bytes.fromhex("00155d000001")
OTHER = bytes.fromhex("00155d000002")
BROADCAST = b"\xff" * 6
DIRECTED, MULTICAST, ALL_MULTICAST, BROADCASTS, PROMISCUOUS = 1, 2, 4, 8, 0x20
EVERYTHING = PROMISCUOUS

SECTION = 1806
SEND_SECTION = 6144
BUFFER_ID = 0xCAFE
RECEIVE_PAGE, SEND_PAGE, DATA_PAGE, RING_PAGE = 512, 256, 64, 768
CHECKSUM, LSO, VLAN, HASH, PACKET_ID = 0, 2, 6, 8, 0x80000001


def ppi(kind: int, value: int, offset: int = 12) -> bytes:
    """A piece of per-packet information with a 32-bit value."""
    return struct.pack("<III", 4 + offset, kind, offset) + bytes(offset - 12) + struct.pack("<I", value)


def rndis(frame: bytes, ppis: bytes = b"", pad: int = 0) -> bytes:
    """An RNDIS packet as Linux makes it."""
    body = struct.pack("<9I", 36 + len(ppis), len(frame), 0, 0, 0, 36 if ppis else 0, len(ppis), 0, 0)
    body += ppis + frame + bytes(pad)
    return struct.pack("<II", 1, 8 + len(body)) + body


class Received(NamedTuple):
    """A frame in the receive buffer."""

    data: bytes
    ppis: dict[int, int]
    #: How the transaction is known that it came with.
    transaction: int


class Queue:
    """One channel: the guest's rings and the engine at their other end."""

    def __init__(self, rig: Rig, index: int, ring_pages: int) -> None:
        first = RING_PAGE + 2 * ring_pages * index
        self.to_host = GuestRing(rig.memory, range(first, first + ring_pages))
        self.to_guest = GuestRing(rig.memory, range(first + ring_pages, first + 2 * ring_pages))
        for ring in (self.to_host, self.to_guest):
            ring.init()
        self.rings = Ring(rig.memory.hot, self.to_host.numbers), Ring(rig.memory.hot, self.to_guest.numbers)
        self.rings[0].init_incoming()
        self.rings[1].init_outgoing()
        self.doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.engine = NetQueue(rig.device, index, rig.memory.hot, *self.rings, self.doorbell)
        self.signals = 0

    def run(self) -> tuple[int, list[Packet]]:
        """Serve until there is nothing to do or Python is needed: what is left to it, and what was not sent."""
        while True:
            idle, left, packets, unsent, signal = self.engine.serve()
            assert packets == []
            self.signals += signal
            if idle or left or unsent:
                return left, unsent

    def take(self) -> list[Packet]:
        """What the host sent."""
        return self.to_guest.read()[0]

    def close(self) -> None:
        self.engine.quiesce()
        os.close(self.doorbell)


class Rig:
    """A NIC between a guest's rings and a socket, whose other end is `port`; nobody answers for Python."""

    def __init__(
        self,
        queues: int = 1,
        ring_pages: int = 5,
        section: int = SECTION,
        receive_pages: Sequence[int] = range(RECEIVE_PAGE, RECEIVE_PAGE + 128),
        connect: bool = True,
    ) -> None:
        self.memory = GuestMemory(4 << 20)
        self.device = NetDevice(self.memory.hot)
        self.receive_pages = list(receive_pages)
        self.section = section
        self.sections = self.device.set_receive_buffer(
            [(page * PAGE_SIZE, PAGE_SIZE) for page in receive_pages], BUFFER_ID, section
        )
        self.send_sections = self.device.set_send_buffer([(SEND_PAGE * PAGE_SIZE, 64 * PAGE_SIZE)], SEND_SECTION)
        self.device.set_filter(EVERYTHING, MAC)
        self.queues = [Queue(self, index, ring_pages) for index in range(queues)]
        self.queue = self.queues[0]
        self.port, self.end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
        self.port.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
        if connect:
            self.device.set_port(self.end.fileno())
            self.device.set_link(True)
        self._number = 0

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
        self.device.set_port(-1)
        self.port.close()
        self.end.close()

    # To the network.

    def send(self, data: bytes, section: int = 0, queue: int = 0, flags: int = COMPLETION_REQUESTED) -> int:
        """Send RNDIS packets through a section of the send buffer; return the transaction id."""
        self.memory.write(SEND_PAGE * PAGE_SIZE + section * SEND_SECTION, data)
        return self.put(PACKET_INBAND, b"", struct.pack("<IIII", RNDIS, 0, section, len(data)), queue, flags)

    def send_direct(self, pieces: Iterable[bytes], section: bytes = b"", queue: int = 0) -> int:
        """Send RNDIS packets by pages, each piece at the end of a page of its own, after what is in section 1."""
        ranges = b""
        count = 0
        for number, piece in enumerate(pieces):
            offset = -len(piece) % PAGE_SIZE
            page = DATA_PAGE + 2 * number
            self.memory.write(page * PAGE_SIZE + offset, piece)
            ranges += struct.pack("<IIQ", len(piece), offset, page)
            count += 1
        if section:
            self.memory.write(SEND_PAGE * PAGE_SIZE + SEND_SECTION, section)
        payload = struct.pack("<IIII", RNDIS, 0, 1 if section else NO_SECTION, len(section))
        return self.put(PACKET_GPA_DIRECT, struct.pack("<II", 0, count) + ranges, payload, queue)

    def put(self, kind: int, header: bytes, payload: bytes, queue: int = 0, flags: int = COMPLETION_REQUESTED) -> int:
        """Write any packet into a channel's ring; return its transaction id."""
        self._number += 1
        fits, _ = self.queues[queue].to_host.write((kind, flags, self._number, header, payload))
        assert fits
        return self._number

    def sent(self) -> list[tuple[tuple[int, ...], bytes]]:
        """What came out of the port: header and frame."""
        found: list[tuple[tuple[int, ...], bytes]] = []
        while True:
            try:
                data = self.port.recv(1 << 17)
            except BlockingIOError:
                return found
            found.append((VNET.unpack(data[:10]), data[10:]))

    def statuses(self, queue: int = 0) -> dict[int, int]:
        """Completions of what was sent: status by transaction id."""
        result = {}
        for kind, flags, number, _, payload in self.queues[queue].take():
            assert (kind, flags) == (PACKET_COMPLETION, 0)
            message, status = struct.unpack_from("<II", payload)
            assert message == COMPLETE
            result[number] = status
        return result

    # From the network.

    def arrive(self, frame: bytes, vnet: bytes = PLAIN) -> None:
        """A frame comes to the port."""
        self.port.send(vnet + frame)

    def read_section(self, offset: int, size: int) -> bytes:
        """What is in the receive buffer."""
        data = b""
        while size:
            page, at = divmod(offset, PAGE_SIZE)
            step = min(size, PAGE_SIZE - at)
            data += self.memory.read(self.receive_pages[page] * PAGE_SIZE + at, step)
            offset, size = offset + step, size - step
        return data

    def received(self, queue: int = 0, complete: bool = True) -> list[Received]:
        """Frames, or parts of them, in order; and gives their sections back."""
        result = []
        for kind, flags, number, header, payload in self.queues[queue].take():
            assert (kind, flags) == (PACKET_TRANSFER_PAGES, COMPLETION_REQUESTED)
            assert struct.unpack_from("<IIII", payload) == (RNDIS, 0, NO_SECTION, 0)
            buffer_id, count = struct.unpack_from("<HxxI", header)
            assert buffer_id == BUFFER_ID
            assert len(header) == 8 + 8 * count
            for index in range(count):
                size, offset = struct.unpack_from("<II", header, 8 + 8 * index)
                assert offset % self.section == 0
                assert size <= self.section
                result.append(self.parse(self.read_section(offset, size), number))
            if complete:
                self.give_back(number, queue)
        return result

    def give_back(self, transaction: int, queue: int = 0, status: int = SUCCESS) -> None:
        """Complete what was received."""
        packet = (PACKET_COMPLETION, 0, transaction, b"", struct.pack("<II", COMPLETE, status))
        fits, _ = self.queues[queue].to_host.write(packet)
        assert fits

    @staticmethod
    def parse(message: bytes, transaction: int) -> Received:
        """What is in a section."""
        kind, size, data, length, oob, oob_length, oob_count, ppis, ppis_length, _, _ = struct.unpack_from(
            "<11I", message
        )
        assert (kind, size) == (1, len(message))
        assert (oob, oob_length, oob_count) == (0, 0, 0)
        assert 8 + data + length == size
        found = {}
        at = 8 + ppis
        while at < 8 + ppis + ppis_length:
            step, what, offset = struct.unpack_from("<III", message, at)
            assert step % 4 == 0
            assert offset + 4 <= step
            (found[what],) = struct.unpack_from("<I", message, at + offset)
            at += step
        assert not ppis_length or (ppis == 36 and at <= 8 + data)
        return Received(message[8 + data :], found, transaction)


def readable(fd: int) -> bool:
    """Whether a file has something to read now."""
    return bool(select.select([fd], [], [], 0)[0])


def frame_of(size: int, fill: int = 0, to: bytes = OTHER) -> bytes:
    """A frame of no known protocol."""
    return to + MAC + b"\x88\xb5" + bytes((fill + at) & 0xFF for at in range(size - 14))


def counted(rig: Rig) -> dict[str, int]:
    """Statistics that are not 0."""
    return {name: value for name, value in rig.device.statistics().items() if value}


def small_rig() -> Rig:
    """A NIC with four sections for frames."""
    rig = Rig(receive_pages=range(512, 521))
    assert rig.sections == 20
    return rig
