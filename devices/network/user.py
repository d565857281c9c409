"""The host's own network for one NIC, without privileges: passt, and a switch of two ports that leads to it.

passt (https://passt.top, passt(1)) gives the guest an address by DHCP, DHCPv6 or NDP, answers for its gateway, and
carries its connections as sockets of a process of the host. The gateway's address leads to the host itself. It takes
complete frames behind their length only, so a switch in a thread of this process does the checksums and cuts the
segments that NICs leave to their network.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time

from devices.network.errors import SwitchError
from devices.network.port import DEFAULT_MTU, Port
from pyvmm.core import _hot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

#: How long passt may take to start.
START_S = 20
_LOOK_S = 0.002
#: Starts passt with the socket that is file 8, and kills it once this process closes the pipe that is file 9, or has
#: ended in whatever way: passt of March 2023 may not hear of its socket's end, as it may peek at a connection for ever.
_KEEPER = '"$@" --fd 8 </dev/null >&2 9<&- & echo $!; exec 8<&- >&- 2>&-; read -r line <&9; kill -9 $!; wait'
_SOCKET, _LIFE = 8, 9
_NIC, _PASST = 0, 1
#: Addresses for guests of hosts that have no way to other networks, from which passt would take them.
_ALONE = ("--ipv4-only", "-i", "lo", "-a", "10.0.2.15", "-n", "24", "-g", "10.0.2.2", "-M", "02:00:00:00:00:01")


class UserPort(Port):
    """Made with passt running. `on_lost` is called, on a thread of the port's own, when passt ends."""

    def __init__(self, forwards: Sequence[str], on_lost: Callable[[], None] | None = None) -> None:
        """`forwards` lead ports of the host to the guest, as ``tcp:[ADDRESS:]8080:80``. Raises SwitchError."""
        stream, self._keeper = _start(forwards, DEFAULT_MTU)
        switch = _hot.Switch(DEFAULT_MTU, patient=True)
        switch.add_port(_PASST, "stream", stream.detach())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        switch.add_port(_NIC, "socket", theirs.detach())
        ours.setblocking(False)
        super().__init__(ours.detach(), "user")
        if on_lost is not None:
            self.on_lost = on_lost
        self._switch = switch
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="user network", daemon=True)
        self._thread.start()

    def set_offloads(self, offloads: int) -> None:
        """Give the NIC only what it takes."""
        self._switch.set_offloads(_NIC, offloads)

    def close(self) -> None:
        """End passt with its socket, and return once the ports of the host that it had are free."""
        self._closing = True
        self._switch.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for number in (_NIC, _PASST):
            self._switch.remove_port(number)
        os.close(self.fd)
        self._keeper.end()

    def inspect(self) -> dict[str, Any]:
        """As all ports, and what passed between the NIC and passt."""
        ends = {"nic": _NIC, "passt": _PASST}
        return {**super().inspect(), **{name: self._switch.statistics(number) for name, number in ends.items()}}

    def _main(self) -> None:
        self._switch.run()
        if not self._closing:
            self.on_lost()


def _start(forwards: Sequence[str], mtu: int) -> tuple[socket.socket, _Keeper]:
    """Our end of the stream to a passt that is ready, and who keeps it."""
    passt = shutil.which("passt")
    if passt is None:
        raise SwitchError("user network: passt is missing; on Debian: apt install passt", "host")
    words = [passt, "--foreground", "--quiet", "--stderr", "--mtu", str(mtu)]
    words += () if _has_way() else _ALONE
    for forward in forwards:
        words += _forward(forward)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with tempfile.TemporaryFile() as errors:
        try:
            keeper = _Keeper(words, theirs, errors.fileno())
        except OSError as error:
            ours.close()
            raise SwitchError(f"user network: passt does not start: {error}", "host") from error
        if keeper.is_ready():
            return ours, keeper
        ours.close()
        keeper.end()
        errors.seek(0)
        said = errors.read().decode(errors="replace").splitlines() or ["it says nothing"]
        raise SwitchError(f"user network: passt does not start: {said[-1]}", "host")


class _Keeper:
    """Who keeps a passt, and the passt."""

    def __init__(self, words: Sequence[str], theirs: socket.socket, errors: int) -> None:
        """Raises OSError."""
        reader, self._life = os.pipe()

        def place() -> None:  # in the child, where the shell reaches only files of one digit
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs.fileno(), reader)]
            for fd, number in zip(high, (_SOCKET, _LIFE), strict=True):
                os.dup2(fd, number)

        try:
            with theirs:
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", _KEEPER, "sh", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    pass_fds=(_SOCKET, _LIFE),
                    preexec_fn=place,
                    start_new_session=True,
                )
        except OSError:
            os.close(self._life)
            raise
        finally:
            os.close(reader)
        assert self._process.stdout is not None
        with self._process.stdout as told:
            self._passt = int(told.read())

    def is_ready(self) -> bool:
        """Wait for passt to serve, before which it sets its seccomp filter; False if it ends instead."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                with open(f"/proc/{self._passt}/status", encoding="ascii") as file:
                    status = dict(line.split(":\t", 1) for line in file if ":\t" in line)
            except (FileNotFoundError, ProcessLookupError):
                return False
            if status["State"].startswith("Z"):
                return False
            if status.get("Seccomp", "2\n") == "2\n":
                return True
            time.sleep(_LOOK_S)
        return False

    def end(self) -> None:
        """Have passt ended; return once it has."""
        os.close(self._life)
        self._process.wait()


def _has_way() -> bool:
    """Whether the host has a default route, of IPv4 or IPv6, in this thread's network namespace."""
    try:
        with open("/proc/thread-self/net/route", encoding="ascii") as file:
            if any(row.split()[1] == row.split()[7] == "00000000" for row in list(file)[1:]):
                return True
        with open("/proc/thread-self/net/ipv6_route", encoding="ascii") as file:
            return any(row.split()[:2] == ["0" * 32, "00"] and row.split()[9] != "lo" for row in file)
    except OSError:  # no IPv6
        return False


def _forward(forward: str) -> tuple[str, str]:
    """passt's option for a forward. Raises SwitchError if the port of the host is taken, where passt is silent."""
    protocol, _, rest = forward.partition(":")
    source, _, guest_port = rest.rpartition(":")
    address, _, port = source.rpartition(":")
    address = address.strip("[]")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM) as probe:
            if protocol == "tcp":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, int(port)))
            if protocol == "tcp":
                probe.listen(1)
    except OSError as error:
        what = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise SwitchError(f"user network: forward {forward}: port {port} of the host: {what}", "host") from error
    return "-t" if protocol == "tcp" else "-u", f"{address}/{port}:{guest_port}" if address else f"{port}:{guest_port}"
