"""HTTP servers that say who they are, on addresses of the loopback network, and a client that asks."""

from __future__ import annotations

import http.client
import http.server
import socket
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_S = 20.0


class Web:
    """One server at `address`, on a port that the first one chooses; `held` requests get their answer's end later."""

    def __init__(self, name: str, address: str, port: int = 0) -> None:
        self.name = name
        self.go_on = threading.Event()
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = web.name.encode()
                self.send_response(200)
                self.send_header("Content-Length", str(2 * len(body)))
                self.end_headers()
                self.wfile.write(body)
                if self.path == "/held":
                    self.wfile.flush()
                    web.go_on.wait(PATIENCE_S)
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:  # clients of killed servers go away
                pass

        self._server = Server((address, port), Handler)
        self.address = address
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        """Listen no longer."""
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def ask(port: int, address: str = "127.0.0.1", source: str = "", path: str = "/") -> str:
    """The name of the server that answers; raises OSError if none does."""
    connection = http.client.HTTPConnection(address, port, timeout=PATIENCE_S, source_address=(source, 0))
    try:
        connection.request("GET", path)
        text = connection.getresponse().read().decode()
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()
    assert text[: len(text) // 2] * 2 == text
    return text[: len(text) // 2]


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds; what it lets out as OSError counts as not yet."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)
