"""The guest's side of the storage protocol, told as Linux's storvsc_drv.c tells it, and a channel without rings."""

from __future__ import annotations

import os
import struct
import weakref
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from devices.synthetic.storvsp.lane import Lane
from devices.vmbus.packets import (
    COMPLETION_REQUESTED,
    PACKET_COMPLETION,
    PACKET_GPA_DIRECT,
    PACKET_INBAND,
    ChannelViolation,
)
from pyvmm.core._hot import Ring, RingError, StorageQueue
from pyvmm.core.memory import PAGE_SIZE, GuestMemory, GuestMemoryError
from pyvmm.core.trace import Tracer
from tests.fakes.board import ManualClock
from tests.fakes.ring import GuestRing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from devices.synthetic.storvsp.vsp import StorVsp
    from devices.vmbus.channel import Channel
    from pyvmm.core._hot import Memory, Packet

# struct vmscsi_request up to its data area.
_REQUEST = struct.Struct("<HBBBBBBBBBBI20s")
_HEADER = struct.Struct("<III")
FULL_BODY = 0x34
OLD_BODY = 0x24

RING_PAGES = 9

WRITE_TYPE, READ_TYPE, UNKNOWN_TYPE = 0, 1, 2


class GuestEnd(Protocol):
    """The guest's end of one open channel."""

    memory: GuestMemory

    def send(self, packet: Packet) -> None:
        """Put a packet into the ring and signal the host if that is due."""

    def receive(self) -> list[Packet]:
        """Return what the host sent, waiting for at least one packet."""


class Result(NamedTuple):
    """One completed SCSI request."""

    nt_status: int
    srb_status: int
    scsi_status: int
    transferred: int
    sense: bytes
    data: bytes

    @property
    def code(self) -> tuple[int, int, int]:
        """Sense key, ASC and ASCQ; all zero without sense data."""
        return (self.sense[2] & 0xF, self.sense[12], self.sense[13]) if self.srb_status & 0x80 else (0, 0, 0)


