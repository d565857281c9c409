"""The guest's side of an integration component's pipe, without rings: it answers as hv_utils does, or as told.

Written with `struct` from Linux 6.1 include/linux/hyperv.h, so that it does not share the host's layouts.
"""

from __future__ import annotations

import struct

from devices.synthetic.ic.component import IntegrationComponent
from devices.vmbus.packets import inband

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.core._hot import Packet

_PIPE = struct.Struct("<II")
_HEADER = struct.Struct("<HHHHHHIBBH")

VersionPair = tuple[int, int]


class Message:
    """One message of the host's, taken apart."""

    def __init__(self, payload: bytes) -> None:
        kind, length = _PIPE.unpack_from(payload)
        assert kind == 1
        assert 0 <= len(payload) - 8 - length < 8  # rings pad to 8 bytes
        payload = payload[: 8 + length]
        fields = _HEADER.unpack_from(payload, 8)
        self.framework: VersionPair = fields[0:2]
        self.type: int = fields[2]
        self.version: VersionPair = fields[3:5]
        self.status: int = fields[6]
        self.transaction: int = fields[7]
        self.flags: int = fields[8]
        self.body = payload[28:]
        assert fields[5] == len(self.body)

    def offered(self) -> tuple[list[VersionPair], list[VersionPair]]:
        """The framework and message versions of a negotiation."""
        frameworks, messages, _ = struct.unpack_from("<HHI", self.body)
        pairs = list(struct.iter_unpack("<HH", self.body[8:]))
        assert len(pairs) == frameworks + messages
        return pairs[:frameworks], pairs[frameworks:]


class FakeChannel:
    """Stands for `devices.vmbus.channel.Channel`; `room` is how many more packets it takes."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.sent: list[bytes] = []
        self.on_sent: Callable[[], None] = lambda: None
        self.room = room

    def send(self, packets: Sequence[Packet]) -> bool:
        if len(packets) > self.room:
            return False
        for packet in packets:
            self.room -= 1
            self.sent.append(packet[4])
        self.on_sent()
        return True


class IcGuest:
    """A guest with its driver loaded: `open` connects, `serve` answers everything that waits."""

    def __init__(
        self,
        component: IntegrationComponent,
        versions: Sequence[VersionPair],
        frameworks: Sequence[VersionPair] = ((3, 0), (1, 0)),
        status: int = 0,
    ) -> None:
        self.component = component
        self.versions = versions
        self.frameworks = frameworks
        self.status = status
        self.channel: Any = FakeChannel()
        self.received: list[Message] = []

    def open(self) -> None:
        self.channel = FakeChannel()
        self.component.open(self.channel)

    def close(self) -> None:
        self.component.close(self.channel)

    def take(self) -> list[Message]:
        """Read what the host sent since the last time."""
        waiting, self.channel.sent = self.channel.sent, []
        messages = [Message(payload) for payload in waiting]
        self.received += messages
        return messages

    def serve(self) -> list[Message]:
        """Answer what waits, and what that brings; return the messages."""
        messages = []
        while waiting := self.take():
            messages += waiting
            for message in waiting:
                self.answer(message)
        return messages

    def answer(self, message: Message) -> None:
        body = message.body
        if message.type == 0:
            body = self._choose(message)
        elif message.type == 1:
            body = struct.pack("<Q", struct.unpack_from("<Q", body)[0] + 1) + body[8:]
        self.reply(message, body)

    def _choose(self, message: Message) -> bytes:
        frameworks, versions = message.offered()
        framework = next((pair for pair in self.frameworks if pair in frameworks), None)
        version = next((pair for pair in self.versions if pair in versions), None)
        if framework is None or version is None:
            return struct.pack("<HHIHHHH", 0, 0, 0, *frameworks[0], *versions[0])
        return struct.pack("<HHIHHHH", 1, 1, 0, *framework, *version)

    def reply(
        self,
        message: Message,
        body: bytes,
        *,
        kind: int | None = None,
        transaction: int | None = None,
        flags: int = 5,
        size: int | None = None,
    ) -> None:
        """Send back `message` with this body, and with wrong fields where wanted."""
        header = _HEADER.pack(
            *message.framework,
            message.type if kind is None else kind,
            *message.version,
            len(body) if size is None else size,
            0 if message.type == 0 else self.status,
            message.transaction if transaction is None else transaction,
            flags,
            0,
        )
        self.raw(header + body)

    def raw(self, message: bytes) -> None:
        """Send any bytes as a message."""
        self.component.packets(self.channel, [inband(_PIPE.pack(1, len(message)) + message)])
