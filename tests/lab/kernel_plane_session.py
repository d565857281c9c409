"""Tests that test_kernel_plane.py runs inside the lab: the kernel's plane, through what all planes do and its own."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from devices.network.definition import SwitchDefinition, SwitchType
from devices.network.kernel.plane import KernelPlane
from devices.network.kernel.rules import MAX_ADDRESSES
from devices.network.plane import DataPlane, Learned, PlaneError
from devices.network.planes import set_addresses
from tests.fakes import frames
from tests.fakes.netns import NetworkNamespace
from tests.fakes.plane_cases import PlaneCases
from tests.fakes.plane_rig import PATIENCE_S, Rig

_ETH_P_ALL = 3
_SOL_PACKET, _AUXDATA, _IGNORE_OUTGOING = 263, 8, 23


class TestKernelPlane(PlaneCases):
    def make_plane(self) -> DataPlane:
        return KernelPlane(SwitchDefinition(name="test"))


def command(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def state() -> tuple[list[str], str]:
    """What of the host a switch may have changed."""
    links = [link["ifname"] for link in json.loads(command("ip", "-j", "link"))]
    return links, command("nft", "list", "ruleset")


def addresses(interface: str) -> list[str]:
    (found,) = json.loads(command("ip", "-j", "address", "show", "dev", interface))
    return [f"{each['local']}/{each['prefixlen']}" for each in found["addr_info"] if each["scope"] == "global"]


def routes(interface: str) -> list[tuple[str, str]]:
    found = [
        each for six in ("-4", "-6") for each in json.loads(command("ip", "-j", six, "route", "show", "table", "all"))
    ]
    return sorted(
        (each["dst"], each["gateway"]) for each in found if each.get("dev") == interface and "gateway" in each
    )


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**values: Any) -> Rig:
        rig = Rig(KernelPlane(SwitchDefinition(**{"name": "test", **values})))
        rig.plane.open()
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.close()


# The host's side --------------------------------------------------------------------------------------


def arp_request(address: bytes, wanted: bytes, mac: str) -> bytes:
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + frames.mac_bytes(mac) + address + bytes(6) + wanted
    return frames.ethernet(body, frames.ARP, source=mac)


def test_the_host_is_on_an_internal_switch_in_the_vlan_without_a_number(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(type=SwitchType.INTERNAL, addresses=("192.168.77.1/24",))
    assert rig.plane.host_interface == "pv-test"
    set_addresses("pv-test", rig.plane.definition.addresses)
    none, ten = rig.nic(), rig.access(10, mac_spoofing=True)
    for nic in (ten, none):
        nic.send(arp_request(bytes((192, 168, 77, nic.number + 1)), bytes((192, 168, 77, 1)), nic.mac))
    assert arp_reply(none) == bytes((192, 168, 77, 1))
    assert "192.168.77.3" not in command("ip", "neighbour", "show", "dev", "pv-test")
    # Neither asks for routers nor has an address of IPv6 that nobody gave it.
    (link,) = json.loads(command("ip", "-j", "address", "show", "dev", "pv-test"))
    assert [each["local"] for each in link["addr_info"]] == ["192.168.77.1"]


def arp_reply(nic: Any) -> bytes:
    """The address of the next ARP reply that the NIC gets."""
    while True:
        _, frame = nic.read()
        if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\x00\x02":
            found: bytes = frame[28:32]
            return found


# The way outside --------------------------------------------------------------------------------------


@pytest.fixture
def outside() -> Iterator[socket.socket]:
    """A socket at the other end of the host's interface ``up0``."""
    with NetworkNamespace() as space:
        command("ip", "link", "add", "up0", "type", "veth", "peer", "name", "far0")
        try:
            command("ip", "link", "set", "far0", "netns", f"/proc/{os.getpid()}/fd/{space.fd}")
            space.command("sysctl", "-qw", "net.ipv6.conf.far0.disable_ipv6=1")
            space.command("ip", "link", "set", "far0", "up")
            command("ip", "link", "set", "up0", "up")
            deadline = time.monotonic() + PATIENCE_S
            while "state UP" not in command("ip", "link", "show", "dev", "up0"):
                assert time.monotonic() < deadline, "the cable gets no carrier"
            kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
            with space.run(lambda: socket.socket(socket.AF_PACKET, kind)) as packets:
                packets.setsockopt(_SOL_PACKET, _AUXDATA, 1)
                packets.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
                packets.settimeout(PATIENCE_S)
                packets.bind(("far0", _ETH_P_ALL))
                yield packets
        finally:
            command("ip", "link", "del", "up0")


