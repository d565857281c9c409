"""What ports of a bridge may send: nftables rules of the bridge family, one table for each switch.

A frame's outer tag is out of it when rules look (skb_vlan_untag), so what they call a protocol is what is behind it.
Guards judge by the header that a receiver would see; what they cannot see is dropped, as RFC 7113 recommends.

Sources: Linux 6.1 net/bridge/netfilter/nf_tables_bridge.c, net/netfilter/nft_payload.c; nft(8); IEEE 802.1Q, sections
6.9 and 8.6.3; RFC 826, 2131, 8415, 4861, 792 and 1256.
"""

from __future__ import annotations

from devices.network import nft
from devices.network.settings import VlanMode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from devices.network.settings import PortSettings

#: Why frames are dropped, as `PortStatistics` has it; each is a counter of its port.
REASONS = ("link_down", "reserved", "malformed", "vlan", "mac_spoofing", "dhcp_guard", "router_guard")
#: Addresses that one port may send from at the same time, if it may use others than its own.
MAX_ADDRESSES = 1024
_FORGET = "5m"
_TAGS = "{ 0x8100, 0x88a8 }"


class Rules:
    """The table of one bridge, named like it. Each change is one transaction; methods raise PlaneError."""

    def __init__(self, bridge: str, unnumbered: int) -> None:
        self._table = f"bridge {bridge}"
        self._bridge = bridge
        self._unnumbered = unnumbered

    def make(self) -> None:
        """Make the table, which lets everything pass at first."""
        nft.change(
            f"table {self._table} {{\n"
            "map ports { type ifname : verdict; }\n"
            # Before all others' rules.
            "chain from { type filter hook prerouting priority -300; policy accept; iifname vmap @ports; }\n"
            "set down { type ifname; }\n"
            "chain to { type filter hook postrouting priority 0; policy accept; oifname @down drop; }\n"
            "}\n"
        )

    def remove(self) -> None:
        """Remove the table."""
        nft.remove_table("bridge", self._bridge)

    def add_port(self, number: int, interface: str, settings: PortSettings) -> None:
        """Have rules for a new port."""
        made = [f"add counter {self._table} p{number}_{reason}" for reason in REASONS]
        made.append(
            f"add set {self._table} p{number}_macs "
            f"{{ type ether_addr; size {MAX_ADDRESSES}; flags dynamic,timeout; timeout {_FORGET}; }}"
        )
        made += [f"add chain {self._table} {chain}" for chain in _chains(number)]
        made += self._rules(number, interface, settings)
        made.append(f'add element {self._table} ports {{ "{interface}" : jump p{number} }}')
        nft.change("\n".join(made) + "\n")

    def change_port(self, number: int, interface: str, settings: PortSettings) -> None:
        """Have other rules for it."""
        rules = [f"flush set {self._table} p{number}_macs", *self._rules(number, interface, settings)]
        nft.change("\n".join(rules) + "\n")

    def remove_port(self, number: int, interface: str) -> None:
        """Forget it."""
        gone = [f'delete element {self._table} ports {{ "{interface}" }}', *self._link(interface, True)]
        gone += [f"flush chain {self._table} {chain}" for chain in _chains(number)]
        gone += [f"delete chain {self._table} {chain}" for chain in _chains(number)]
        gone.append(f"delete set {self._table} p{number}_macs")
        gone += [f"delete counter {self._table} p{number}_{reason}" for reason in REASONS]
        nft.change("\n".join(gone) + "\n")

    def add_uplink(self, interface: str) -> None:
        """Keep out of the switch what the network outside must not bring to it."""
        rules = [f"add chain {self._table} uplink"]
        rules += [f"add rule {self._table} uplink {match} drop" for match in (_RESERVED, *self._foreign())]
        rules.append(f'add element {self._table} ports {{ "{interface}" : jump uplink }}')
        nft.change("\n".join(rules) + "\n")

    def dropped(self) -> dict[int, dict[str, int]]:
        """How many frames of each port were dropped, by reason."""
        result: dict[int, dict[str, int]] = {}
        for name, packets in nft.counters("bridge", self._bridge).items():
            number, _, reason = name.removeprefix("p").partition("_")
            result.setdefault(int(number), {})[reason] = packets
        return result

    def _foreign(self) -> Iterator[str]:
        # Two tags would be one at a port that takes off the first, and lead to another VLAN.
        yield f"meta protocol {_TAGS}"
        yield "ether type 0x88a8"
        yield f"ether type 0x8100 vlan id {self._unnumbered}"

    def _link(self, interface: str, up: bool) -> list[str]:
        element = f'element {self._table} down {{ "{interface}" }}'
        return [f"add {element}", f"delete {element}"] if up else [f"add {element}"]

    def _rules(self, number: int, interface: str, settings: PortSettings) -> list[str]:
        chain, guard = _chains(number)
        rules = [f"flush chain {self._table} {name}" for name in (chain, guard)]
        rules += self._link(interface, settings.link)

        def add(to: str, match: str, verdict: str) -> None:
            rules.append(f"add rule {self._table} {to} {match} {verdict}")

        def drop(to: str, match: str, reason: str) -> None:
            add(to, match, f"counter name p{number}_{reason} drop")

        if not settings.link:
            drop(chain, "", "link_down")
        drop(chain, _RESERVED, "reserved")
        drop(chain, "ether saddr & 01:00:00:00:00:00 == 01:00:00:00:00:00", "malformed")
        for match in self._foreign():
            drop(chain, match, "vlan")
        tagged = settings.allowed if settings.mode is VlanMode.TRUNK else ()
        # 0 is a tag that gives a priority only.
        allowed = ", ".join(str(vlan) for vlan in sorted({0, *tagged}))
        drop(chain, f"ether type 0x8100 vlan id != {{ {allowed} }}", "vlan")
        if settings.mac_spoofing:
            # Each address may take a place in the bridge's table.
            add(chain, f"update @p{number}_macs {{ ether saddr }}", f"goto {guard}")
            drop(chain, "", "mac_spoofing")
        else:
            drop(chain, f"ether saddr != {settings.mac}", "mac_spoofing")
            add(chain, f"meta protocol arp arp saddr ether {settings.mac}", "accept")
            drop(chain, "meta protocol arp", "mac_spoofing")
            add(chain, "", f"goto {guard}")
        if settings.dhcp_guard:
            for match in _DHCP_SERVER:
                drop(guard, match, "dhcp_guard")
        if settings.router_guard:
            for match in _ROUTER:
                drop(guard, match, "router_guard")
        if settings.dhcp_guard or settings.router_guard:
            add(guard, "meta protocol { ip, ip6 } meta l4proto != 255", "accept")
            reason = "dhcp_guard" if settings.dhcp_guard else "router_guard"
            drop(guard, "meta protocol { ip, ip6 }", reason)
        return rules


_RESERVED = "ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00"
_DHCP_SERVER = (
    "meta protocol ip udp sport 67",
    "meta protocol ip udp dport 68",
    "meta protocol ip6 udp sport 547",
    "meta protocol ip6 udp dport 546",
)
_ROUTER = ("meta protocol ip icmp type { 5, 9 }", "meta protocol ip6 icmpv6 type { 134, 137 }")


def _chains(number: int) -> tuple[str, str]:
    return f"p{number}", f"p{number}_guard"
