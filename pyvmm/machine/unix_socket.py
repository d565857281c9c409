"""Listening on a unix socket that only its owner may use."""

from __future__ import annotations

import os
import socket
import stat

from pyvmm.machine.config import ConfigError

#: sockaddr_un holds 108 bytes with the closing NUL (unix(7)).
_MAX_PATH = 107


class UnixListener:
    """A listening unix socket of mode 0600 at `path`, made in place of a stale one that nobody listens on.

    Raises ConfigError, whose message starts with `what`.
    """

    def __init__(self, path: str, what: str) -> None:
        self.path = path
        if not path or "\0" in path:
            raise ConfigError(f"{what} socket {path!r}: not a path")
        if len(os.fsencode(path)) > _MAX_PATH:
            raise ConfigError(f"{what} socket {path}: the path is longer than the {_MAX_PATH} bytes of a unix socket")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._bind(what)
            os.chmod(path, 0o600)  # nobody can connect before listen()
            self.socket.listen(8)
            status = os.lstat(path)
        except OSError as error:
            self.socket.close()
            raise ConfigError(f"{what} socket {path}: {error.strerror or error}") from error
        except ConfigError:
            self.socket.close()
            raise
        self._identity = (status.st_dev, status.st_ino)

    def _bind(self, what: str) -> None:
        try:
            self.socket.bind(self.path)
            return
        except OSError:
            if not os.path.lexists(self.path):
                raise
        if not stat.S_ISSOCK(os.lstat(self.path).st_mode):
            raise ConfigError(f"{what} socket {self.path}: the file exists and is not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a full backlog says EAGAIN: somebody listens
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:
                os.unlink(self.path)
            except BlockingIOError:
                raise ConfigError(f"{what} socket {self.path}: in use by another process") from None
            else:
                raise ConfigError(f"{what} socket {self.path}: in use by another process")
        self.socket.bind(self.path)

    def close(self) -> None:
        """Close the socket and remove its file, unless another one stands there by now."""
        self.socket.close()
        try:
            status = os.lstat(self.path)
            if (status.st_dev, status.st_ino) == self._identity:
                os.unlink(self.path)
        except OSError:
            pass
