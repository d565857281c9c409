"""What every data plane does, through the descriptors of its ports. A test class of a plane inherits these."""

from __future__ import annotations

import ipaddress
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.network.plane import DataPlane, Learned, PlaneError
from devices.network.port import OFFLOAD_CHECKSUM, OFFLOAD_TSO4, OFFLOAD_TSO6
from tests.fakes import frames
from tests.fakes.plane_rig import Nic, Rig, mac_of

A4, B4, A6, B6 = "10.0.0.1", "10.0.0.2", "fe80::1", "fe80::2"
ALL_NODES = "33:33:00:00:00:01"


def udp4(ports: tuple[int, int], nic: Nic, text: bytes = b"x" * 300) -> bytes:
    packet = frames.udp(text, source=A4, to=B4, ports=ports)
    return frames.ethernet(frames.ipv4(packet, frames.UDP, source=A4, to=B4), frames.IPV4, source=nic.mac)


def udp6(ports: tuple[int, int], nic: Nic, before: int = 0) -> bytes:
    packet = frames.udp(b"x" * 300, source=A6, to=B6, ports=ports)
    kind = frames.UDP
    for _ in range(before):
        packet, kind = frames.extension(kind, packet), 60
    return frames.ethernet(frames.ipv6(packet, kind, source=A6, to=B6), frames.IPV6, to=ALL_NODES, source=nic.mac)


def icmp6(kind: int, nic: Nic, before: int = 0) -> bytes:
    packet, following = frames.icmpv6(kind, bytes(40), source=A6, to="ff02::1"), frames.ICMPV6
    for _ in range(before):
        packet, following = frames.extension(following, packet), 60
    ip = frames.ipv6(packet, following, source=A6, to="ff02::1")
    return frames.ethernet(ip, frames.IPV6, to=ALL_NODES, source=nic.mac)


def arp(nic: Nic, sender: str) -> bytes:
    address = ipaddress.ip_address(A4).packed
    body = struct.pack(">HHBBH", 1, 0x800, 6, 4, 2) + frames.mac_bytes(sender) + address + bytes(6) + address
    return frames.ethernet(body, frames.ARP, source=nic.mac)


def tcp(nic: Nic, to: str, size: int, six: bool = False) -> bytes:
    data = bytes(i * 7 & 0xFF for i in range(size))
    if six:
        packet = frames.tcp(data, source=A6, to=B6, flags=frames.ACK | frames.PSH)
        return frames.ethernet(frames.ipv6(packet, frames.TCP, source=A6, to=B6), frames.IPV6, to=to, source=nic.mac)
    packet = frames.tcp(data, source=A4, to=B4, flags=frames.ACK | frames.PSH)
    return frames.ethernet(frames.ipv4(packet, frames.TCP, source=A4, to=B4), frames.IPV4, to=to, source=nic.mac)


