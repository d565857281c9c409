"""NDIS objects: what larger queries are answered with, and larger sets hold.

Sources: Microsoft's documentation of the structures NDIS_OFFLOAD, NDIS_OFFLOAD_PARAMETERS, NDIS_OFFLOAD_ENCAPSULATION,
NDIS_RECEIVE_SCALE_CAPABILITIES, NDIS_RECEIVE_SCALE_PARAMETERS, NDIS_LINK_STATE and RNDIS_CONFIG_PARAMETER_INFO;
drivers/net/hyperv/hyperv_net.h of Linux 6.1; vm/devices/net/netvsp/src/rndisprot.rs of OpenVMM.
"""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import NamedTuple

from devices.synthetic.netvsp.rndis import Refused, Status


class Offload(IntFlag):
    """Work that a guest may leave to its NIC: checksums, segments to be cut, segments to be joined."""

    SEND_IP4 = 0x1
    SEND_TCP4 = 0x2
    SEND_UDP4 = 0x4
    SEND_TCP6 = 0x8
    SEND_UDP6 = 0x10
    RECEIVE_IP4 = 0x20
    RECEIVE_TCP4 = 0x40
    RECEIVE_UDP4 = 0x80
    RECEIVE_TCP6 = 0x100
    RECEIVE_UDP6 = 0x200
    LSO4 = 0x400
    LSO6 = 0x800
    RSC4 = 0x1000
    RSC6 = 0x2000


SEND = Offload.SEND_IP4 | Offload.SEND_TCP4 | Offload.SEND_UDP4 | Offload.SEND_TCP6 | Offload.SEND_UDP6
RECEIVE = (
    Offload.RECEIVE_IP4 | Offload.RECEIVE_TCP4 | Offload.RECEIVE_UDP4 | Offload.RECEIVE_TCP6 | Offload.RECEIVE_UDP6
)
LSO = Offload.LSO4 | Offload.LSO6
RSC = Offload.RSC4 | Offload.RSC6
#: How far the same checksum's bit for what is received is from the one for what is sent.
_TO_RECEIVE = 5

# Types of objects.
_DEFAULT, _RSS_CAPABILITIES, _OFFLOAD, _ENCAPSULATION = 0x80, 0x88, 0xA7, 0xA8
_HEADER = struct.Struct("<BBH")
#: NDIS versions that brought revisions 2 and 3 of NDIS_OFFLOAD, and the sizes of all three.
_NDIS_6_1, _NDIS_6_30 = (6, 1), (6, 30)
_OFFLOAD_SIZES = {1: 112, 2: 144, 3: 156}

#: Frames are IEEE 802.3's.
_ETHERNET, _ETHERNET_HEADER = 2, 14
#: As Hyper-V's switch has them.
_LSO_MAX_SIZE, _LSO_MIN_SEGMENTS = 0xF53C, 2
# Fields of two bits each, 1 where it is supported.
_IP_OPTIONS, _TCP_OPTIONS, _TCP, _UDP, _IP = 1, 1 << 2, 1 << 4, 1 << 6, 1 << 8


def offload(offloads: Offload, ndis: tuple[int, int]) -> bytes:
    """NDIS_OFFLOAD in the revision of the guest's NDIS version: what is possible, or what is on."""
    received = Offload(offloads >> _TO_RECEIVE)  # under the names of what is sent
    checksums = (
        *(_ETHERNET, _checksums4(offloads), _ETHERNET, _checksums4(received)),
        *(_ETHERNET, _checksums6(offloads), _ETHERNET, _checksums6(received)),
    )
    sizes = (_ETHERNET, _LSO_MAX_SIZE, _LSO_MIN_SEGMENTS)
    lso4 = sizes if offloads & Offload.LSO4 else (0, 0, 0)
    lso6 = (*sizes, _IP_OPTIONS | _TCP_OPTIONS) if offloads & Offload.LSO6 else (0, 0, 0, 0)
    revision = 3 if ndis >= _NDIS_6_30 else 2 if ndis >= _NDIS_6_1 else 1
    size = _OFFLOAD_SIZES[revision]
    body = struct.pack(
        "<8I44x7I4x32x2B10x", *checksums, *lso4, *lso6, bool(offloads & Offload.RSC4), bool(offloads & Offload.RSC6)
    )
    return (_HEADER.pack(_OFFLOAD, revision, size) + body)[:size]


