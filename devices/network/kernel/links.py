"""Bridges, their ports and their VLANs, by rtnetlink.

Sources: Linux 6.1 include/uapi/linux/if_bridge.h, net/bridge/br_netlink.c, br_vlan.c and br_fdb.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import Any

from pyroute2 import IPRoute, NetlinkError

from devices.network.plane import PlaneError
from devices.network.settings import MAX_VLAN, MIN_VLAN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_FLAGS_SELF = 2
_PVID, _UNTAGGED, _RANGE_BEGIN, _RANGE_END = 2, 4, 8, 16
_NUD_PERMANENT = 0x80


@contextlib.contextmanager
def attempt(what: str, needs: str = "") -> Iterator[None]:
    """Raise PlaneError if the kernel refuses what is done within; `needs` is what it may lack."""
    try:
        yield
    except (NetlinkError, OSError) as error:
        code = error.code if isinstance(error, NetlinkError) else error.errno or 0
        why = os.strerror(code)
        if code in (errno.EPERM, errno.EACCES):
            why += "; run as root"
        elif needs and code in (errno.EOPNOTSUPP, errno.ENOENT, errno.EINVAL, errno.ENODEV):
            why += f"; the host's kernel may lack {needs}"
        raise PlaneError(f"{what}: {why}") from error


class Links:
    """The interfaces of the network namespace of whoever made this; methods raise PlaneError."""

    def __init__(self) -> None:
        with attempt("rtnetlink"):
            self.route = IPRoute()

    def close(self) -> None:
        """Let go of the socket."""
        self.route.close()

    def find(self, name: str) -> Any:
        """The interface `name` as a message of rtnetlink, or None."""
        with attempt(name):
            return next(iter(self.route.get_links(ifname=name)), None) if _exists(name) else None

    def index(self, name: str) -> int:
        """The number of the interface `name`."""
        with attempt(name):
            return socket.if_nametoindex(name)

    def statistics(self, name: str) -> dict[str, int]:
        """What it has counted, as struct rtnl_link_stats64 calls it."""
        found = self.find(name)
        if found is None:
            raise PlaneError(f"{name}: somebody has removed it")
        return dict(found.get("IFLA_STATS64"))

    def ports(self, bridge: int) -> list[str]:
        """The interfaces that are ports of a bridge."""
        with attempt(_name(bridge)):
            return [link.get("IFLA_IFNAME") for link in self.route.get_links() if link.get("IFLA_MASTER") == bridge]

    def names(self, prefix: str) -> list[str]:
        """The interfaces whose names begin so."""
        return [name for _, name in socket.if_nameindex() if name.startswith(prefix)]

    def make_bridge(self, name: str, mac: str, mtu: int) -> int:
        """The index of a new bridge that keeps VLANs apart, has no part in spanning trees, and is down."""
        with attempt(f"bridge {name}", "bridges with VLAN filtering (CONFIG_BRIDGE, CONFIG_BRIDGE_VLAN_FILTERING)"):
            self.route.link(
                "add",
                ifname=name,
                kind="bridge",
                address=mac,
                br_vlan_filtering=1,
                br_vlan_default_pvid=0,
                br_stp_state=0,
                br_mcast_snooping=0,
            )
            index = socket.if_nametoindex(name)
            self.route.link("set", index=index, mtu=mtu)  # once set it stays, whatever ports come
        return index

    def make_ifb(self, name: str) -> int:
        """The index of a new interface that gives back what is sent to it, once it is through its queue."""
        with attempt(name, "the ifb driver (CONFIG_IFB)"):
            self.route.link("add", ifname=name, kind="ifb")
            index = socket.if_nametoindex(name)
            self.route.link("set", index=index, state="up")
        return index

    def set(self, index: int, **values: Any) -> None:
        """Set attributes of an interface."""
        with attempt(_name(index)):
            self.route.link("set", index=index, **values)

    def remove(self, name: str) -> None:
        """Remove an interface, if it is there."""
        if _exists(name):
            with attempt(name):
                self.route.link("del", index=socket.if_nametoindex(name))

    def set_vlans(self, index: int, untagged: int, tagged: Collection[int] = (), bridge: bool = False) -> None:
        """Have a bridge's port, or with `bridge` the bridge itself, be in these VLANs and no others."""
        own = [["IFLA_BRIDGE_FLAGS", _FLAGS_SELF]] if bridge else []
        wanted = [(untagged, untagged, _PVID | _UNTAGGED)] if untagged else []
        wanted += [(first, last, 0) for first, last in _runs(set(tagged) - {untagged})]
        with attempt(f"VLANs of {_name(index)}"):
            everything = {"attrs": own + _vlan_range(MIN_VLAN, MAX_VLAN, 0)}
            self.route.vlan_filter("del", index=index, IFLA_AF_SPEC=everything)
            if wanted:
                spec = [info for first, last, flags in wanted for info in _vlan_range(first, last, flags)]
                self.route.vlan_filter("add", index=index, IFLA_AF_SPEC={"attrs": own + spec})

    def learned(self, bridge: int) -> list[tuple[int, str, int]]:
        """VLAN, MAC and port of each address that a bridge has learned."""
        with attempt(_name(bridge)):
            entries = list(self.route.fdb("dump"))
        return [
            (entry.get("NDA_VLAN") or 0, entry.get("NDA_LLADDR"), entry["ifindex"])
            for entry in entries
            if entry.get("NDA_MASTER") == bridge and not entry["state"] & _NUD_PERMANENT
        ]


def _exists(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"interface {index}"


def _runs(vlans: set[int]) -> list[tuple[int, int]]:
    """The first and last of each run of numbers."""
    runs: list[tuple[int, int]] = []
    for vlan in sorted(vlans):
        if runs and runs[-1][1] == vlan - 1:
            runs[-1] = (runs[-1][0], vlan)
        else:
            runs.append((vlan, vlan))
    return runs


def _vlan_range(first: int, last: int, flags: int) -> list[list[Any]]:
    if first == last:
        return [["IFLA_BRIDGE_VLAN_INFO", {"vid": first, "flags": flags}]]
    return [
        ["IFLA_BRIDGE_VLAN_INFO", {"vid": first, "flags": flags | _RANGE_BEGIN}],
        ["IFLA_BRIDGE_VLAN_INFO", {"vid": last, "flags": flags | _RANGE_END}],
    ]
