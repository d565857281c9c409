"""The network protocol (NVSP) on its VMBus channels: what the packets hold.

Facts: drivers/net/hyperv/hyperv_net.h of Linux 6.1 and vm/devices/net/netvsp/src/protocol.rs of OpenVMM. A message is
its number and its fields, little-endian, and zeros up to a fixed size.
"""

from __future__ import annotations

import struct
from enum import IntEnum

#: The channel type of a synthetic NIC.
INTERFACE_TYPE = "f8615163-df3e-46c5-913f-f2d2f965ed0e"

#: Protocol versions: Windows Server 2008 (and iPXE), 2008 R2, 2012, 2012 R2, 2016, 2019.
V1, V2, V4, V5, V6, V6_1 = 0x00002, 0x30002, 0x40000, 0x50000, 0x60000, 0x60001
VERSIONS = (V1, V2, V4, V5, V6, V6_1)


class Message(IntEnum):
    """Numbers of messages."""

    INIT = 1
    INIT_COMPLETE = 2
    SEND_NDIS_VERSION = 100
    SEND_RECEIVE_BUFFER = 101
    SEND_RECEIVE_BUFFER_COMPLETE = 102
    REVOKE_RECEIVE_BUFFER = 103
    SEND_SEND_BUFFER = 104
    SEND_SEND_BUFFER_COMPLETE = 105
    REVOKE_SEND_BUFFER = 106
    SEND_RNDIS_PACKET = 107
    SEND_RNDIS_PACKET_COMPLETE = 108
    SEND_NDIS_CONFIG = 125
    SEND_VF_ASSOCIATION = 128
    SWITCH_DATA_PATH = 129
    OID_QUERY_EX = 131
    OID_QUERY_EX_COMPLETE = 132
    SUB_CHANNEL = 133
    SEND_INDIRECTION_TABLE = 134


class Status(IntEnum):
    """How the host took a message."""

    NONE = 0
    SUCCESS = 1
    FAILURE = 2
    INVALID_RNDIS_PACKET = 5


#: What a guest may send: the version that it came with, and its fields.
REQUESTS: dict[int, tuple[int, struct.Struct]] = {
    Message.INIT: (0, struct.Struct("<II")),  # version, twice
    Message.SEND_NDIS_VERSION: (V1, struct.Struct("<II")),  # major, minor
    Message.SEND_RECEIVE_BUFFER: (V1, struct.Struct("<IH")),  # GPADL, id
    Message.REVOKE_RECEIVE_BUFFER: (V1, struct.Struct("<H")),  # id
    Message.SEND_SEND_BUFFER: (V1, struct.Struct("<IH")),  # GPADL, id
    Message.REVOKE_SEND_BUFFER: (V1, struct.Struct("<H")),  # id
    Message.SEND_RNDIS_PACKET: (V1, struct.Struct("<III")),  # channel type, section of the send buffer, bytes in it
    Message.SEND_NDIS_CONFIG: (V2, struct.Struct("<IIQ")),  # largest frame, 0, capabilities
    Message.SWITCH_DATA_PATH: (V4, struct.Struct("<I")),  # DATA_PATH_*
    Message.OID_QUERY_EX: (V5, struct.Struct("<BBHI")),  # header of an NDIS object, OID
    Message.SUB_CHANNEL: (V5, struct.Struct("<II")),  # operation, count
}

#: Channel types of SEND_RNDIS_PACKET.
DATA, CONTROL = 0, 1
#: No section of the send buffer.
NO_SECTION = 0xFFFF_FFFF
#: Capabilities of the guest that matter to us: 802.1Q tags beside the frame, and segments put together (RSC).
CAPABILITY_8021Q, CAPABILITY_RSC = 0x08, 0x80
DATA_PATH_SYNTHETIC = 0
SUB_CHANNEL_ALLOCATE = 1

SEND_SECTION_SIZE = 6144
#: What a section of the receive buffer has beside the frame: room for the RNDIS header, and an end that netvsc in newer
#: versions of Windows has no use of (OpenVMM, buffers.rs).
_SECTION_HEADER, _SECTION_TAIL = 256, 36
#: Frames of guests that say nothing, or less.
DEFAULT_FRAME_SIZE = 1514
#: Entries of the table by which guests spread what they send over channels.
SEND_TABLE_ENTRIES = 16

