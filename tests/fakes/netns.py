"""Network namespaces for tests; gone with the last reference. Only root can make them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


class NetworkNamespace:
    """A fresh namespace, whose only interface is a loopback that is up."""

    def __init__(self) -> None:
        def make() -> int:
            _check(_LIBC.unshare(_CLONE_NEWNET))
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

        self.fd = _in_thread(make)
        self.command("ip", "link", "set", "lo", "up")

    def run(self, action: Callable[[], T]) -> T:
        """Do `action` on a thread of the namespace; sockets and processes that it makes belong there."""

        def enter() -> T:
            _check(_LIBC.setns(self.fd, _CLONE_NEWNET))
            return action()

        return _in_thread(enter)

    def command(self, *words: str) -> str:
        """Run a command there, which has to succeed; return its output."""
        return self.run(lambda: subprocess.run(words, check=True, capture_output=True, text=True)).stdout

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)

    def __enter__(self) -> NetworkNamespace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _in_thread(action: Callable[[], T]) -> T:
    """What `action` returns or raises, on a thread of its own: a thread's namespace is not that of others."""
    result: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            result.append(action())
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return result[0]
