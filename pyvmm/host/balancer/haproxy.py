"""HAProxy: its configuration, its process, and its runtime interface.

Facts: HAProxy 2.6 configuration manual and management guide (section 9.3, "Unix Socket commands").
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import socket
import subprocess

from pyvmm.host.balancer.definition import Algorithm, Balancer, BalancerError, join

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_BACKEND = "vms"
#: Where servers are until their VM's address is known; nothing is sent there (RFC 5737).
_NOWHERE = "192.0.2.1"
_BALANCE = {
    Algorithm.ROUND_ROBIN: "roundrobin",
    Algorithm.LEAST_CONNECTIONS: "leastconn",
    Algorithm.SOURCE: "source",
}
_REPLY_S = 10.0
_STOP_S = 5.0
_PR_SET_PDEATHSIG = 1


def server_name(index: int) -> str:
    """What the configuration calls a backend: names of VMs may hold what HAProxy's syntax does not take."""
    return f"vm{index}"


def configuration(balancer: Balancer, addresses: Mapping[str, str], socket_path: Path, user: str | None) -> str:
    """The configuration, with each backend (by name) at its address if it has one; `user` is whom to run as."""
    kind, _, path = balancer.check.partition(":")
    check = [f"    option httpchk GET {path or '/'}"] if kind == "http" else []
    affinity = []
    if balancer.affinity_seconds:
        affinity = [
            f"    stick-table type ipv6 size 100k expire {balancer.affinity_seconds}s",
            "    stick on src",
        ]
    servers = []
    for index, backend in enumerate(balancer.backends):
        address = addresses.get(backend.name)
        state = "" if address else " disabled"
        weight = 0 if backend.draining else backend.weight
        where = join(address or _NOWHERE, backend.port)
        servers.append(f"    server {server_name(index)} {where} id {index + 1} check weight {weight}{state}")
    interval = round(balancer.interval * 1000)
    return "\n".join(
        [
            "global",
            f"    stats socket {socket_path} mode 600 level admin expose-fd listeners",
            *([f"    user {user}"] if user else []),
            "    noreuseport",  # or two load balancers could have one address
            "    log stderr local0 warning",
            "    hard-stop-after 1h",
            "defaults",
            "    mode tcp",
            "    timeout connect 3s",
            "    timeout client 1h",
            "    timeout server 1h",
            f"    timeout check {max(interval, 500)}ms",
            "    retries 3",
            "    option redispatch 1",
            f"    default-server inter {interval}ms fall {balancer.fall} rise {balancer.rise} on-marked-down "
            "shutdown-sessions",
            "frontend vip",
            f"    bind {join(balancer.vip, balancer.port)}",
            f"    default_backend {_BACKEND}",
            f"backend {_BACKEND}",
            f"    balance {_BALANCE[balancer.algorithm]}",
            *(["    hash-type consistent"] if balancer.algorithm is Algorithm.SOURCE else []),
            *check,
            *affinity,
            *servers,
            "",
        ]
    )


class Runtime:
    """HAProxy's runtime interface at a unix socket. Raises OSError while nobody listens there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, command: str) -> str:
        """Run one command and return its output."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_REPLY_S)
            connection.connect(str(self._path))
            connection.sendall(command.encode() + b"\n")
            parts = iter(lambda: connection.recv(65536), b"")
            return b"".join(parts).decode(errors="replace")

    def statistics(self) -> dict[str, dict[str, str]]:
        """The rows of ``show stat`` by name: ``FRONTEND``, ``BACKEND`` and each server."""
        text = self.ask("show stat").removeprefix("# ")
        rows = csv.DictReader(io.StringIO(text))
        return {row["svname"]: row for row in rows if row.get("svname")}

    def place(self, index: int, address: str, port: int) -> None:
        """Move a server."""
        self._order(f"set server {_BACKEND}/{server_name(index)} addr {address} port {port}")

    def enable(self, index: int, on: bool) -> None:
        """Have a server checked and used, or neither."""
        self._order(f"set server {_BACKEND}/{server_name(index)} state {'ready' if on else 'maint'}")

    def weigh(self, index: int, weight: int) -> None:
        """Change a server's weight. With 0 it keeps its connections and gets no new ones, not even of clients that
        have been there before."""
        self._order(f"set server {_BACKEND}/{server_name(index)} weight {weight}")
        if weight == 0:
            self.ask(f"clear table {_BACKEND} data.server_id eq {index + 1}")

    def _order(self, command: str) -> None:
        said = self.ask(command).strip()
        if said and "no need to change" not in said and "changed from" not in said:
            raise BalancerError(f"HAProxy refuses {command!r}: {said}")


class Process:
    """HAProxy under its master process, which dies with this one."""

    def __init__(self, config: Path, log: Path) -> None:
        program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
        if program is None:
            raise BalancerError("haproxy is not installed: apt install haproxy")
        self._command = [program, "-W", "-db", "-f", str(config)]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def check(self) -> None:
        """Raise BalancerError with HAProxy's own words unless it takes the configuration."""
        done = subprocess.run([*self._command, "-c", "-q"], capture_output=True, text=True, check=False)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "[ALERT]" in line), done.stderr.strip())
            raise BalancerError(f"HAProxy refuses its configuration: {said}")

    def complaint(self) -> str:
        """The last thing that it called an alert."""
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        alerts = [line.partition(" : ")[2] for line in lines if line.startswith("[ALERT]")]
        return next((line for line in alerts if "Fatal errors" not in line and "exited" not in line), str(self._log))

    def start(self) -> None:
        """Start it, unless it runs."""
        if not self.running:
            with open(self._log, "wb") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )

    @property
    def pid(self) -> int | None:
        """Its master process, None while there is none."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self.pid is not None

    def reload(self) -> None:
        """Have it read its configuration again: new connections by the new one, the others go on by the old."""
        if self._process is not None:
            self._process.send_signal(signal.SIGUSR2)

    def stop(self) -> None:
        """End it with all connections."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None


def _die_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
