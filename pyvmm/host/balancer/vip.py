"""The address that clients use, on the host for as long as the load balancer runs."""

from __future__ import annotations

import ipaddress
import socket

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from pyvmm.host.balancer.definition import BalancerError


def add(address: str) -> str | None:
    """Give the host `address` unless it has it: on the interface whose network it is in, else on the loopback.

    Return the interface, or None if there was nothing to do. Raises BalancerError.
    """
    ip = ipaddress.ip_address(address)
    if ip.is_unspecified or ip.is_loopback:
        return None
    with IPRoute() as netlink:
        found: dict[str, ipaddress.IPv4Network | ipaddress.IPv6Network] = {}
        for row in netlink.get_addr(family=socket.AF_INET if ip.version == 4 else socket.AF_INET6):
            host = ipaddress.ip_interface(f"{row.get('IFA_LOCAL') or row.get('IFA_ADDRESS')}/{row['prefixlen']}")
            if host.ip == ip:
                return None
            found[_name(netlink, row["index"])] = host.network
        interface = next((name for name, network in found.items() if ip in network), "lo")
        try:
            netlink.addr("add", index=socket.if_nametoindex(interface), address=address, prefixlen=ip.max_prefixlen)
        except NetlinkError as error:
            raise BalancerError(
                f"vip {address}: the host has no such address, and cannot get it: {error.args[1]}"
            ) from error
    return interface


def remove(address: str, interface: str) -> None:
    """Take away what `add` gave; harmless if it or the interface is gone."""
    with IPRoute() as netlink:
        try:
            length = ipaddress.ip_address(address).max_prefixlen
            netlink.addr("del", index=socket.if_nametoindex(interface), address=address, prefixlen=length)
        except (NetlinkError, OSError):
            pass


def _name(netlink: IPRoute, index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return ""
