"""The host's interface that joins an external switch.

What comes by a bridge's port is the bridge's, so the host's addresses and routes are of use only there: they move to
the bridge, and back when the interface leaves it.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from devices.network import sysctl
from devices.network.kernel.links import Links, attempt
from devices.network.plane import PlaneError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: Within quotes nft takes it as it is.
_NAME = re.compile(r"[A-Za-z0-9_.@-]+")
_ARPHRD_ETHER = 1
_TABLE_LOCAL = 255
_PROTO_KERNEL = 2
_LINK_SCOPE = 253
_IFA_F_NODAD, _IFA_F_NOPREFIXROUTE = 0x02, 0x200
_RTN_UNICAST = 1
#: Attributes of a route that it has on another interface too.
_ROUTE = ("RTA_DST", "RTA_GATEWAY", "RTA_PREFSRC", "RTA_PRIORITY", "RTA_TABLE", "RTA_PREF")


class Uplink:
    """The interface `name`; methods raise PlaneError."""

    def __init__(self, links: Links, name: str) -> None:
        self._links = links
        self.name = name
        found = links.find(name)
        if found is None:
            raise PlaneError(f"uplink {name}: no interface with this name")
        self._found = found
        self.index: int = found["index"]
        self.mac: str = found.get("IFLA_ADDRESS")

    def check(self, share: bool, mtu: int) -> None:
        """Whether it can join a switch."""
        found, where = self._found, f"uplink {self.name}"
        kind = found.get(("IFLA_LINKINFO", "IFLA_INFO_KIND"))
        if found["ifi_type"] != _ARPHRD_ETHER or kind == "bridge":
            raise PlaneError(f"{where}: a bridge takes Ethernet interfaces only, and no bridges")
        if found.get("IFLA_MASTER"):
            raise PlaneError(f"{where}: it is part of another bridge or bond already")
        if found.get("IFLA_MTU") < mtu:
            raise PlaneError(
                f"{where}: its MTU is {found.get('IFLA_MTU')}, the switch's {mtu}: ip link set {self.name} mtu {mtu}"
            )
        if not _NAME.fullmatch(self.name):
            raise PlaneError(f"{where}: nftables cannot have rules for an interface of that name")
        addresses = [_text(each) for each in addresses_of(self._links, self.index)]
        if addresses and not share:
            raise PlaneError(
                f"{where}: it carries {', '.join(addresses)}, which the host would lose: have the switch share it "
                "(--share), or use --plane process or another interface"
            )
        if share and any(_leads_to(hop, self.index) for route in _routes(self._links) for hop in _hops(route)):
            raise PlaneError(f"{where}: routes with several next hops lead there, which cannot move to the switch")

    def join(self, bridge: int) -> None:
        """Become a port of `bridge`, which is up; what it carries moves there."""
        self._links.set(self.index, master=bridge, state="up")
        _move(self._links, self.index, bridge)
        sysctl.put(f"net/ipv6/conf/{self.name}/disable_ipv6", "1")


def leave(links: Links, name: str, bridge: int) -> None:
    """Have the port `name` leave `bridge`, and take along what that carries; raises PlaneError."""
    found = links.find(name)
    if found is None:
        return
    sysctl.put(f"net/ipv6/conf/{name}/disable_ipv6", sysctl.get("net/ipv6/conf/default/disable_ipv6") or "0")
    _move(links, bridge, found["index"])
    links.set(found["index"], master=0)


def addresses_of(links: Links, index: int) -> list[Any]:
    """The addresses of an interface but those that it has of itself."""
    with attempt("addresses"):
        return [each for each in links.route.get_addr(index=index) if each["scope"] != _LINK_SCOPE]


def _routes(links: Links) -> list[Any]:
    """All but those that come and go with addresses."""
    with attempt("routes"):
        return [
            route
            for family in (2, 10)
            for route in links.route.get_routes(family=family)
            if route["proto"] != _PROTO_KERNEL
            and route.get("RTA_TABLE") != _TABLE_LOCAL
            and route["type"] == _RTN_UNICAST
        ]


def _hops(route: Any) -> Iterable[Any]:
    return route.get("RTA_MULTIPATH") or ()


def _leads_to(hop: Any, index: int) -> bool:
    return bool(hop["oif"] == index)


def _move(links: Links, source: int, to: int) -> None:
    """Whatever ends this halfway, nothing is on neither."""
    addresses = addresses_of(links, source)
    routes = [route for route in _routes(links) if route.get("RTA_OIF") == source]
    for address in addresses:
        with attempt(f"address {_text(address)}"):
            _add_address(links, address, to)
    # A route's gateway may be reached by another one's.
    for route in sorted(routes, key=lambda each: (each.get("RTA_GATEWAY") is not None, -each["dst_len"])):
        with attempt(f"route to {route.get('RTA_DST') or 'everywhere'}"):
            links.route.route("replace", **_route(route, to))
    for address in reversed(addresses):  # the first of a network takes the others along
        with attempt(f"address {_text(address)}"):
            links.route.addr("del", index=source, address=_address(address), prefixlen=address["prefixlen"])


def _add_address(links: Links, address: Any, to: int) -> None:
    flags = (address.get("IFA_FLAGS") or address["flags"]) & _IFA_F_NOPREFIXROUTE
    values: dict[str, Any] = {"flags": flags | (_IFA_F_NODAD if address["family"] == 10 else 0)}
    if address.get("IFA_BROADCAST"):
        values["broadcast"] = address.get("IFA_BROADCAST")
    known = address.get("IFA_CACHEINFO")
    if known and known["ifa_valid"] != 0xFFFFFFFF:
        values["preferred_lft"], values["valid_lft"] = known["ifa_preferred"], known["ifa_valid"]
    links.route.addr(
        "replace", index=to, address=_address(address), prefixlen=address["prefixlen"], scope=address["scope"], **values
    )


def _route(route: Any, to: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "family": route["family"],
        "dst_len": route["dst_len"],
        "tos": route["tos"],
        "proto": route["proto"],
        "scope": route["scope"],
        "type": route["type"],
        "flags": route["flags"] & 0x04,  # RTNH_F_ONLINK
    }
    attributes = [[name, route.get(name)] for name in _ROUTE if route.get(name) is not None]
    attributes.append(["RTA_OIF", to])
    metrics = route.get("RTA_METRICS")
    if metrics:
        attributes.append(["RTA_METRICS", {"attrs": metrics["attrs"]}])
    return {**values, "attrs": attributes}


def _address(message: Any) -> str:
    address: str = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
    return address


def _text(message: Any) -> str:
    return str(ipaddress.ip_interface(f"{_address(message)}/{message['prefixlen']}"))
