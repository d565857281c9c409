"""A guest on VMBus without KVM: ports that lead to a real `VmBus`, and a driver that knows the protocol by itself.

memory, ports = GuestMemory(16 << 20), FakePorts()
bus = VmBus(memory, ports, on_error=errors.append)
bus.add_device(vsp)
guest = FakeGuest(ports, memory)
channel = guest.open(guest.connect()[0])
channel.send((6, 0, 0, b"", b"hello"))
packets = channel.receive()
bus.stop()
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from uuid import UUID

from enlightenments.ports import Ports
from pyvmm.core.memory import PAGE_SIZE, GuestMemory
from tests.fakes.ring import GuestRing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from enlightenments.ports import MessageHandler
    from pyvmm.core._hot import Packet

SINT = 2
TIMEOUT_S = 10.0

V0_13, V1_1, V2_4, V3_0, V4_0, V4_1 = 0xD, 0x10001, 0x20004, 0x30000, 0x40000, 0x40001
V5_0, V5_1, V5_2, V5_3 = 0x50000, 0x50001, 0x50002, 0x50003

(
    OFFER_CHANNEL,
    RESCIND,
    REQUEST_OFFERS,
    ALL_OFFERS_DELIVERED,
    OPEN_CHANNEL,
    OPEN_RESULT,
    CLOSE_CHANNEL,
    GPADL_HEADER,
    GPADL_BODY,
    GPADL_CREATED,
    GPADL_TEARDOWN,
    GPADL_TORNDOWN,
    REL_ID_RELEASED,
    INITIATE_CONTACT,
    VERSION_RESPONSE,
    UNLOAD,
    UNLOAD_COMPLETE,
) = range(1, 18)


class FakePorts(Ports):
    """The partition's ports as dictionaries. `capacity` bounds the messages that wait for one SINT."""

    def __init__(self, vp_count: int = 4, capacity: int = 1 << 30) -> None:
        self.vp_count = vp_count
        self.capacity = capacity
        self.handlers: dict[int, MessageHandler] = {}
        self.event_ports: dict[int, int] = {}
        self.changed = threading.Condition()
        self.messages: dict[tuple[int, int], deque[bytes]] = {}
        #: Event flags that are set, as (VP, SINT, flag), and how often each was signalled.
        self.flags: set[tuple[int, int, int]] = set()
        self.signals: Counter[tuple[int, int, int]] = Counter()
        self.raised: list[tuple[int, int]] = []
        self._space_event = -1
        self._refused = False

    def connect_message_port(self, connection_id: int, handler: MessageHandler) -> None:
        if connection_id in self.handlers:
            raise ValueError(f"connection id {connection_id:#x} is taken")
        self.handlers[connection_id] = handler

    def disconnect_message_port(self, connection_id: int) -> None:
        del self.handlers[connection_id]

    def connect_event_port(self, connection_id: int, eventfd: int) -> None:
        if connection_id in self.event_ports:
            raise ValueError(f"connection id {connection_id:#x} is taken")
        self.event_ports[connection_id] = eventfd

    def disconnect_event_port(self, connection_id: int) -> None:
        with self.changed:
            del self.event_ports[connection_id]

    def set_message_space_event(self, eventfd: int) -> None:
        self._space_event = eventfd

    def post_message(self, vp: int, sint: int, message_type: int, payload: bytes) -> bool:
        assert 0 <= vp < self.vp_count
        assert message_type == 1
        assert len(payload) <= 240
        with self.changed:
            queue = self.messages.setdefault((vp, sint), deque())
            if len(queue) >= self.capacity:
                self._refused = True
                return False
            queue.append(payload)
            self.changed.notify_all()
        return True

    def signal_event(self, vp: int, sint: int, flag: int) -> None:
        assert 0 <= vp < self.vp_count
        assert 0 <= flag < 2048
        with self.changed:
            self.flags.add((vp, sint, flag))
            self.signals[vp, sint, flag] += 1
            self.changed.notify_all()

    def raise_sint(self, vp: int, sint: int) -> None:
        assert 0 <= vp < self.vp_count
        self.raised.append((vp, sint))

    # The guest's side.

    def wait_for(self, predicate: Callable[[], object], what: str) -> None:
        """Wait until `predicate` holds; it is looked at whenever a message or a signal arrives."""
        with self.changed:
            assert self.changed.wait_for(predicate, TIMEOUT_S), f"no {what}"

    def take_message(self, vp: int = 0, sint: int = SINT) -> bytes:
        """Wait for the next message."""
        queue = self.messages.setdefault((vp, sint), deque())
        self.wait_for(lambda: queue, "message")
        with self.changed:
            message = queue.popleft()
            refused, self._refused = self._refused, False
        if refused:
            os.eventfd_write(self._space_event, 1)
        return message

    def take_flag(self, vp: int, flag: int) -> None:
        """Wait for an event flag and clear it."""
        self.take_flag_of(vp, SINT, flag)

    def take_flag_of(self, vp: int, sint: int, flag: int) -> None:
        """`take_flag` for another SINT than VMBus's."""
        self.wait_for(lambda: (vp, sint, flag) in self.flags, f"signal of flag {flag} on VP {vp}")
        with self.changed:
            self.flags.discard((vp, sint, flag))

    def hv_signal_event(self, connection_id: int) -> bool:
        """HvSignalEvent; False where it returns an error."""
        with self.changed:
            eventfd = self.event_ports.get(connection_id)
            if eventfd is None:
                return False
            os.eventfd_write(eventfd, 1)
        return True

    def hv_post_message(self, connection_id: int, payload: bytes, message_type: int = 1) -> bool | None:
        """HvPostMessage: None for an unknown connection, False for insufficient buffers."""
        handler = self.handlers.get(connection_id)
        return None if handler is None else handler(message_type, payload)