class StorVsc:
    """A storage driver on one channel.

    `pages` are guest page numbers for its data buffers, used in the given order.
    """

    def __init__(self, end: GuestEnd, pages: Sequence[int] = (), body: int = FULL_BODY) -> None:
        self.end = end
        self.pages = list(pages)
        self.body = body
        #: Operations of unsolicited packets.
        self.notices: list[int] = []
        self._next_id = 1
        self._done: dict[int, bytes] = {}

    def submit(self, packet_type: int, header: bytes, payload: bytes, flags: int = COMPLETION_REQUESTED) -> int:
        """Send one packet; return its transaction id."""
        transaction_id = self._next_id
        self._next_id += 1
        self.end.send((packet_type, flags, transaction_id, header, payload))
        return transaction_id

    def collect(self, transaction_id: int) -> bytes:
        """Wait for the completion of `transaction_id` and return its payload."""
        while transaction_id not in self._done:
            self.pump()
        return self._done.pop(transaction_id)

    def pump(self) -> None:
        """Take in what the host sent."""
        for kind, _, transaction_id, _, payload in self.end.receive():
            if kind == PACKET_COMPLETION:
                assert transaction_id not in self._done, "a request was completed twice"
                self._done[transaction_id] = payload
            else:
                assert kind == PACKET_INBAND and transaction_id == 0
                self.notices.append(int.from_bytes(payload[:4], "little"))

    def operation(self, operation: int, body: bytes = b"") -> tuple[int, bytes]:
        """Send a control packet; return the completion's status and body."""
        payload = _HEADER.pack(operation, 1, 0) + body.ljust(self.body, b"\0")
        answer = self.collect(self.submit(PACKET_INBAND, b"", payload))
        done, _, status = _HEADER.unpack_from(answer)
        assert done == 1 and len(answer) == len(payload)
        return status, answer[_HEADER.size :]

    def initialize(self, versions: Sequence[int] = (0x0602, 0x0600, 0x0501), subchannels: int = 0) -> tuple[int, bytes]:
        """Go through the handshake, newest version first; return the version and the channel properties."""
        assert self.operation(7)[0] == 0
        for version in versions:
            status, body = self.operation(9, struct.pack("<HH", version, 0))
            assert struct.unpack_from("<H", body)[0] == version
            if status == 0:
                break
            assert status == 0xC0000059
        else:
            raise AssertionError("no version accepted")
        status, properties = self.operation(10)
        assert status == 0
        assert self.operation(8)[0] == 0
        if subchannels:
            assert self.operation(13, struct.pack("<H", subchannels))[0] == 0
        return version, properties

    def start(
        self,
        cdb: bytes,
        size: int = 0,
        direction: int = UNKNOWN_TYPE,
        lun: int = 0,
        target: int = 0,
        path: int = 0,
        offset: int = 0,
    ) -> int:
        """Send a SCSI request whose buffer begins `offset` bytes into the driver's pages; return its id."""
        count = (offset + size + PAGE_SIZE - 1) // PAGE_SIZE
        assert count <= len(self.pages)
        kind, _, _, header, payload = scsi_packet(
            0, cdb, size, direction, self.pages[:count], offset, lun, target, path, self.body
        )
        return self.submit(kind, header, payload)

    def finish(self, transaction_id: int, size: int = 0, offset: int = 0) -> Result:
        """Wait for a SCSI request and return how it ended, with the `size` bytes of its buffer."""
        answer = self.collect(transaction_id)
        done, _, nt_status = _HEADER.unpack_from(answer)
        assert done == 1 and len(answer) == _HEADER.size + self.body
        (_, srb, scsi, _, _, _, _, _, sense_length, _, _, moved, sense) = _REQUEST.unpack_from(answer, _HEADER.size)
        return Result(nt_status, srb, scsi, moved, sense[:sense_length], self.peek(size, offset))

    def read(self, cdb: bytes, size: int, lun: int = 0, offset: int = 0, target: int = 0, path: int = 0) -> Result:
        """Run a command that returns data."""
        return self.finish(self.start(cdb, size, READ_TYPE, lun, target, path, offset), size, offset)

    def write(self, cdb: bytes, data: bytes, lun: int = 0, offset: int = 0) -> Result:
        """Run a command that takes data."""
        self.poke(data, offset)
        return self.finish(self.start(cdb, len(data), WRITE_TYPE, lun, offset=offset))

    def command(self, cdb: bytes, lun: int = 0) -> Result:
        """Run a command without data."""
        return self.finish(self.start(cdb, lun=lun))

    def poke(self, data: bytes, offset: int = 0) -> None:
        """Put `data` into the driver's pages."""
        self._each(len(data), offset, lambda gpa, at, size: self.end.memory.write(gpa, data[at : at + size]))

    def peek(self, size: int, offset: int = 0) -> bytes:
        """Return what is in the driver's pages."""
        found: list[bytes] = []
        self._each(size, offset, lambda gpa, _, length: found.append(self.end.memory.read(gpa, length)))
        return b"".join(found)

    def _each(self, size: int, offset: int, action: Callable[[int, int, int], None]) -> None:
        at = 0
        while at < size:
            page, start = divmod(offset + at, PAGE_SIZE)
            length = min(PAGE_SIZE - start, size - at)
            action(self.pages[page] * PAGE_SIZE + start, at, length)
            at += length


def scsi_packet(
    transaction_id: int,
    cdb: bytes,
    size: int,
    direction: int,
    pages: Sequence[int],
    offset: int = 0,
    lun: int = 0,
    target: int = 0,
    path: int = 0,
    body: int = FULL_BODY,
    cdb_length: int | None = None,
) -> Packet:
    """A SCSI request; with a buffer of `size` bytes, if any, that begins `offset` bytes into `pages`."""
    port, sense_length = 7, 20
    length = len(cdb) if cdb_length is None else cdb_length
    request = _REQUEST.pack(body, 0, 0, port, path, target, lun, length, sense_length, direction, 0, size, cdb)
    payload = _HEADER.pack(3, 1, 0) + request[:body].ljust(body, b"\0")
    if not size:
        return PACKET_INBAND, COMPLETION_REQUESTED, transaction_id, b"", payload
    return PACKET_GPA_DIRECT, COMPLETION_REQUESTED, transaction_id, gpa_range(size, offset, pages), payload


