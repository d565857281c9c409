"""What the NIC's fast path should do with one frame, in plain Python, from the protocol and not from the C code."""

from __future__ import annotations

import struct
from typing import NamedTuple

from tests.fakes import frames
from tests.fakes.net_rig import CHECKSUM, LSO, VLAN

#: Bits of the offloads that a guest takes.
TCP4, UDP4, TCP6, UDP6, IP4, RSC4, RSC6, STRIP = (1 << bit for bit in range(8))


class Sent(NamedTuple):
    """What a payload of RNDIS packets makes: what is written to the port, and whether all of it made sense."""

    writes: list[bytes]
    valid: bool


def _ppis(data: bytes) -> dict[int, int] | None:
    found = {}
    while data:
        if len(data) < 12:
            return None
        size, kind, offset = struct.unpack_from("<III", data)
        if not 12 <= size <= len(data):
            return None
        if kind in (CHECKSUM, LSO, VLAN):
            if not 12 <= offset <= size - 4:
                return None
            (found[kind],) = struct.unpack_from("<I", data, offset)
        data = data[size:]
    return found


def send(data: bytes, frame_size: int) -> Sent:
    """The writes for a payload of RNDIS packets."""
    writes: list[bytes] = []
    valid = bool(data)
    while data:
        if len(data) < 44:
            return Sent(writes, False)
        kind, length, offset, size = struct.unpack_from("<IIII", data)
        ppi_offset, ppi_size = struct.unpack_from("<II", data, 28)
        if kind != 1 or not 44 <= length <= len(data):
            return Sent(writes, False)
        message = data[8:length]
        if offset + size > len(message):
            return Sent(writes, False)
        ppis: dict[int, int] | None = {}
        if ppi_size:
            if ppi_offset + ppi_size > len(message) or ppi_size > 256:
                return Sent(writes, False)
            ppis = _ppis(message[ppi_offset : ppi_offset + ppi_size])
            if ppis is None:
                return Sent(writes, False)
        assert ppis is not None
        written = _write(message[offset : offset + size], ppis, frame_size)
        if written is None:
            valid = False
        else:
            writes.append(written)
        data = data[length:]
    return Sent(writes, valid)


def _tags(frame: bytes, most: int = 2) -> int:
    count = 0
    while count < most and int.from_bytes(frame[12 + 4 * count : 14 + 4 * count], "big") in (0x8100, 0x88A8):
        count += 1
    return count


def _write(frame: bytes, ppis: dict[int, int], frame_size: int) -> bytes | None:
    lso, checksum, vlan = ppis.get(LSO, 0), ppis.get(CHECKSUM, 0), ppis.get(VLAN, 0) & 0xFFFF
    if len(frame) < 14:
        return None
    if len(frame) < 14 + 4 * _tags(frame, 3):
        return None
    limit = frame_size + 4 * _tags(frame)
    if len(frame) > (14 + 4 * _tags(frame) + 65535 if lso else limit):
        return None
    if vlan and _tags(frame) == 2:
        return None
    header = bytes(10)
    if lso or checksum & 0x1C:
        changed = _offload(frame, lso, checksum, limit)
        if changed is None:
            return None
        header, frame = changed[:10], changed[10:]
    if vlan:
        tci = (vlan & 7) << 13 | (vlan & 8) << 9 | vlan >> 4
        frame = frames.tagged(frame, tci)
        flags, gso, size, mss, start, field = struct.unpack("<BBHHHH", header)
        header = frames.vnet(flags, gso, size + 4 * bool(gso), mss, start + 4 * bool(flags), field)
    return header + frame


class UnknownError(Exception):
    """The model doesn't say."""


def _whole(frame: bytes) -> bool:
    """Whether the headers of an IP frame make sense."""
    network = 14 + 4 * _tags(frame)
    ip = frame[network:]
    kind = int.from_bytes(frame[network - 2 : network], "big")
    if kind == 0x0800:
        size = (ip[0] & 15) * 4 if len(ip) >= 20 and ip[0] >> 4 == 4 else 0
        if not 20 <= size <= len(ip) or int.from_bytes(ip[6:8], "big") & 0x3FFF:
            return False
        protocol = ip[9]
    elif kind == 0x86DD:
        size = 40
        if len(ip) < 40 or ip[0] >> 4 != 6:
            return False
        protocol = ip[6]
    else:
        return False
    if protocol not in (frames.TCP, frames.UDP):
        raise UnknownError
    transport = ip[size:]
    if protocol == frames.UDP:
        return len(transport) >= 8
    return len(transport) >= 20 and 20 <= transport[12] >> 4 << 2 <= len(transport)


