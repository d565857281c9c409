"""The VMBus control messages: one table, from which the encoder, the decoder and the table in docs/vmbus.md come.

Every message begins with u32 number, u32 0. Layouts: Linux 6.1 include/linux/hyperv.h (``vmbus_channel_message_*``),
openvmm vmbus_core protocol.rs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import construct as c

#: A message with its header fits the payload of one SynIC message.
MAX_MESSAGE = 240
_HEADER = struct.Struct("<II")


def version_word(major: int, minor: int) -> int:
    """Return a protocol version as it is sent."""
    return major << 16 | minor


def version_text(word: int) -> str:
    """Return ``major.minor``."""
    return f"{word >> 16}.{word & 0xFFFF}"


V1 = version_word(0, 13)
WIN7 = version_word(1, 1)
WIN8 = version_word(2, 4)
WIN8_1 = version_word(3, 0)
WIN10 = version_word(4, 0)
WIN10_RS3 = version_word(4, 1)
V5_0 = version_word(5, 0)
V5_1 = version_word(5, 1)
V5_2 = version_word(5, 2)
V5_3 = version_word(5, 3)
#: Known, so that its messages can be named, but never negotiated.
COPPER = version_word(6, 0)
#: What can be negotiated.
VERSIONS = (V1, WIN7, WIN8, WIN8_1, WIN10, WIN10_RS3, V5_0, V5_1, V5_2, V5_3)

HOST = "host to guest"
GUEST = "guest to host"


class MessageError(ValueError):
    """A guest's message that is too short for its layout, or that no guest may send."""


@dataclass(frozen=True)
class Message:
    """One row of the table: `since` is the first protocol version that has the message."""

    number: int
    name: str
    direction: str
    since: int
    layout: Any


_GUID = c.ExprAdapter(c.Bytes(16), lambda raw, _: UUID(bytes_le=raw), lambda guid, _: guid.bytes_le)
_CHANNEL = "channel_id" / c.Int32ul
_GPADL = "gpadl_id" / c.Int32ul
_STATUS = "status" / c.Int32sl


def _fields(*fields: Any) -> Any:
    return c.Struct(*fields)


_OFFER = _fields(
    "interface_id" / _GUID,
    "instance_id" / _GUID,
    c.Padding(16),
    "flags" / c.Int16ul,
    "mmio_megabytes" / c.Int16ul,
    "user_defined" / c.Bytes(120),
    "subchannel_index" / c.Int16ul,
    "mmio_megabytes_optional" / c.Default(c.Int16ul, 0),
    _CHANNEL,
    "monitor_id" / c.Default(c.Int8ul, 0xFF),
    "monitor_allocated" / c.Default(c.Int8ul, 0),
    "is_dedicated" / c.Int16ul,
    "connection_id" / c.Int32ul,
)

