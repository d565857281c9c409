"""The switch in C beside what all data planes do: kinds of ports, time, bounds, and peers that lie or die."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.core._hot import Switch
from tests.fakes import frames
from tests.fakes.plane_cases import read_pcap
from tests.fakes.switch_rig import SECOND, A, B, C, SwitchRig, frame, is_quiet, receive, receive_stream, send

IP = {"source": "10.0.0.1", "to": "10.0.0.2"}
IP6 = {"source": "fd00::1", "to": "fd00::2"}


@pytest.fixture
def rig() -> Iterator[SwitchRig]:
    rig = SwitchRig()
    yield rig
    rig.close()


def mac(text: str) -> bytes:
    return frames.mac_bytes(text)


def tcp_frame(size: int, to: str = frames.BROADCAST, source: str = A) -> bytes:
    packet = frames.tcp(bytes(i & 0xFF for i in range(size)), source=IP["source"], to=IP["to"])
    return frames.packet4(packet, frames.TCP, to=to, source=source)


# Streams ----------------------------------------------------------------------------------------------


def test_a_stream_carries_complete_frames_behind_their_lengths(rig: SwitchRig) -> None:
    nic, stream = rig.port(1), rig.stream(2)
    nic.send(frames.partial(tcp_frame(100)))
    nic.send(frames.partial(tcp_frame(5000, to=B), 1400))
    got = receive_stream(stream, 5)
    assert got[0] == tcp_frame(100)
    for segment in got:
        frames.assert_right(segment)
    assert b"".join(segment[54:] for segment in got[1:]) == tcp_frame(5000)[54:]
    rig.switch.set_offloads(2, 15)  # there is no header that could say so
    nic.send(frames.partial(tcp_frame(100)))
    assert receive_stream(stream, 1) == [tcp_frame(100)]


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 17, 18, 19, 200])
def test_frames_of_a_stream_may_come_in_any_pieces(rig: SwitchRig, cut: int) -> None:
    nic, stream = rig.port(1), rig.stream(2)
    wanted = [frame(B, text=bytes([i]) * (i * 37)) for i in range(12)]
    data = b"".join(len(each).to_bytes(4, "big") + each for each in wanted)
    for at in range(0, len(data), cut):
        stream.send(data[at : at + cut])
    assert [receive(nic) for _ in wanted] == wanted


def test_a_stream_that_is_read_late_loses_whole_frames_only(rig: SwitchRig) -> None:
    nic, stream = rig.port(1), rig.stream(2)
    other = rig.port(3)
    for number in range(4000):
        send(nic, frame(A, text=number.to_bytes(2, "big") * 600))
        if number % 10 == 9:  # so that the switch has seen them all
            assert [receive(other) for _ in range(10)]
    lost = rig.dropped(2)["queue_full"]
    got = receive_stream(stream, 4000 - lost)
    numbers = [int.from_bytes(each[14:16], "big") for each in got]
    assert numbers == sorted(set(numbers)) and numbers[0] == 0
    for number, each in zip(numbers, got, strict=True):
        assert each == frame(A, text=number.to_bytes(2, "big") * 600)
    send(nic, frame(A, text=b"after"))
    assert receive_stream(stream, 1) == [frame(A, text=b"after")]


def test_a_patient_switch_holds_a_port_up_rather_than_lose_frames() -> None:
    rig = SwitchRig(patient=True)
    nic, stream = rig.port(1), rig.stream(2)
    there = [frame(A, text=number.to_bytes(2, "big") * 600) for number in range(4000)]
    back = [frame(B, text=number.to_bytes(2, "big") * 600) for number in range(4000)]

    def feed() -> None:
        for each in there:
            send(nic, each)

    def feed_back() -> None:
        stream.sendall(b"".join(len(each).to_bytes(4, "big") + each for each in back))

    for feeder in (feed, feed_back):
        thread = threading.Thread(target=feeder)
        thread.start()
        if feeder is feed:
            assert receive_stream(stream, len(there)) == there
        else:
            assert [receive(nic) for _ in back] == back
        thread.join()
    assert rig.dropped(1) == rig.dropped(2) == {}
    rig.close()


@pytest.mark.parametrize("length", [0, 13, 65535 + 23, 0xFFFFFFFF])
def test_a_stream_that_sends_no_frames_loses_its_port_alone(rig: SwitchRig, length: int) -> None:
    nic, other, stream = rig.port(1), rig.port(2), rig.stream(3)
    good = frame(C)
    stream.send(len(good).to_bytes(4, "big") + good + length.to_bytes(4, "big") + bytes(100))
    assert rig.wait_for(3) == "it sends no frames"
    assert receive(nic) == good
    assert stream.recv(1) == b""
    send(nic, frame(A))
    assert [receive(other), receive(other)] == [good, frame(A)]


# Peers that die ---------------------------------------------------------------------------------------


def test_a_peer_that_is_gone_loses_its_port_and_its_addresses(rig: SwitchRig) -> None:
    a, b, c = rig.port(1), rig.port(2), rig.port(3)
    send(b, frame(B))
    assert receive(a) == receive(c) == frame(B)
    b.close()
    assert rig.wait_for(2) == "its other end is gone"
    assert rig.switch.learned() == []
    send(a, frame(A, to=B))
    assert receive(c) == frame(A, to=B)
    rig.switch.remove_port(2)
    again = rig.port(2)
    send(a, frame(A))
    assert receive(again) == frame(A)


def test_a_peer_that_dies_while_frames_wait_for_it_is_noticed(rig: SwitchRig) -> None:
    a, b, c = rig.port(1), rig.port(2), rig.port(3)
    for _ in range(50):
        send(a, *[frame(A, text=bytes(1400))] * 20)
        for _ in range(20):
            receive(c)
    assert rig.dropped(2)["queue_full"]
    b.close()
    assert rig.wait_for(2).startswith(("its other end is gone", "it cannot be read"))


def test_a_removed_port_is_not_waited_for_though_others_have_its_descriptor(rig: SwitchRig) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    copy = os.dup(ours.fileno())
    rig.switch.add_port(1, "socket", ours.detach())
    a, b = rig.port(2), rig.port(3)
    send(a, frame(A))
    assert receive(b) == frame(A)
    rig.switch.remove_port(1)
    send(theirs, frame(B))
    for _ in range(100):
        send(a, frame(A))
        assert receive(b) == frame(A)
    assert os.read(theirs.fileno(), 2000)[10:] == frame(A)
    assert os.read(copy, 2000)[10:] == frame(B)  # nobody else has
    os.close(copy)
    theirs.close()


def test_every_port_that_is_lost_is_told(rig: SwitchRig) -> None:
    ends = [rig.port(number) for number in range(200)]
    for end in ends:
        end.close()
    assert {number for number in range(200) if rig.wait_for(number)} == set(range(200))


# Time -------------------------------------------------------------------------------------------------


def test_an_address_is_forgotten_300_seconds_after_it_was_seen(rig: SwitchRig) -> None:
    a, b, c = rig.port(1), rig.port(2), rig.port(3)
    send(b, frame(B))
    assert receive(a) == receive(c)
    rig.pass_time(200 * SECOND)
    send(b, frame(B))
    assert receive(a) == receive(c)
    rig.pass_time(300 * SECOND)
    assert rig.switch.learned() == [(0, mac(B), 2)]
    send(a, frame(A, to=B))
    assert receive(b) == frame(A, to=B)
    rig.pass_time(1)
    assert rig.switch.learned() == [(0, mac(A), 1)]
    send(a, frame(A, to=B))
    assert receive(b) == receive(c) == frame(A, to=B)


@pytest.mark.parametrize("limited", [1, 2])
def test_a_limit_lets_pass_what_it_says_as_time_goes_by(rig: SwitchRig, limited: int) -> None:
    rate = 800_000  # bits per second: a frame of 1000 bytes every 10 ms
    rig.pass_time(SECOND)
    ends = {number: rig.port(number, bandwidth=rate if number == limited else 0) for number in (1, 2)}
    other, third = rig.port(3), rig.port(4)
    one = frame(A, text=bytes(986))
    send(ends[1], *[one] * 60)

    def arrived() -> int:
        # Rounds enough for all that may come to be there.
        for _ in range(8):
            send(other, frame(C, to=mac_text(4)))
            receive(third)
            while not is_quiet(third):
                receive(third)
        found = 0
        while not is_quiet(ends[2]):
            if receive(ends[2]) == one:
                found += 1
        return found

    rig.switch.set_port(4, mac=mac(mac_text(4)))
    count = arrived()
    assert 1 <= count <= 2  # 10 ms may come at once
    for turn in range(1, 51):
        rig.pass_time(SECOND // 100)
        count += arrived()
        assert turn <= count <= turn + 3
    rig.switch.set_port(limited)
    for _ in range(60 - count):
        assert receive(ends[2]) == one


def mac_text(number: int) -> str:
    return f"00:15:5d:00:00:{number:02x}"


def test_time_does_not_go_back(rig: SwitchRig) -> None:
    rig.pass_time(5)
    with pytest.raises(ValueError, match="go back"):
        rig.switch.set_time(4)
    with pytest.raises(ValueError, match="the host's"):
        Switch().set_time(5)


# Bounds -----------------------------------------------------------------------------------------------


def test_a_flood_of_addresses_leaves_those_of_others_where_they_are(rig: SwitchRig) -> None:
    flooder, known, other = rig.port(1), rig.port(2, mac=mac(B), mac_spoofing=False), rig.port(3)
    send(known, frame(B))
    send(other, frame(C))
    for _ in range(2):
        receive(flooder)
    assert receive(known) == frame(C) and receive(other) == frame(B)
    for number in range(20_000):
        send(flooder, frame(f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}", to=B, text=b"flood"))
        if number % 50 == 49:
            for _ in range(50):
                receive(known)
    learned = rig.switch.learned()
    assert len(learned) <= 1024 + 2
    assert (0, mac(B), 2) in learned and (0, mac(C), 3) in learned
    send(known, frame(B, to=C))
    assert receive(other) == frame(B, to=C)
    assert is_quiet(other)


def test_what_waits_for_a_port_is_bounded_and_dropped_with_its_vlan(rig: SwitchRig) -> None:
    a, slow, c = rig.port(1, vlan=5), rig.port(2, vlan=5), rig.port(3, vlan=5)
    size = 1014
    for number in range(3000):
        send(a, frame(A, text=number.to_bytes(2, "big") * 500))
        if number % 10 == 9:
            for _ in range(10):
                receive(c)
    full = rig.dropped(2)["queue_full"]
    assert full >= 1500
    taken = rig.switch.statistics(2)["sent_frames"]
    assert (3000 - full - taken) * size <= 512 << 10
    rig.switch.set_port(2, vlan=6)
    rig.switch.set_port(1, vlan=6)
    send(a, frame(A, text=b"six"))
    got = [receive(slow) for _ in range(taken + 1)]
    assert got[-1] == frame(A, text=b"six")


def test_there_are_no_more_than_1024_ports() -> None:
    switch = Switch()
    one = os.eventfd(0)
    for number in range(1024):
        switch.add_port(number, "tap", os.dup(one))
    spare = os.dup(one)
    with pytest.raises(ValueError, match="1024"):
        switch.add_port(2000, "tap", spare)
    with pytest.raises(OSError):
        os.fstat(spare)
    os.close(one)


# What callers may do ----------------------------------------------------------------------------------


def test_a_port_that_cannot_be_added_closes_its_descriptor() -> None:
    switch = Switch()
    a, b = socket.socketpair()
    switch.add_port(1, "stream", a.detach())
    for number, kind, more in (
        (1, "stream", {}),
        (2, "pipe", {}),
        (2, "socket", {"vlan": 4095}),
        (2, "socket", {"tagged": [0]}),
        (2, "socket", {"mac": b"12345"}),
        (2, "socket", {"mac_spoofing": False}),
    ):
        fd = os.dup(b.fileno())
        with pytest.raises(ValueError):
            switch.add_port(number, kind, fd, **more)
        with pytest.raises(OSError):
            os.fstat(fd)
    with open(__file__, "rb") as file, pytest.raises(OSError):  # epoll doesn't wait for files
        switch.add_port(2, "tap", os.dup(file.fileno()))
    with pytest.raises(KeyError):
        switch.statistics(2)
    b.close()


def test_calls_for_a_port_that_is_not_there_say_so() -> None:
    switch = Switch()
    for call in (
        lambda: switch.set_port(9),
        lambda: switch.set_offloads(9, 1),
        lambda: switch.remove_port(9),
        lambda: switch.mirror(9, -1, 0),
        lambda: switch.statistics(9),
    ):
        with pytest.raises(KeyError, match="9"):
            call()


def test_one_thread_runs_the_switch_and_stop_is_not_lost(rig: SwitchRig) -> None:
    a, b = rig.port(1), rig.port(2)
    send(a, frame(A))
    receive(b)  # so it runs
    with pytest.raises(RuntimeError, match="another thread"):
        rig.switch.run()
    other = Switch()
    other.stop()
    assert other.run() == []


def test_ports_may_come_and_go_while_frames_flow(rig: SwitchRig) -> None:
    a, b = rig.port(1), rig.port(2)
    stopped = threading.Event()

    def feed() -> None:
        while not stopped.is_set():
            send(a, frame(A))
            receive(b)

    feeder = threading.Thread(target=feed)
    feeder.start()
    for number in range(500):
        end = rig.port(100 + number % 7)
        rig.switch.set_port(100 + number % 7, vlan=number % 3, bandwidth=number % 2 * 100_000)
        if number % 5 == 0:
            end.close()
        rig.switch.remove_port(100 + number % 7)
    stopped.set()
    feeder.join()
    rig.switch.remove_port(1)
    rig.switch.remove_port(2)
    assert rig.switch.learned() == []


# Frames that lie --------------------------------------------------------------------------------------


def drops_of(rig: SwitchRig, *messages: bytes, **how: object) -> dict[str, int]:
    """What is counted when a port with these settings sends messages, none of which may come out."""
    a, b, c = rig.port(1, **how), rig.port(2), rig.port(3)
    for message in messages:
        a.send(message)
    send(c, frame(C, to=B))
    assert receive(b) == frame(C, to=B)
    send(c, frame(C, to=B))
    assert receive(b) == frame(C, to=B)
    assert is_quiet(b)
    return rig.dropped(1)


def test_messages_that_are_no_frames_are_dropped(rig: SwitchRig) -> None:
    short = [b"x", bytes(9), bytes(10), bytes(23)]
    source = frame("01:15:5d:00:00:01")  # of a group
    lies = [frames.vnet(1, start=100, at=0) + frame(A), frames.vnet(1, 1, 0, 1000, 34, 16) + frame(A)]
    cut = frames.vnet() + frames.tagged(frame(A), 7)[:15]  # in its tag
    assert drops_of(rig, *short, frames.vnet() + source, *lies, cut) == {"malformed": 8}


def test_messages_that_are_too_long_are_dropped(rig: SwitchRig) -> None:
    long = [frames.vnet() + frame(A, text=bytes(1501)), bytes(70_000), frames.partial(tcp_frame(5000, to=B), 1461)]
    assert drops_of(rig, *long) == {"oversized": 3}
    a, b = rig.port(11), rig.port(12)
    biggest = frames.tagged(frame(A, text=bytes(1500)), 7)
    rig.switch.set_port(11, tagged=[7])
    rig.switch.set_port(12, vlan=7)
    send(a, biggest)
    assert receive(b) == frame(A, text=bytes(1500))


def test_drops_are_counted_by_reason(rig: SwitchRig) -> None:
    dhcp = frames.packet4(frames.udp(b"", ports=(67, 68), **IP), frames.UDP, source=A)
    router = frames.ethernet(
        frames.ipv6(frames.icmpv6(134, bytes(12), **IP6), frames.ICMPV6, **IP6), frames.IPV6, source=A
    )
    spoofed, tagged, reserved = frame(B), frames.tagged(frame(A), 9), frame(A, to="01:80:c2:00:00:00")
    messages = [frames.vnet() + each for each in (dhcp, router, spoofed, tagged, reserved)]
    counted = drops_of(rig, *messages, mac=mac(A), mac_spoofing=False, dhcp_guard=True, router_guard=True)
    assert counted == {"dhcp_guard": 1, "router_guard": 1, "mac_spoofing": 1, "vlan": 1, "reserved": 1}


def test_frames_for_an_unplugged_nic_are_counted_and_not_flooded(rig: SwitchRig) -> None:
    a, b, c = rig.port(1), rig.port(2, link=False, mac=mac(B)), rig.port(3)
    send(a, frame(A, to=B), frame(A))
    assert receive(c) == frame(A)
    rig.switch.set_port(2)
    send(a, frame(A, text=b"up"))
    assert receive(b) == frame(A, text=b"up")
    assert rig.dropped(2) == {"link_down": 1}


def test_a_checksum_is_not_written_where_a_guard_has_looked(rig: SwitchRig) -> None:
    # "Completed", the checksum of nothing at all is what makes 67 of the source port.
    packet = bytearray(frames.udp(b"", ports=(0, 68), **IP))
    frame_ = bytearray(frames.packet4(bytes(packet), frames.UDP, source=A))
    field = 34
    frame_[field : field + 2] = b"\0\0"
    rest = frames.checksum(bytes(frame_[field:])) ^ 0xFFFF
    wanted = 67 ^ 0xFFFF
    # The last two bytes make up the difference.
    frame_ += struct.pack(">H", (wanted - rest) % 0xFFFF)
    message = frames.vnet(1, start=field, at=0) + bytes(frame_)
    a, b = rig.port(1), rig.port(2)
    a.send(message)
    assert receive(b)[34:36] == b"\x00\x43"
    rig.switch.remove_port(1)
    rig.switch.remove_port(2)
    assert drops_of(rig, message, dhcp_guard=True) == {"dhcp_guard": 1}


def test_a_guard_drops_what_it_cannot_see_through(rig: SwitchRig) -> None:
    chain = frames.extension(frames.UDP, frames.udp(b"", ports=(547, 546), **IP6))
    for _ in range(40):
        chain = frames.extension(60, chain)
    deep = frames.ethernet(frames.ipv6(chain, 60, **IP6), frames.IPV6, source=A)
    cut = frames.ethernet(frames.ipv6(b"", 60, **IP6), frames.IPV6, source=A)
    tiny = frames.packet4(b"1234", frames.UDP, source=A)
    assert drops_of(rig, *(frames.vnet() + each for each in (deep, cut, tiny)), dhcp_guard=True) == {"dhcp_guard": 3}


def test_what_a_nic_calls_checked_is_not_called_so_to_another(rig: SwitchRig) -> None:
    a, b = rig.port(1), rig.port(2)
    rig.switch.set_offloads(2, 15)
    a.send(frames.vnet(2) + frame(A))
    assert b.recv(2000) == frames.vnet(0) + frame(A)


def test_what_is_left_in_a_header_does_not_reach_others(rig: SwitchRig) -> None:
    a, b = rig.port(1), rig.port(2)
    rig.switch.set_offloads(2, 15)
    a.send(frames.vnet(0, 0, 0x1111, 0x2222, 0x3333, 0x4444) + frame(A))
    assert b.recv(2000) == frames.vnet() + frame(A)


def test_what_no_nic_sends_in_one_piece_is_dropped(rig: SwitchRig) -> None:
    packet = frames.udp(bytes(3000), ports=(1, 2), source=IP["source"], to=IP["to"])
    datagrams = frames.partial(frames.packet4(packet, frames.UDP, source=A), 1000)
    to_all = frames.partial(tcp_frame(3000), 1000)
    assert drops_of(rig, datagrams, to_all) == {"malformed": 2}


def test_segments_for_an_unknown_address_are_cut_only_for_who_may_have_it(rig: SwitchRig) -> None:
    a, knows, may = rig.port(1), rig.port(2, mac=mac(B), mac_spoofing=False), rig.port(3)
    a.send(frames.partial(tcp_frame(3000, to=C), 1000))
    assert b"".join(receive(may)[54:] for _ in range(3)) == tcp_frame(3000)[54:]
    send(a, frame(A, to=C), frame(A))
    assert [receive(knows) for _ in range(2)] == [frame(A, to=C), frame(A)]


def test_a_nic_whose_frames_are_much_work_waits_its_turn() -> None:
    switch = Switch()
    (heavy, port), (sink, other) = (socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    switch.add_port(1, "socket", port.detach())
    switch.add_port(2, "socket", other.detach(), mac=mac(B))
    message = frames.partial(tcp_frame(12_000, to=B), 48)  # 250 segments

    def taken_in_a_turn() -> int:
        for _ in range(12):
            heavy.send(message)
        before = switch.statistics(1)["received_frames"]
        switch.stop()
        assert switch.run() == []  # which carries what is there already
        taken: int = switch.statistics(1)["received_frames"] - before
        return taken

    heavy.setblocking(False)
    assert taken_in_a_turn() == 12
    assert taken_in_a_turn() == 9  # after 2048 messages
    heavy.close()
    sink.close()


@pytest.mark.parametrize(("from_tag", "to_tag"), [(None, 7), (7, None), (7, 7), (None, None)])
def test_a_partial_checksum_is_found_where_the_tag_has_moved_it(
    rig: SwitchRig, from_tag: int | None, to_tag: int | None
) -> None:
    ways: dict[int | None, dict[str, Any]] = {None: {"vlan": 7}, 7: {"tagged": [7]}}
    a, b = rig.port(1, **ways[from_tag]), rig.port(2, **ways[to_tag], mac=mac(B))
    rig.switch.set_offloads(2, 15)
    plain = tcp_frame(100, to=B)
    sent = frames.partial(frames.tagged(plain, 7) if from_tag else plain)
    wanted = bytearray(frames.partial(frames.tagged(plain, 7) if to_tag else plain))
    a.send(sent)
    wanted[2:4] = bytes(2)  # the size of headers means something to segmentation only
    assert b.recv(2000) == bytes(wanted)


def test_a_flooded_frame_is_complete_for_all(rig: SwitchRig) -> None:
    a, takes, takes_not = rig.port(1), rig.port(2), rig.port(3)
    rig.switch.set_offloads(2, 15)
    a.send(frames.partial(tcp_frame(100)))
    assert receive(takes_not) == tcp_frame(100)
    assert receive(takes) == tcp_frame(100)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_messages_leave_the_switch_at_work(data: st.DataObject) -> None:
    rig = SwitchRig()
    try:
        ends = {
            1: rig.port(1, dhcp_guard=True, router_guard=True),
            2: rig.port(2, tagged=[10, 20], vlan=5),
            3: rig.port(3, vlan=10),
        }
        stream = rig.stream(4)
        good = [tcp_frame(100), frames.tagged(tcp_frame(200), 10), frame(A), frame(B, to=A)]
        for _ in range(data.draw(st.integers(1, 12))):
            message = bytearray(data.draw(st.sampled_from([*map(frames.partial, good[:2]), frames.vnet() + good[2]])))
            for _ in range(data.draw(st.integers(0, 4))):
                message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
            message = message[: data.draw(st.integers(1, len(message)))]
            ends[data.draw(st.sampled_from((1, 2, 3)))].send(bytes(message))
        stream.send(data.draw(st.binary(max_size=40)))
        probe, answer = rig.port(8, vlan=77), rig.port(9, vlan=77)
        send(probe, frame(A))
        assert receive(answer) == frame(A)
        for number in (1, 2, 3):
            counted = rig.switch.statistics(number)
            assert sum(counted["dropped"].values()) <= 12 * 3 + counted["received_frames"]
    finally:
        rig.close()


# Mirrors ----------------------------------------------------------------------------------------------


def mirror_to(rig: SwitchRig, number: int, path: Path, limit: int = 1 << 20) -> None:
    rig.switch.mirror(number, os.open(path, os.O_WRONLY | os.O_CREAT), limit)


def test_a_mirror_has_what_was_dropped_and_tags_as_on_the_link(rig: SwitchRig, tmp_path: Path) -> None:
    a, b = rig.port(1, tagged=[10]), rig.port(2, vlan=10)
    mirror_to(rig, 1, tmp_path / "1")
    mirror_to(rig, 2, tmp_path / "2")
    tagged = [frames.tagged(frame(A), vlan) for vlan in (10, 11, 0x2000)]
    double = frames.tagged(frames.tagged(frame(A), 9, frames.SERVICE_VLAN), 10)
    send(a, *tagged, double, frames.tagged(frame(A, text=b"end"), 10))
    while receive(b) != frame(A, text=b"end"):
        pass
    send(b, frame(B))
    while receive(a) != frames.tagged(frame(B), 10):
        pass
    for number in (1, 2):
        rig.switch.mirror(number, -1, 0)
    assert read_pcap(tmp_path / "1") == [
        *tagged,
        double,
        frames.tagged(frame(A, text=b"end"), 10),
        frames.tagged(frame(B), 10),
    ]
    assert read_pcap(tmp_path / "2") == [frame(A), frame(A, text=b"end"), frame(B)]


def test_a_mirror_ends_when_its_file_is_full_and_frames_go_on(rig: SwitchRig, tmp_path: Path) -> None:
    a, b = rig.port(1), rig.port(2)
    mirror_to(rig, 1, tmp_path / "full", 500)
    for _ in range(20):
        send(a, frame(A, text=bytes(100)))
        receive(b)
    assert rig.wait_for(1) == "mirror: the file is as large as it may be"
    assert read_pcap(tmp_path / "full") == [frame(A, text=bytes(100))] * 3


def test_a_mirror_ends_when_its_file_cannot_be_written_and_frames_go_on(rig: SwitchRig) -> None:
    a, b = rig.port(1), rig.port(2)
    rig.switch.mirror(2, os.open("/dev/full", os.O_WRONLY), 1 << 20)
    for _ in range(20):
        send(a, frame(A, text=bytes(100)))
        receive(b)
    assert rig.wait_for(2) == "mirror: the file cannot be written: No space left on device"