def receive(packets: socket.socket) -> bytes:
    """The next frame of a NIC, with its tag."""
    while True:
        frame, control, _, _ = packets.recvmsg(65536, 64)
        if frame[6:9] != b"\x00\x15\x5d":
            continue
        for _, _, data in control:
            status, _, _, _, _, tci, _ = struct.unpack("IIIHHHH", data)
            if status & 0x10:
                return frames.tagged(frame, tci)
        return frame


def test_frames_go_outside_with_the_tags_of_their_vlans_and_come_back(
    make_rig: Callable[..., Rig], outside: socket.socket
) -> None:
    rig = make_rig(type=SwitchType.EXTERNAL, interface="up0")
    none, ten = rig.nic(), rig.access(10)
    for nic in (none, ten):
        nic.send(nic.frame(text=bytes(46)))
    assert receive(outside) == none.frame(text=bytes(46))
    assert receive(outside) == frames.tagged(ten.frame(text=bytes(46)), 10)
    far = "00:15:5d:00:00:99"
    back = [frames.ethernet(bytes(46), 0x88B6, to=nic.mac, source=far) for nic in (none, ten)]
    # What would get to the VLAN without a number by the number that it has on the bridge, or by a second tag.
    outside.send(frames.tagged(frames.ethernet(b"leak" * 12, 0x88B6, to=none.mac, source=far), 4094))
    outside.send(frames.tagged(frames.tagged(frames.ethernet(b"leak" * 12, 0x88B6, source=far), 10), 4094))
    outside.send(back[0])
    outside.send(frames.tagged(back[1], 10))
    assert none.receive()[1] == back[0]
    assert ten.receive()[1] == back[1]
    assert {Learned(0, far, None), Learned(10, far, None)} <= set(rig.plane.learned())


@pytest.fixture
def shared(outside: socket.socket) -> None:
    """Addresses and routes by ``up0``."""
    command("ip", "address", "add", "203.0.113.1/24", "dev", "up0")
    command("ip", "address", "add", "fd02::1/64", "dev", "up0", "nodad")
    command("ip", "route", "add", "198.51.100.0/24", "via", "203.0.113.254", "metric", "7")
    command("ip", "route", "add", "default", "via", "203.0.113.254")
    command("ip", "-6", "route", "add", "fd03::/64", "via", "fd02::9")


HAS = ["203.0.113.1/24", "fd02::1/64"]
LEADS = [("198.51.100.0/24", "203.0.113.254"), ("default", "203.0.113.254"), ("fd03::/64", "fd02::9")]


@pytest.mark.usefixtures("shared")
def test_an_interface_that_the_host_uses_is_refused_or_shared_and_given_back(make_rig: Callable[..., Rig]) -> None:
    with pytest.raises(PlaneError, match=r"up0: it carries 203.0.113.1/24, fd02::1/64, which the host would lose"):
        make_rig(type=SwitchType.EXTERNAL, interface="up0")
    assert (addresses("up0"), routes("up0")) == (HAS, LEADS)
    rig = make_rig(type=SwitchType.EXTERNAL, interface="up0", share=True)
    assert (addresses("up0"), routes("up0")) == ([], [])
    assert (addresses("pv-test"), routes("pv-test")) == (HAS, LEADS)
    nic = rig.nic()
    nic.send(arp_request(bytes((203, 0, 113, 5)), bytes((203, 0, 113, 1)), nic.mac))
    assert arp_reply(nic) == bytes((203, 0, 113, 1))
    rig.plane.close()
    assert (addresses("up0"), routes("up0")) == (HAS, LEADS)


