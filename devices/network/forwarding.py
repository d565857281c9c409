"""IP forwarding of the host, which NAT switches need while there are any, and which is as it was afterwards.

All who need it share a lock on one file, which tells the last to go, also when others were killed. The file remembers
what was set before the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os

from devices.network import places, sysctl
from devices.network.plane import PlaneError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_IPV4, _IPV6 = "net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"
_MAX_FILE = 1 << 20


class Forwarding:
    """Keeps the host's IP forwarding on, from `take` to `give_back`; methods raise PlaneError."""

    def __init__(self) -> None:
        self._file = -1

    def take(self, ipv6: bool) -> None:
        """Have packets forwarded."""
        path = os.path.join(places.runtime_dir(), "switches", "forwarding")
        wanted = {_IPV4: "1"} | (_for_ipv6() if ipv6 else {})
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise PlaneError(f"{path}: {error.strerror}") from error
        with _turn(self._file):
            # What a killed one left is older than what is set now.
            remembered = {name: now for name in wanted if (now := sysctl.get(name)) is not None} | _read(self._file)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(remembered).encode(), 0)
            fcntl.flock(self._file, fcntl.LOCK_SH)
            for name, value in wanted.items():
                sysctl.put(name, value)

    def give_back(self) -> None:
        """Set all as it was, if nobody else needs it. Harmless the second time."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        try:
            with _turn(file):
                if _alone(file):
                    for name, value in _read(file).items():
                        sysctl.put(name, value)
                    os.ftruncate(file, 0)
        finally:
            os.close(file)


def _for_ipv6() -> dict[str, str]:
    """A router does not listen to others unless told to, and the host shall keep the way out that it has from them."""
    wanted = {}
    try:
        interfaces = os.listdir("/proc/sys/net/ipv6/conf")
    except OSError:
        return {}  # a host without IPv6
    for interface in interfaces:
        name = f"net/ipv6/conf/{interface}/accept_ra"
        if interface not in ("all", "default", "lo") and sysctl.get(name) == "1":
            wanted[name] = "2"
    return wanted | {_IPV6: "1"}


@contextlib.contextmanager
def _turn(file: int) -> Iterator[None]:
    """One process at a time. Unlike `fcntl.flock` this has nothing to do with the lock that all share."""
    fcntl.lockf(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN)


def _alone(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(file: int) -> dict[str, str]:
    try:
        values: dict[str, str] = json.loads(os.pread(file, _MAX_FILE, 0) or b"{}")
    except ValueError:
        return {}
    return values