def gpa_range(size: int, offset: int, pages: Sequence[int], count: int = 1) -> bytes:
    """The extra header of a GPA-direct packet with one range, or one that claims `count` of them."""
    return struct.pack(f"<IIII{len(pages)}Q", 0, count, size, offset, *pages)


class LoopbackChannel:
    """Stands in for `devices.vmbus.channel.Channel`; has rings, and a doorbell, once an engine wants them."""

    def __init__(self, index: int, memory: GuestMemory) -> None:
        self.subchannel_index = index
        self.memory = memory
        self.sent: list[Packet] = []
        self.held = False
        self.engine: StorageQueue | None = None

    def send(self, packets: Sequence[Packet]) -> bool:
        self.sent.extend(packets)
        return True

    def stop_receiving(self) -> None:
        self.held = True

    def start_receiving(self) -> None:
        self.held = False

    def make_engine(self, make: Callable[[Memory, Ring, Ring, int], StorageQueue]) -> StorageQueue:
        self.doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self.doorbell)
        pages = GuestMemory(RING_PAGES * 2 * PAGE_SIZE)  # of their own, lest they cost the tests any of theirs
        self.to_host = GuestRing(pages, range(RING_PAGES))
        self.to_guest = GuestRing(pages, range(RING_PAGES, 2 * RING_PAGES))
        for ring in (self.to_host, self.to_guest):
            ring.init()
        self.incoming, self.outgoing = (Ring(pages.hot, ring.numbers) for ring in (self.to_host, self.to_guest))
        return make(self.memory.hot, self.incoming, self.outgoing, self.doorbell)

    def use_engine(self, engine: StorageQueue) -> None:
        self.engine = engine

    def run(self, engine: StorageQueue, packet: Packet) -> Iterator[list[Packet]]:
        """Put a packet through the engine, and let the caller serve what it leaves to Python."""
        assert self.to_host.write(packet)[0]
        while True:
            idle, left, packets, unsent, _ = engine.serve()
            self.sent += unsent + self.to_guest.read()[0]
            yield packets + (self.incoming.read(left)[0] if left else [])
            if idle:
                engine.drain()
                try:
                    os.eventfd_read(self.doorbell)
                except BlockingIOError:
                    return


class Loopback:
    """The guest's end of a channel whose packets reach the VSP at once, on the caller's thread."""

    def __init__(self, vsp: StorVsp, memory: GuestMemory, index: int = 0) -> None:
        self.vsp = vsp
        self.memory = memory
        #: Why the channel was given up.
        self.broken: str | None = None
        self.device = LoopbackChannel(index, memory)
        self._waiting: list[Packet] = []
        vsp.open(cast("Channel", self.device))

    def send(self, packet: Packet) -> None:
        """Put a packet into the ring, and have it served unless the device holds back."""
        self._waiting.append(packet)
        self._serve()

    def receive(self) -> list[Packet]:
        """Return what the host sent."""
        self._serve()
        found, self.device.sent = self.device.sent, []
        assert found, f"the host has nothing to say (channel broken: {self.broken})"
        return found

    def close(self) -> None:
        """Close the channel."""
        self.vsp.close(cast("Channel", self.device))

    def _serve(self) -> None:
        try:
            while self._waiting and not self.device.held and not self.broken:
                packet = self._waiting.pop(0)
                engine = self.device.engine
                # Packets in rings are filled up to 8 bytes; what is not reaches the VSP as it is.
                ringless = (len(packet[3]) | len(packet[4])) % 8
                for packets in [[packet]] if engine is None or ringless else self.device.run(engine, packet):
                    self.vsp.packets(cast("Channel", self.device), packets)
        except (ChannelViolation, GuestMemoryError, RingError) as error:
            self.broken = str(error)


class InlineLane(Lane):
    """Carries jobs out on the spot."""

    def submit(self, job: Callable[[], object]) -> None:
        job()


class LoopbackBus:
    """Stands in for the bus: memory, a tracer, a clock that stands still, and a note of the sub-channels asked for."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.tracer = Tracer()
        self.clock = ManualClock()
        self.subchannels: list[int] = []

    def failed(self, error: BaseException) -> None:
        raise error

    def offer_subchannels(self, vsp: StorVsp, count: int) -> None:
        self.subchannels.append(count)
