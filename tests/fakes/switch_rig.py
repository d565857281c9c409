"""A `_hot.Switch` on a clock that the test winds, and what is at the other ends of its ports."""

from __future__ import annotations

import os
import select
import socket
import threading
from typing import Any

from pyvmm.core._hot import Switch
from tests.fakes import frames

PATIENCE_S = 20.0
SECOND = 1_000_000_000
A, B, C = "00:15:5d:00:00:01", "00:15:5d:00:00:02", "00:15:5d:00:00:03"
TEST_KIND = 0x88B6


def frame(source: str, to: str = frames.BROADCAST, text: bytes = b"") -> bytes:
    return frames.ethernet(text, TEST_KIND, to=to, source=source)


class SwitchRig:
    """The switch runs on a thread of its own; what ends is kept in `ended`."""

    def __init__(self, mtu: int = 1500, patient: bool = False) -> None:
        self.switch = Switch(mtu, manual_time=True, patient=patient)
        self.now = 0
        self.ended: list[tuple[int, str]] = []
        self._news = threading.Condition()
        self._ends: list[socket.socket] = []
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _main(self) -> None:
        while ended := self.switch.run():
            with self._news:
                self.ended += ended
                self._news.notify_all()

    def port(self, number: int, **settings: Any) -> socket.socket:
        """The NIC's end of a new port."""
        return self.add(number, "socket", socket.SOCK_SEQPACKET, **settings)

    def stream(self, number: int, **settings: Any) -> socket.socket:
        """What is at the other end of a port that is a stream."""
        return self.add(number, "stream", socket.SOCK_STREAM, **settings)

    def add(self, number: int, kind: str, type: int, **settings: Any) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, type)
        theirs.settimeout(PATIENCE_S)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200_000)  # any user may
        self._ends.append(theirs)
        self.switch.add_port(number, kind, ours.detach(), **settings)
        return theirs

    def pass_time(self, nanoseconds: int) -> None:
        self.now += nanoseconds
        self.switch.set_time(self.now)

    def wait_for(self, number: int) -> str:
        """Why something of the port ended; waits until it has."""
        with self._news:
            assert self._news.wait_for(lambda: any(who == number for who, _ in self.ended), PATIENCE_S)
            return next(why for who, why in self.ended if who == number)

    def dropped(self, number: int) -> dict[str, int]:
        counted: dict[str, int] = self.switch.statistics(number)["dropped"]
        return counted

    def close(self) -> None:
        self.switch.stop()
        self._thread.join()
        for end in self._ends:
            end.close()


def send(end: socket.socket, *all_frames: bytes) -> None:
    """Without offloads."""
    for each in all_frames:
        try:
            os.write(end.fileno(), frames.vnet() + each)
        except BlockingIOError:
            end.send(frames.vnet() + each)  # which waits until most of what is under way is taken


def receive(end: socket.socket) -> bytes:
    """The next frame, which must be complete."""
    message = end.recv(70000)
    assert message[:10] == bytes(10)
    return message[10:]


def is_quiet(end: socket.socket) -> bool:
    """Whether nothing waits there now."""
    return not select.select([end], [], [], 0)[0]


def receive_stream(end: socket.socket, count: int) -> list[bytes]:
    """So many frames behind their lengths."""
    return [_exactly(end, int.from_bytes(_exactly(end, 4), "big")) for _ in range(count)]


def _exactly(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = end.recv(size - len(data))
        assert more
        data += more
    return data
