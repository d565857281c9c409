"""The host's own network for one NIC, without privileges: passt, and a switch of two ports that leads to it.

passt (https://passt.top, passt(1)) gives the guest an address by DHCP, DHCPv6 or NDP, answers for its gateway, and
carries its connections as sockets of a process of the host. The gateway's address leads to the host itself. It takes
complete frames behind their length only, so a switch in a thread of this process does the checksums and cuts the
segments that NICs leave to their network. passt ends with its socket, so also when this process is killed.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
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
#: How long it may take to end, and how often that is looked at.
_END_S, _LOOK_S = 2, 0.005
_NIC, _PASST = 0, 1
#: Addresses for guests of hosts that have no way to other networks, from which passt would take them.
_ALONE = ("--ipv4-only", "-i", "lo", "-a", "10.0.2.15", "-n", "24", "-g", "10.0.2.2", "-M", "02:00:00:00:00:01")


class UserPort(Port):
    """Made with passt running. `on_lost` is called, on a thread of the port's own, when passt ends."""

    def __init__(self, forwards: Sequence[str], on_lost: Callable[[], None] | None = None) -> None:
        """`forwards` lead ports of the host to the guest, as ``tcp:[ADDRESS:]8080:80``. Raises SwitchError."""
        stream = _start(forwards, DEFAULT_MTU)
        switch = _hot.Switch(DEFAULT_MTU, patient=True)
        switch.add_port(_PASST, "stream", stream.detach())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        switch.add_port(_NIC, "socket", theirs.detach())
        ours.setblocking(False)
        super().__init__(ours.detach(), "user")
        if on_lost is not None:
            self.on_lost = on_lost
        self._switch = switch
        self._forwards = forwards
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
        deadline = time.monotonic() + _END_S
        for forward in self._forwards:
            while not _is_free(forward) and time.monotonic() < deadline:
                time.sleep(_LOOK_S)  # passt is nobody's child, so nobody is told of its end

    def inspect(self) -> dict[str, Any]:
        """As all ports, and what passed between the NIC and passt."""
        ends = {"nic": _NIC, "passt": _PASST}
        return {**super().inspect(), **{name: self._switch.statistics(number) for name, number in ends.items()}}

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
    protocol, address, port, guest_port = _parts(forward)
    try:
        _bind(protocol, address, port)
    except OSError as error:
        what = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise SwitchError(f"user network: forward {forward}: port {port} of the host: {what}", "host") from error
    return "-t" if protocol == "tcp" else "-u", f"{address}/{port}:{guest_port}" if address else f"{port}:{guest_port}"


def _parts(forward: str) -> tuple[str, str, int, str]:
    protocol, _, rest = forward.partition(":")
    source, _, guest_port = rest.rpartition(":")
    address, _, port = source.rpartition(":")
    return protocol, address.strip("[]"), int(port), guest_port


def _is_free(forward: str) -> bool:
    protocol, address, port, _ = _parts(forward)
    try:
        _bind(protocol, address, port)
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def _bind(protocol: str, address: str, port: int) -> None:
    """Have the port of the host for a moment, as passt would; raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM) as probe:
        if protocol == "tcp":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))
        if protocol == "tcp":
            probe.listen(1)
