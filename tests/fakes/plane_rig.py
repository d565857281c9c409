"""NICs at the ports of a data plane: frames in and out through the descriptors that it gives."""

from __future__ import annotations

import itertools
import os
import select
import time
from typing import Any

import msgspec

from devices.network.port import MAX_FRAME
from devices.network.settings import PortSettings, VlanMode
from tests.fakes import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.network.plane import DataPlane

#: What must arrive does within this, or the test fails.
PATIENCE_S = 20.0
VNET = 10
_MARK = b"\x88\xb5marker"
_COUNT = itertools.count()


def mac_of(number: int) -> str:
    return f"00:15:5d:00:00:{number:02x}"


class Nic:
    """One NIC and its port; what it is sent is read in order."""

    def __init__(self, plane: DataPlane, number: int, settings: PortSettings) -> None:
        self.plane = plane
        self.number = number
        self.settings = settings
        self.mac = settings.mac
        self.fd = plane.add_port(number, settings)
        os.set_blocking(self.fd, False)

    def change(self, **changes: Any) -> None:
        self.settings = msgspec.structs.replace(self.settings, **changes)
        self.plane.change_port(self.number, self.settings)

    def close(self) -> None:
        os.close(self.fd)

    def send(self, frame: bytes, header: bytes = bytes(VNET)) -> None:
        """Hand the port a frame, once it takes one."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                os.write(self.fd, header + frame)
                return
            except BlockingIOError:
                assert select.select([], [self.fd], [], deadline - time.monotonic())[1], "the port takes nothing"

    def receive(self) -> tuple[bytes, bytes]:
        """The next header and frame that isn't a marker; fails if none comes."""
        while True:
            header, frame = self.read()
            if _MARK not in frame and not _is_chatter(frame):
                return header, frame

    def read(self) -> tuple[bytes, bytes]:
        """The next header and frame of all."""
        assert select.select([self.fd], [], [], PATIENCE_S)[0], "nothing arrives"
        message = os.read(self.fd, MAX_FRAME)
        return message[:VNET], message[VNET:]

    def frame(self, to: str = frames.BROADCAST, text: bytes = b"", **how: Any) -> bytes:
        """A frame from this NIC of a kind that nobody else sends."""
        return frames.ethernet(text, 0x88B6, to=to, source=how.get("source", self.mac))

    def heard(self, witness: Nic, tag: int = 0) -> list[bytes]:
        """The frames that have arrived here when those of `witness`, sent later, have; which are left out.

        The witness is in this NIC's VLAN `tag`, which this one sees as a tag if it isn't 0.
        """
        result = []
        # What came to the switch before the first marker was read is decided before the second one is read.
        for _ in range(2):
            mark = frames.ethernet(b"marker %d" % next(_COUNT), 0x88B5, source=witness.mac)
            seen = frames.tagged(mark, tag) if tag else mark
            witness.send(mark)
            while (got := self.read()[1]) != seen:
                if _MARK not in got and not _is_chatter(got):
                    result.append(got)
        return result


def _is_chatter(frame: bytes) -> bool:
    """Whether it is what a host's kernel says on its own, such as neighbour discovery."""
    return frame[6:9] != b"\x00\x15\x5d"


class Rig:
    """A plane and the NICs that a test asks for."""

    def __init__(self, plane: DataPlane) -> None:
        self.plane = plane
        self.nics: list[Nic] = []

    def nic(self, **settings: Any) -> Nic:
        number = len(self.nics) + 1
        known = {"vm": f"vm{number}", "nic": "net0", "mac": mac_of(number)}
        nic = Nic(self.plane, number, PortSettings(**(known | settings)))
        self.nics.append(nic)
        return nic

    def access(self, vlan: int, **settings: Any) -> Nic:
        return self.nic(mode=VlanMode.ACCESS, vlan=vlan, **settings)

    def trunk(self, *allowed: int, native: int = 0, **settings: Any) -> Nic:
        return self.nic(mode=VlanMode.TRUNK, allowed=allowed, native=native, **settings)

    def close(self) -> None:
        for nic in self.nics:
            nic.close()
        self.plane.close()
