"""An interface that joins a bridge with what it carries, and leaves it again, in a network of the test's own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from devices.network.kernel.links import Links
from devices.network.kernel.uplink import Uplink, leave
from devices.network.plane import PlaneError
from tests.fakes.netns import NetworkNamespace

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")

_LINKS = """
ip link add bridge0 type bridge
ip link add up0 type veth peer name far0
sysctl -qw net.ipv6.conf.bridge0.addr_gen_mode=1 net.ipv6.conf.up0.addr_gen_mode=1
ip link set bridge0 up
ip link set up0 up
ip link set far0 up
ip address add 203.0.113.1/24 dev up0
"""
_MORE = """
ip address add 203.0.113.7/24 dev up0
ip address add 198.18.0.1/15 dev up0 valid_lft 5000 preferred_lft 4000
ip address add fd02::1/64 dev up0 nodad
ip route add 198.51.100.0/24 via 203.0.113.254 metric 7
ip route add default via 203.0.113.254 mtu 1400
ip -6 route add fd03::/64 via fd02::9
ip -6 route add default via fe80::1 dev up0
ip route add 10.7.0.0/16 dev up0 scope link table 100
ip route add 10.8.0.0/16 via 10.9.0.1 dev up0 onlink table 100
"""


def shell(text: str) -> str:
    return subprocess.run(["sh", "-ec", text], check=True, capture_output=True, text=True).stdout


def carried(interface: str) -> list[str]:
    """Addresses, but what is left of their lives, and routes."""
    addresses = shell(f"ip address show dev {interface} scope global | sed -n '/inet/s/{interface}//p'").splitlines()
    ways = shell(f"ip route show table all dev {interface}; ip -6 route show dev {interface}").splitlines()
    return [" ".join(line.split()) for line in addresses] + sorted(
        line.strip() for line in ways if "ff00::" not in line
    )


@pytest.fixture
def space() -> Iterator[NetworkNamespace]:
    with NetworkNamespace() as space:
        space.run(lambda: shell(_LINKS))
        yield space


def test_what_an_interface_carries_moves_to_the_bridge_and_back(space: NetworkNamespace) -> None:
    def there_and_back() -> tuple[list[str], ...]:
        shell(_MORE)
        links = Links()
        try:
            seen = [carried("up0")]
            uplink = Uplink(links, "up0")
            uplink.check(share=True, mtu=1500)
            uplink.join(links.index("bridge0"))
            seen += [carried("bridge0"), carried("up0")]
            leave(links, "up0", links.index("bridge0"))
            return (*seen, carried("up0"), carried("bridge0"))
        finally:
            links.close()

    before, moved, rest, after, bridge = space.run(there_and_back)
    assert len(before) > 15 and any("203.0.113.7/24" in line for line in before)
    assert moved == before
    assert after == before
    assert rest == bridge == []


def test_routes_with_several_next_hops_are_refused(space: NetworkNamespace) -> None:
    def check() -> None:
        shell("ip route add 10.0.0.0/8 nexthop via 203.0.113.2 nexthop via 203.0.113.3")
        links = Links()
        try:
            with pytest.raises(PlaneError, match="routes with several next hops lead there"):
                Uplink(links, "up0").check(share=True, mtu=1500)
        finally:
            links.close()

    space.run(check)
