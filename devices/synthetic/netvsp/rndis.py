"""Remote NDIS: the control messages by which a guest and its NIC talk, inside NVSP.

Facts: Microsoft's "Remote NDIS Specification" 1.1, include/linux/rndis.h of Linux 6.1,
vm/devices/net/netvsp/src/rndisprot.rs of OpenVMM. A message is u32 type, u32 length of all of it, and a body. Offsets
in a body count from where the body begins. Data messages are the C code's (`pyvmm.core._hot.NetQueue`).
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple


class Type(IntEnum):
    """Types of control messages; their completions have COMPLETION set."""

    INITIALIZE = 2
    HALT = 3
    QUERY = 4
    SET = 5
    RESET = 6
    INDICATE_STATUS = 7
    KEEPALIVE = 8


COMPLETION = 0x8000_0000


class Status(IntEnum):
    """NDIS status codes."""

    SUCCESS = 0
    FAILURE = 0xC000_0001
    NOT_SUPPORTED = 0xC000_00BB
    BAD_VERSION = 0xC001_0004
    MULTICAST_FULL = 0xC001_0009
    ADAPTER_NOT_READY = 0xC001_0011
    INVALID_LENGTH = 0xC001_0014
    INVALID_DATA = 0xC001_0015


class Indication(IntEnum):
    """What INDICATE_STATUS tells of."""

    MEDIA_CONNECT = 0x4001_000B
    MEDIA_DISCONNECT = 0x4001_000C
    OFFLOAD_CURRENT_CONFIG = 0x4002_0006


class Refused(Exception):
    """A query or set that ends with `status`."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


HEADER = struct.Struct("<II")
_REQUEST_ID = struct.Struct("<I")
_INITIALIZE = struct.Struct("<IIII")  # request, major, minor, largest transfer
#: request, status, major, minor, device flags, medium, packets in a message, largest transfer, alignment (a power of
#: 2), offset and size of the list of address families.
_INITIALIZE_COMPLETE = struct.Struct("<11I")
_QUERY = struct.Struct("<5I")  # request, OID, length and offset of the data, handle; SET's as well
_QUERY_COMPLETE = struct.Struct("<4I")  # request, status, length and offset of the data
_ID_STATUS = struct.Struct("<II")
_INDICATE = struct.Struct("<3I")  # status, length and offset of the data

MAJOR_VERSION, MINOR_VERSION = 1, 0
_CONNECTIONLESS = 1
_MAX_PACKETS = 8
_MAX_TRANSFER = 0xEFFF_FFFF
_ALIGNMENT = 3
#: The longest control message that is read. Linux's longest has an RSS table, Windows's the name of a parameter.
MAX_MESSAGE = 0x4000


class Request(NamedTuple):
    """A message from the guest. `oid` and `data` are of QUERY and SET only."""

    type: Type
    id: int
    oid: int
    data: bytes


def parse(message: bytes) -> Request:
    """Take a control message apart; more bytes than it says are padding. Raises ValueError."""
    if len(message) < HEADER.size:
        raise ValueError(f"RNDIS message of {len(message)} bytes")
    number, length = HEADER.unpack_from(message)
    if not HEADER.size <= length <= len(message):
        raise ValueError(f"RNDIS message of {len(message)} bytes that says {length}")
    body = message[HEADER.size : length]
    try:
        kind = Type(number)
    except ValueError:
        raise ValueError(f"RNDIS message of unknown type {number:#x}") from None
    layout = _LAYOUTS.get(kind)
    if layout is None or len(body) < layout.size:
        raise ValueError(f"RNDIS {kind.name} of {length} bytes")
    if layout is not _QUERY:
        return Request(kind, _REQUEST_ID.unpack_from(body)[0], 0, b"")
    request_id, oid, size, offset, _ = _QUERY.unpack_from(body)
    if not size:  # and the offset is anything
        return Request(kind, request_id, oid, b"")
    if offset < _QUERY.size or offset + size > len(body):
        raise ValueError(f"RNDIS {kind.name} with {size} bytes at {offset} of {len(body)}")
    return Request(kind, request_id, oid, body[offset : offset + size])


#: The least that each type has.
_LAYOUTS = {
    Type.INITIALIZE: _INITIALIZE,
    Type.HALT: _REQUEST_ID,
    Type.QUERY: _QUERY,
    Type.SET: _QUERY,
    Type.RESET: _REQUEST_ID,  # which is reserved there
    Type.KEEPALIVE: _REQUEST_ID,
}


def _message(kind: int, body: bytes) -> bytes:
    return HEADER.pack(kind, HEADER.size + len(body)) + body


def initialize_complete(request_id: int) -> bytes:
    """The answer to INITIALIZE."""
    body = _INITIALIZE_COMPLETE.pack(
        request_id,
        Status.SUCCESS,
        MAJOR_VERSION,
        MINOR_VERSION,
        _CONNECTIONLESS,
        0,  # Ethernet
        _MAX_PACKETS,
        _MAX_TRANSFER,
        _ALIGNMENT,
        0,
        0,
    )
    return _message(COMPLETION | Type.INITIALIZE, body)


def query_complete(request_id: int, status: Status, data: bytes = b"") -> bytes:
    """The answer to QUERY."""
    body = _QUERY_COMPLETE.pack(request_id, status, len(data), _QUERY_COMPLETE.size) + data
    return _message(COMPLETION | Type.QUERY, body)


def set_complete(request_id: int, status: Status) -> bytes:
    """The answer to SET."""
    return _message(COMPLETION | Type.SET, _ID_STATUS.pack(request_id, status))


def reset_complete() -> bytes:
    """The answer to RESET: it worked, and the guest shall set its filter and addresses again."""
    return _message(COMPLETION | Type.RESET, _ID_STATUS.pack(Status.SUCCESS, 1))


def keepalive_complete(request_id: int) -> bytes:
    """The answer to KEEPALIVE."""
    return _message(COMPLETION | Type.KEEPALIVE, _ID_STATUS.pack(request_id, Status.SUCCESS))


def indicate_status(status: Indication, data: bytes = b"") -> bytes:
    """Tell the guest of something that it hasn't asked for."""
    body = _INDICATE.pack(status, len(data), _INDICATE.size if data else 0) + data
    return _message(Type.INDICATE_STATUS, body)
