"""What the service of a switch and its clients say to each other: JSON objects over SOCK_SEQPACKET, one a message.

A client asks ``{"command": NAME, ...}``, one of the structs here, and gets one reply to each, in order: ``{"ok": true,
...}`` or ``{"ok": false, "error": TEXT, "kind": KIND}``. The descriptor of a new port comes with the reply to ``plug``.
To a connection that has a port the service also tells ``{"event": "settings", "settings": {...}}`` when somebody else
has changed them. A reply that is larger than a message is ``{"ok": true, "file": LENGTH}``, with the descriptor of a
memory file that holds it.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Annotated, Any

import msgspec

from devices.network.settings import PortSettings

MAX_MESSAGE = 32 << 10
#: The largest reply by memory file.
MAX_FILE = 64 << 20


class Request(msgspec.Struct, tag_field="command", tag=str.lower, frozen=True, forbid_unknown_fields=True):
    """What a client may ask."""


class Plug(Request, frozen=True):
    """Make a port, which lives as long as the connection."""

    settings: PortSettings


class Offloads(Request, frozen=True):
    """The NIC at the connection's port takes these from now on; see `devices.network.port`."""

    offloads: Annotated[int, msgspec.Meta(ge=0, le=0xFF)]


class Change(Request, frozen=True):
    """Set the connection's own port."""

    settings: PortSettings


class Show(Request, frozen=True):
    """Tell all about the switch; or about the port of ``VM`` or ``VM:NIC``."""

    port: str | None = None


class Set(Request, frozen=True):
    """Change some of the settings of somebody's port."""

    port: str
    changes: dict[str, Any]


class Mirror(Request, frozen=True):
    """Write the frames of somebody's port to a new file at an absolute path, or stop that."""

    port: str
    path: str | None


class Stop(Request, frozen=True):
    """End the service, and forget the switch's definition if told; refused while there are ports, unless by force."""

    force: bool = False
    delete: bool = False


REQUESTS = Plug | Offloads | Change | Show | Set | Mirror | Stop


def encode(message: dict[str, Any]) -> tuple[bytes, int]:
    """The bytes to send, and the memory file that goes with them, which the caller closes, or -1."""
    text = json.dumps(message).encode()
    if len(text) <= MAX_MESSAGE:
        return text, -1
    file = os.memfd_create("pyvmm-reply", os.MFD_CLOEXEC)
    os.truncate(file, len(text))
    os.pwrite(file, text, 0)
    return json.dumps({"ok": True, "file": len(text)}).encode(), file


def decode(text: bytes) -> dict[str, Any]:
    """The message in `text`; raises ValueError."""
    try:
        message = json.loads(text)
    except RecursionError:
        message = None
    if not isinstance(message, dict):
        raise ValueError("not a JSON object")
    return message


def receive(connection: socket.socket) -> tuple[dict[str, Any] | None, int]:
    """The next message from a service, None at its end, and the descriptor with it or -1.

    Raises OSError as the socket does, and ValueError for what no service sends.
    """
    text, fds, flags, _ = socket.recv_fds(connection, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
    fd = fds[0] if fds else -1
    if not text:
        return None, fd
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("too long for a message")
        message = decode(text)
        if "file" in message:
            file, fd = fd, -1
            try:
                message = decode(os.pread(file, MAX_FILE, 0))
            finally:
                os.close(file)
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise
    return message, fd
