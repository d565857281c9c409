"""The NIC's fast path from the network: frames from its port to a guest's receive buffer, over all of its channels."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pyvmm.core._hot import NetDevice, RingError
from pyvmm.core.memory import PAGE_SIZE, GuestMemory
from tests.fakes import frames
from tests.fakes.net_rig import (
    ALL_MULTICAST,
    BROADCAST,
    BROADCASTS,
    BUFFER_ID,
    DIRECTED,
    HASH,
    MAC,
    MULTICAST,
    OTHER,
    PROMISCUOUS,
    SECTION,
    Rig,
    counted,
    frame_of,
    readable,
    small_rig,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GROUP = bytes.fromhex("333300000001")


@pytest.fixture(name="rig")
def make_rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_frames_from_the_port_come_in_one_packet_and_their_sections_are_used_again(rig: Rig) -> None:
    for round_ in range(50):
        expected = [frame_of(60 + 7 * at, round_) for at in range(10)]
        for frame in expected:
            rig.arrive(frame)
        rig.queue.run()
        received = rig.received()
        assert [entry.data for entry in received] == expected
        assert all(entry.ppis == {} for entry in received)
        assert len({entry.transaction for entry in received}) == 1
    assert counted(rig) == {"received_frames": 500, "received_bytes": 50 * sum(map(len, expected))}


def test_nothing_is_read_while_the_guest_holds_all_sections() -> None:
    rig = small_rig()
    for at in range(6):
        rig.arrive(frame_of(100, at))
    rig.queue.run()
    first = rig.received(complete=False)
    assert [entry.data for entry in first] == [frame_of(100, at) for at in range(4)]
    rig.give_back(first[0].transaction)
    rig.queue.run()
    assert [entry.data for entry in rig.received()] == [frame_of(100, at) for at in range(4, 6)]
    rig.close()


def test_sections_that_come_back_by_another_channel_wake_the_one_that_reads() -> None:
    rig = Rig(queues=2, receive_pages=range(512, 521))
    rig.queues[1].run()
    rig.device.set_rss(bytes(40), [1], 0x100)
    for at in range(6):
        rig.arrive(frames.packet4(bytes((at,)), frames.UDP))
    rig.queue.run()
    assert len(rig.received(queue=1)) == 4
    assert not readable(rig.queue.doorbell)
    rig.queues[1].run()
    assert readable(rig.queue.doorbell)
    rig.queue.run()
    assert len(rig.received(queue=1)) == 2
    rig.close()


def test_the_event_tells_of_frames_that_wait(rig: Rig) -> None:
    rig.queue.run()
    assert not readable(rig.queue.engine.event)
    rig.arrive(frame_of(60))
    assert readable(rig.queue.engine.event)
    rig.queue.run()
    assert not readable(rig.queue.engine.event)


@pytest.mark.parametrize(
    ("packet_filter", "passes"),
    [
        (DIRECTED, {"own"}),
        (MULTICAST, {"group"}),
        (ALL_MULTICAST, {"group", "other group"}),
        (BROADCASTS, {"all"}),
        (DIRECTED | BROADCASTS | MULTICAST, {"own", "all", "group"}),
        (PROMISCUOUS, {"own", "other", "all", "group", "other group"}),
    ],
)
def test_only_what_the_guest_asks_for_passes(rig: Rig, packet_filter: int, passes: set[str]) -> None:
    rig.device.set_filter(packet_filter, MAC, (GROUP,))
    addresses = {"own": MAC, "other": OTHER, "all": BROADCAST, "group": GROUP, "other group": GROUP[:5] + b"\2"}
    for address in addresses.values():
        rig.arrive(frame_of(60, to=address))
    rig.queue.run()
    assert {name for name, to in addresses.items() if to in [e.data[:6] for e in rig.received()]} <= passes
    assert rig.device.statistics()["received_frames"] == len(passes)
    assert rig.device.statistics()["received_filtered"] == 5 - len(passes)


def test_what_came_while_nothing_was_received_never_comes(rig: Rig) -> None:
    device = rig.device
    switches: list[tuple[Callable[[], None], Callable[[], None]]] = [
        (lambda: device.set_link(False), lambda: device.set_link(True)),
        (lambda: device.set_filter(0, MAC), lambda: device.set_filter(PROMISCUOUS, MAC)),
    ]
    for off, on in switches:
        off()
        rig.arrive(frame_of(60, 1))
        rig.queue.run()
        assert rig.received() == []
        on()
        rig.arrive(frame_of(60, 2))
        rig.queue.run()
        assert [entry.data for entry in rig.received()] == [frame_of(60, 2)]
        rig.queue.run()


def test_frames_that_are_none_are_dropped(rig: Rig) -> None:
    rig.port.send(b"short")
    rig.arrive(b"x" * 13)
    rig.arrive(frame_of(1515))
    rig.arrive(frame_of(60))
    rig.queue.run()
    assert len(rig.received()) == 1
    assert {name: value for name, value in counted(rig).items() if "received_" in name} == {
        "received_frames": 1,
        "received_bytes": 60,
        "received_runts": 2,
        "received_oversized": 1,
    }


def test_a_port_whose_other_end_is_gone_is_left_alone(rig: Rig) -> None:
    rig.port.close()
    assert rig.queue.run() == (0, [])
    assert rig.queue.run() == (0, [])
    assert counted(rig) == {}


def test_a_receive_buffer_of_scattered_pages_that_begins_inside_one_works() -> None:
    rig = Rig(receive_pages=[*range(600, 660, 2), *range(601, 661, 2)])
    gpas = [page * PAGE_SIZE for page in rig.receive_pages]
    runs = [(gpas[0] + 1000, PAGE_SIZE - 1000), *((gpa, PAGE_SIZE) for gpa in gpas[1:-1]), (gpas[-1], 7)]
    size = sum(length for _, length in runs)
    assert rig.device.set_receive_buffer(runs, BUFFER_ID, SECTION) == size // SECTION
    original = rig.read_section
    rig.read_section = lambda offset, size: original(offset + 1000, size)  # type: ignore[method-assign]
    for at in range(8):
        rig.arrive(frame_of(1514, at))
    rig.queue.run()
    assert [entry.data for entry in rig.received()] == [frame_of(1514, at) for at in range(8)]
    rig.close()


@pytest.mark.parametrize(
    ("runs", "section"),
    [
        ([(0, 1 << 20), (1 << 20, 100), (2 << 20, 4096)], SECTION),
        ([(0, 4096), (1 << 20 | 8, 4096)], SECTION),
        ([(1 << 40, 4096)], SECTION),
        ([(0, 8 << 20)], SECTION),
        ([(0, 0)], SECTION),
        ([], SECTION),
        ([(0, 16 * SECTION)], SECTION),
        ([(0, 1 << 20)], 1279),
        ([(0, 1 << 20)], 65537),
        ([(0, 1 << 20)], 0),
    ],
)
def test_a_receive_buffer_that_cannot_be_used_is_refused(runs: list[tuple[int, int]], section: int) -> None:
    device = NetDevice(GuestMemory(4 << 20).hot)
    with pytest.raises(ValueError, match=r"buffer|sections"):
        device.set_receive_buffer(runs, BUFFER_ID, section)
    assert device.set_receive_buffer([(0, 17 * SECTION)], BUFFER_ID, SECTION) == 17


# Completions ----------------------------------------------------------------------------------------------


def test_a_completion_of_what_is_not_under_way_breaks_the_channel(rig: Rig) -> None:
    rig.arrive(frame_of(60))
    rig.queue.run()
    (entry,) = rig.received(complete=False)
    for number in (entry.transaction + 1, entry.transaction + (1 << 32), entry.transaction & 0xFFFFFFFF, 2**64 - 1):
        rig.give_back(number)
        with pytest.raises(RingError, match="not under way"):
            rig.queue.run()
    rig.give_back(entry.transaction)
    rig.queue.run()
    rig.give_back(entry.transaction)
    with pytest.raises(RingError, match="not under way"):
        rig.queue.run()


def test_a_completion_in_another_channel_than_the_packet_breaks_that_one() -> None:
    rig = Rig(queues=2)
    rig.arrive(frame_of(60))
    rig.queue.run()
    (entry,) = rig.received(complete=False)
    rig.give_back(entry.transaction, queue=1)
    with pytest.raises(RingError, match="not under way"):
        rig.queues[1].run()
    rig.give_back(entry.transaction)
    assert rig.queue.run() == (0, [])
    rig.close()


def test_completions_may_come_after_the_receive_buffer_was_taken_back(rig: Rig) -> None:
    rig.arrive(frame_of(60))
    rig.queue.run()
    (entry,) = rig.received(complete=False)
    rig.device.set_receive_buffer(None)
    rig.give_back(entry.transaction)
    assert rig.queue.run() == (0, [])
    rig.arrive(frame_of(60))
    assert rig.queue.run() == (0, [])
    assert rig.queue.take() == []


# Receive side scaling -------------------------------------------------------------------------------------


def spread(rig: Rig, count: int = 32) -> list[list[int]]:
    """The source ports that each channel receives."""
    for at in range(count):
        packet = frames.tcp(b"x", source="10.0.0.1", to="10.0.0.2", ports=(1000 + at, 80))
        rig.arrive(frames.packet4(packet, frames.TCP))
        rig.queue.run()
    found = []
    for index, queue in enumerate(rig.queues):
        received = rig.received(queue=index)
        assert all(HASH in entry.ppis for entry in received)
        found.append([int.from_bytes(entry.data[34:36], "big") for entry in received])
        queue.run()
    return found


def test_connections_are_spread_over_channels_by_the_table() -> None:
    rig = Rig(queues=4, ring_pages=9)
    for queue in rig.queues:
        queue.run()
    key = bytes(range(1, 41))
    rig.device.set_rss(key, [0, 1, 2, 3], 0x200)
    first = spread(rig)
    assert sorted(port for ports in first for port in ports) == list(range(1000, 1032))
    assert all(first)
    assert spread(rig) == first  # a connection stays where it is
    assert rig.queues[3].engine.inspect()["packets_out"] > 0
    rig.device.set_rss(key, [0, 2, 2, 0], 0x200)
    second = spread(rig)
    assert not second[1] and not second[3]
    rig.device.set_rss(b"", [], 0)
    for at in range(5):
        rig.arrive(frames.packet4(frames.tcp(b"", source="10.0.0.1", to="10.0.0.2", ports=(at, 80)), frames.TCP))
    rig.queue.run()
    assert len(rig.received()) == 5
    rig.close()


def test_channels_that_are_not_open_leave_their_frames_to_the_first() -> None:
    rig = Rig(queues=2)
    rig.queues[1].run()
    rig.device.set_rss(bytes(range(40)), [1, 9], 0x200)
    assert any(spread(rig, 8)[1])
    rig.queues[1].engine.quiesce()
    for at in range(8):
        packet = frames.tcp(b"x", source="10.0.0.1", to="10.0.0.2", ports=(1000 + at, 80))
        rig.arrive(frames.packet4(packet, frames.TCP))
    rig.queue.run()
    assert rig.queues[1].take() == []
    assert len(rig.received()) == 8
    rig.close()


def test_frames_for_a_channel_whose_ring_is_full_are_dropped_and_their_sections_freed() -> None:
    rig = Rig(queues=2, ring_pages=2)
    rig.queues[1].run()
    rig.device.set_rss(bytes(40), [1], 0x200)
    packet = frames.packet4(frames.tcp(b"x", source="10.0.0.1", to="10.0.0.2"), frames.TCP)
    for _ in range(1000):
        rig.arrive(packet)
        rig.queue.run()
    statistics = rig.device.statistics()
    assert statistics["received_no_room"] + len(rig.received(queue=1)) == 1000
    rig.queues[1].run()
    for _ in range(10):
        rig.arrive(packet)
    rig.queue.run()
    assert len(rig.received(queue=1)) == 10
    rig.close()


def test_another_channels_guest_is_signalled_by_its_own_worker_if_there_is_no_target() -> None:
    rig = Rig(queues=2)
    rig.queues[1].run()
    rig.device.set_rss(bytes(40), [1], 0x200)
    os.eventfd_read(rig.queues[1].doorbell)
    rig.arrive(frames.packet4(frames.tcp(b"x", source="10.0.0.1", to="10.0.0.2"), frames.TCP))
    rig.queue.run()
    assert rig.queue.signals == 0
    assert readable(rig.queues[1].doorbell)
    rig.queues[1].run()
    assert rig.queues[1].signals == 1
    rig.close()


@pytest.mark.parametrize(
    ("key", "table"), [(bytes(39), [0]), (bytes(40), [64]), (bytes(40), [0] * 129), (bytes(40), [-1])]
)
def test_a_table_that_cannot_be_is_refused(rig: Rig, key: bytes, table: list[int]) -> None:
    with pytest.raises((ValueError, OverflowError)):
        rig.device.set_rss(key, table, 0x200)
