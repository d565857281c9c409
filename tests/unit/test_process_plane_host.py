"""The in-process plane between kernels: host interfaces and uplinks in namespaces, TCP that checks what it gets."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from devices.network.definition import SwitchDefinition, SwitchType
from devices.network.plane import Learned, PlaneError
from devices.network.port import OFFLOAD_CHECKSUM, OFFLOAD_TSO4, OFFLOAD_TSO6
from devices.network.process_plane import ProcessPlane, make_tap, open_packets
from pyvmm.core._hot import Switch
from tests.fakes import frames
from tests.fakes.netns import NetworkNamespace
from tests.fakes.plane_rig import PATIENCE_S, Rig

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")

_SIZE = 8 << 20
_SOL_PACKET, _AUXDATA = 263, 8
_ETH_P_ALL = 3
_SOL_UDP, _UDP_SEGMENT = 17, 103
ALL = OFFLOAD_CHECKSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6


@pytest.fixture
def spaces() -> Iterator[tuple[NetworkNamespace, NetworkNamespace]]:
    with NetworkNamespace() as one, NetworkNamespace() as other:
        yield one, other


def transfer(sender: NetworkNamespace, receiver: NetworkNamespace, address: str) -> None:
    """Send bytes by TCP; both kernels must agree on them, and on every checksum on the way."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    data = random.Random(address).randbytes(_SIZE)
    received = hashlib.sha256()

    def listen() -> socket.socket:
        server = socket.socket(family)
        server.settimeout(30)
        server.bind((address, 5000))
        server.listen(1)
        return server

    def take() -> None:
        connection, _ = server.accept()
        with connection:
            connection.settimeout(30)
            while piece := connection.recv(1 << 20):
                received.update(piece)

    def send() -> None:
        with socket.socket(family) as client:
            client.settimeout(30)
            client.connect((address, 5000))
            client.sendall(data)

    with receiver.run(listen) as server:
        taker = threading.Thread(target=take)
        taker.start()
        sender.run(send)
        taker.join()
    assert received.hexdigest() == hashlib.sha256(data).hexdigest()
    for space in (sender, receiver):
        assert errors_of(space) == 0


def errors_of(space: NetworkNamespace) -> int:
    """TCP segments that the namespace's kernel has thrown away."""

    def read() -> list[list[str]]:
        with open("/proc/thread-self/net/snmp") as file:
            return [line.split() for line in file if line.startswith("Tcp:")]

    names, values = space.run(read)
    found = dict(zip(names, values, strict=True))
    return int(found["InErrs"]) + int(found["InCsumErrors"])


def address_of(space: NetworkNamespace, name: str) -> str:
    found: str = json.loads(space.command("ip", "-j", "link", "show", "dev", name))[0]["address"]
    return found


def add_addresses(space: NetworkNamespace, name: str, number: int) -> None:
    space.command("ip", "address", "add", f"10.0.0.{number}/24", "dev", name)
    space.command("ip", "address", "add", f"fd00::{number}/64", "dev", name, "nodad")


@pytest.fixture
def switch() -> Iterator[Switch]:
    switch = Switch()
    thread = threading.Thread(target=switch.run)
    thread.start()
    yield switch
    switch.stop()
    thread.join()


@pytest.mark.parametrize("address", ["10.0.0.2", "fd00::2"])
@pytest.mark.parametrize("offloads", [0, OFFLOAD_CHECKSUM, ALL])
def test_kernels_accept_what_the_switch_cuts_and_completes(
    spaces: tuple[NetworkNamespace, NetworkNamespace], switch: Switch, address: str, offloads: int
) -> None:
    for number, space in enumerate(spaces, 1):
        fd = space.run(lambda name=f"tap{number}": make_tap(name, 1500))  # type: ignore[misc]
        add_addresses(space, f"tap{number}", number)
        switch.add_port(number, "tap", fd)
        switch.set_offloads(number, offloads)
    transfer(*spaces, address)
    came, went = switch.statistics(1), switch.statistics(2)
    assert came["received_bytes"] / came["received_frames"] > 3000  # so there were segments to be cut
    if offloads != ALL:
        assert went["sent_bytes"] / went["sent_frames"] < 1600


