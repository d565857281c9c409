"""Ports of switches for VM processes, and questions to the services of switches."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
import threading
from collections import deque

import msgspec

from devices.network import places, protocol
from devices.network.errors import SwitchError
from devices.network.port import Port
from devices.network.settings import PortSettings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: How long a service may take to start, and to answer, on a host that is slow.
START_S = 120
REPLY_S = 60
#: Tries to get a port from a service that ends meanwhile.
_TRIES = 3


class _Call:
    """A request of a port's owner that waits for its reply."""

    def __init__(self, request: protocol.Request) -> None:
        self.request = request
        self.done = threading.Event()
        self.error: SwitchError | None = None


class SwitchPort(Port):
    """A port of a switch. `on_link` and `on_lost` run on a thread of its own.

    The network forgets the port when `close` is called or the process ends. When the switch's service ends, `on_lost`
    is called, and a new `plug` with `settings` gives another port.
    """

    def __init__(
        self,
        switch: str,
        connection: socket.socket,
        fd: int,
        settings: PortSettings,
        mtu: int,
        on_link: Callable[[bool], None] | None,
        on_lost: Callable[[], None] | None,
    ) -> None:
        super().__init__(fd, f"switch {switch}", mtu)
        self.link = settings.link
        if on_link is not None:
            self.on_link = on_link
        if on_lost is not None:
            self.on_lost = on_lost
        #: As they are now: also `pyvmm switch port` changes them.
        self.settings = settings
        self._connection = connection
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._calls: deque[_Call] = deque()
        self._offloads: int | None = None  # not told yet
        self._lost = False
        self._closed = False
        self._thread = threading.Thread(target=self._main, name=f"port of {self.name}", daemon=True)
        self._thread.start()

    def set_offloads(self, offloads: int) -> None:
        with self._lock:
            if not self._closed:
                self._offloads = offloads
                os.eventfd_write(self._wake, 1)

    def change(self, settings: PortSettings) -> None:
        """Have the port set as told; raises SwitchError, and nothing is changed then."""
        call = _Call(protocol.Change(settings))
        with self._lock:
            if self._lost or self._closed:
                raise SwitchError(f"{self.name}: its service has ended", "stopped")
            self._calls.append(call)
            os.eventfd_write(self._wake, 1)
        if not call.done.wait(REPLY_S):
            raise SwitchError(f"{self.name}: its service does not answer")
        if call.error is not None:
            raise call.error

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._connection.close()
        os.close(self.fd)
        os.close(self._wake)

    def inspect(self) -> dict[str, Any]:
        return {**super().inspect(), "lost": self._lost, "settings": msgspec.to_builtins(self.settings)}

    def _main(self) -> None:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        asked: _Call | None = None  # at most one request is under way, so there is always room to send it
        try:
            while not self._closed:
                if asked is None:
                    asked = self._next()
                    if asked is not None:
                        self._connection.send(msgspec.json.encode(asked.request), socket.MSG_NOSIGNAL)
                for fd, _ in poll.poll():
                    if fd == self._wake:
                        os.eventfd_read(self._wake)
                    else:
                        message, other = protocol.receive(self._connection)
                        if other >= 0:
                            os.close(other)
                        if message is None:
                            raise EOFError
                        if message.get("event") == "settings":
                            if self._apply(msgspec.convert(message.get("settings"), PortSettings)):
                                self.on_link(self.link)
                        elif asked is not None:
                            call, asked = asked, None
                            self._finish(call, message)
        except (OSError, EOFError, ValueError):
            pass
        self._end(asked)

    def _next(self) -> _Call | None:
        with self._lock:
            if self._offloads is not None:
                offloads, self._offloads = self._offloads, None
                return _Call(protocol.Offloads(offloads))
            return self._calls.popleft() if self._calls else None

    def _finish(self, call: _Call, reply: dict[str, Any]) -> None:
        changed = False
        if reply.get("ok") is not True:
            call.error = _error(reply)
        elif isinstance(call.request, protocol.Change):
            changed = self._apply(call.request.settings)
        call.done.set()
        if changed:
            self.on_link(self.link)

    def _apply(self, settings: PortSettings) -> bool:
        """Whether that changes the link."""
        changed = settings.link != self.link
        self.settings = settings
        self.link = settings.link
        return changed

    def _end(self, asked: _Call | None) -> None:
        with self._lock:
            self._lost = not self._closed
            calls = [*self._calls] if asked is None else [asked, *self._calls]
            self._calls.clear()
        for call in calls:
            call.error = SwitchError(f"{self.name}: its service has ended", "stopped")
            call.done.set()
        if self._lost:
            self.on_lost()