def _checksums4(sent: Offload) -> int:
    flags = _IP_OPTIONS | _IP if sent & Offload.SEND_IP4 else 0
    flags |= _IP_OPTIONS | _TCP_OPTIONS | _TCP if sent & Offload.SEND_TCP4 else 0
    return flags | (_IP_OPTIONS | _UDP if sent & Offload.SEND_UDP4 else 0)


def _checksums6(sent: Offload) -> int:
    flags = _IP_OPTIONS | _TCP_OPTIONS | _TCP if sent & Offload.SEND_TCP6 else 0
    return flags | (_IP_OPTIONS | _UDP if sent & Offload.SEND_UDP6 else 0)


_PARAMETERS = struct.Struct("<BBH11Bx")  # up to the flags, which are reserved
_PARAMETERS_SIZE = 20
#: Where RSC's two bytes are in later revisions.
_PARAMETERS_RSC = 22
#: Bits of values 1 to 4: what is sent, what is received.
_CHECKSUM_VALUES = {1: (False, False), 2: (True, False), 3: (False, True), 4: (True, True)}
_SWITCH_VALUES = {1: False, 2: True}


def change_offloads(offloads: Offload, data: bytes) -> Offload:
    """`offloads` as NDIS_OFFLOAD_PARAMETERS changes them; raises Refused."""
    size = _check_header(data, _DEFAULT, _PARAMETERS_SIZE)
    _, _, _, ip4, tcp4, udp4, tcp6, udp6, lso_v1, _, lso4, lso6, _, _ = _PARAMETERS.unpack_from(data)
    if _SWITCH_VALUES.get(lso_v1):
        raise Refused(Status.NOT_SUPPORTED)
    for value, bit in (
        (ip4, Offload.SEND_IP4),
        (tcp4, Offload.SEND_TCP4),
        (udp4, Offload.SEND_UDP4),
        (tcp6, Offload.SEND_TCP6),
        (udp6, Offload.SEND_UDP6),
    ):
        if value in _CHECKSUM_VALUES:
            offloads = _set_checksum(offloads, bit, *_CHECKSUM_VALUES[value])
    switches = [(lso4, Offload.LSO4), (lso6, Offload.LSO6)]
    if size >= _PARAMETERS_RSC + 2:
        switches += [(data[_PARAMETERS_RSC], Offload.RSC4), (data[_PARAMETERS_RSC + 1], Offload.RSC6)]
    for value, bit in switches:
        if value in _SWITCH_VALUES:
            offloads = offloads | bit if _SWITCH_VALUES[value] else offloads & ~bit
    return offloads


def _set_checksum(offloads: Offload, bit: Offload, send: bool, receive: bool) -> Offload:
    received = Offload(bit << _TO_RECEIVE)
    offloads &= ~(bit | received)
    return offloads | (bit if send else Offload(0)) | (received if receive else Offload(0))


def _check_header(data: bytes, kind: int, least: int) -> int:
    """The size that an object has by its header and in fact; raises Refused."""
    if len(data) < _HEADER.size:
        raise Refused(Status.INVALID_LENGTH)
    found, revision, size = _HEADER.unpack_from(data)
    if found != kind or not revision:
        raise Refused(Status.INVALID_DATA)
    if not least <= size <= len(data):
        raise Refused(Status.INVALID_LENGTH)
    return int(size)


_ENCAPSULATION_BODY = struct.Struct("<BBH6I")
_ON = 1


