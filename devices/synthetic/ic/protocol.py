"""What integration components send: the common header, version negotiation and each component's body.

Layouts: Linux 6.1 include/linux/hyperv.h (``icmsg_hdr``, ``icmsg_negotiate``, ``shutdown_msg_data``,
``heartbeat_msg_data``, ``ictimesync_data``, ``ictimesync_ref_data``) and openvmm hyperv_ic_protocol. Everything is
little-endian; a message is a header and its body, inside the pipe's framing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from construct import Bytes, Const, ConstructError, Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct, this

from devices.vmbus.packets import ChannelViolation


class Version(NamedTuple):
    """A framework or message version."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


FRAMEWORK_VERSIONS = (Version(1, 0), Version(3, 0))
SHUTDOWN_VERSIONS = (Version(1, 0), Version(3, 0), Version(3, 1), Version(3, 2))
HEARTBEAT_VERSIONS = (Version(1, 0), Version(3, 0))
TIMESYNC_VERSIONS = (Version(1, 0), Version(3, 0), Version(4, 0))

NEGOTIATE, HEARTBEAT, SHUTDOWN, TIMESYNC = 0, 1, 3, 4
TRANSACTION, REQUEST, RESPONSE = 1, 2, 4

STATUS_OK = 0
STATUS_NAMES = {
    0x80070103: "no more items",
    0x80004005: "failed",
    0x80070032: "not supported",
    0x80041002: "not found",
}

_VERSION = Struct("major" / Int16ul, "minor" / Int16ul)

HEADER = Struct(
    "framework" / _VERSION,
    "type" / Int16ul,
    "message" / _VERSION,
    "size" / Int16ul,  # bytes of the body
    "status" / Int32ul,
    "transaction" / Int8ul,
    "flags" / Int8ul,
    Padding(2),
)

NEGOTIATE_BODY = Struct(
    "framework_count" / Int16ul,
    "message_count" / Int16ul,
    Padding(4),
    "versions" / _VERSION[this.framework_count + this.message_count],
)

SHUTDOWN_PLANNED = 0x80000000
SHUTDOWN_FORCE, SHUTDOWN_RESTART = 1, 2
SHUTDOWN_BODY = Struct(
    "reason" / Const(SHUTDOWN_PLANNED, Int32ul),
    "timeout_seconds" / Const(0, Int32ul),
    "flags" / Int32ul,
    "text" / Bytes(2048),
)

#: Windows says in ``state`` how it fares; Linux sends back what it got.
HEARTBEAT_STATES = ("unknown", "healthy", "critical", "stopped")
HEARTBEAT_BODY = Struct("sequence" / Int64ul, "state" / Int32ul, Padding(28))
#: The least that guests answer with.
HEARTBEAT_REPLY = Struct("sequence" / Int64ul)

TIMESYNC_SYNC, TIMESYNC_SAMPLE = 1, 2
#: Before version 4.
TIMESYNC_BODY = Struct(
    "parent_time" / Int64ul,  # UTC in 100 ns since 1601
    "child_time" / Const(0, Int64ul),
    "round_trip" / Const(0, Int64ul),
    "flags" / Int8ul,
    Padding(3),
)
TIMESYNC_BODY_V4 = Struct(
    "parent_time" / Int64ul,
    "reference_time" / Int64ul,  # the VM's reference time at the same moment, in 100 ns
    "flags" / Int8ul,
    "leap" / Const(0, Int8ul),
    "stratum" / Const(0, Int8ul),
    Padding(5),
)


def encode(framework: Version, message: Version, kind: int, transaction: int, body: bytes) -> bytes:
    """Return a request of the host's."""
    header: bytes = HEADER.build(
        {
            "framework": framework._asdict(),
            "type": kind,
            "message": message._asdict(),
            "size": len(body),
            "status": STATUS_OK,
            "transaction": transaction,
            "flags": TRANSACTION | REQUEST,
        }
    )
    return header + body


def encode_offer(frameworks: tuple[Version, ...], messages: tuple[Version, ...], transaction: int) -> bytes:
    """Return the negotiation request that offers these versions."""
    body = NEGOTIATE_BODY.build(
        {
            "framework_count": len(frameworks),
            "message_count": len(messages),
            "versions": [version._asdict() for version in frameworks + messages],
        }
    )
    return encode(Version(0, 0), Version(0, 0), NEGOTIATE, transaction, body)


def decode(message: bytes) -> tuple[Any, bytes]:
    """Split a message of the guest's into its header and the body that the header tells of.

    Raises ChannelViolation if either is cut off.
    """
    try:
        header = HEADER.parse(message)
    except ConstructError as error:
        raise ChannelViolation(f"integration message of {len(message)} bytes has no header") from error
    body = message[HEADER.sizeof() :][: header.size]
    if len(body) < header.size:
        raise ChannelViolation(f"integration message says {header.size} bytes of body but holds {len(body)}")
    return header, body


def parse(layout: Any, body: bytes, what: str) -> Any:
    """Parse a body; raises ChannelViolation, naming `what`, if it is too short."""
    try:
        return layout.parse(body)
    except ConstructError as error:
        raise ChannelViolation(f"{what} of {len(body)} bytes is too short") from error


def decode_choice(
    body: bytes, frameworks: tuple[Version, ...], messages: tuple[Version, ...]
) -> tuple[Version, Version] | None:
    """Return the framework and message version that the guest chose, None if it knows none of ours.

    Raises ChannelViolation for an answer that is none.
    """
    # The counts are looked at before the versions are parsed: they are the guest's.
    counts = int.from_bytes(body[0:2], "little"), int.from_bytes(body[2:4], "little")
    if len(body) < 4 or counts not in ((0, 0), (1, 1)):
        raise ChannelViolation(f"negotiation answer of {len(body)} bytes with {counts[0]} and {counts[1]} versions")
    if counts == (0, 0):
        return None
    chosen = parse(NEGOTIATE_BODY, body, "negotiation answer").versions
    framework = Version(chosen[0].major, chosen[0].minor)
    message = Version(chosen[1].major, chosen[1].minor)
    if framework not in frameworks or message not in messages:
        raise ChannelViolation(f"guest chose versions {framework} and {message}, which were not offered")
    return framework, message
