"""Addresses, names and the way to other networks for a NAT switch: dnsmasq and nftables on its host interface."""

from __future__ import annotations

import ipaddress
import select
import socket
import time

from devices.network import nft, places, sysctl
from devices.network.definition import parse_forward
from devices.network.dnsmasq import Dnsmasq, configuration
from devices.network.forwarding import Forwarding
from devices.network.plane import PlaneError
from devices.network.reservations import Reservations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.network.definition import Forward, SwitchDefinition

#: dnsmasq is started again so often within so many seconds.
_RESTARTS, _WINDOW_S = 3, 60.0


class Nat:
    """What a NAT switch has beside an internal one. All methods on one thread; they raise PlaneError.

    `interface` is the host's on the switch; it has the addresses of `definition` already. `clock` tells seconds.
    """

    def __init__(
        self, definition: SwitchDefinition, interface: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._definition = definition
        self._interface = interface
        self._clock = clock
        addresses = [ipaddress.ip_interface(text) for text in definition.addresses]
        self._address = next(each for each in addresses if isinstance(each, ipaddress.IPv4Interface))
        self._address6 = next((each for each in addresses if isinstance(each, ipaddress.IPv6Interface)), None)
        self._forwards = [parse_forward(text) for text in definition.forwards]
        self._reservations = Reservations(self._address, places.running(definition.name, "addresses"))
        self._plugged: dict[str, tuple[str, str]] = {}  # MAC: VM, address
        self._held: list[socket.socket] = []
        self._forwarding = Forwarding()
        self._dnsmasq = Dnsmasq(definition.name)
        self._watch: select.epoll | None = None
        self._ends: list[float] = []  # when dnsmasq ended

    def start(self) -> None:
        """Begin to serve. What an earlier life left, which may have ended by SIGKILL, is removed first."""
        self._dnsmasq.stop()
        nft.remove_table("inet", self._interface)
        self._watch = select.epoll()
        for forward in self._forwards:
            self._held.append(_hold(forward))
        # For what is forwarded from the host's own loopback; the rules let nothing else of 127.0.0.0/8 through.
        nft.change(self._rules())
        sysctl.put(f"net/ipv4/conf/{self._interface}/route_localnet", "1")
        self._forwarding.take(ipv6=self._address6 is not None)
        self._serve()

    def stop(self) -> None:
        """Remove all that `start` made. Harmless the second time."""
        self._dnsmasq.stop()
        nft.remove_table("inet", self._interface)
        self._forwarding.give_back()
        sysctl.put(f"net/ipv4/conf/{self._interface}/route_localnet", "0")
        for held in self._held:
            held.close()
        self._held.clear()
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def fileno(self) -> int:
        """A descriptor that is readable when `check` should be called, the same from `start` to `stop`."""
        assert self._watch is not None
        return self._watch.fileno()

    def check(self) -> str | None:
        """See to dnsmasq, if it has ended; return one line for the log, if there is something to say."""
        assert self._watch is not None
        if not self._watch.poll(0):
            return None
        now = self._clock()
        self._ends = [*(end for end in self._ends if end > now - _WINDOW_S), now]
        if len(self._ends) > _RESTARTS:
            self._dnsmasq.stop()
            times = f"{len(self._ends)} times within {_WINDOW_S:g} s"
            return f"dnsmasq has ended {times}: no DHCP and DNS any more until the switch's service starts again"
        self._serve()
        return "dnsmasq had ended and was started again"

    def plug(self, vm: str, mac: str) -> str | None:
        """Reserve an address for a NIC, the same whenever possible, and lead what is forwarded to `vm` to its first.

        Returns the address, or None if all are taken.
        """
        address, news = self._reservations.reserve(mac, vm, set(self._plugged))
        if address is None:
            return None
        if news:
            self._serve()
        self._plugged[mac] = vm, address
        try:
            self._lead()
        except PlaneError:
            del self._plugged[mac]
            raise
        return address

    def unplug(self, mac: str) -> None:
        """Forward nothing to that NIC any more; its address stays reserved as long as there are others."""
        if self._plugged.pop(mac, None) is not None:
            self._lead()

    def leases(self) -> Sequence[tuple[str, str]]:
        """The MAC and address of each lease, for `AddressBook.set_leases`."""
        return self._dnsmasq.leases()

    def _serve(self) -> None:
        """Start dnsmasq, or start it again with what is reserved now."""
        assert self._watch is not None
        lines = configuration(
            self._interface,
            self._address,
            self._address6,
            self._reservations.leased,
            self._reservations.all(),
            self._definition.mtu,
        )
        # A descriptor that was watched leaves when it is closed.
        self._watch.register(self._dnsmasq.start(lines), select.EPOLLIN)

    def _lead(self) -> None:
        """Have forwards lead to the VMs that are plugged in."""
        if self._forwards:
            table = f"inet {self._interface}"
            nft.change("\n".join([f"flush chain {table} forwards", *self._forward_rules(table)]) + "\n")

    def _forward_rules(self, table: str) -> list[str]:
        first: dict[str, str] = {}
        for vm, address in self._plugged.values():
            first.setdefault(vm, address)
        return [
            f"add rule {table} forwards {_where(forward)} dnat ip to {first[forward.vm]}:{forward.vm_port}"
            for forward in self._forwards
            if forward.vm in first
        ]

    def _rules(self) -> str:
        """The table of the switch, which has its interface's name."""
        here, network = f'"{self._interface}"', self._address.network
        inside = f"ip saddr {network}"
        masquerade6 = ""
        foreign = f"iifname {here} meta nfproto ipv6 drop"
        if self._address6 is not None:
            inside6 = f"ip6 saddr {self._address6.network}"
            masquerade6 = f"oifname != {here} {inside6} masquerade"
            foreign = f"iifname {here} ip6 saddr != {self._address6.network} drop"
        return f"""
table inet {self._interface} {{
    chain forwards {{
    }}
    chain before {{
        type filter hook prerouting priority -300; policy accept;
        iifname {here} ip daddr 127.0.0.0/8 drop
    }}
    chain incoming {{
        type nat hook prerouting priority -100; policy accept;
        meta nfproto ipv4 fib daddr type local jump forwards
    }}
    chain own {{
        type nat hook output priority -100; policy accept;
        meta nfproto ipv4 fib daddr type local jump forwards
    }}
    chain outgoing {{
        type nat hook postrouting priority 100; policy accept;
        oifname != {here} {inside} masquerade
        {masquerade6}
        oifname {here} ct status dnat ip saddr {{ 127.0.0.0/8, {network} }} masquerade
    }}
    chain passing {{
        type filter hook forward priority 0; policy accept;
        iifname {here} ip saddr != {network} drop
        {foreign}
        iifname {here} oifname {here} accept
        oifname {here} ct state established,related accept
        oifname {here} ct status dnat accept
        oifname {here} drop
        iifname {here} oifname "pv-*" ct status dnat accept
        iifname {here} oifname "pv-*" ct state established,related accept
        iifname {here} oifname "pv-*" drop
    }}
}}
"""


def _where(forward: Forward) -> str:
    address = "" if forward.address is None else f"ip daddr {forward.address} "
    return f"{address}{forward.protocol} dport {forward.port}"


def _hold(forward: Forward) -> socket.socket:
    """Take the host's port, so that no program and no other switch has it; packets for it never get there."""
    kind = socket.SOCK_STREAM if forward.protocol == "tcp" else socket.SOCK_DGRAM
    held = socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC)
    try:
        held.bind((forward.address or "0.0.0.0", forward.port))
    except OSError as error:
        held.close()
        where = f"{forward.address or 'the host'}'s {forward.protocol} port {forward.port}"
        raise PlaneError(f"forward to {forward.vm}: {where}: {error.strerror}") from error
    return held