@pytest.mark.parametrize("address", ["10.0.0.2", "fd00::2"])
def test_kernels_reach_each_other_through_an_uplink(
    spaces: tuple[NetworkNamespace, NetworkNamespace], switch: Switch, address: str
) -> None:
    guest, network = spaces
    with NetworkNamespace() as host:
        lead_outside(switch, guest, host, network)
        transfer(guest, network, address)
        transfer(network, guest, address.replace("2", "1"))


@pytest.mark.parametrize("address", ["10.0.0.1", "fd00::1"])
def test_datagrams_that_a_kernel_leaves_in_one_piece_reach_a_guest_one_by_one(
    spaces: tuple[NetworkNamespace, NetworkNamespace], switch: Switch, address: str
) -> None:
    guest, network = spaces
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with NetworkNamespace() as host:
        lead_outside(switch, guest, host, network)
        with (
            guest.run(lambda: socket.socket(family, socket.SOCK_DGRAM)) as receiver,
            network.run(lambda: socket.socket(family, socket.SOCK_DGRAM)) as sender,
        ):
            receiver.settimeout(20)
            receiver.bind((address, 5000))
            sender.sendto(b"first", (address, 5000))  # so that the neighbour is known
            assert receiver.recv(2000) == b"first"
            sender.setsockopt(_SOL_UDP, _UDP_SEGMENT, 1000)
            data = random.Random(1).randbytes(9500)
            sender.sendto(data, (address, 5000))
            got = [receiver.recv(2000) for _ in range(10)]
    assert b"".join(got) == data and {len(each) for each in got} == {1000, 500}
    statistics = switch.statistics(2)
    assert statistics["received_bytes"] > 9500 and statistics["dropped"] == {}
    assert statistics["received_frames"] < 10


def lead_outside(switch: Switch, guest: NetworkNamespace, host: NetworkNamespace, network: NetworkNamespace) -> None:
    """The guest on port 1, and on port 2 the host's uplink to the network."""
    join(host, network)
    add_addresses(network, "peer", 2)
    fd = guest.run(lambda: make_tap("tap1", 1500))
    add_addresses(guest, "tap1", 1)
    switch.add_port(1, "tap", fd)
    fd, mac = host.run(lambda: open_packets("uplink"))
    switch.add_port(2, "packet", fd, mac=mac)


def join(host: NetworkNamespace, network: NetworkNamespace) -> None:
    """An Ethernet cable from ``uplink`` of the host to ``peer`` of the network, both up and silent."""
    host.command("ip", "link", "add", "uplink", "type", "veth", "peer", "name", "peer")
    host.command("ip", "link", "set", "peer", "netns", f"/proc/{os.getpid()}/fd/{network.fd}")
    ends = ((host, "uplink"), (network, "peer"))
    for space, name in ends:
        space.command("ip", "link", "set", name, "addrgenmode", "none", "up")
    # An end sends nothing until the kernel has looked at its carrier, which it does when it finds time.
    deadline = time.monotonic() + PATIENCE_S
    while not all("state UP" in space.command("ip", "link", "show", "dev", name) for space, name in ends):
        assert time.monotonic() < deadline, "the cable gets no carrier"


# The plane --------------------------------------------------------------------------------------------


def test_an_internal_switch_has_an_interface_of_the_host_that_goes_with_it() -> None:
    with NetworkNamespace() as host:
        plane = ProcessPlane(SwitchDefinition(name="inside", type=SwitchType.INTERNAL, addresses=("10.0.0.1/24",)))
        host.run(plane.open)
        assert plane.host_interface == "pv-inside"
        add_addresses(host, "pv-inside", 1)
        nic = Rig(plane).nic()
        hello = frames.udp(b"hello", source="10.0.0.2", to="10.0.0.1", ports=(7, 7))
        mac = address_of(host, "pv-inside")
        with host.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as server:
            server.settimeout(20)
            server.bind(("10.0.0.1", 7))
            packet = frames.ipv4(hello, frames.UDP, source="10.0.0.2", to="10.0.0.1")
            nic.send(frames.ethernet(packet, frames.IPV4, to=mac, source=nic.mac))
            assert server.recvfrom(100) == (b"hello", ("10.0.0.2", 7))
            server.sendto(b"answer", ("10.0.0.2", 7))  # which the host asks for by ARP
            while (asked := nic.read()[1])[12:14] != b"\x08\x06":
                pass
            assert asked[38:42] == bytes((10, 0, 0, 2))
        assert Learned(0, mac, None) in plane.learned()
        again = ProcessPlane(plane.definition)
        with pytest.raises(PlaneError, match="host interface pv-inside: "):
            host.run(again.open)
        plane.close()
        plane.close()
        assert "pv-inside" not in host.command("ip", "link")
        host.run(again.open)
        again.close()
        nic.close()