def encapsulation() -> bytes:
    """NDIS_OFFLOAD_ENCAPSULATION: Ethernet frames, both for IPv4 and IPv6."""
    one = (_ON, _ETHERNET, _ETHERNET_HEADER)
    return _ENCAPSULATION_BODY.pack(_ENCAPSULATION, 1, _ENCAPSULATION_BODY.size, *one, *one)


def check_encapsulation(data: bytes) -> None:
    """Raise Refused unless NDIS_OFFLOAD_ENCAPSULATION asks for what there is."""
    _check_header(data, _ENCAPSULATION, _ENCAPSULATION_BODY.size)
    fields = _ENCAPSULATION_BODY.unpack_from(data)[3:]
    for enabled, kind, header in (fields[:3], fields[3:]):
        if enabled == _ON and (kind, header) != (_ETHERNET, _ETHERNET_HEADER):
            raise Refused(Status.NOT_SUPPORTED)


# Receive side scaling ------------------------------------------------------------------------------------------------

RSS_KEY_SIZE = 40
RSS_TABLE_ENTRIES = 128
#: What frames are hashed by, NDIS_HASH_*: the addresses of IPv4 and IPv6, with the ports of TCP.
HASH_TYPES = 0x100 | 0x200 | 0x400 | 0x1000
_HASH_FUNCTION, _TOEPLITZ = 0xFF, 1
_RSS_CAPABILITIES_SIZE = 18
_CAN_HASH_TCP4, _CAN_HASH_TCP6 = 0x100, 0x200
#: header, flags, base processor, hash information, size of the table, its offset, size of the key, its offset.
_RSS_PARAMETERS = struct.Struct("<BBHHHIHxxIHxxI")
_RSS_OFF = 0x10
_ITEM_UNCHANGED = {"hash": 0x2, "table": 0x4, "key": 0x8}


class Rss(NamedTuple):
    """How frames to the guest are spread over channels; with an empty table they are not."""

    key: bytes
    table: tuple[int, ...]
    hashes: int


RSS_NONE = Rss(bytes(RSS_KEY_SIZE), (), 0)


def rss_capabilities(channels: int) -> bytes:
    """NDIS_RECEIVE_SCALE_CAPABILITIES."""
    flags = _CAN_HASH_TCP4 | _CAN_HASH_TCP6 | _TOEPLITZ
    header = _HEADER.pack(_RSS_CAPABILITIES, 2, _RSS_CAPABILITIES_SIZE)
    return header + struct.pack("<IIIH", flags, 1, channels, RSS_TABLE_ENTRIES)


def change_rss(rss: Rss, data: bytes, channels: int) -> Rss:
    """`rss` as NDIS_RECEIVE_SCALE_PARAMETERS changes it; raises Refused.

    The header says nothing of use: Hyper-V's switch doesn't look at it either.
    """
    if len(data) < _RSS_PARAMETERS.size:
        raise Refused(Status.INVALID_LENGTH)
    _, _, _, flags, _, hashes, table_size, table_at, key_size, key_at = _RSS_PARAMETERS.unpack_from(data)
    if flags & _RSS_OFF or (not flags & _ITEM_UNCHANGED["hash"] and not hashes & _HASH_FUNCTION):
        return RSS_NONE
    if flags & _ITEM_UNCHANGED["hash"]:
        hashes = rss.hashes
    elif hashes & _HASH_FUNCTION != _TOEPLITZ:
        raise Refused(Status.NOT_SUPPORTED)
    table, key = rss.table, rss.key
    if not flags & _ITEM_UNCHANGED["table"]:
        raw = _part(data, table_at, table_size)
        if not raw or len(raw) % 4 or len(raw) > 4 * RSS_TABLE_ENTRIES:
            raise Refused(Status.INVALID_LENGTH)
        table = struct.unpack(f"<{len(raw) // 4}I", raw)
        if max(table) >= channels:
            raise Refused(Status.INVALID_DATA)
    if not flags & _ITEM_UNCHANGED["key"]:
        key = _part(data, key_at, key_size)
        if len(key) != RSS_KEY_SIZE:
            raise Refused(Status.INVALID_LENGTH)
    return Rss(key, table, hashes & HASH_TYPES)


