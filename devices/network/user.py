"""The host's own network for one NIC, without privileges: passt, and a switch of two ports that leads to it.

passt (https://passt.top, passt(1)) gives the guest an address by DHCP, DHCPv6 or NDP, answers for its gateway, and
carries its connections as sockets of a process of the host. The gateway's address leads to the host itself. It takes
complete frames behind their length only, so a switch in a thread of this process does the checksums and cuts the
segments that NICs leave to their network. passt ends with its socket, so also when this process is killed.
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import socket
import subprocess
import threading

from devices.network.errors import SwitchError
from devices.network.port import DEFAULT_MTU, Port
from pyvmm.core import _hot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: How long passt may take to start.
START_S = 20
_END_S = 5
_NIC, _PASST = 0, 1
#: Addresses for guests of hosts that have no way to other networks, from which passt would take them.
_ALONE = ("--ipv4-only", "-i", "lo", "-a", "10.0.2.15", "-n", "24", "-g", "10.0.2.2", "-M", "02:00:00:00:00:01")


class UserPort(Port):
    """Made with passt running. `on_lost` is called, on a thread of the port's own, when passt ends."""

    def __init__(self, forwards: Sequence[str], on_lost: Callable[[], None] | None = None) -> None:
        """`forwards` lead ports of the host to the guest, as ``tcp:[ADDRESS:]8080:80``. Raises SwitchError."""
        stream = _start(forwards, DEFAULT_MTU)
        switch = _hot.Switch(DEFAULT_MTU, patient=True)
        switch.add_port(_PASST, "stream", os.dup(stream.fileno()))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        switch.add_port(_NIC, "socket", theirs.detach())
        ours.setblocking(False)
        super().__init__(ours.detach(), "user")
        if on_lost is not None:
            self.on_lost = on_lost
        self._switch = switch
        self._stream = stream
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
        with self._stream:
            try:
                self._stream.shutdown(socket.SHUT_WR)
            except OSError:  # it has ended before
                return
            end = select.poll()
            end.register(self._stream, 0)  # its end is told always
            end.poll(_END_S * 1000)

    def _main(self) -> None:
        self._switch.run()
        if not self._closing:
            self.on_lost()


def _start(forwards: Sequence[str], mtu: int) -> socket.socket:
    """Our end of the stream to a passt that is ready."""
    passt = shutil.which("passt")
    if passt is None:
        raise SwitchError("user network: passt is missing; on Debian: apt install passt", "host")
    words = [passt, "--quiet", "--stderr", "--mtu", str(mtu), *(() if _has_way() else _ALONE)]
    for forward in forwards:
        words += _forward(forward)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with theirs:
            # It goes into the background once it is ready, or ends with what is wrong.
            done = subprocess.run(
                [*words, "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=START_S,
                check=False,
            )
        if done.returncode:
            lines = done.stderr.decode(errors="replace").splitlines() or [f"status {done.returncode}"]
            raise SwitchError(f"user network: passt does not start: {lines[-1]}", "host")
    except (OSError, subprocess.TimeoutExpired) as error:
        ours.close()
        raise SwitchError(f"user network: passt does not start: {error}", "host") from error
    except BaseException:
        ours.close()
        raise
    return ours


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
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, kind) as probe:
            if protocol == "tcp":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, int(port)))
            if protocol == "tcp":
                probe.listen(1)
    except OSError as error:
        what = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise SwitchError(f"user network: forward {forward}: port {port} of the host: {what}", "host") from error
    return "-t" if protocol == "tcp" else "-u", f"{address}/{port}:{guest_port}" if address else f"{port}:{guest_port}"
