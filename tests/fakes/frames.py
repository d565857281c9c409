"""Frames made and taken apart in plain Python: what C code is checked against. Checksums as RFC 1071 has them."""

from __future__ import annotations

import ipaddress
import struct
from typing import NamedTuple

IPV4, ARP, VLAN, IPV6, SERVICE_VLAN = 0x0800, 0x0806, 0x8100, 0x86DD, 0x88A8
ICMPV4, TCP, UDP, ICMPV6 = 1, 6, 17, 58
FIN, SYN, PSH, ACK, CWR = 1, 2, 8, 0x10, 0x80
BROADCAST = "ff:ff:ff:ff:ff:ff"


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def checksum(data: bytes) -> int:
    """The internet checksum: one's complement of the one's complement sum."""
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def ethernet(payload: bytes, kind: int, *, to: str = BROADCAST, source: str = "00:15:5d:00:00:01") -> bytes:
    return mac_bytes(to) + mac_bytes(source) + struct.pack(">H", kind) + payload


def tagged(frame: bytes, vlan: int, kind: int = VLAN) -> bytes:
    """`frame` with one more tag in front."""
    return frame[:12] + struct.pack(">HH", kind, vlan) + frame[12:]


def _addresses(source: str, to: str) -> bytes:
    return ipaddress.ip_address(source).packed + ipaddress.ip_address(to).packed


def _pseudo(addresses: bytes, protocol: int, length: int) -> bytes:
    if len(addresses) == 8:
        return addresses + struct.pack(">HH", protocol, length)
    return addresses + struct.pack(">II", length, protocol)


def ipv4(payload: bytes, protocol: int, *, source: str, to: str, options: bytes = b"", fragment: int = 0) -> bytes:
    length = 20 + len(options) + len(payload)
    head = struct.pack(">BBHHHBBH", 0x45 + len(options) // 4, 0, length, 0x1234, fragment, 64, protocol, 0)
    head += _addresses(source, to) + options
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + payload


def ipv6(payload: bytes, protocol: int, *, source: str, to: str) -> bytes:
    return struct.pack(">IHBB", 6 << 28, len(payload), protocol, 255) + _addresses(source, to) + payload


def extension(following: int, payload: bytes, size: int = 8) -> bytes:
    """An IPv6 extension header, to be used as payload: hop-by-hop, routing or destination options."""
    return bytes((following, size // 8 - 1)) + bytes(size - 2) + payload


def udp(payload: bytes, *, source: str, to: str, ports: tuple[int, int]) -> bytes:
    length = 8 + len(payload)
    pseudo = _pseudo(_addresses(source, to), UDP, length)
    found = checksum(pseudo + struct.pack(">HHHH", *ports, length, 0) + payload)
    return struct.pack(">HHHH", *ports, length, found or 0xFFFF) + payload


def tcp(
    payload: bytes,
    *,
    source: str,
    to: str,
    ports: tuple[int, int] = (1000, 2000),
    sequence: int = 0,
    flags: int = ACK,
    options: bytes = b"",
) -> bytes:
    size = 20 + len(options)
    head = struct.pack(">HHIIHHHH", *ports, sequence, 7, size // 4 << 12 | flags, 100, 0, 0) + options
    found = checksum(_pseudo(_addresses(source, to), TCP, size + len(payload)) + head + payload)
    return head[:16] + struct.pack(">H", found) + head[18:] + payload


def icmpv6(kind: int, payload: bytes, *, source: str, to: str) -> bytes:
    body = struct.pack(">BBH", kind, 0, 0) + payload
    found = checksum(_pseudo(_addresses(source, to), ICMPV6, len(body)) + body)
    return body[:2] + struct.pack(">H", found) + body[4:]


def packet4(payload: bytes, protocol: int, **how: str) -> bytes:
    """A frame with an IPv4 packet from 10.0.0.1 to 10.0.0.2."""
    return ethernet(ipv4(payload, protocol, source="10.0.0.1", to="10.0.0.2"), IPV4, **how)


class Parts(NamedTuple):
    """What is in a frame of TCP or UDP over IP without extension headers."""

    network: int
    transport: int
    payload: int
    version: int
    protocol: int


def parts(frame: bytes) -> Parts:
    at = 12
    while (kind := int.from_bytes(frame[at : at + 2], "big")) in (VLAN, SERVICE_VLAN):
        at += 4
    network = at + 2
    if kind == IPV4:
        transport, protocol, version = network + (frame[network] & 15) * 4, frame[network + 9], 4
    else:
        assert kind == IPV6
        transport, protocol, version = network + 40, frame[network + 6], 6
    header = frame[transport + 12] >> 4 << 2 if protocol == TCP else 8
    return Parts(network, transport, transport + header, version, protocol)


def pseudo_of(frame: bytes, length: int) -> bytes:
    """The pseudo header for `length` bytes of TCP or UDP."""
    found = parts(frame)
    start, size = (12, 8) if found.version == 4 else (8, 32)
    return _pseudo(frame[found.network + start : found.network + start + size], found.protocol, length)


def assert_right(frame: bytes) -> None:
    """Lengths and checksums of a TCP or UDP frame are those of its content."""
    found = parts(frame)
    ip = frame[found.network : found.transport]
    if found.version == 4:
        assert int.from_bytes(ip[2:4], "big") == len(frame) - found.network
        assert checksum(ip) == 0
    else:
        assert int.from_bytes(ip[4:6], "big") == len(frame) - found.transport
    assert checksum(pseudo_of(frame, len(frame) - found.transport) + frame[found.transport :]) == 0


def vnet(flags: int = 0, gso_type: int = 0, header: int = 0, gso_size: int = 0, start: int = 0, at: int = 0) -> bytes:
    """A virtio_net_hdr."""
    return struct.pack("<BBHHHH", flags, gso_type, header, gso_size, start, at)


def partial(frame: bytes, gso_size: int = 0) -> bytes:
    """A header and `frame` with no more than the pseudo header's sum as checksum; to be cut with `gso_size`."""
    found = parts(frame)
    field = found.transport + (16 if found.protocol == TCP else 6)
    total = checksum(pseudo_of(frame, len(frame) - found.transport)) ^ 0xFFFF
    kind = 0
    if gso_size:
        kind = 5 if found.protocol == UDP else {4: 1, 6: 4}[found.version]
    head = vnet(1, kind, found.payload, gso_size, found.transport, field - found.transport)
    return head + frame[:field] + struct.pack(">H", total) + frame[field + 2 :]