_NUMBER = struct.Struct("<I")
_INIT_COMPLETE = struct.Struct("<IIII")
_RECEIVE_BUFFER_COMPLETE = struct.Struct("<IIIIIII")
_TWO = struct.Struct("<III")
_MAX_MDL_CHAIN = 34
_NO_VERSION = 0xFFFF_FFFF


def message_size(version: int) -> int:
    """Bytes of each message to a guest of this version; 0 for one that has none yet."""
    return 0x28 if version >= V6_1 else 0x1C


def parse(payload: bytes, version: int) -> tuple[Message, tuple[int, ...]]:
    """Number and fields of a message of a guest; `version` is 0 before one is agreed. Raises ValueError."""
    if len(payload) < _NUMBER.size:
        raise ValueError(f"message of {len(payload)} bytes")
    (number,) = _NUMBER.unpack_from(payload)
    if number not in REQUESTS:
        raise ValueError(f"unknown message {number}")
    since, fields = REQUESTS[number]
    message = Message(number)
    if version < since:
        raise ValueError(f"{message.name} under protocol version {version:#x}")
    if len(payload) < _NUMBER.size + fields.size:
        raise ValueError(f"{message.name} of {len(payload)} bytes")
    return message, fields.unpack_from(payload, _NUMBER.size)


def init_complete(version: int, accepted: bool) -> bytes:
    """The answer to INIT."""
    legacy = V1 if accepted and version == V1 else _NO_VERSION
    return _INIT_COMPLETE.pack(
        Message.INIT_COMPLETE, legacy, _MAX_MDL_CHAIN, Status.SUCCESS if accepted else Status.NONE
    )


def receive_section_size(frame_size: int) -> int:
    """Bytes of a section of the receive buffer for frames of so many bytes."""
    return _SECTION_HEADER + frame_size + _SECTION_TAIL


def receive_buffer_complete(section_size: int, sections: int) -> bytes:
    """The answer to SEND_RECEIVE_BUFFER; no sections for a buffer that is refused."""
    number = Message.SEND_RECEIVE_BUFFER_COMPLETE
    if not sections:
        return _RECEIVE_BUFFER_COMPLETE.pack(number, Status.FAILURE, 0, 0, 0, 0, 0)
    end = section_size * sections
    return _RECEIVE_BUFFER_COMPLETE.pack(number, Status.SUCCESS, 1, 0, section_size, sections, end)


def send_buffer_complete(accepted: bool) -> bytes:
    """The answer to SEND_SEND_BUFFER."""
    status, size = (Status.SUCCESS, SEND_SECTION_SIZE) if accepted else (Status.FAILURE, 0)
    return _TWO.pack(Message.SEND_SEND_BUFFER_COMPLETE, status, size)


def rndis_packet_complete(status: Status) -> bytes:
    """The answer to SEND_RNDIS_PACKET."""
    return _TWO.pack(Message.SEND_RNDIS_PACKET_COMPLETE, status, 0)


def oid_query_ex_complete(status: int) -> bytes:
    """The answer to OID_QUERY_EX, without data."""
    return _TWO.pack(Message.OID_QUERY_EX_COMPLETE, status, 0)


def sub_channel_complete(status: Status, count: int) -> bytes:
    """The answer to SUB_CHANNEL."""
    return _TWO.pack(Message.SUB_CHANNEL, status, count)


def send_indirection_table(channels: int) -> bytes:
    """The table by which a guest is to spread what it sends over `channels`."""
    table = [entry % channels for entry in range(SEND_TABLE_ENTRIES)]
    header = _TWO.pack(Message.SEND_INDIRECTION_TABLE, len(table), _TWO.size)
    return header + struct.pack(f"<{len(table)}I", *table)


def version_text(version: int) -> str:
    """A version as people write it."""
    return {V1: "1", V2: "2"}.get(version, f"{version >> 16}.{version & 0xFFFF}")