def test_an_interface_that_cannot_join_is_refused(make_rig: Callable[..., Rig], outside: socket.socket) -> None:
    def refusal(interface: str, **values: Any) -> str:
        with pytest.raises(PlaneError) as refused:
            make_rig(type=SwitchType.EXTERNAL, interface=interface, **values)
        return str(refused.value)

    assert refusal("up7") == "uplink up7: no interface with this name"
    assert "takes Ethernet interfaces only" in refusal("lo")
    command("ip", "link", "add", 'up"*', "type", "dummy")
    try:
        assert "nftables cannot have rules" in refusal('up"*')
    finally:
        command("ip", "link", "del", 'up"*')
    assert "its MTU is 1500, the switch's 9000" in refusal("up0", mtu=9000)
    make_rig(name="other", type=SwitchType.EXTERNAL, interface="up0")
    assert "part of another bridge" in refusal("up0")


# Lives that were ended --------------------------------------------------------------------------------

_LIFE = """
import sys, time
from devices.network.definition import SwitchDefinition, SwitchType
from devices.network.kernel.plane import KernelPlane
from devices.network.settings import PortSettings
plane = KernelPlane(SwitchDefinition(name="test", type=SwitchType.EXTERNAL, interface="up0", share=True))
plane.open()
plane.add_port(1, PortSettings(vm="vm1", nic="net0", mac="00:15:5d:00:00:01", bandwidth=1000000))
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.usefixtures("shared")
def test_what_a_killed_service_left_is_found_and_removed(make_rig: Callable[..., Rig]) -> None:
    with subprocess.Popen([sys.executable, "-c", _LIFE], stdout=subprocess.PIPE) as life:
        assert life.stdout is not None and life.stdout.readline() == b"ready\n"
        life.kill()
    assert addresses("pv-test") == HAS
    rig = make_rig(type=SwitchType.EXTERNAL, interface="up0", share=True)
    assert (addresses("pv-test"), routes("pv-test")) == (HAS, LEADS)
    a, b = rig.nic(), rig.nic()
    a.send(a.frame())
    assert b.heard(a)[:1] == [a.frame()]
    rig.plane.close()
    assert (addresses("up0"), routes("up0")) == (HAS, LEADS)


def test_a_port_whose_descriptor_somebody_keeps_goes_all_the_same(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    nic = rig.nic(bandwidth=1_000_000)
    assert len(state()[0]) == 4  # lo, bridge, TAP, ifb
    rig.plane.remove_port(nic.number)
    assert len(state()[0]) == 2
    again = rig.plane.add_port(nic.number, nic.settings)
    os.close(again)


# Refusals ---------------------------------------------------------------------------------------------


def test_the_number_that_the_plane_needs_itself_is_refused(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    with pytest.raises(PlaneError, match="VLAN 4094 is the kernel plane's own"):
        rig.access(4094)
    with pytest.raises(PlaneError, match="VLAN 4094 is the kernel plane's own"):
        rig.trunk(1, 4094)
    nic = rig.access(4093)
    with pytest.raises(PlaneError, match="VLAN 4094"):
        nic.change(vlan=4094)
    other = rig.access(4093)
    nic.send(nic.frame())
    assert other.heard(nic) == [nic.frame()]


def test_an_interface_of_somebody_else_with_the_bridges_name_is_left_alone(make_rig: Callable[..., Rig]) -> None:
    command("ip", "link", "add", "pv-test", "type", "dummy")
    try:
        with pytest.raises(PlaneError, match="there is an interface pv-test already"):
            make_rig()
        assert "pv-test" in state()[0]
    finally:
        command("ip", "link", "del", "pv-test")


def test_a_guest_that_may_use_any_address_does_not_fill_the_bridges_table(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    a, b, c = rig.nic(mac_spoofing=True), rig.nic(), rig.nic()
    for number in range(MAX_ADDRESSES + 100):
        a.send(a.frame(source=f"00:15:5d:77:{number >> 8:02x}:{number & 0xFF:02x}"))
        if number % 64 == 0:
            b.heard(c)  # before there is too much for its TAP
    b.heard(c)
    learned = [each for each in rig.plane.learned() if each.port == a.number]
    assert len(learned) <= MAX_ADDRESSES
    assert rig.plane.statistics(a.number).dropped["mac_spoofing"] >= 100
