"""The console on a unix socket: one client at a time, which first gets the last output again."""

from __future__ import annotations

import os
import select
import socket
import threading

from pyvmm.machine.console import Console, InputQueue
from pyvmm.machine.unix_socket import UnixListener

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.machine.console import Receive

_SCROLLBACK = 64 << 10
#: Output kept for a client that reads slowly; what does not fit is dropped and counted.
_OUTPUT_LIMIT = 256 << 10
_CHUNK = 4096


class SocketConsole(Console):
    """Serves the socket at `path`; raises ConfigError if it cannot be made there."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._listener = UnixListener(path, "com1")
        self._listener.socket.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # guards everything below
        self._client: socket.socket | None = None
        self._scrollback = bytearray()
        self._output = bytearray()
        self._client_lost = 0

    def start(self, receive: Receive) -> None:
        self._thread = threading.Thread(target=self._serve, args=(InputQueue(receive),), name="console", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        with self._lock:
            self._scrollback += data
            del self._scrollback[:-_SCROLLBACK]
            if self._client is None:
                return
            if self._client_lost or len(self._output) + len(data) > _OUTPUT_LIMIT:
                self._client_lost += len(data)
                self.lost += len(data)
                return
            if not self._output:
                os.eventfd_write(self._wake, 1)
            self._output += data

    def close(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            self._drop_client()
        self._listener.close()
        os.close(self._wake)

    def inspect(self) -> dict[str, Any]:
        with self._lock:
            return {
                "kind": "unix",
                "path": self._listener.path,
                "attached": self._client is not None,
                "lost": self.lost,
            }

    def _serve(self, queue: InputQueue) -> None:
        while not self._stopping:
            timeout = queue.pump()
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            poll.register(self._listener.socket, select.POLLIN)
            with self._lock:
                client = self._client
                if client is not None:
                    # While the guest takes nothing, the client is not read: its socket buffer is the bound.
                    wanted = select.POLLIN if timeout is None else 0
                    poll.register(client, wanted | (select.POLLOUT if self._output else 0))
            ready = dict(poll.poll(timeout))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if client is not None and ready.get(client.fileno(), 0):
                self._serve_client(client, ready[client.fileno()], queue)
            if self._listener.socket.fileno() in ready:
                self._accept()
        with self._lock:
            self._flush()

    def _serve_client(self, client: socket.socket, events: int, queue: InputQueue) -> None:
        with self._lock:
            if events & select.POLLOUT:
                self._flush()
        if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            try:
                data = client.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            queue.add(data)
            if not data:
                with self._lock:
                    self._drop_client()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.socket.accept()
        except OSError:  # it went away again
            return
        client.setblocking(False)
        with self._lock:
            if self._client is None:
                self._client = client
                self._output = bytearray(self._scrollback)
                return
        with client:
            try:
                client.send(b"pyvmm: the console is in use by another client\r\n")
            except OSError:
                pass

    def _flush(self) -> None:
        if self._client is None or not self._output:
            return
        try:
            sent = self._client.send(self._output)
        except BlockingIOError:
            return
        except OSError:
            self._drop_client()
            return
        del self._output[:sent]
        if not self._output and self._client_lost:
            self._output += f"\r\n[pyvmm: {self._client_lost} bytes lost]\r\n".encode()
            self._client_lost = 0

    def _drop_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        self._output.clear()
        self._client_lost = 0