def _part(data: bytes, offset: int, size: int) -> bytes:
    if offset + size > len(data):
        raise Refused(Status.INVALID_LENGTH)
    return data[offset : offset + size]


# Others ---------------------------------------------------------------------------------------------------------------

_LINK_STATE = struct.Struct("<BBHIIIQQII")
_CONNECTED, _DISCONNECTED = 1, 2
_FULL_DUPLEX = 2


def link_state(up: bool, speed: int) -> bytes:
    """NDIS_LINK_STATE; `speed` in bits/s."""
    state = _CONNECTED if up else _DISCONNECTED
    return _LINK_STATE.pack(_DEFAULT, 1, _LINK_STATE.size, state, _FULL_DUPLEX, 0, speed, speed, 0, 0)


_CONFIG = struct.Struct("<5I")  # offset and length of the name, type, offset and length of the value
_MAX_CONFIG = 255
_CONFIG_STRING = 2
#: The parameter that changes the address: twelve hexadecimal digits.
ADDRESS_NAME = "NetworkAddress"
#: Parameters that switch offloads: of a checksum bit 0 is for what is sent, and bit 1 for what is received.
_CHECKSUM_NAMES = {
    "*IPChecksumOffloadIPv4": Offload.SEND_IP4,
    "*TCPChecksumOffloadIPv4": Offload.SEND_TCP4,
    "*UDPChecksumOffloadIPv4": Offload.SEND_UDP4,
    "*TCPChecksumOffloadIPv6": Offload.SEND_TCP6,
    "*UDPChecksumOffloadIPv6": Offload.SEND_UDP6,
}
_SWITCH_NAMES = {
    "*LsoV2IPv4": Offload.LSO4,
    "*LsoV2IPv6": Offload.LSO6,
    "*RscIPv4": Offload.RSC4,
    "*RscIPv6": Offload.RSC6,
}


def config_parameter(data: bytes) -> tuple[str, str]:
    """Name and value of RNDIS_CONFIG_PARAMETER_INFO, without a value unless that is a string. Raises Refused."""
    if len(data) < _CONFIG.size:
        raise Refused(Status.INVALID_LENGTH)
    name_at, name_size, kind, value_at, value_size = _CONFIG.unpack_from(data)
    if name_size > _MAX_CONFIG or value_size > _MAX_CONFIG:
        raise Refused(Status.INVALID_LENGTH)
    try:
        name = _part(data, name_at, name_size).decode("utf-16-le")
        value = _part(data, value_at, value_size).decode("utf-16-le") if kind == _CONFIG_STRING else ""
    except UnicodeDecodeError:
        raise Refused(Status.INVALID_DATA) from None
    return name.rstrip("\0"), value.rstrip("\0")


def parse_address(value: str) -> bytes | None:
    """The MAC address in a value of the parameter ADDRESS_NAME; None for an empty one. Raises Refused."""
    if not value:
        return None
    if len(value) != 12 or not value.isalnum() or not value.isascii():
        raise Refused(Status.INVALID_DATA)
    try:
        address = bytes.fromhex(value)
    except ValueError:
        raise Refused(Status.INVALID_DATA) from None
    if address[0] & 1:  # a group's
        raise Refused(Status.INVALID_DATA)
    return address


def change_offload_by_name(offloads: Offload, name: str, value: str) -> Offload:
    """`offloads` as a configuration parameter changes them, if it is about them; raises Refused."""
    if name not in _CHECKSUM_NAMES and name not in _SWITCH_NAMES:
        return offloads
    if value not in ("0", "1", "2", "3"):
        raise Refused(Status.INVALID_DATA)
    number = int(value)
    if name in _CHECKSUM_NAMES:
        return _set_checksum(offloads, _CHECKSUM_NAMES[name], bool(number & 1), bool(number & 2))
    bit = _SWITCH_NAMES[name]
    return offloads | bit if number else offloads & ~bit
