"""NAT of a switch: kernels of guests on the in-process plane, of the host and of others outside, in namespaces."""

from __future__ import annotations

import ipaddress
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devices.network import places
from devices.network.definition import SwitchDefinition, SwitchType
from devices.network.forwarding import Forwarding
from devices.network.nat import Nat
from devices.network.plane import PlaneError
from devices.network.planes import set_addresses
from devices.network.port import OFFLOAD_CHECKSUM, OFFLOAD_TSO4, OFFLOAD_TSO6
from devices.network.process_plane import ProcessPlane, make_tap
from devices.network.reservations import Reservations
from devices.network.settings import PortSettings
from pyvmm.core._hot import Switch
from tests.fakes import frames
from tests.fakes.netns import NetworkNamespace

root = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")

HOST, OUTSIDE = "203.0.113.1", "203.0.113.2"
_PATIENCE_S = 20
_UDHCPC = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip address replace "$ip/$mask" dev "$interface"
ip route replace default via "$router"
echo "ip=$ip router=$router dns=$dns mtu=$mtu"
"""


class Guest:
    """A VM with a NIC on the switch: a namespace whose TAP is joined to the port."""

    def __init__(self, rig: Rig, number: int, vm: str) -> None:
        self.vm = vm
        self.mac = f"00:15:5d:00:00:{number:02x}"
        self.space = NetworkNamespace()
        tap = self.space.run(lambda: make_tap("eth0", 1500))
        self.space.command("ip", "link", "set", "eth0", "address", self.mac)
        self.port = rig.plane.add_port(number, PortSettings(vm=vm, nic="net0", mac=self.mac))
        rig.plane.set_offloads(number, OFFLOAD_CHECKSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6)
        self._cable = Switch()
        self._cable.add_port(0, "tap", tap)
        self._cable.add_port(1, "socket", self.port)
        self._thread = threading.Thread(target=self._cable.run)
        self._thread.start()
        self.address = rig.host.run(lambda: rig.nat.plug(vm, self.mac))

    def dhcp(self, script: Path) -> dict[str, str]:
        """What a DHCP client gets, which is in use then."""
        said = self.space.command("busybox", "udhcpc", "-i", "eth0", "-O", "mtu", "-nqf", "-s", str(script))
        told = next(line for line in said.splitlines() if line.startswith("ip="))
        return dict(word.split("=") for word in told.split())

    def close(self) -> None:
        self._cable.stop()
        self._thread.join()
        self.space.close()


class Rig:
    """The host with the switch ``net``, and what is outside."""

    def __init__(self, definition: SwitchDefinition, script: Path) -> None:
        self.script = script
        self.definition = definition
        self.host, self.outside = NetworkNamespace(), NetworkNamespace()
        self.now = 0.0
        self.guests: list[Guest] = []
        self.host.command("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "temporary")
        self.host.command("ip", "link", "set", "temporary", "netns", path_of(self.outside))
        self.outside.command("ip", "link", "set", "temporary", "name", "eth0")
        for space, address, six in ((self.host, HOST, "fd02::1"), (self.outside, OUTSIDE, "fd02::2")):
            space.command("ip", "address", "add", f"{address}/24", "dev", "eth0")
            space.command("ip", "address", "add", f"{six}/64", "dev", "eth0", "nodad")
            space.command("ip", "link", "set", "eth0", "up")
        self.plane = ProcessPlane(definition)
        self.host.run(self.plane.open)
        self.host.run(lambda: set_addresses("pv-net", definition.addresses))
        self.nat = self.make_nat()
        self.host.run(self.nat.start)

    def make_nat(self) -> Nat:
        return Nat(self.definition, "pv-net", clock=lambda: self.now)

    def guest(self, vm: str) -> Guest:
        guest = Guest(self, len(self.guests) + 1, vm)
        self.guests.append(guest)
        return guest

    def close(self) -> None:
        for guest in self.guests:
            guest.close()
        self.host.run(self.nat.stop)
        self.host.run(self.nat.stop)
        left = self.host.command("nft", "list", "ruleset")
        forwarding = setting(self.host, "net/ipv4/ip_forward")
        self.plane.close()
        self.host.close()
        self.outside.close()
        assert (left, forwarding) == ("", "0")
        assert not dnsmasqs()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYVMM_RUNTIME_DIR", str(tmp_path / "run"))
    places.make_folder(places.running("net", "lock"))
    script = tmp_path / "udhcpc"
    script.write_text(_UDHCPC)
    script.chmod(0o755)
    return script


@pytest.fixture
def make_rig(script: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(*forwards: str, addresses: tuple[str, ...] = ("192.168.77.1/24",)) -> Rig:
        definition = SwitchDefinition(name="net", type=SwitchType.NAT, addresses=addresses, forwards=forwards)
        rigs.append(Rig(definition, script))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def dnsmasqs() -> list[int]:
    """The processes that serve a switch of this test."""
    conf = f"--conf-file={places.running('net', 'dnsmasq')}".encode()
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if conf in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(int(pid))
        except OSError:
            pass
    return found


def path_of(space: NetworkNamespace) -> str:
    return f"/proc/{os.getpid()}/fd/{space.fd}"


def setting(space: NetworkNamespace, name: str) -> str:
    return space.run(Path(f"/proc/sys/{name}").read_text).strip()


def listen(space: NetworkNamespace, port: int, kind: int = socket.SOCK_STREAM, six: bool = False) -> socket.socket:
    def make() -> socket.socket:
        server = socket.socket(socket.AF_INET6 if six else socket.AF_INET, kind)
        server.settimeout(_PATIENCE_S)
        server.bind(("", port))
        if kind == socket.SOCK_STREAM:
            server.listen(8)
        return server

    return space.run(make)


def reached(client: NetworkNamespace, address: str, port: int, server: socket.socket) -> str:
    """Connect, have a word each way, and return who the server takes the client for."""

    def connect() -> socket.socket:
        return socket.create_connection((address, port), timeout=_PATIENCE_S)

    with client.run(connect) as one:
        other, who = server.accept()
        with other:
            other.settimeout(_PATIENCE_S)
            one.sendall(b"ping")
            assert other.recv(4) == b"ping"
            other.sendall(b"pong")
            assert one.recv(4) == b"pong"
        found: str = who[0]
        return found


def refused(client: NetworkNamespace, address: str, port: int) -> bool:
    def connect() -> bool:
        try:
            socket.create_connection((address, port), timeout=1.0).close()
        except OSError:
            return True
        return False

    return client.run(connect)


# What guests get --------------------------------------------------------------------------------------


@root
def test_a_guest_has_its_address_by_dhcp_and_reaches_other_networks_as_the_host(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    guest = rig.guest("web01")
    told = guest.dhcp(rig.script)
    assert told == {"ip": guest.address, "router": "192.168.77.1", "dns": "192.168.77.1", "mtu": "1500"}
    assert rig.nat.leases() == [(guest.mac, guest.address)]
    with listen(rig.outside, 7) as server:
        assert reached(guest.space, OUTSIDE, 7, server) == HOST


@root
def test_guests_find_each_other_by_the_names_of_their_vms(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    one, other = rig.guest("web01"), rig.guest("db01")
    one.dhcp(rig.script)
    other.dhcp(rig.script)
    said = other.space.command("busybox", "nslookup", "-type=a", "web01", "192.168.77.1")
    assert f"Address: {one.address}" in said
    with listen(one.space, 80) as server:
        assert reached(other.space, str(one.address), 80, server) == other.address


@root
def test_a_guest_reaches_ipv6_networks_with_the_prefix_that_the_host_advertises(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(addresses=("192.168.77.1/24", "fd01::1/64"))
    guest = rig.guest("web01")
    monitor = guest.space.run(
        lambda: subprocess.Popen(["ip", "-6", "monitor", "address"], stdout=subprocess.PIPE, text=True)
    )
    with monitor:
        assert monitor.stdout is not None
        # The router is asked for when the interface comes up.
        guest.space.command("ip", "link", "set", "eth0", "down")
        guest.space.command("ip", "link", "set", "eth0", "up")
        while True:
            assert select.select([monitor.stdout], [], [], _PATIENCE_S)[0], "no address comes"
            line = monitor.stdout.readline()
            if "fd01:" in line and "tentative" not in line:
                break
        monitor.kill()
    with listen(rig.outside, 7, six=True) as server:
        assert reached(guest.space, "fd02::2", 7, server) == "fd02::1"
    assert setting(rig.host, "net/ipv6/conf/eth0/accept_ra") == "2"
    rig.host.run(rig.nat.stop)
    assert setting(rig.host, "net/ipv6/conf/eth0/accept_ra") == "1"
    assert setting(rig.host, "net/ipv6/conf/all/forwarding") == "0"


# Forwards ---------------------------------------------------------------------------------------------


@root
def test_ports_of_the_host_lead_to_the_vm_from_everywhere_while_it_is_plugged_in(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("tcp:8080:web01:80", "udp:53000:web01:5300")
    other = rig.guest("db01")
    other.dhcp(rig.script)
    assert refused(rig.outside, HOST, 8080)
    guest = rig.guest("web01")
    guest.dhcp(rig.script)
    with listen(guest.space, 80) as server:
        assert reached(rig.outside, HOST, 8080, server) == OUTSIDE
        assert reached(rig.host, HOST, 8080, server) == HOST
        assert reached(rig.host, "127.0.0.1", 8080, server) == "192.168.77.1"
        assert reached(other.space, HOST, 8080, server) == "192.168.77.1"
    client = rig.outside.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with client, listen(guest.space, 5300, socket.SOCK_DGRAM) as server:
        client.sendto(b"ping", (HOST, 53000))
        assert server.recvfrom(10)[0] == b"ping"
    rig.host.run(lambda: rig.nat.unplug(guest.mac))
    assert refused(rig.outside, HOST, 8080)


@root
def test_what_guests_send_elsewhere_is_not_forwarded(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("tcp:8080:web01:80")
    guest = rig.guest("web01")
    guest.dhcp(rig.script)
    with listen(rig.outside, 8080) as server:
        assert reached(guest.space, OUTSIDE, 8080, server) == HOST
        assert reached(rig.host, OUTSIDE, 8080, server) == HOST


@root
def test_a_port_that_a_program_of_the_host_has_is_refused_and_nothing_is_left(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.host.run(rig.nat.stop)
    definition = SwitchDefinition(
        name="net", type=SwitchType.NAT, addresses=("192.168.77.1/24",), forwards=("tcp:8080:web01:80",)
    )
    nat = Nat(definition, "pv-net")
    taken = "forward to web01: the host's tcp port 8080: Address already in use"
    with listen(rig.host, 8080), pytest.raises(PlaneError, match=taken):
        rig.host.run(nat.start)
    rig.host.run(nat.stop)
    rig.host.run(nat.start)
    assert not refused(rig.host, "192.168.77.1", 53)
    rig.host.run(nat.stop)


# Who is kept apart ------------------------------------------------------------------------------------


@root
def test_nobody_outside_reaches_guests_but_by_forwards(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    guest = rig.guest("web01")
    guest.dhcp(rig.script)
    rig.outside.command("ip", "route", "add", "192.168.77.0/24", "via", HOST)
    with listen(guest.space, 80) as server:
        assert refused(rig.outside, str(guest.address), 80)
        assert reached(rig.host, str(guest.address), 80, server) == "192.168.77.1"


@root
def test_guests_of_two_switches_do_not_reach_each_other(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("tcp:8080:web01:80")
    guest = rig.guest("web01")
    guest.dhcp(rig.script)
    with NetworkNamespace() as other:
        rig.host.command("ip", "link", "add", "pv-other", "type", "veth", "peer", "name", "temporary")
        rig.host.command("ip", "link", "set", "temporary", "netns", path_of(other))
        rig.host.command("ip", "address", "add", "192.168.78.1/24", "dev", "pv-other")
        rig.host.command("ip", "link", "set", "pv-other", "up")
        other.command("ip", "address", "add", "192.168.78.2/24", "dev", "temporary")
        other.command("ip", "link", "set", "temporary", "up")
        other.command("ip", "route", "add", "default", "via", "192.168.78.1")
        with listen(other, 80) as server:
            assert reached(rig.host, "192.168.78.2", 80, server) == "192.168.78.1"
            assert refused(guest.space, "192.168.78.2", 80)
        with listen(guest.space, 81):
            assert refused(other, str(guest.address), 81)


@root
def test_guests_do_not_reach_the_hosts_loopback_though_forwards_come_from_there(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("tcp:8080:web01:80")
    guest = rig.guest("web01")
    guest.dhcp(rig.script)
    (host,) = json.loads(rig.host.command("ip", "-j", "link", "show", "dev", "pv-net"))
    with (
        listen(rig.host, 9, socket.SOCK_DGRAM) as server,
        guest.space.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as nic,
    ):
        nic.bind(("eth0", 0))
        for to in ("127.0.0.1", "192.168.77.1"):
            packet = frames.udp(to.encode(), source=str(guest.address), to=to, ports=(9, 9))
            packet = frames.ipv4(packet, frames.UDP, source=str(guest.address), to=to)
            nic.send(frames.ethernet(packet, frames.IPV4, to=host["address"], source=guest.mac))
        assert server.recvfrom(100)[0] == b"192.168.77.1"


# What ends --------------------------------------------------------------------------------------------


@root
def test_dnsmasq_that_is_killed_starts_again_but_not_for_ever(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    guest = rig.guest("web01")
    for _ in range(3):
        (pid,) = dnsmasqs()
        os.kill(pid, signal.SIGKILL)
        assert select.select([rig.nat], [], [], _PATIENCE_S)[0]
        assert rig.host.run(rig.nat.check) == "dnsmasq had ended and was started again"
        assert rig.host.run(rig.nat.check) is None
    assert guest.dhcp(rig.script)["ip"] == guest.address
    (pid,) = dnsmasqs()
    os.kill(pid, signal.SIGKILL)
    assert select.select([rig.nat], [], [], _PATIENCE_S)[0]
    assert "no DHCP and DNS any more" in str(rig.host.run(rig.nat.check))
    assert not select.select([rig.nat], [], [], 0)[0]
    assert not dnsmasqs()


_LIFE = """
import sys, time
from devices.network.definition import SwitchDefinition, SwitchType
from devices.network.nat import Nat
address, forward = "192.168.77.1/24", sys.argv[1]
nat = Nat(SwitchDefinition(name="net", type=SwitchType.NAT, addresses=(address,), forwards=(forward,)), "pv-net")
nat.start()
nat.plug("web01", "00:15:5d:00:00:01")
print("ready", flush=True)
time.sleep(600)
"""


@root
def test_what_a_killed_service_left_is_replaced_and_the_hosts_settings_are_known_still(
    make_rig: Callable[..., Rig],
) -> None:
    forward = "tcp:8080:web01:80"
    rig = make_rig(forward)
    rig.host.run(rig.nat.stop)
    assert setting(rig.host, "net/ipv4/ip_forward") == "0"
    words = [sys.executable, "-c", _LIFE, forward]
    with rig.host.run(lambda: subprocess.Popen(words, stdout=subprocess.PIPE)) as life:
        assert life.stdout is not None and life.stdout.readline() == b"ready\n"
        life.kill()
    (old,) = dnsmasqs()
    rig.nat = rig.make_nat()
    rig.host.run(rig.nat.start)
    (new,) = dnsmasqs()
    assert new != old
    assert "192.168.77" not in rig.host.command("nft", "list", "chain", "inet", "pv-net", "forwards")
    guest = rig.guest("web01")
    guest.dhcp(rig.script)
    with listen(guest.space, 80) as server:
        assert reached(rig.outside, HOST, 8080, server) == OUTSIDE


@root
def test_forwarding_stays_on_while_another_switch_needs_it(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    other = Forwarding()
    rig.host.run(lambda: other.take(ipv6=False))
    rig.host.run(rig.nat.stop)
    assert setting(rig.host, "net/ipv4/ip_forward") == "1"
    rig.host.run(other.give_back)
    assert setting(rig.host, "net/ipv4/ip_forward") == "0"


# Reservations -----------------------------------------------------------------------------------------


def macs(count: int) -> list[str]:
    return [f"00:15:5d:00:{number >> 8:02x}:{number & 0xFF:02x}" for number in range(count)]


@pytest.mark.parametrize("own", ["10.0.0.1/30", "10.0.0.2/29", "10.1.2.254/24", "10.0.0.1/8"])
def test_addresses_are_in_the_network_and_each_is_one_nics(own: str, tmp_path: Path) -> None:
    host = ipaddress.IPv4Interface(own)
    reservations = Reservations(host, str(tmp_path / "addresses"))
    all_macs = macs(600)
    given = [address for mac in all_macs if (address := reservations.reserve(mac, "vm", set(all_macs))[0])]
    assert given and len(set(given)) == len(given)
    for ip in map(ipaddress.IPv4Address, given):
        assert ip in host.network and ip not in (host.ip, host.network[0], host.network[-1])
        assert reservations.leased is None or not reservations.leased[0] <= ip <= reservations.leased[1]
    again = Reservations(host, str(tmp_path / "addresses"))
    for mac, address in zip(all_macs, given, strict=False):
        assert again.reserve(mac, "vm", set(all_macs)) == (address, False)


def test_an_address_is_the_same_without_a_memory_of_it(tmp_path: Path) -> None:
    own = ipaddress.IPv4Interface("192.168.77.1/24")
    first, second = (Reservations(own, str(tmp_path / name)) for name in ("one", "two"))
    assert first.reserve(macs(1)[0], "vm", set())[0] == second.reserve(macs(1)[0], "vm", set())[0]


def test_when_all_addresses_are_taken_an_idle_nics_is_given_away(tmp_path: Path) -> None:
    reservations = Reservations(ipaddress.IPv4Interface("10.0.0.1/29"), str(tmp_path / "addresses"))
    busy: set[str] = set()
    given = {}
    for mac in macs(20):
        address, news = reservations.reserve(mac, "vm", busy)
        if address is None:
            break
        assert news
        given[mac] = address
        busy.add(mac)
    oldest = next(iter(given))
    assert reservations.reserve("00:15:5d:01:00:00", "vm", busy) == (None, False)
    assert reservations.reserve("00:15:5d:01:00:00", "vm", busy - {oldest}) == (given[oldest], True)


def test_only_names_that_can_be_a_hosts_are_and_each_once(tmp_path: Path) -> None:
    reservations = Reservations(ipaddress.IPv4Interface("10.0.0.1/24"), str(tmp_path / "addresses"))
    for mac, vm in zip(macs(4), ["Web01", "web01", "no name", "-x\ndhcp-script=/bin/sh"], strict=True):
        reservations.reserve(mac, vm, set())
    assert [name for _, _, name in reservations.all()] == ["web01", "", "", ""]


def test_a_memory_of_another_network_or_none_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "addresses"
    for text in ('[["00:15:5d:00:00:00", "10.9.9.9", "vm"]]', "{", '[["x"]]', '[["00:15:5d:00:00:00", "\\n", "vm"]]'):
        path.write_text(text)
        reservations = Reservations(ipaddress.IPv4Interface("10.0.0.1/24"), str(path))
        assert reservations.all() == []
