"""The guest's side of the network protocol, told as Linux 6.1 (drivers/net/hyperv), Windows and iPXE tell it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from devices.vmbus.packets import (
    COMPLETION_REQUESTED,
    PACKET_COMPLETION,
    PACKET_GPA_DIRECT,
    PACKET_INBAND,
    PACKET_TRANSFER_PAGES,
)
from pyvmm.core.memory import PAGE_SIZE
from tests.fakes.net_rig import ppi, rndis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.core._hot import Packet
    from tests.fakes.vmbus_guest import FakeGuest, GuestChannel

V1, V2, V4, V5, V6, V6_1 = 0x00002, 0x30002, 0x40000, 0x50000, 0x60000, 0x60001
LINUX_VERSIONS = (V6_1, V6, V5, V4, V2, V1)

INIT, INIT_COMPLETE = 1, 2
NDIS_VERSION, RECEIVE_BUFFER, RECEIVE_BUFFER_COMPLETE, REVOKE_RECEIVE_BUFFER = 100, 101, 102, 103
SEND_BUFFER, SEND_BUFFER_COMPLETE, REVOKE_SEND_BUFFER = 104, 105, 106
RNDIS_PACKET, RNDIS_PACKET_COMPLETE = 107, 108
NDIS_CONFIG, VF_ASSOCIATION, SWITCH_DATA_PATH = 125, 128, 129
OID_QUERY_EX, OID_QUERY_EX_COMPLETE, SUB_CHANNEL, INDIRECTION_TABLE = 131, 132, 133, 134
SUCCESS, FAILURE, INVALID_RNDIS = 1, 2, 5
NO_SECTION = 0xFFFFFFFF
RECEIVE_ID, SEND_ID = 0xCAFE, 0

INITIALIZE, HALT, QUERY, SET, RESET, INDICATE, KEEPALIVE = 2, 3, 4, 5, 6, 7, 8
DONE = 0x80000000
CONNECT, DISCONNECT, OFFLOAD_CONFIG = 0x4001000B, 0x4001000C, 0x40020006

FRAME_SIZE, MAX_FRAME_SIZE, LINK_SPEED, FILTER = 0x00010106, 0x00010111, 0x00010107, 0x0001010E
CONNECT_STATUS, FRIENDLY_NAME, PERMANENT_ADDRESS = 0x00010114, 0x00020216, 0x01010101
RSS_CAPABILITIES, RSS_PARAMETERS, CONFIG_PARAMETER = 0x00010203, 0x00010204, 0x0001021B
OFFLOAD_CAPABILITIES, OFFLOAD_CURRENT, OFFLOAD_PARAMETERS = 0xFC01020D, 0xFC01020B, 0xFC01020C
SUPPORTED_LIST, LINK_STATE, ENCAPSULATION, MULTICAST_LIST = 0x00010101, 0x00010207, 0x0101010A, 0x01010103
DIRECTED, MULTICAST, ALL_MULTICAST, BROADCAST, PROMISCUOUS = 1, 2, 4, 8, 0x20

RSS_KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")


class Answer(NamedTuple):
    """What a query or set ended with."""

    status: int
    data: bytes


class Frame(NamedTuple):
    """A frame from the network, with its per-packet information."""

    data: bytes
    ppis: dict[int, int]


class NetVsc:
    """A network driver on its primary channel; sub-channels are added to `channels`."""

    def __init__(self, guest: FakeGuest, channel: GuestChannel, receive_pages: int = 64, send_pages: int = 16) -> None:
        self.guest = guest
        self.channel = channel
        self.channels = {0: channel}
        self.receive_pages = guest.allocate(receive_pages)
        #: Where in its first page the receive buffer begins.
        self.receive_offset = 0
        self.send_pages = guest.allocate(send_pages)
        (self.control_page, self.frame_page) = guest.allocate(2)
        self.version = 0
        self.message_size = 0x28
        self.section_size = 0
        self.sections = 0
        self.receive_gpadl = self.send_gpadl = 0
        self.frames: list[Frame] = []
        #: (status, data) of what the host told unasked.
        self.indications: list[tuple[int, bytes]] = []
        #: In-band messages of the host.
        self.notices: list[bytes] = []
        #: Whether completions of what was received say nothing, as iPXE's.
        self.empty_completions = False
        #: Whether sections of the receive buffer are given back.
        self.gives_back = True
        self.held: list[tuple[int, int]] = []
        self._next_id = 1
        self._next_request = 1
        self._done: dict[int, bytes] = {}
        self._answers: dict[int, tuple[int, bytes]] = {}

    # Packets.

    def send(
        self, payload: bytes, kind: int = PACKET_INBAND, header: bytes = b"", channel: int = 0, wanted: bool = True
    ) -> int:
        """Send a packet; return its transaction id."""
        transaction_id = self._next_id
        self._next_id += 1
        flags = COMPLETION_REQUESTED if wanted else 0
        self.channels[channel].send((kind, flags, transaction_id, header, payload))
        return transaction_id

    def message(self, number: int, body: bytes, wanted: bool = True) -> int:
        """Send an NVSP message of the size that the driver always sends; return its transaction id."""
        return self.send((struct.pack("<I", number) + body).ljust(self.message_size, b"\0"), wanted=wanted)

    def ask(self, number: int, body: bytes) -> bytes:
        """Send an NVSP message and return the body of its completion, with its number."""
        return self.collect(self.message(number, body))

    def collect(self, transaction_id: int) -> bytes:
        """Wait for a completion."""
        while transaction_id not in self._done:
            self.pump()
        return self._done.pop(transaction_id)

    def pump(self, channel: int = 0) -> None:
        """Take in what the host sent, waiting for at least one packet."""
        for packet in self.channels[channel].receive():
            self._take(packet, channel)

    def _take(self, packet: Packet, channel: int) -> None:
        kind, flags, transaction_id, header, payload = packet
        if kind == PACKET_COMPLETION:
            assert transaction_id not in self._done, "a request was completed twice"
            self._done[transaction_id] = payload
        elif kind == PACKET_INBAND:
            self.notices.append(payload)
        else:
            assert (kind, flags) == (PACKET_TRANSFER_PAGES, COMPLETION_REQUESTED)
            self._receive(transaction_id, header, payload, channel)

    def _receive(self, transaction_id: int, header: bytes, payload: bytes, channel: int) -> None:
        number, kind, section, _ = struct.unpack_from("<IIII", payload)
        assert (number, section) == (RNDIS_PACKET, NO_SECTION)
        assert len(payload) >= (0x28 if self.version >= V6_1 else 0x1C)
        buffer_id, count = struct.unpack_from("<HxxI", header)
        assert buffer_id == RECEIVE_ID
        for at in range(8, 8 + 8 * count, 8):
            size, offset = struct.unpack_from("<II", header, at)
            assert offset % self.section_size == 0 and size <= self.section_size
            self._rndis(self.read(self.receive_pages, self.receive_offset + offset, size), kind)
        if self.gives_back:
            self.give_back(transaction_id, channel)
        else:
            self.held.append((transaction_id, channel))

    def give_back(self, transaction_id: int, channel: int = 0) -> None:
        """Complete what was received."""
        payload = struct.pack("<II", RNDIS_PACKET_COMPLETE, SUCCESS).ljust(self.message_size, b"\0")
        packet = PACKET_COMPLETION, 0, transaction_id, b"", b"" if self.empty_completions else payload
        self.channels[channel].send(packet)

    def _rndis(self, message: bytes, channel_type: int) -> None:
        kind, size = struct.unpack_from("<II", message)
        assert size <= len(message)
        body = message[8:size]
        assert channel_type == (0 if kind == 1 else 1)
        if kind == 1:
            data, length, _, _, _, info, info_size = struct.unpack_from("<7I", body)
            ppis = {}
            at = info
            while at < info + info_size:
                step, what, start = struct.unpack_from("<III", body, at)
                (ppis[what],) = struct.unpack_from("<I", body, at + start)
                at += step
            self.frames.append(Frame(body[data : data + length], ppis))
        elif kind == INDICATE:
            status, length, start = struct.unpack_from("<III", body)
            assert start + length <= len(body)
            self.indications.append((status, body[start : start + length] if length else b""))
        else:
            # Of RESET the first word is the status.
            request = 0 if kind == RESET | DONE else struct.unpack_from("<I", body)[0]
            assert request not in self._answers
            self._answers[request] = kind, body

    def read(self, pages: Sequence[int], offset: int, size: int) -> bytes:
        """Bytes of a buffer that is made of `pages`."""
        data = b""
        while size:
            page, at = divmod(offset, PAGE_SIZE)
            step = min(size, PAGE_SIZE - at)
            data += self.guest.memory.read(pages[page] * PAGE_SIZE + at, step)
            offset, size = offset + step, size - step
        return data

    def write(self, pages: Sequence[int], offset: int, data: bytes) -> None:
        """Fill part of a buffer that is made of `pages`."""
        while data:
            page, at = divmod(offset, PAGE_SIZE)
            step = min(len(data), PAGE_SIZE - at)
            self.guest.memory.write(pages[page] * PAGE_SIZE + at, data[:step])
            offset, data = offset + step, data[step:]

    # The handshake.

    def negotiate(self, versions: Sequence[int] = LINUX_VERSIONS) -> int:
        """Offer versions until one is taken; return it."""
        for version in versions:
            answer = self.ask(INIT, struct.pack("<II", version, version))
            number, legacy, chain, status = struct.unpack_from("<IIII", answer)
            assert (number, chain) == (INIT_COMPLETE, 34)
            assert legacy == (2 if status == SUCCESS and version == V1 else 0xFFFFFFFF)
            if status == SUCCESS:
                self.version = version
                return version
            assert status == 0
        raise AssertionError("no version accepted")

    def configure(self, mtu: int = 1500, capabilities: int | None = None, ndis: tuple[int, int] | None = None) -> None:
        """Tell frame size, capabilities and NDIS version as Linux does, which wants no completions."""
        if capabilities is None:
            capabilities = 8 | (4 | 0x20 if self.version >= V5 else 0) | (0x80 if self.version >= V6_1 else 0)
        if self.version >= V2:
            self.message(NDIS_CONFIG, struct.pack("<IIQ", mtu + 14, 0, capabilities), wanted=False)
        self.message(NDIS_VERSION, struct.pack("<II", *(ndis or ((6, 30) if self.version >= V5 else (6, 1)))), False)

    def lend_receive_buffer(self) -> int:
        """Make the GPADL and tell of it; return the status."""
        self.receive_gpadl = self.guest.create_gpadl(self.channel.offer.channel_id, self.receive_pages)
        return self.tell_receive_buffer(self.receive_gpadl)

    def tell_receive_buffer(self, gpadl: int) -> int:
        """Tell of a GPADL as the receive buffer; return the status."""
        answer = self.ask(RECEIVE_BUFFER, struct.pack("<IH", gpadl, RECEIVE_ID))
        number, status, areas, offset, size, count, end = struct.unpack_from("<7I", answer)
        assert number == RECEIVE_BUFFER_COMPLETE
        if status == SUCCESS:
            assert (areas, offset, end) == (1, 0, size * count)
            assert count == len(self.receive_pages) * PAGE_SIZE // size
            self.section_size, self.sections = size, count
        return int(status)

    def lend_send_buffer(self) -> int:
        """Make the GPADL and tell of it; return the status."""
        self.send_gpadl = self.guest.create_gpadl(self.channel.offer.channel_id, self.send_pages)
        answer = self.ask(SEND_BUFFER, struct.pack("<IH", self.send_gpadl, SEND_ID))
        number, status, size = struct.unpack_from("<III", answer)
        assert number == SEND_BUFFER_COMPLETE
        assert status != SUCCESS or size == 6144
        return int(status)

    def handshake(
        self,
        versions: Sequence[int] = LINUX_VERSIONS,
        mtu: int = 1500,
        capabilities: int | None = None,
        ndis: tuple[int, int] | None = None,
    ) -> None:
        """All up to where RNDIS begins."""
        self.negotiate(versions)
        self.configure(mtu, capabilities, ndis)
        assert self.lend_receive_buffer() == SUCCESS
        assert self.lend_send_buffer() == SUCCESS

    def revoke(self) -> None:
        """Take both buffers back, as Linux does when it lets the device go."""
        self.message(REVOKE_RECEIVE_BUFFER, struct.pack("<H", RECEIVE_ID), wanted=False)
        self.message(REVOKE_SEND_BUFFER, struct.pack("<H", SEND_ID), wanted=False)

    # RNDIS.

    def control(self, message: bytes) -> int:
        """Send a control message in a page, as Linux does; return the NVSP status of its completion."""
        return self.status(self.post_control(message))

    def post_control(self, message: bytes) -> int:
        """Send a control message; return the transaction id."""
        self.guest.memory.write(self.control_page * PAGE_SIZE + 16, message)
        header = struct.pack("<IIIIQ", 0, 1, len(message), 16, self.control_page)
        payload = struct.pack("<IIII", RNDIS_PACKET, 1, NO_SECTION, 0).ljust(self.message_size, b"\0")
        return self.send(payload, PACKET_GPA_DIRECT, header)

    def control_by_section(self, message: bytes, section: int = 0) -> int:
        """Send a control message through the send buffer; return the NVSP status of its completion."""
        self.write(self.send_pages, section * 6144, message)
        payload = struct.pack("<IIII", RNDIS_PACKET, 1, section, len(message)).ljust(self.message_size, b"\0")
        return self.status(self.send(payload))

    def status(self, transaction_id: int) -> int:
        """Wait for the completion of an RNDIS packet and return its status."""
        number, status = struct.unpack_from("<II", self.collect(transaction_id))
        assert number == RNDIS_PACKET_COMPLETE
        return int(status)

    def request(self, kind: int, body: bytes = b"") -> bytes:
        """Send a control message with a request id; return the body of the answer after that id."""
        request = self._next_request
        self._next_request += 1
        message = struct.pack("<III", kind, 12 + len(body), request) + body
        assert self.control(message) == SUCCESS
        found, answer = self.answer(0 if kind == RESET else request)
        assert found == kind | DONE
        return answer[4:]

    def answer(self, request: int) -> tuple[int, bytes]:
        """Wait for the answer to a request: its type, and its body."""
        while request not in self._answers:
            self.pump()
        return self._answers.pop(request)

    def initialize(self) -> None:
        """RNDIS INITIALIZE."""
        answer = self.request(INITIALIZE, struct.pack("<III", 1, 0, 0x4000))
        status, major, minor, flags, medium, packets, _, alignment, _, _ = struct.unpack("<10I", answer)
        assert (status, major, minor, flags, medium) == (0, 1, 0, 1, 0)
        assert packets == 8 and alignment == 3

    def halt(self) -> None:
        """RNDIS HALT, which has no answer."""
        assert self.control(struct.pack("<III", HALT, 12, 0)) == SUCCESS

    def query(self, oid: int, data: bytes = b"") -> Answer:
        """Query an object."""
        answer = self.request(QUERY, struct.pack("<IIII", oid, len(data), 20, 0) + data)
        status, size, offset = struct.unpack_from("<III", answer)
        assert offset == 16 and len(answer) == 12 + size
        return Answer(status, answer[12:])

    def query32(self, oid: int) -> int:
        """Query an object that is a number."""
        status, data = self.query(oid)
        assert status == 0 and len(data) == 4
        return int.from_bytes(data, "little")

    def set(self, oid: int, data: bytes) -> int:
        """Set an object; return the status."""
        answer = self.request(SET, struct.pack("<IIII", oid, len(data), 20, 0) + data)
        assert len(answer) == 4
        return int.from_bytes(answer, "little")

    # Frames.

    def transmit(self, frame: bytes, ppis: bytes = b"", section: int | None = None, channel: int = 0) -> int:
        """Send a frame, by a page or through the send buffer; return the NVSP status of its completion."""
        message = rndis(frame, ppis)
        if section is None:
            self.guest.memory.write(self.frame_page * PAGE_SIZE, message)
            header = struct.pack("<IIIIQ", 0, 1, len(message), 0, self.frame_page)
            payload = struct.pack("<IIII", RNDIS_PACKET, 0, NO_SECTION, 0).ljust(self.message_size, b"\0")
            transaction_id = self.send(payload, PACKET_GPA_DIRECT, header, channel)
        else:
            self.write(self.send_pages, section * 6144, message)
            payload = struct.pack("<IIII", RNDIS_PACKET, 0, section, len(message)).ljust(self.message_size, b"\0")
            transaction_id = self.send(payload, channel=channel)
        while transaction_id not in self._done:
            self.pump(channel)
        return self.status(transaction_id)

    def frame(self, channel: int = 0) -> Frame:
        """Wait for a frame."""
        while not self.frames:
            self.pump(channel)
        return self.frames.pop(0)

    def indication(self) -> tuple[int, bytes]:
        """Wait for an indication."""
        while not self.indications:
            self.pump()
        return self.indications.pop(0)


def start_linux(driver: NetVsc, mtu: int = 1500, channels: int = 1, versions: Sequence[int] = LINUX_VERSIONS) -> int:
    """Bring a NIC up as rndis_filter_device_add does; return the MTU that the driver has then."""
    driver.handshake(versions, mtu)
    driver.initialize()
    mtu = min(mtu, driver.query32(FRAME_SIZE))
    assert len(driver.query(PERMANENT_ADDRESS).data) == 6
    assert driver.query(FRIENDLY_NAME).status == 0
    enable_linux_offloads(driver)
    driver.query32(CONNECT_STATUS)
    if driver.version >= V5:
        driver.query32(LINK_SPEED)
        if channels > 1:
            open_linux_channels(driver, channels)
    assert driver.set(FILTER, struct.pack("<I", BROADCAST | ALL_MULTICAST | DIRECTED)) == 0
    return mtu


def enable_linux_offloads(driver: NetVsc) -> None:
    """Ask what the NIC can and turn it on, as rndis_netdev_set_hwcaps does."""
    revision, size = (3, 156) if driver.version >= V5 else (2, 144) if driver.version >= V4 else (1, 112)
    wanted = struct.pack("<BBH", 0xA7, revision, size)
    status, caps = driver.query(OFFLOAD_CAPABILITIES, wanted.ljust(size, b"\0"))
    assert status == 0
    kind, found, length = struct.unpack_from("<BBH", caps)
    assert kind == 0xA7 and found >= 1 and 112 <= length <= 156 and length == len(caps)
    sent4, sent6 = struct.unpack_from("<I", caps, 8)[0], struct.unpack_from("<I", caps, 24)[0]
    assert sent4 & 0x14 == 0x14 and sent6 & 0x15 == 0x15
    lso4, _, _, lso6, _, _, options = struct.unpack_from("<7I", caps, 80)
    assert lso4 & 2 and lso6 & 2 and options & 5 == 5
    udp = (4 if sent4 & 0x40 else 0, 4 if sent6 & 0x40 else 0) if driver.version > V4 else (0, 0)
    rsc = 2 if length >= 146 and caps[144] and caps[145] else 0
    size = 28 if driver.version > V4 else 22
    data = struct.pack("<BBH", 0x80, 3, size) + bytes((1, 4, udp[0], 4, udp[1], 0, 0, 2, 2, 0, 0, 0))
    data = data.ljust(22, b"\0") + bytes((rsc, rsc))
    assert driver.set(OFFLOAD_PARAMETERS, data.ljust(28, b"\0")[:size]) == 0
    while not driver.indications:
        driver.pump()
    assert driver.indication()[0] == OFFLOAD_CONFIG


def open_linux_channels(driver: NetVsc, channels: int) -> None:
    """Ask for sub-channels, open them, and spread what comes over all."""
    status, caps = driver.query(RSS_CAPABILITIES, struct.pack("<BBH", 0x88, 2, 18).ljust(18, b"\0"))
    assert status == 0 and len(caps) == 18
    _, _, queues, entries = struct.unpack_from("<IIIH", caps, 4)
    assert queues >= channels
    answer = driver.ask(SUB_CHANNEL, struct.pack("<II", 1, channels - 1))
    assert struct.unpack_from("<III", answer) == (SUB_CHANNEL, SUCCESS, channels - 1)
    for index, offer in enumerate([driver.guest.next_offer() for _ in range(1, channels)], 1):
        assert offer.subchannel_index == index
        driver.channels[index] = driver.guest.open(offer, vp=index)
    assert driver.set(RSS_PARAMETERS, rss_parameters([0] * entries, flags=0x10)) == 0
    assert driver.set(RSS_PARAMETERS, rss_parameters([at % channels for at in range(entries)])) == 0


def rss_parameters(table: Sequence[int], key: bytes = RSS_KEY, flags: int = 0, hashes: int = 0x1701) -> bytes:
    """NDIS_RECEIVE_SCALE_PARAMETERS as Linux lays it out."""
    size = 4 * len(table)
    head = struct.pack("<BBHHHIHxxIHxxIIII", 0x89, 2, 40, flags, 0, hashes, size, 40, len(key), 40 + size, 0, 0, 0)
    return head + struct.pack(f"<{len(table)}I", *table) + key


def config_parameter(name: str, value: str) -> bytes:
    """RNDIS_CONFIG_PARAMETER_INFO with a string, as Windows sends it."""
    raw_name, raw_value = name.encode("utf-16-le"), value.encode("utf-16-le")
    head = struct.pack("<5I", 20, len(raw_name), 2, 20 + len(raw_name), len(raw_value))
    return head + raw_name + raw_value


def start_windows(driver: NetVsc) -> None:
    """Bring a NIC up as Windows does: completions for all, settings by name, a list of groups, many queries."""
    driver.negotiate((V6_1,))
    assert driver.ask(NDIS_CONFIG, struct.pack("<IIQ", 1514, 0, 0xFF)) == b""
    assert driver.ask(NDIS_VERSION, struct.pack("<II", 6, 85)) == b""
    assert driver.lend_receive_buffer() == SUCCESS
    assert driver.lend_send_buffer() == SUCCESS
    driver.initialize()
    status, data = driver.query(SUPPORTED_LIST)
    assert status == 0
    for (oid,) in struct.iter_unpack("<I", data):
        assert driver.query(oid).status in (0, 0xC00000BB)
    for name in ("IPChecksumOffloadIPv4", "TCPChecksumOffloadIPv4", "TCPChecksumOffloadIPv6"):
        assert driver.set(CONFIG_PARAMETER, config_parameter(f"*{name}", "3")) == 0
    for name in ("UDPChecksumOffloadIPv4", "UDPChecksumOffloadIPv6"):
        assert driver.set(CONFIG_PARAMETER, config_parameter(f"*{name}", "3")) == 0
    assert driver.set(CONFIG_PARAMETER, config_parameter("NetworkAddress", "")) == 0
    assert driver.set(ENCAPSULATION, driver.query(ENCAPSULATION).data) == 0
    assert driver.set(MULTICAST_LIST, bytes.fromhex("01005e000001 3333 00000001")) == 0
    assert driver.set(FILTER, struct.pack("<I", DIRECTED | MULTICAST | BROADCAST)) == 0


def start_ipxe(driver: NetVsc) -> None:
    """Bring a NIC up as iPXE does: version 1, NDIS 6.1, a small receive buffer, no send buffer, no offloads."""
    driver.empty_completions = True
    driver.negotiate((V1,))
    driver.configure(capabilities=0, ndis=(6, 1))
    assert driver.lend_receive_buffer() == SUCCESS
    driver.initialize()
    assert len(driver.query(PERMANENT_ADDRESS).data) == 6
    driver.query32(CONNECT_STATUS)
    assert driver.set(FILTER, struct.pack("<I", DIRECTED | MULTICAST | ALL_MULTICAST | BROADCAST)) == 0


VLAN_PPI = 6


def vlan_ppi(vlan: int, priority: int = 0) -> bytes:
    """The per-packet information that gives a frame a tag."""
    return ppi(VLAN_PPI, priority | vlan << 4)