class PlaneCases:
    """A subclass makes a plane for a private switch with an MTU of 1500."""

    def make_plane(self) -> DataPlane:
        raise NotImplementedError

    @pytest.fixture
    def rig(self) -> Iterator[Rig]:
        plane = self.make_plane()
        plane.open()
        rig = Rig(plane)
        yield rig
        rig.close()

    # Where frames go ------------------------------------------------------------------------------------

    def test_a_broadcast_reaches_all_others_and_not_its_sender(self, rig: Rig) -> None:
        a, b, c = rig.nic(), rig.nic(), rig.nic()
        frame = a.frame()
        a.send(frame)
        assert b.heard(c) == [frame]
        assert c.heard(b) == [frame]
        assert a.heard(b) == []

    def test_a_frame_for_a_nic_reaches_it_alone(self, rig: Rig) -> None:
        a, b, c = rig.nic(), rig.nic(), rig.nic()
        b.send(b.frame())
        frame = a.frame(to=b.mac, text=b"for b")
        assert a.heard(c) == [b.frame()]
        a.send(frame)
        assert c.heard(b) == [b.frame()]
        assert b.heard(c) == [frame]

    def test_an_address_behind_a_port_is_learned_and_moves(self, rig: Rig) -> None:
        a, b, c = rig.nic(mac_spoofing=True), rig.nic(mac_spoofing=True), rig.nic()
        guest = "00:15:5d:00:01:01"
        b.send(b.frame(source=guest))
        assert a.heard(c) == [b.frame(source=guest)]
        assert c.heard(a) == [b.frame(source=guest)]
        for nic, other in ((b, a), (a, b)):
            if nic is a:
                a.send(a.frame(source=guest, text=b"moved"))
                assert b.heard(c)
                assert c.heard(b)
            assert Learned(0, guest, nic.number) in rig.plane.learned()
            frame = c.frame(to=guest, text=b"for the guest")
            c.send(frame)
            assert nic.heard(c) == [frame]
            assert other.heard(c) == []

    def test_frames_for_an_unknown_address_reach_all_of_the_vlan(self, rig: Rig) -> None:
        a, b, c = rig.access(10), rig.access(10, mac_spoofing=True), rig.access(20, mac_spoofing=True)
        frame = a.frame(to="00:15:5d:00:09:09")
        a.send(frame)
        assert b.heard(a) == [frame]
        d = rig.access(20)
        assert c.heard(d) == []

    def test_addresses_reserved_for_links_are_not_forwarded(self, rig: Rig) -> None:
        a, b, c = rig.nic(), rig.nic(), rig.nic()
        for last in (0x00, 0x01, 0x03, 0x0E, 0x0F):
            a.send(a.frame(to=f"01:80:c2:00:00:{last:02x}"))
        other = a.frame(to="01:80:c2:00:00:10")
        a.send(other)
        assert b.heard(c) == [other]

    # VLANs ----------------------------------------------------------------------------------------------

    def test_access_ports_reach_their_own_vlan_only(self, rig: Rig) -> None:
        a, b, c, d, e = rig.access(10), rig.access(10), rig.access(20), rig.access(20), rig.nic()
        frame, direct = a.frame(), a.frame(to=c.mac, text=b"across")
        a.send(frame)
        a.send(direct)
        assert b.heard(a)[0] == frame
        assert c.heard(d) == []
        f = rig.nic()
        assert e.heard(f) == []

    def test_the_same_address_in_two_vlans_is_two_nics(self, rig: Rig) -> None:
        mac = mac_of(0x99)
        a, b = rig.access(10), rig.access(20)
        ten, twenty = rig.access(10, mac=mac, mac_spoofing=True), rig.access(20, mac=mac, mac_spoofing=True)
        ten.send(ten.frame())
        twenty.send(twenty.frame())
        assert a.heard(ten) == [ten.frame()]
        assert b.heard(twenty) == [twenty.frame()]
        frame = b.frame(to=mac)
        b.send(frame)
        assert twenty.heard(b) == [frame]
        assert ten.heard(a) == []

    def test_frames_with_a_tag_from_an_access_port_are_dropped(self, rig: Rig) -> None:
        a, b, c, d = rig.access(10), rig.access(10), rig.access(20), rig.access(20)
        for vlan in (10, 20):
            a.send(frames.tagged(a.frame(), vlan))
        a.send(frames.tagged(frames.tagged(a.frame(), 20), 10))
        assert b.heard(a) == []
        assert c.heard(d) == []

    def test_a_trunk_has_tags_on_its_link_and_only_for_what_it_carries(self, rig: Rig) -> None:
        trunk = rig.trunk(10, 20)
        ten, twenty, thirty, none = rig.access(10), rig.access(20), rig.access(30), rig.nic()
        for nic in (ten, twenty, thirty, none):
            nic.send(nic.frame())
        assert trunk.heard(ten, tag=10) == [
            frames.tagged(ten.frame(), 10),
            frames.tagged(twenty.frame(), 20),
            none.frame(),
        ]
        for vlan in (10, 20, 30):
            trunk.send(frames.tagged(trunk.frame(text=b"%d" % vlan), vlan))
        trunk.send(trunk.frame(text=b"none"))
        assert ten.heard(rig.access(10)) == [trunk.frame(text=b"10")]
        assert twenty.heard(rig.access(20)) == [trunk.frame(text=b"20")]
        assert thirty.heard(rig.access(30)) == []
        assert none.heard(rig.nic()) == [trunk.frame(text=b"none")]

    def test_a_trunk_has_its_native_vlan_without_tags(self, rig: Rig) -> None:
        trunk, five, none = rig.trunk(10, native=5), rig.access(5), rig.nic()
        five.send(five.frame())
        assert trunk.heard(five) == [five.frame()]
        trunk.send(trunk.frame())
        assert five.heard(rig.access(5)) == [trunk.frame()]
        assert none.heard(rig.nic()) == []

    def test_a_frame_keeps_its_tag_from_trunk_to_trunk(self, rig: Rig) -> None:
        a, b = rig.trunk(10, 20), rig.trunk(10, 30)
        priority = 5 << 13
        frame = a.frame(to=b.mac, text=bytes(46))
        for vlan in (10, 20):
            a.send(frames.tagged(frame, vlan | priority))
        assert b.heard(rig.access(10), tag=10) == [frames.tagged(frame, 10 | priority)]

    def test_a_second_tag_does_not_lead_to_another_vlan(self, rig: Rig) -> None:
        a, b, twenty = rig.trunk(10), rig.trunk(20, native=10), rig.access(20)
        a.send(frames.tagged(frames.tagged(a.frame(), 20), 10))
        assert b.heard(rig.access(10)) == []
        assert twenty.heard(rig.access(20)) == []

    def test_a_change_of_vlan_holds_from_when_it_returns(self, rig: Rig) -> None:
        a, ten, twenty = rig.access(10), rig.access(10), rig.access(20)
        a.send(a.frame(text=b"1"))
        assert ten.heard(rig.access(10)) == [a.frame(text=b"1")]
        a.change(vlan=20)
        a.send(a.frame(text=b"2"))
        assert twenty.heard(a) == [a.frame(text=b"2")]
        assert ten.heard(rig.access(10)) == []

    # Guards ---------------------------------------------------------------------------------------------

    def test_frames_with_a_source_that_is_not_the_nics_are_dropped(self, rig: Rig) -> None:
        a, b, c = rig.nic(), rig.nic(), rig.nic()
        for source in (b.mac, "00:15:5d:00:07:07"):
            a.send(a.frame(source=source))
        assert b.heard(c) == []
        assert c.heard(b) == []
        a.change(mac_spoofing=True)
        a.send(a.frame(source="00:15:5d:00:07:07"))
        assert b.heard(c) == [a.frame(source="00:15:5d:00:07:07")]

    def test_arp_that_names_another_sender_is_dropped(self, rig: Rig) -> None:
        a, b, c = rig.nic(), rig.nic(), rig.nic()
        a.send(arp(a, b.mac))
        a.send(arp(a, a.mac))
        assert b.heard(c) == [arp(a, a.mac)]

    def test_a_nic_does_not_take_over_the_address_of_another(self, rig: Rig) -> None:
        a, b, c = rig.nic(), rig.nic(), rig.nic()
        b.send(b.frame())
        assert c.heard(a) == [b.frame()]
        a.send(a.frame(source=b.mac))
        assert b.heard(a) == []
        c.send(c.frame(to=b.mac))
        assert b.heard(c) == [c.frame(to=b.mac)]
        assert a.heard(c) == [b.frame()]

    def test_dhcp_guard_drops_what_servers_send(self, rig: Rig) -> None:
        guarded, free, listener = rig.nic(dhcp_guard=True), rig.nic(), rig.nic()
        asks = [udp4((68, 67), guarded), udp6((546, 547), guarded)]
        for frame in (udp4((67, 68), guarded), udp6((547, 546), guarded), udp6((547, 546), guarded, before=2), *asks):
            guarded.send(frame)
        assert listener.heard(guarded) == asks
        for frame in (answers := [udp4((67, 68), free), udp6((547, 546), free)]):
            free.send(frame)
        assert listener.heard(free) == answers

    def test_router_guard_drops_what_routers_send(self, rig: Rig) -> None:
        guarded, free, listener = rig.nic(router_guard=True), rig.nic(), rig.nic()
        redirect = frames.ipv4(bytes((5, 1, 0, 0)) + bytes(32), frames.ICMPV4, source=A4, to=B4)
        echo = frames.ipv4(bytes((8, 0, 0, 0)) + bytes(32), frames.ICMPV4, source=A4, to=B4)
        good = [icmp6(135, guarded), icmp6(136, guarded), frames.ethernet(echo, frames.IPV4, source=guarded.mac)]
        bad = [icmp6(134, guarded), icmp6(137, guarded), icmp6(134, guarded, before=3)]
        bad.append(frames.ethernet(redirect, frames.IPV4, source=guarded.mac))
        for frame in (*bad, *good):
            guarded.send(frame)
        assert listener.heard(guarded) == good
        free.send(icmp6(134, free))
        assert listener.heard(free) == [icmp6(134, free)]

    def test_guards_look_behind_the_tags_of_a_trunk(self, rig: Rig) -> None:
        trunk, ten = rig.trunk(10, dhcp_guard=True, router_guard=True), rig.access(10)
        for frame in (udp4((67, 68), trunk), udp6((547, 546), trunk), icmp6(134, trunk)):
            trunk.send(frames.tagged(frame, 10))
        trunk.send(frames.tagged(udp4((1, 2), trunk), 10))
        assert ten.heard(rig.access(10)) == [udp4((1, 2), trunk)]

    # Links, limits --------------------------------------------------------------------------------------

    def test_nothing_passes_while_the_cable_is_unplugged(self, rig: Rig) -> None:
        a, b, c = rig.nic(), rig.nic(), rig.nic()
        a.change(link=False)
        try:
            a.send(a.frame())
        except OSError:  # some ports say so
            pass
        b.send(b.frame(text=b"down"))
        assert b.heard(c) == []
        assert c.heard(b) == [b.frame(text=b"down")]
        a.change(link=True)
        b.send(b.frame(text=b"up"))
        assert a.heard(c) == [b.frame(text=b"up")]
        a.send(a.frame(text=b"up"))
        assert b.heard(c) == [a.frame(text=b"up")]

    @pytest.mark.parametrize("way", ["received", "sent"])
    def test_bandwidth_is_limited_and_not_far_below_the_limit(self, rig: Rig, way: str) -> None:
        limit = 8_000_000
        a = rig.nic(bandwidth=limit if way == "received" else None)
        b = rig.nic(bandwidth=limit if way == "sent" else None)
        frame = udp4((1, 2), a, bytes(1400))
        frame = frames.mac_bytes(b.mac) + frame[6:]
        started = arrived = 0.0
        size = in_flight = 0
        # At first what may come at once, then for as long as it takes to measure.
        while not started or arrived - started < 0.5:
            while in_flight < 64:
                a.send(frame)
                in_flight += 1
            assert b.receive()[1] == frame
            arrived = time.monotonic()
            in_flight -= 1
            size += len(frame)
            if not started and size > 60_000:
                started, size = arrived, 0
        rate = size * 8 / (arrived - started)
        assert 0.7 * limit < rate < 1.3 * limit

    # What NICs take -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("six", [False, True])
    def test_a_nic_gets_complete_frames_until_it_takes_others(self, rig: Rig, six: bool) -> None:
        a, b, c = rig.nic(), rig.nic(), rig.nic()
        b.send(b.frame())
        assert a.heard(c) == [b.frame()]
        frame = tcp(a, b.mac, 1000, six)
        message = frames.partial(frame)
        a.send(message[10:], message[:10])
        header, got = b.receive()
        assert got == frame and not header[0] & 1
        rig.plane.set_offloads(b.number, OFFLOAD_CHECKSUM)
        a.send(message[10:], message[:10])
        header, got = b.receive()
        if header[0] & 1:  # it may be as it was sent, and may be complete
            assert (header[6:], got) == (message[6:10], message[10:])
        else:
            assert got == frame

    @pytest.mark.parametrize("six", [False, True])
    def test_a_nic_gets_segments_cut_until_it_takes_them_whole(self, rig: Rig, six: bool) -> None:
        a, b, c = rig.nic(), rig.nic(), rig.nic()
        b.send(b.frame())
        assert a.heard(c) == [b.frame()]
        frame = tcp(a, b.mac, 20_000, six)
        message = frames.partial(frame, 1400)
        rig.plane.set_offloads(b.number, OFFLOAD_CHECKSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6)
        a.send(message[10:], message[:10])
        header, got = b.receive()
        assert got == message[10:] and header[:2] == message[:2] and header[4:] == message[4:10]
        rig.plane.set_offloads(b.number, 0)
        a.send(message[10:], message[:10])
        payload = frames.parts(frame).payload
        data = b""
        while len(data) < 20_000:
            header, got = b.receive()
            assert not header[0] & 1 and not header[1]
            frames.assert_right(got)
            assert len(got) <= payload + 1400
            data += got[payload:]
        assert data == frame[payload:]

    def test_segments_to_an_access_port_lose_the_tag_that_a_trunk_put_there(self, rig: Rig) -> None:
        trunk, ten = rig.trunk(10), rig.access(10)
        ten.send(ten.frame())
        assert trunk.heard(rig.access(10), tag=10) == [frames.tagged(ten.frame(), 10)]
        frame = tcp(trunk, ten.mac, 4000)
        message = frames.partial(frames.tagged(frame, 10), 1400)
        trunk.send(message[10:], message[:10])
        got = [ten.receive()[1] for _ in range(3)]
        for segment in got:
            frames.assert_right(segment)
        assert b"".join(segment[54:] for segment in got) == frame[54:]
        message = frames.partial(tcp(ten, trunk.mac, 3000), 1400)
        ten.send(message[10:], message[:10])
        for _ in range(3):
            segment = trunk.receive()[1]
            assert segment[12:16] == b"\x81\x00\x00\x0a"
            frames.assert_right(segment)

    # What there is to see -------------------------------------------------------------------------------

    def test_statistics_count_both_ways(self, rig: Rig) -> None:
        a, b, c = rig.nic(), rig.nic(), rig.nic()
        before = [rig.plane.statistics(nic.number) for nic in (a, b)]
        for _ in range(5):
            a.send(a.frame(to=b.mac, text=bytes(100)))
        b.heard(c)
        after = [rig.plane.statistics(nic.number) for nic in (a, b)]
        assert after[0].received_frames - before[0].received_frames >= 5
        assert after[0].received_bytes - before[0].received_bytes >= 5 * 114
        assert after[1].sent_frames - before[1].sent_frames >= 5
        assert after[1].sent_bytes - before[1].sent_bytes >= 5 * 114

    def test_statistics_count_what_a_guard_drops(self, rig: Rig) -> None:
        a, b, c = rig.nic(dhcp_guard=True), rig.nic(), rig.nic()
        for _ in range(3):
            a.send(udp4((67, 68), a))
        assert b.heard(c) == []
        assert sum(rig.plane.statistics(a.number).dropped.values()) >= 3

    def test_a_mirror_has_what_a_port_sends_and_is_sent_as_on_a_wire(self, rig: Rig, tmp_path: Path) -> None:
        a, b, c = rig.nic(), rig.nic(), rig.nic()
        b.send(b.frame())
        assert a.heard(c) == [b.frame()]
        path = tmp_path / "a.pcap"
        rig.plane.mirror(a.number, str(path))
        with pytest.raises(PlaneError):
            rig.plane.mirror(b.number, str(path))
        sent = frames.partial(tcp(a, b.mac, 3000), 1400)
        a.send(sent[10:], sent[:10])
        got = [b.receive()[1] for _ in range(3)]
        b.send(b.frame(to=a.mac, text=b"back"))
        c.send(c.frame(to=b.mac, text=b"not for a"))
        assert a.heard(c) == [b.frame(to=a.mac, text=b"back")]
        rig.plane.mirror(a.number, None)
        read = read_pcap(path)
        for frame in (*got, b.frame(to=a.mac, text=b"back")):
            assert read.count(frame) == 1
        assert c.frame(to=b.mac, text=b"not for a") not in read
        done = subprocess.run(["tcpdump", "-nr", str(path)], capture_output=True, text=True, check=True)
        assert done.stdout.count("Flags") == 3

    # Ports that go --------------------------------------------------------------------------------------

    def test_a_port_that_goes_leaves_the_others_alone(self, rig: Rig) -> None:
        a, b, c = rig.nic(), rig.nic(), rig.nic()
        c.send(c.frame())
        assert a.heard(b) == [c.frame()]
        rig.plane.remove_port(c.number)
        assert Learned(0, c.mac, c.number) not in rig.plane.learned()
        a.send(a.frame(to=c.mac))
        a.send(a.frame())
        assert a.frame() in b.heard(a)

    def test_a_nic_that_takes_nothing_holds_up_nobody(self, rig: Rig) -> None:
        a, b, c = rig.nic(), rig.nic(), rig.nic()
        for turn in range(3000):  # of which b takes none
            a.send(a.frame(text=turn.to_bytes(2, "big") + bytes(1000)))
            if turn % 20 == 19:
                got = [c.receive()[1][14:16] for _ in range(20)]
                assert got[-1] == turn.to_bytes(2, "big")
        assert os.read(b.fd, 65600)[24:26] == bytes(2)


def read_pcap(path: Path) -> list[bytes]:
    """The frames in a pcap file of any resolution."""
    data = path.read_bytes()
    magic, _, _, _, _, _, link = struct.unpack_from("<IHHiIII", data)
    assert magic in (0xA1B23C4D, 0xA1B2C3D4) and link == 1
    result, at = [], 24
    while at < len(data):
        _, _, size, full = struct.unpack_from("<IIII", data, at)
        assert size == full
        result.append(data[at + 16 : at + 16 + size])
        at += 16 + size
    assert at == len(data)
    return result
