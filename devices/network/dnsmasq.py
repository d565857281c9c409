"""dnsmasq as a process of a NAT switch: DHCP, router advertisements and DNS on one interface of the host.

It runs with a configuration of its own and reads none of the host's but /etc/resolv.conf. It gives its rights up once
it has read that as root, so what it must know later is told by starting it again.

Sources: dnsmasq(8) 2.90.
"""

from __future__ import annotations

import ipaddress
import os
import select
import signal
import subprocess

from devices.network import nft, places
from devices.network.plane import PlaneError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_SECONDS = 20.0
_END_S = 5.0


class Dnsmasq:
    """The process of the switch `name`; methods raise PlaneError."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._conf = places.running(name, "dnsmasq")
        self._pid = places.running(name, "dnsmasq.pid")
        self._leases = places.running(name, "leases")
        self._process = -1

    def start(self, lines: Iterable[str]) -> int:
        """Serve as `lines` of a configuration file say; return a descriptor that is readable at its end."""
        self.stop()
        text = "".join(f"{line}\n" for line in (*lines, f"pid-file={self._pid}", f"dhcp-leasefile={self._leases}"))
        environment = {**os.environ, "PATH": nft.PATH, "LC_ALL": "C"}
        try:
            with open(self._conf, "w", encoding="ascii") as file:
                file.write(text)
            # It detaches itself once all it needs is there.
            done = subprocess.run(
                ["dnsmasq", f"--conf-file={self._conf}"],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
                env=environment,
            )
        except FileNotFoundError as error:
            raise PlaneError("dnsmasq is missing (apt install dnsmasq-base)") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PlaneError(f"dnsmasq: {error}") from error
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
            raise PlaneError(said[-1])
        self._process = self._find()
        if self._process < 0:
            raise PlaneError("dnsmasq ended while it started; the host's log may say why")
        return self._process

    def stop(self) -> None:
        """End it, whoever started it. Harmless if it doesn't run."""
        process = self._process if self._process >= 0 else self._find()
        self._process = -1
        if process < 0:
            return
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                signal.pidfd_send_signal(process, number)
                if select.select([process], [], [], _END_S)[0]:
                    break
        except ProcessLookupError:
            pass
        finally:
            os.close(process)
        for path in (self._pid, self._conf):
            _remove(path)

    def leases(self) -> list[tuple[str, str]]:
        """MAC and IPv4 address of each lease."""
        try:
            with open(self._leases, encoding="ascii", errors="replace") as file:
                rows = [line.split() for line in file]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise PlaneError(f"{self._leases}: {error.strerror}") from error
        # Expiry, MAC, address, name, client's id; those of DHCPv6 have no MAC.
        return [(row[1].lower(), row[2]) for row in rows if len(row) >= 4 and _is_ipv4(row[2])]

    def _find(self) -> int:
        """A descriptor of the running process, or -1. A number that another process has by now is not ours."""
        process = -1
        try:
            with open(self._pid, encoding="ascii") as file:
                pid = int(file.read())
            process = os.pidfd_open(pid)
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if f"--conf-file={self._conf}".encode() in file.read().split(b"\0"):
                    return process
        except (OSError, ValueError):
            pass
        if process >= 0:
            os.close(process)
        return -1


def configuration(
    interface: str,
    address: ipaddress.IPv4Interface,
    address6: ipaddress.IPv6Interface | None,
    leased: tuple[ipaddress.IPv4Address, ipaddress.IPv4Address] | None,
    reserved: Iterable[tuple[str, str, str]],
    mtu: int,
) -> list[str]:
    """The lines that serve the networks of the host's addresses on `interface`.

    `leased` are the first and last address for whom nothing is reserved; `reserved` are (MAC, address, name or empty).
    """
    where = f"{address.network.network_address},static" if leased is None else f"{leased[0]},{leased[1]}"
    lines = [
        f"interface={interface}",
        "except-interface=lo",
        "bind-dynamic",
        "no-hosts",
        "domain-needed",
        "bogus-priv",
        "dhcp-authoritative",
        "dhcp-no-override",
        # Names are those of VMs, not what a guest calls itself.
        "dhcp-ignore-names",
        "quiet-dhcp",
        "quiet-dhcp6",
        "quiet-ra",
        f"dhcp-range={where},{address.netmask},12h",
        f"dhcp-option=option:mtu,{mtu}",
        "dhcp-lease-max=4096",
    ]
    if address6 is not None:
        network = address6.network
        lines += ["enable-ra", f"dhcp-range={network.network_address},ra-stateless,{network.prefixlen},12h"]
    lines += [f"dhcp-host={mac},{ip}{',' if name else ''}{name}" for mac, ip, name in reserved]
    return lines


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
