"""A guest with just enough of IPv4 to be on a NAT switch: DHCP (RFC 2131), ARP, echo (RFC 792), and a SYN answered."""

from __future__ import annotations

import os
import select
import struct
from typing import TYPE_CHECKING

from devices.network.port import VNET_HEADER_SIZE
from tests.fakes.frames import (
    ACK,
    ARP,
    BROADCAST,
    ICMPV4,
    IPV4,
    SYN,
    TCP,
    UDP,
    checksum,
    ethernet,
    ipv4,
    mac_bytes,
    parts,
    tcp,
    udp,
    vnet,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.network.client import SwitchPort

WAIT_S = 30
_MAGIC = bytes.fromhex("63825363")
_DISCOVER, _OFFER, _REQUEST, _ACK = 1, 2, 3, 5
_REQUESTED_IP, _KIND, _SERVER = 50, 53, 54


class IpGuest:
    """Behind a port of a switch; its address is that of the port's settings."""

    def __init__(self, port: SwitchPort) -> None:
        self._port = port
        self.mac = port.settings.mac
        self.address = "0.0.0.0"
        self.router = ""
        self._router_mac = BROADCAST

    def send(self, payload: bytes, kind: int = IPV4, to: str = BROADCAST) -> None:
        """One frame."""
        os.write(self._port.fd, vnet() + ethernet(payload, kind, to=to, source=self.mac))

    def receive(self, wanted: Callable[[bytes], bool]) -> bytes:
        """The next frame that is `wanted`; the others are lost, but those who ask for its MAC are answered."""
        while True:
            assert select.select([self._port.fd], [], [], WAIT_S)[0]
            frame = os.read(self._port.fd, 1 << 17)[VNET_HEADER_SIZE:]
            if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\x01" and _text(frame[38:42]) == self.address:
                self._arp(2, frame[22:28], _text(frame[28:32]))
            if wanted(frame):
                return frame

    def dhcp(self) -> None:
        """Get an address and a router."""
        options = self._dhcp(_DISCOVER, b"")
        self.address = "0.0.0.0"
        asked = bytes((_REQUESTED_IP, 4)) + options[0] + bytes((_SERVER, 4)) + options[_SERVER]
        options = self._dhcp(_REQUEST, asked)
        self.address = _text(options[0])
        self.router = _text(options[3])
        self._arp(1, bytes(6), self.router)
        reply = self.receive(lambda frame: frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\x02")
        self._router_mac = reply[22:28].hex(":")

    def ping(self, to: str) -> None:
        """Send an echo request by the router and wait for the reply."""
        body = struct.pack(">BBHHH", 8, 0, 0, 77, 1) + b"ping"
        body = body[:2] + struct.pack(">H", checksum(body)) + body[4:]
        self.send(ipv4(body, ICMPV4, source=self.address, to=to), to=self._router_mac)
        self.receive(lambda frame: _is_ip(frame, ICMPV4, to) and frame[34:36] == b"\0\0" and frame[38:40] == b"\0\x4d")

    def accept(self, port: int) -> str:
        """Answer the first SYN for `port`; return who sent it."""
        frame = self.receive(
            lambda frame: _is_ip(frame, TCP) and frame[36:38] == struct.pack(">H", port) and frame[47] & SYN == SYN
        )
        peer, sequence = _text(frame[26:30]), int.from_bytes(frame[38:42], "big")
        segment = bytearray(
            tcp(b"", source=self.address, to=peer, ports=(port, int.from_bytes(frame[34:36], "big")), flags=SYN | ACK)
        )
        segment[8:12] = struct.pack(">I", sequence + 1 & 0xFFFFFFFF)
        segment[16:18] = bytes(2)
        pseudo = frame[30:34] + frame[26:30] + struct.pack(">HH", TCP, len(segment))
        segment[16:18] = struct.pack(">H", checksum(pseudo + bytes(segment)))
        self.send(ipv4(bytes(segment), TCP, source=self.address, to=peer), to=self._router_mac)
        return peer

    def _arp(self, operation: int, to: bytes, address: str) -> None:
        body = struct.pack(">HHBBH", 1, IPV4, 6, 4, operation) + mac_bytes(self.mac) + _packed(self.address)
        self.send(body + to + _packed(address), ARP)

    def _dhcp(self, kind: int, options: bytes) -> dict[int, bytes]:
        """The options of the answer, and the address given as option 0."""
        message = struct.pack(">BBBBIHH", 1, 1, 6, 0, 0x1234, 0, 0x8000) + bytes(16) + mac_bytes(self.mac)
        message = message.ljust(236, b"\0") + _MAGIC + bytes((_KIND, 1, kind)) + options + b"\xff"
        packet = udp(message, source="0.0.0.0", to="255.255.255.255", ports=(68, 67))
        self.send(ipv4(packet, UDP, source="0.0.0.0", to="255.255.255.255"))
        frame = self.receive(lambda frame: _is_ip(frame, UDP) and frame[36:38] == b"\0\x44")
        reply = frame[parts(frame).payload :]
        found = {0: reply[16:20]}
        rest = reply[240:]
        while rest and rest[0] != 0xFF:
            if rest[0]:
                found[rest[0]] = rest[2 : 2 + rest[1]]
            rest = rest[2 + rest[1] :] if rest[0] else rest[1:]
        assert found[_KIND] == bytes((_OFFER if kind == _DISCOVER else _ACK,))
        return found


def _is_ip(frame: bytes, protocol: int, source: str | None = None) -> bool:
    good = len(frame) >= 42 and frame[12:14] == b"\x08\0" and frame[14] == 0x45 and frame[23] == protocol
    return good and (source is None or _text(frame[26:30]) == source)


def _packed(address: str) -> bytes:
    return bytes(map(int, address.split(".")))


def _text(packed: bytes) -> str:
    return ".".join(map(str, packed))