@dataclass(frozen=True)
class OfferInfo:
    """An OFFER_CHANNEL message."""

    interface_id: UUID
    instance_id: UUID
    flags: int
    mmio_megabytes: int
    user_defined: bytes
    subchannel_index: int
    channel_id: int
    monitor_allocated: int
    is_dedicated: int
    connection_id: int

    @classmethod
    def parse(cls, body: bytes) -> OfferInfo:
        """Take the message's body apart."""
        assert len(body) == 188
        flags, mmio = struct.unpack_from("<HH", body, 48)
        sub, _, channel, _, monitor, dedicated, connection = struct.unpack_from("<HHIBBHI", body, 172)
        return cls(
            UUID(bytes_le=body[:16]),
            UUID(bytes_le=body[16:32]),
            flags,
            mmio,
            body[52:172],
            sub,
            channel,
            monitor,
            dedicated,
            connection,
        )


class FakeGuest:
    """A VMBus driver. Guest pages for rings and buffers come from `first_page` upward."""

    def __init__(self, ports: FakePorts, memory: GuestMemory, first_page: int = 16) -> None:
        self.ports = ports
        self.memory = memory
        self.version = 0
        self.vp = 0
        self.post_connection = 4
        self.interrupt_page: int | None = None
        self._next_page = first_page
        self._next_gpadl = 0xE1E10

    def allocate(self, count: int, scattered: bool = True) -> list[int]:
        """Return `count` page numbers, not in order unless told so."""
        pages = list(range(self._next_page, self._next_page + count))
        self._next_page += count
        return pages[::2] + pages[1::2][::-1] if scattered else pages

    # Messages.

    def post(self, number: int, body: bytes = b"") -> None:
        """Post a message, trying again while the host has no room."""
        self.post_raw(struct.pack("<II", number, 0) + body)

    def post_raw(self, message: bytes) -> None:
        """Post any bytes."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (accepted := self.ports.hv_post_message(self.post_connection, message)):
            assert accepted is False, f"no message port {self.post_connection}"
            assert time.monotonic() < deadline, "the host takes no messages"
            time.sleep(0)

    def expect(self, number: int) -> bytes:
        """Return the body of the next message, which must have this number."""
        message = self.ports.take_message(self.vp)
        got, zero = struct.unpack_from("<II", message)
        assert (got, zero) == (number, 0), f"message {got} instead of {number}"
        return message[8:]

    # Connection.

    def contact(
        self, version: int = V5_3, vp: int = 0, monitor: tuple[int, int] = (0, 0), target: int | None = None
    ) -> tuple[int, int, int]:
        """Send InitiateContact; return (supported, connection state, version or connection id)."""
        self.version, self.vp = version, vp if version >= V3_0 else 0
        self.post_connection = 4 if version >= V5_0 else 1
        if target is None:
            target = SINT if version >= V5_0 else 0
            if version < V2_4:
                (page,) = self.allocate(1)
                target = self.interrupt_page = page * PAGE_SIZE
        self.post(INITIATE_CONTACT, struct.pack("<IIQQQ", version, vp, target, *monitor))
        supported, state, _, value = struct.unpack("<BBHI", self.expect(VERSION_RESPONSE))
        return supported, state, value

    def connect(self, version: int = V5_3, vp: int = 0) -> list[OfferInfo]:
        """Connect and return the offers."""
        supported, state, value = self.contact(version, vp)
        assert (supported, state) == (1, 0)
        if version >= V5_0:
            self.post_connection = value
        else:
            assert value == version
        return self.request_offers()

    def request_offers(self) -> list[OfferInfo]:
        """Ask for the offers that are there now."""
        self.post(REQUEST_OFFERS)
        offers: list[OfferInfo] = []
        while True:
            message = self.ports.take_message(self.vp)
            (number,) = struct.unpack_from("<I", message)
            if number == ALL_OFFERS_DELIVERED:
                return offers
            assert number == OFFER_CHANNEL
            offers.append(OfferInfo.parse(message[8:]))

    def next_offer(self) -> OfferInfo:
        """Wait for a hot-added device or a sub-channel."""
        return OfferInfo.parse(self.expect(OFFER_CHANNEL))

    def unload(self) -> None:
        """Disconnect."""
        self.post(UNLOAD)
        self.expect(UNLOAD_COMPLETE)

    # GPADLs.

    def send_gpadl(
        self, channel_id: int, ranges: Sequence[tuple[int, int, Sequence[int]]], pad: bool = False, **header: int
    ) -> int:
        """Send header and bodies for (byte count, byte offset, pages) ranges; return the id, without waiting.

        `pad` fills the last message up, as UEFI does; `length`, `count` and `gpadl_id` override the header.
        """
        gpadl_id = header.get("gpadl_id", self._next_gpadl)
        self._next_gpadl += 1
        data = b"".join(struct.pack("<II", size, at) + struct.pack(f"<{len(p)}Q", *p) for size, at, p in ranges)
        length, count = header.get("length", len(data)), header.get("count", len(ranges))
        first, rest = data[: 27 * 8], data[27 * 8 :]
        tail = b"\xff" * (27 * 8 - len(first)) if pad else b""
        self.post(GPADL_HEADER, struct.pack("<IIHH", channel_id, gpadl_id, length, count) + first + tail)
        for number, at in enumerate(range(0, len(rest), 28 * 8), 1):
            part = rest[at : at + 28 * 8]
            tail = b"\xff" * (28 * 8 - len(part)) if pad else b""
            self.post(GPADL_BODY, struct.pack("<II", number, gpadl_id) + part + tail)
        return gpadl_id

    def gpadl_status(self, gpadl_id: int) -> int:
        """Wait for GpadlCreated of this id; return its status."""
        _, created, status = struct.unpack("<IIi", self.expect(GPADL_CREATED))
        assert created == gpadl_id
        return int(status)

    def create_gpadl(self, channel_id: int, pages: Sequence[int], pad: bool = False) -> int:
        """Make a GPADL of whole pages; return its id."""
        gpadl_id = self.send_gpadl(channel_id, [(len(pages) * PAGE_SIZE, 0, pages)], pad)
        assert self.gpadl_status(gpadl_id) == 0
        return gpadl_id

    def teardown_gpadl(self, channel_id: int, gpadl_id: int) -> None:
        """Take a GPADL back."""
        self.post(GPADL_TEARDOWN, struct.pack("<II", channel_id, gpadl_id))
        assert self.expect(GPADL_TORNDOWN) == struct.pack("<I", gpadl_id)

    # Channels.

    def try_open(self, channel_id: int, gpadl_id: int, downstream: int, vp: int = 0, user_data: bytes = b"") -> int:
        """Send OpenChannel; return the status of its result."""
        self.post(
            OPEN_CHANNEL,
            struct.pack("<IIIII", channel_id, 77, gpadl_id, vp, downstream) + user_data.ljust(120, b"\0"),
        )
        got, open_id, status = struct.unpack("<IIi", self.expect(OPEN_RESULT))
        assert (got, open_id) == (channel_id, 77)
        return int(status)

    def open(
        self, offer: OfferInfo, vp: int = 0, out_pages: int = 4, in_pages: int = 4, user_data: bytes = b""
    ) -> GuestChannel:
        """Lend ring pages and open a channel; page counts include the control page."""
        pages = self.allocate(out_pages + in_pages)
        rings = GuestRing(self.memory, pages[:out_pages]), GuestRing(self.memory, pages[out_pages:])
        for ring in rings:
            ring.init()
        gpadl_id = self.create_gpadl(offer.channel_id, pages)
        assert self.try_open(offer.channel_id, gpadl_id, out_pages, vp, user_data) == 0
        return GuestChannel(self, offer, gpadl_id, vp, *rings)


class GuestChannel:
    """The guest's end of an open channel."""

    def __init__(
        self, guest: FakeGuest, offer: OfferInfo, gpadl_id: int, vp: int, outgoing: GuestRing, incoming: GuestRing
    ) -> None:
        self.guest = guest
        self.memory = guest.memory
        self.offer = offer
        self.gpadl_id = gpadl_id
        self.vp = vp
        self.outgoing = outgoing
        self.incoming = incoming
        #: Times that the ring rules asked for HvSignalEvent.
        self.signalled = 0
        #: Whether the host may give the channel up meanwhile, for what it has read already.
        self.hostile = False

    def signal(self) -> None:
        """Ring the host's bell, as the protocol version has it."""
        guest, offer = self.guest, self.offer
        self.signalled += 1
        connection = offer.connection_id
        if guest.version < V2_4:
            assert guest.interrupt_page is not None
            word = guest.interrupt_page + PAGE_SIZE // 2 + offer.channel_id // 8
            page = guest.memory.view(word, 1, write=True)
            page[0] |= 1 << offer.channel_id % 8
            connection = 2
        assert guest.ports.hv_signal_event(connection) or self.hostile

    def try_send(self, packet: Packet) -> bool:
        """Write a packet if it fits, with a signal if the rules want one."""
        fits, signal = self.outgoing.write(packet)
        if signal:
            self.signal()
        return fits

    def send(self, packet: Packet) -> None:
        """Write a packet; the ring must have room once the host has caught up."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.try_send(packet):
            assert time.monotonic() < deadline, "the host doesn't read the ring"
            time.sleep(0)

    def receive(self, limit: int = 1 << 30) -> list[Packet]:
        """Take packets, waiting for at least one."""
        while True:
            packets, signal = self.incoming.read(limit)
            if signal:
                self.signal()
            if packets:
                return packets
            self.wait_signal()

    def wait_signal(self) -> None:
        """Wait for the host's signal and clear it."""
        if self.guest.version < V2_4:
            self.guest.ports.take_flag(0, 0)
            assert self.guest.interrupt_page is not None
            self.guest.memory.view(self.guest.interrupt_page, PAGE_SIZE // 2, write=True)[:] = bytes(PAGE_SIZE // 2)
        else:
            self.guest.ports.take_flag(self.vp, self.offer.channel_id)

    def close(self, teardown: bool = True) -> None:
        """Close the channel and take the ring back."""
        self.guest.post(CLOSE_CHANNEL, struct.pack("<I", self.offer.channel_id))
        if teardown:
            self.guest.teardown_gpadl(self.offer.channel_id, self.gpadl_id)
