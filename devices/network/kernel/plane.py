"""A switch that the kernel carries: each port is a TAP on a bridge with VLAN filtering.

The names of all that is made come from the switch's, so that an earlier life's can be found: the bridge is its host
interface, also where the host has no part in it; ``pvHASHpN`` is the TAP of port N, ``pvHASHiN`` the ifb of its limit.
The VLAN without a number has one on the bridge, UNNUMBERED, which no port can have otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys

from devices.network import sysctl, tap
from devices.network.kernel import shaping, uplink
from devices.network.kernel.links import Links, attempt
from devices.network.kernel.mirror import Mirror
from devices.network.kernel.rules import Rules
from devices.network.plane import DataPlane, Learned, PlaneError
from devices.network.port import MAX_FRAME
from devices.network.process_plane import host_mac
from devices.network.settings import MAX_VLAN, MIN_VLAN, PortSettings, PortStatistics, VlanMode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.network.definition import SwitchDefinition

#: The bridge's number for the VLAN without one.
UNNUMBERED = MAX_VLAN


class _Port:
    def __init__(self, interface: str, ifb: str, fd: int, index: int, settings: PortSettings) -> None:
        self.interface = interface
        self.ifb = ifb
        self.fd = fd
        self.index = index
        self.settings = settings
        self.mirror: Mirror | None = None


class KernelPlane(DataPlane):
    """Wants CAP_NET_ADMIN, and CAP_NET_RAW for mirrors. What ends meanwhile is told to `on_trouble`, one line each."""

    name = "kernel"

    def __init__(self, definition: SwitchDefinition) -> None:
        super().__init__(definition)
        self._bridge = definition.host_interface
        # Unlike the bridge's name these have the same length for all switches.
        self._prefix = f"pv{hashlib.sha256(definition.name.encode()).hexdigest()[:8]}"
        self._rules = Rules(self._bridge, UNNUMBERED)
        self._ports: dict[int, _Port] = {}
        self._links: Links | None = None
        self._index = 0
        self.on_trouble: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)

    # The switch -----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the bridge, its rules, and its host side or uplink."""
        links = self._links = Links()
        try:
            self._clean(links)
            self._make(links)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove everything of the switch."""
        links, self._links = self._links, None
        if links is None:
            return
        try:
            for port in self._ports.values():
                if port.mirror is not None:
                    port.mirror.stop()
                os.close(port.fd)
            self._ports.clear()
            self.host_interface = None
            self._clean(links)
        finally:
            links.close()

    def _make(self, links: Links) -> None:
        definition = self.definition
        hosted = definition.type in ("internal", "nat")
        outside = None if definition.interface is None else uplink.Uplink(links, definition.interface)
        if outside is not None:
            outside.check(definition.share, definition.mtu)
        # The uplink's address stays the host's, as that is how others know it.
        shared = outside is not None and definition.share
        mac = outside.mac if outside is not None and shared else host_mac(self._bridge).hex(":")
        self._rules.make()
        self._index = links.make_bridge(self._bridge, mac, definition.mtu)
        if shared or any(":" in address for address in definition.addresses):
            pass
        elif hosted:
            # Whoever wants IPv6 there may give it an address; it takes none of itself.
            sysctl.put(f"net/ipv6/conf/{self._bridge}/addr_gen_mode", "1")
        else:
            sysctl.put(f"net/ipv6/conf/{self._bridge}/disable_ipv6", "1")
        links.set(self._index, ifalias=f"pyvmm switch {definition.name}")
        if hosted or shared:
            links.set_vlans(self._index, UNNUMBERED, bridge=True)
        links.set(self._index, state="up")
        if outside is not None:
            self._rules.add_uplink(outside.name)
            outside.join(self._index)
            links.set_vlans(outside.index, UNNUMBERED, range(MIN_VLAN, UNNUMBERED))
        if hosted:
            self.host_interface = self._bridge

    def _clean(self, links: Links) -> None:
        """Remove what there is of the switch, whoever made it; what its bridge carries goes back to its uplink."""
        bridge = links.find(self._bridge)
        if bridge is not None:
            if bridge.get(("IFLA_LINKINFO", "IFLA_INFO_KIND")) != "bridge":
                raise PlaneError(f"there is an interface {self._bridge} already, which is not the switch's bridge")
            for name in links.ports(bridge["index"]):
                if not name.startswith(self._prefix):
                    uplink.leave(links, name, bridge["index"])
        for name in links.names(self._prefix):
            links.remove(name)
        links.remove(self._bridge)
        self._rules.remove()

    # Ports ----------------------------------------------------------------------------------------------

    def add_port(self, number: int, settings: PortSettings) -> int:
        """Make a TAP; return a descriptor of it."""
        links = self._opened()
        self._check(settings)
        interface, ifb = f"{self._prefix}p{number}", f"{self._prefix}i{number}"
        with contextlib.ExitStack() as failed:
            with attempt(f"TAP {interface}", "TAP (CONFIG_TUN: modprobe tun)"):
                fd = tap.create(interface)
            failed.callback(os.close, fd)
            index = links.index(interface)
            port = _Port(interface, ifb, fd, index, settings)
            sysctl.put(f"net/ipv6/conf/{interface}/disable_ipv6", "1")
            links.set(index, mtu=self.definition.mtu, ifalias=f"pyvmm {settings.vm} {settings.nic}"[:255])
            self._rules.add_port(number, interface, settings)
            failed.callback(self._rules.remove_port, number, interface)
            failed.callback(links.remove, ifb)
            shaping.set_limit(links, index, ifb, settings.bandwidth, self.definition.mtu)
            links.set(index, master=self._index)
            self._set_vlans(port, settings)
            links.set(index, state="up")
            given = os.dup(fd)
            failed.pop_all()
        self._ports[number] = port
        return given

    def change_port(self, number: int, settings: PortSettings) -> None:
        """Set the port as told."""
        self._check(settings)
        port = self._ports[number]
        was = port.settings
        try:
            self._apply(number, port, was, settings)
        except PlaneError:
            with contextlib.suppress(PlaneError):
                self._apply(number, port, settings, was)
            raise
        port.settings = settings

    def _apply(self, number: int, port: _Port, was: PortSettings, settings: PortSettings) -> None:
        links = self._opened()
        other_vlans = _vlans(settings) != _vlans(was)
        if other_vlans:
            links.set_vlans(port.index, 0)  # until the rules fit the new ones
        self._rules.change_port(number, port.interface, settings)
        fewer = other_vlans or not settings.link
        if fewer or settings.bandwidth != was.bandwidth:
            shaping.set_limit(links, port.index, port.ifb, settings.bandwidth, self.definition.mtu)
        if fewer:
            _drop_waiting(port.fd)
        if other_vlans:
            self._set_vlans(port, settings)

    def set_offloads(self, number: int, offloads: int) -> None:
        """Give the port's NIC only what it takes."""
        port = self._ports[number]
        with attempt(port.interface):
            tap.set_offloads(port.fd, offloads)

    def remove_port(self, number: int) -> None:
        """Remove the TAP, also if somebody has a descriptor of it still."""
        links = self._opened()
        port = self._ports.pop(number)
        if port.mirror is not None:
            port.mirror.stop()
        os.close(port.fd)
        links.remove(port.interface)
        links.remove(port.ifb)
        self._rules.remove_port(number, port.interface)

    def mirror(self, number: int, path: str | None) -> None:
        """Write all frames of a port to a new pcap file, or stop that."""
        port = self._ports[number]
        old = port.mirror
        if path is not None:
            port.mirror = Mirror(port.interface, path, self.definition.mtu, self._tell(number))
        else:
            port.mirror = None
        if old is not None:
            old.stop()

    def _tell(self, number: int) -> Callable[[str], None]:
        return lambda why: self.on_trouble(f"switch {self.definition.name}: port {number}: {why}")

    # What there is to see -------------------------------------------------------------------------------

    def statistics(self, number: int) -> PortStatistics:
        """What the TAP, its buckets and its rules have counted."""
        links, port = self._opened(), self._ports[number]
        counted = links.statistics(port.interface)
        dropped = dict(self._rules.dropped().get(number, {}))
        buckets = [port.index] if port.settings.bandwidth is None else [port.index, links.index(port.ifb)]
        dropped["queue_full"] = counted["tx_dropped"] + shaping.dropped(links, *buckets)
        return PortStatistics(
            received_frames=counted["rx_packets"],
            received_bytes=counted["rx_bytes"],
            sent_frames=counted["tx_packets"],
            sent_bytes=counted["tx_bytes"],
            dropped={reason: frames for reason, frames in dropped.items() if frames},
        )

    def learned(self) -> Sequence[Learned]:
        """The addresses in the bridge's table."""
        numbers = {port.index: number for number, port in self._ports.items()}
        return [
            Learned(0 if vlan == UNNUMBERED else vlan, mac, numbers.get(index))
            for vlan, mac, index in self._opened().learned(self._index)
        ]

    # ----------------------------------------------------------------------------------------------------

    def _opened(self) -> Links:
        assert self._links is not None
        return self._links

    def _check(self, settings: PortSettings) -> None:
        access = settings.mode is VlanMode.ACCESS and settings.vlan == UNNUMBERED
        trunk = settings.mode is VlanMode.TRUNK and UNNUMBERED in (settings.native, *settings.allowed)
        if access or trunk:
            raise PlaneError(f"VLAN {UNNUMBERED} is the kernel plane's own: use another one, or --plane process")

    def _set_vlans(self, port: _Port, settings: PortSettings) -> None:
        untagged, tagged = _vlans(settings)
        self._opened().set_vlans(port.index, untagged, tagged)


def _vlans(settings: PortSettings) -> tuple[int, tuple[int, ...]]:
    """The VLAN of the bridge for frames without a tag, and those for which frames have one."""
    match settings.mode:
        case VlanMode.ACCESS:
            return settings.vlan, ()
        case VlanMode.TRUNK:
            return settings.native or UNNUMBERED, settings.allowed
    return UNNUMBERED, ()


def _drop_waiting(fd: int) -> None:
    try:
        while True:
            os.read(fd, MAX_FRAME)
    except OSError:
        pass  # nothing is left