MESSAGES: tuple[Message, ...] = (
    Message(1, "OFFER_CHANNEL", HOST, V1, _OFFER),
    Message(2, "RESCIND_CHANNEL_OFFER", HOST, V1, _fields(_CHANNEL)),
    Message(3, "REQUEST_OFFERS", GUEST, V1, _fields()),
    Message(4, "ALL_OFFERS_DELIVERED", HOST, V1, _fields()),
    Message(
        5,
        "OPEN_CHANNEL",
        GUEST,
        V1,
        _fields(
            _CHANNEL,
            "open_id" / c.Int32ul,
            _GPADL,
            "target_vp" / c.Int32ul,
            "downstream_page_offset" / c.Int32ul,
            "user_data" / c.Bytes(120),
        ),
    ),
    Message(6, "OPEN_CHANNEL_RESULT", HOST, V1, _fields(_CHANNEL, "open_id" / c.Int32ul, _STATUS)),
    Message(7, "CLOSE_CHANNEL", GUEST, V1, _fields(_CHANNEL)),
    Message(
        8,
        "GPADL_HEADER",
        GUEST,
        V1,
        _fields(_CHANNEL, _GPADL, "length" / c.Int16ul, "range_count" / c.Int16ul, "data" / c.GreedyBytes),
    ),
    Message(
        9,
        "GPADL_BODY",
        GUEST,
        V1,
        _fields("message_number" / c.Int32ul, _GPADL, "data" / c.GreedyBytes),
    ),
    Message(10, "GPADL_CREATED", HOST, V1, _fields(_CHANNEL, _GPADL, _STATUS)),
    Message(11, "GPADL_TEARDOWN", GUEST, V1, _fields(_CHANNEL, _GPADL)),
    Message(12, "GPADL_TORNDOWN", HOST, V1, _fields(_GPADL)),
    Message(13, "REL_ID_RELEASED", GUEST, V1, _fields(_CHANNEL)),
    Message(
        14,
        "INITIATE_CONTACT",
        GUEST,
        V1,
        _fields(
            "version" / c.Int32ul,
            "target_vp" / c.Int32ul,
            "interrupt_page_or_target" / c.Int64ul,
            "parent_to_child_monitor" / c.Int64ul,
            "child_to_parent_monitor" / c.Int64ul,
        ),
    ),
    Message(
        15,
        "VERSION_RESPONSE",
        HOST,
        V1,
        _fields(
            "supported" / c.Int8ul,
            "connection_state" / c.Int8ul,
            c.Padding(2),
            "version_or_connection_id" / c.Int32ul,
        ),
    ),
    Message(16, "UNLOAD", GUEST, V1, _fields()),
    Message(17, "UNLOAD_COMPLETE", HOST, V1, _fields()),
    Message(
        18,
        "OPEN_RESERVED_CHANNEL",
        GUEST,
        WIN10,
        _fields(
            _CHANNEL,
            "target_vp" / c.Int32ul,
            "target_sint" / c.Int32ul,
            _GPADL,
            "downstream_page_offset" / c.Int32ul,
        ),
    ),
    Message(
        19,
        "CLOSE_RESERVED_CHANNEL",
        GUEST,
        WIN10,
        _fields(_CHANNEL, "target_vp" / c.Int32ul, "target_sint" / c.Int32ul),
    ),
    Message(20, "CLOSE_RESERVED_RESPONSE", HOST, WIN10, _fields(_CHANNEL)),
    # From 5.2 on a silo GUID may follow; it does not matter for a refusal.
    Message(21, "TL_CONNECT_REQUEST", GUEST, WIN10, _fields("endpoint_id" / _GUID, "service_id" / _GUID)),
    Message(22, "MODIFY_CHANNEL", GUEST, WIN10_RS3, _fields(_CHANNEL, "target_vp" / c.Int32ul)),
    Message(
        23, "TL_CONNECT_REQUEST_RESULT", HOST, WIN10_RS3, _fields("endpoint_id" / _GUID, "service_id" / _GUID, _STATUS)
    ),
    Message(24, "MODIFY_CHANNEL_RESPONSE", HOST, V5_3, _fields(_CHANNEL, _STATUS)),
    Message(
        25,
        "MODIFY_CONNECTION",
        GUEST,
        COPPER,
        _fields("parent_to_child_monitor" / c.Int64ul, "child_to_parent_monitor" / c.Int64ul),
    ),
    Message(26, "MODIFY_CONNECTION_RESPONSE", HOST, COPPER, _fields("connection_state" / c.Int8ul)),
    Message(27, "PAUSE", GUEST, COPPER, _fields()),
    Message(28, "PAUSE_RESPONSE", HOST, COPPER, _fields()),
    Message(29, "RESUME", GUEST, COPPER, _fields()),
)

_BY_NUMBER = {message.number: message for message in MESSAGES}
_BY_NAME = {message.name: message for message in MESSAGES}


def encode(name: str, **fields: Any) -> bytes:
    """Return the bytes of a message, header included."""
    message = _BY_NAME[name]
    return _HEADER.pack(message.number, 0) + bytes(message.layout.build(fields))


def decode(data: bytes) -> tuple[Message, Any]:
    """Return a message's row and its fields as attributes; bytes beyond the layout are ignored, as guests pad.

    Raises MessageError.
    """
    if len(data) < _HEADER.size:
        raise MessageError(f"message of {len(data)} bytes")
    number = _HEADER.unpack_from(data)[0]
    message = _BY_NUMBER.get(number)
    if message is None:
        raise MessageError(f"unknown message {number}")
    try:
        return message, message.layout.parse(data[_HEADER.size :])
    except c.ConstructError as error:
        raise MessageError(f"{message.name} of {len(data)} bytes is too short") from error


def describe(data: bytes) -> str:
    """Return one line about a message for traces; never raises."""
    try:
        message, fields = decode(data)
    except MessageError as error:
        return str(error)
    shown = []
    for name, value in fields.items():
        if name.startswith("_"):
            continue
        if isinstance(value, bytes):
            value = f"<{len(value)} bytes>"
        elif name == "version":
            value = version_text(value)
        shown.append(f"{name}={value}")
    return " ".join([message.name, *shown])


def table() -> str:
    """Return the Markdown table of docs/vmbus.md."""
    lines = ["| # | Message | Direction | Since | Fields |", "| --- | --- | --- | --- | --- |"]
    for message in MESSAGES:
        names = ", ".join(f"`{field.name}`" for field in message.layout.subcons if field.name) or "-"
        lines.append(
            f"| {message.number} | {message.name} | {message.direction} | {version_text(message.since)} | {names} |"
        )
    return "\n".join(lines) + "\n"