def test_an_external_switch_shares_the_interface_with_the_host_and_knows_its_vlans(
    spaces: tuple[NetworkNamespace, NetworkNamespace],
) -> None:
    host, network = spaces
    join(host, network)
    plane = ProcessPlane(SwitchDefinition(name="outside", type=SwitchType.EXTERNAL, interface="uplink"))
    host.run(plane.open)
    rig = Rig(plane)
    none, ten, trunk = rig.nic(), rig.access(10), rig.trunk(20, native=30)
    wire = network.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
    wire.setsockopt(_SOL_PACKET, _AUXDATA, 1)
    wire.bind(("peer", _ETH_P_ALL))
    wire.settimeout(20)
    for nic, vlan in ((none, None), (ten, 10), (trunk, 20)):
        sent = nic.frame(text=b"out")
        nic.send(sent if nic is not trunk else frames.tagged(sent, 20))
        assert heard(wire, sent) == vlan
    outside = "00:15:5d:00:00:77"
    own = address_of(host, "uplink")
    for text, tag, nic, seen in (
        (b"none", None, none, None),
        (b"ten", 10, ten, None),
        (b"twenty", 20, trunk, 20),
    ):
        # What is for the host alone comes to nobody else.
        for to in (own, frames.BROADCAST):
            frame = frames.ethernet(text, 0x88B6, to=to, source=outside)
            wire.send(frames.tagged(frame, tag) if tag else frame)
        assert nic.receive()[1] == (frames.tagged(frame, seen) if seen else frame)
    rig.close()
    wire.close()


def heard(wire: socket.socket, frame: bytes) -> int | None:
    """The VLAN in which a frame arrives, None for none; other frames are passed over."""
    while True:
        got, more, _, _ = wire.recvmsg(2000, 100)
        if got.startswith(frame):
            data = next(data for level, kind, data in more if (level, kind) == (_SOL_PACKET, _AUXDATA))
            status, _, _, _, _, tci, _ = struct.unpack("IIIHHHH", data)
            return tci if status & 0x10 else None


def test_a_host_without_what_a_switch_needs_is_told_so() -> None:
    with NetworkNamespace() as host:
        missing = ProcessPlane(SwitchDefinition(name="x", type=SwitchType.EXTERNAL, interface="nowhere0"))
        with pytest.raises(PlaneError, match="uplink nowhere0: no interface"):
            host.run(missing.open)
        loop = ProcessPlane(SwitchDefinition(name="x", type=SwitchType.EXTERNAL, interface="lo"))
        with pytest.raises(PlaneError, match="uplink lo: it is no Ethernet interface"):
            host.run(loop.open)


def test_an_uplink_that_goes_is_told_and_the_rest_goes_on(
    spaces: tuple[NetworkNamespace, NetworkNamespace],
) -> None:
    host, network = spaces
    join(host, network)
    plane = ProcessPlane(SwitchDefinition(name="outside", type=SwitchType.EXTERNAL, interface="uplink"))
    told: list[str] = []
    gone = threading.Event()

    def hear(text: str) -> None:
        told.append(text)
        gone.set()

    plane.on_trouble = hear
    host.run(plane.open)
    rig = Rig(plane)
    a, b = rig.nic(), rig.nic()
    host.command("ip", "link", "delete", "uplink")
    a.send(a.frame())
    assert b.heard(a) == [a.frame()]
    assert gone.wait(20)
    assert told[0].startswith("switch outside: host: ")
    rig.close()