def plug(
    switch: str,
    settings: PortSettings,
    on_link: Callable[[bool], None] | None = None,
    on_lost: Callable[[], None] | None = None,
) -> SwitchPort:
    """A new port of `switch`, whose service is started if it doesn't run. Raises SwitchError.

    The callbacks are those of `Port`; given here they miss nothing.
    """
    places.check_name(switch)
    for _ in range(_TRIES):
        connection = _connect(switch)
        if connection is None:
            start(switch)
            continue
        try:
            reply, fd = _exchange(connection, protocol.Plug(settings), REPLY_S, switch)
            if reply is None:
                connection.close()  # the service has ended meanwhile
                continue
            mtu = reply.get("mtu")
            if fd < 0 or not isinstance(mtu, int):
                raise SwitchError(f"switch {switch}: its service gave no port")
            os.set_blocking(fd, False)
            connection.setblocking(False)
            return SwitchPort(switch, connection, fd, settings, mtu, on_link, on_lost)
        except BaseException:
            connection.close()
            raise
    raise SwitchError(f"switch {switch}: its service ends again and again; see {places.running(switch, 'log')}")


def ask(switch: str, request: protocol.Request, timeout: float = REPLY_S) -> dict[str, Any]:
    """What the running service of `switch` answers; raises SwitchError, of kind ``stopped`` if none runs."""
    connection = _connect(switch)
    if connection is None:
        raise SwitchError(f"switch {switch}: its service does not run", "stopped")
    with connection:
        reply, fd = _exchange(connection, request, timeout, switch)
        if fd >= 0:
            os.close(fd)
        if reply is None:
            raise SwitchError(f"switch {switch}: its service has ended", "stopped")
        return reply


def running(switch: str) -> bool:
    """Whether the service of `switch` runs."""
    connection = _connect(switch)
    if connection is not None:
        connection.close()
    return connection is not None


def start(switch: str) -> None:
    """Start the service of `switch`, unless one runs, and wait until it answers; raises SwitchError as that does."""
    import subprocess

    ready, told = os.pipe()
    with open(ready, "rb") as answer:
        words = [sys.executable, "-m", "devices.network.service", switch, str(told)]
        try:
            log = _open_log(switch)
            try:
                starter = subprocess.Popen(
                    words, pass_fds=(told,), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
                )
            finally:
                os.close(log)
        except OSError as error:
            raise SwitchError(f"switch {switch}: its service cannot be started: {error.strerror}", "host") from error
        finally:
            os.close(told)
        if not select.select([answer], [], [], START_S)[0]:
            raise SwitchError(f"switch {switch}: its service did not start within {START_S} s")
        text = answer.read(protocol.MAX_MESSAGE)
    starter.wait()  # at its end already: the service has detached itself
    try:
        reply = protocol.decode(text)
    except ValueError:
        log_path = places.running(switch, "log")
        raise SwitchError(f"switch {switch}: its service ended while it started; see {log_path}") from None
    if reply.get("ok") is not True:
        raise _error(reply)


def _open_log(switch: str) -> int:
    path = places.running(switch, "log")
    places.make_folder(path)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _connect(switch: str) -> socket.socket | None:
    """A connection to the service, or None if it doesn't run."""
    path = places.running(switch, "sock")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Unlike a timeout of Python's, this one also waits for room among those that want to connect.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", REPLY_S, 0))
    try:
        connection.connect(path)
        return connection
    except OSError as error:
        connection.close()
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ECONNREFUSED):
            return None
        if error.errno == errno.EAGAIN:
            raise SwitchError(f"switch {switch}: its service does not answer") from error
        raise SwitchError(f"switch {switch}: {path}: {error.strerror or error}", "host") from error


def _exchange(
    connection: socket.socket, request: protocol.Request, timeout: float, switch: str
) -> tuple[dict[str, Any] | None, int]:
    """The reply and the descriptor with it or -1; no reply if the service ends.

    Raises SwitchError, also for a refusal.
    """
    connection.settimeout(timeout)
    try:
        try:
            connection.send(msgspec.json.encode(request), socket.MSG_NOSIGNAL)
        except ConnectionError:
            pass  # it may have said why
        try:
            reply, fd = protocol.receive(connection)
        except ConnectionResetError:
            reply, fd = protocol.receive(connection)  # that comes first if our request was not read
    except TimeoutError as error:
        raise SwitchError(f"switch {switch}: its service did not answer within {timeout:g} s") from error
    except OSError as error:
        if error.errno == errno.EMSGSIZE:
            raise SwitchError(f"switch {switch}: the request is too long", "usage") from error
        return None, -1  # reset
    except ValueError as error:
        raise SwitchError(f"switch {switch}: its service does not speak as it should: {error}") from error
    if reply is not None and reply.get("ok") is not True:
        if fd >= 0:
            os.close(fd)
        raise _error(reply)
    return reply, fd


def _error(reply: dict[str, Any]) -> SwitchError:
    return SwitchError(str(reply.get("error")), str(reply.get("kind", "refused")))