def _offload(frame: bytes, lso: int, checksum: int, limit: int) -> bytes | None:
    """For TCP and UDP over IP without extension headers, in frames that are whole."""
    if not _whole(frame):
        return None
    found = frames.parts(frame)
    ip = bytearray(frame[found.network : found.transport])
    rest = frame[found.transport :]
    if not lso and checksum & 0x10 and found.version == 4:
        ip[10:12] = bytes(2)
        ip[10:12] = frames.checksum(bytes(ip)).to_bytes(2, "big")
    if not lso and not checksum & 0xC:
        return bytes(10) + frame[: found.network] + bytes(ip) + rest
    if found.protocol != (frames.TCP if lso or checksum & 4 else frames.UDP):
        return None
    mss = 0
    if lso:
        mss = lso & 0xFFFFF
        if not lso >> 30 & 1 or (lso >> 31) != (found.version == 6) or mss < 48 or found.payload + mss > limit:
            return None
        length = len(frame) - (found.network if found.version == 4 else found.transport)
        if len(frame) - found.network > 65535:
            return None
        at = 2 if found.version == 4 else 4
        ip[at : at + 2] = length.to_bytes(2, "big")
        if found.version == 4:
            ip[10:12] = bytes(2)
            ip[10:12] = frames.checksum(bytes(ip)).to_bytes(2, "big")
        if len(frame) - found.payload <= mss:
            mss = 0
    else:
        size = int.from_bytes(ip[2:4], "big") if found.version == 4 else 40 + int.from_bytes(ip[4:6], "big")
        if not found.payload <= found.network + size <= len(frame):
            return None
        rest = rest[: found.network + size - found.transport]
    made = bytearray(frames.partial(frame[: found.network] + bytes(ip) + rest, mss))
    if mss and frame[found.transport + 13] & 0x80:
        made[1] |= 0x80
    if not mss:
        made[2:4] = bytes(2)
    return bytes(made)


class Seen(NamedTuple):
    """A frame as the guest gets it."""

    data: bytes
    ppis: dict[int, int]


def receive(vnet: bytes, frame: bytes, offloads: int, frame_size: int, room: int) -> Seen | None:
    """What the guest sees of a frame that comes in, without filter and RSS; None for nothing."""
    flags, gso, _, mss, start, field = struct.unpack("<BBHHHH", vnet)
    if len(frame) < 14:
        return None
    tags = _tags(frame)
    limit = min(room, frame_size + 4 * tags)
    if gso == 5:  # datagrams, which no guest takes in one piece
        return None
    if len(frame) <= limit:
        gso = 0
    elif not gso:
        return None
    plain = int.from_bytes(frame[12 + 4 * tags :][:2], "big")
    known = frames.parts(frame) if plain in (0x0800, 0x86DD) else None
    ppis: dict[int, int] = {}
    if gso:
        assert known is not None
        assert mss
        if not offloads & (RSC4 if known.version == 4 else RSC6):
            return None
    if flags or gso:
        if flags & 1 and (start < 14 or start + field + 2 > len(frame)):
            return None
        mine = {(4, 6): TCP4, (4, 17): UDP4, (6, 6): TCP6, (6, 17): UDP6}
        taken = offloads & mine[known.version, known.protocol] if known else 0
        value = 0
        if known and taken:
            value = 1 << (3 if known.protocol == frames.TCP else 4)
        if flags & 1:
            if gso and taken:
                value |= 1 << 7
            else:
                found = frames.checksum(frame[start:]) or 0xFFFF
                at = start + field
                frame = frame[:at] + found.to_bytes(2, "big") + frame[at + 2 :]
        if known and known.version == 4 and offloads & IP4:
            value |= (frames.checksum(frame[known.network : known.transport]) == 0) << 5
        if value:
            ppis[CHECKSUM] = value
    if offloads & STRIP and frame[12:14] == b"\x81\x00" and len(frame) >= 18:
        tci = int.from_bytes(frame[14:16], "big")
        ppis[VLAN] = tci >> 13 | (tci >> 12 & 1) << 3 | (tci & 0xFFF) << 4
        frame = frame[:12] + frame[16:]
    return Seen(frame, ppis)
