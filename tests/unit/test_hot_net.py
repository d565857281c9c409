"""The NIC's fast path by itself: frames from a guest's rings to its port, and from the port to its receive buffer."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from devices.vmbus.packets import (
    COMPLETION_REQUESTED,
    PACKET_COMPLETION,
    PACKET_GPA_DIRECT,
    PACKET_INBAND,
    PACKET_TRANSFER_PAGES,
)
from pyvmm.core._hot import NetDevice, NetQueue, RingError, SynIC
from pyvmm.core.memory import PAGE_SIZE, GuestMemory
from tests.fakes import frames
from tests.fakes.net_rig import (
    ALL_MULTICAST,
    BROADCAST,
    BROADCASTS,
    BUFFER_ID,
    COMPLETE,
    DIRECTED,
    HASH,
    INVALID,
    MAC,
    MULTICAST,
    NO_SECTION,
    OTHER,
    PROMISCUOUS,
    RNDIS,
    SECTION,
    SUCCESS,
    Queue,
    Rig,
    readable,
    rndis,
)
from tests.fakes.ring import MASK, OUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NO_OFFLOAD = (0, 0, 0, 0, 0, 0)
GROUP = bytes.fromhex("333300000001")


def frame_of(size: int, fill: int = 0, to: bytes = OTHER) -> bytes:
    """A frame of no known protocol."""
    return to + MAC + b"\x88\xb5" + bytes((fill + at) & 0xFF for at in range(size - 14))


@pytest.fixture(name="rig")
def make_rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def counted(rig: Rig) -> dict[str, int]:
    """Statistics that are not 0."""
    return {name: value for name, value in rig.device.statistics().items() if value}


# To the network -------------------------------------------------------------------------------------------


def test_a_frame_in_the_send_buffer_goes_to_the_port_and_is_completed(rig: Rig) -> None:
    number = rig.send(rndis(frame_of(100)), section=3)
    assert rig.queue.run() == (0, [])
    assert rig.sent() == [(NO_OFFLOAD, frame_of(100))]
    assert rig.statuses() == {number: SUCCESS}
    assert counted(rig) == {"sent_frames": 1, "sent_bytes": 100}


def test_a_frame_in_pages_goes_to_the_port_however_it_is_cut(rig: Rig) -> None:
    data = rndis(frame_of(1514))
    for cut in (1, 8, 43, 44, 50, 60, 200):
        number = rig.send_direct((data[:cut], data[cut:700], data[700:]))
        rig.queue.run()
        assert rig.sent() == [(NO_OFFLOAD, frame_of(1514))]
        assert rig.statuses() == {number: SUCCESS}


def test_headers_in_the_send_buffer_are_followed_by_data_in_pages(rig: Rig) -> None:
    first, second = rndis(frame_of(60, 1), pad=4), rndis(frame_of(1000, 2))
    number = rig.send_direct((second[44:500], second[500:]), section=first + second[:44])
    rig.queue.run()
    assert [frame for _, frame in rig.sent()] == [frame_of(60, 1), frame_of(1000, 2)]
    assert rig.statuses() == {number: SUCCESS}


def test_control_messages_and_the_rest_are_left_to_python(rig: Rig) -> None:
    for kind, payload in (
        (PACKET_INBAND, struct.pack("<IIII", RNDIS, 1, 0, 24)),
        (PACKET_INBAND, struct.pack("<III", 1, 2, 2)),
        (PACKET_INBAND, b""),
        (PACKET_COMPLETION, struct.pack("<II", 131, 0)),
        (3, struct.pack("<IIII", RNDIS, 0, 0, 0)),
    ):
        number = rig.put(kind, b"", payload)
        rig.send(rndis(frame_of(60)))
        assert rig.queue.run() == (1, [])
        assert rig.queue.rings[0].read(1)[0][0][2] == number
        assert rig.queue.run() == (0, [])
        assert len(rig.sent()) == 1


def test_a_frame_that_makes_no_sense_is_completed_as_such_after_those_before_it(rig: Rig) -> None:
    number = rig.send(rndis(frame_of(60)) + rndis(frame_of(1515)) + rndis(frame_of(61)))
    rig.queue.run()
    assert [len(frame) for _, frame in rig.sent()] == [60, 61]
    assert rig.statuses() == {number: INVALID}
    assert rig.device.statistics()["sent_invalid"] == 1


@pytest.mark.parametrize("data", [b"", b"x" * 43, rndis(frame_of(60))[:-1]], ids=["none", "no header", "cut off"])
def test_what_is_no_rndis_packet_is_completed_as_such(rig: Rig, data: bytes) -> None:
    number = rig.send(data)
    assert rig.queue.run() == (0, [])
    assert rig.statuses() == {number: INVALID}
    assert rig.sent() == []


@pytest.mark.parametrize(
    ("kind", "header", "section", "flags"),
    [
        (PACKET_INBAND, b"", (1 << 20, 60), 1),
        (PACKET_INBAND, b"", (0, 6145), 1),
        (PACKET_INBAND, b"", (0xFFFFFFFE, 60), 1),
        (PACKET_INBAND, b"", (0, 60), 0),
        (PACKET_GPA_DIRECT, struct.pack("<IIIIQ", 0, 1, 100, 0, 1 << 40), (NO_SECTION, 0), 1),
        (PACKET_GPA_DIRECT, struct.pack("<IIIIQ", 0, 1, 100, 0, 2**64 - 1), (NO_SECTION, 0), 1),
        (PACKET_GPA_DIRECT, struct.pack("<IIIIQ", 0, 2, 100, 0, 64), (NO_SECTION, 0), 1),
        (PACKET_GPA_DIRECT, struct.pack("<IIIIQ", 0, 1, 100, 4096, 64), (NO_SECTION, 0), 1),
        (PACKET_GPA_DIRECT, struct.pack("<IIIIQ", 0, 1, 4097, 0, 64), (NO_SECTION, 0), 1),
        (PACKET_GPA_DIRECT, struct.pack("<IIIIQ", 0, 1, 2**32 - 1, 4095, 64), (NO_SECTION, 0), 1),
    ],
)
def test_a_packet_that_names_memory_it_may_not_breaks_the_channel(
    rig: Rig, kind: int, header: bytes, section: tuple[int, int], flags: int
) -> None:
    rig.put(kind, header, struct.pack("<IIII", RNDIS, 0, *section), flags=flags)
    with pytest.raises(RingError, match="an RNDIS packet"):
        rig.queue.run()
    assert rig.sent() == []


def test_a_send_buffer_that_was_taken_back_is_not_read(rig: Rig) -> None:
    rig.device.set_send_buffer(None)
    rig.send(rndis(frame_of(60)))
    with pytest.raises(RingError, match="send buffer"):
        rig.queue.run()


def fill_up(rig: Rig) -> None:
    """Leave the port room for a few frames."""
    rig.end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def test_nothing_is_lost_or_sent_twice_while_the_port_is_full(rig: Rig) -> None:
    # Packets of several frames, of which the port takes a part at a time.
    fill_up(rig)
    expected = [frame_of(60 + number, number) for number in range(40)]
    numbers = [
        rig.send(b"".join(rndis(frame) for frame in expected[at : at + 8]), section=at // 8) for at in range(0, 40, 8)
    ]
    found: list[bytes] = []
    statuses: dict[int, int] = {}
    rounds = 0
    while True:
        assert rig.queue.run() == (0, [])
        statuses |= rig.statuses()
        assert not readable(rig.queue.engine.event)
        found += [frame for _, frame in rig.sent()]
        if len(statuses) == len(numbers):
            break
        assert readable(rig.queue.engine.event)
        rounds += 1
    assert found == expected
    assert rounds > 1
    assert statuses == dict.fromkeys(numbers, SUCCESS)
    assert not readable(rig.queue.engine.event)


def test_an_invalid_frame_before_the_port_was_full_is_not_forgotten(rig: Rig) -> None:
    fill_up(rig)
    sequence = [b"short", *(frame_of(60, number) for number in range(30))]
    number = rig.send(b"".join(map(rndis, sequence)))
    rig.queue.run()
    assert rig.statuses() == {}
    found = rig.sent()
    while len(found) < 30:
        rig.queue.run()
        found += rig.sent()
    assert [frame for _, frame in found] == sequence[1:]
    assert rig.statuses() == {number: INVALID}
    assert rig.device.statistics()["sent_invalid"] == 1


def test_a_guest_without_a_network_sends_into_the_void() -> None:
    rig = Rig(connect=False)
    number = rig.send(rndis(frame_of(60)))
    rig.queue.run()
    rig.device.set_port(rig.end.fileno())
    second = rig.send(rndis(frame_of(60)))
    rig.queue.run()
    rig.device.set_link(True)
    third = rig.send(rndis(frame_of(60)))
    rig.queue.run()
    rig.port.close()
    fourth = rig.send(rndis(frame_of(60)))
    rig.queue.run()
    assert rig.statuses() == dict.fromkeys((number, second, third, fourth), SUCCESS)
    statistics = rig.device.statistics()
    assert (statistics["sent_unplugged"], statistics["sent_frames"], statistics["sent_errors"]) == (2, 1, 1)
    rig.close()


def test_a_ring_of_one_page_sends_large_frames() -> None:
    rig = Rig(ring_pages=2)
    data = rndis(frame_of(9014))
    rig.device.set_frame_size(9014)
    for _ in range(50):
        number = rig.send_direct([data[at : at + 4096] for at in range(0, len(data), 4096)])
        rig.queue.run()
        assert [frame for _, frame in rig.sent()] == [frame_of(9014)]
        assert rig.statuses() == {number: SUCCESS}
    rig.close()


def test_any_channel_sends() -> None:
    rig = Rig(queues=3)
    numbers = [rig.send(rndis(frame_of(60, index)), section=index, queue=index) for index in range(3)]
    for queue in reversed(rig.queues):
        queue.run()
    assert [frame for _, frame in rig.sent()] == [frame_of(60, index) for index in (2, 1, 0)]
    for index, number in enumerate(numbers):
        assert rig.statuses(index) == {number: SUCCESS}
    rig.close()


# From the network -----------------------------------------------------------------------------------------


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


def small_rig() -> Rig:
    """A NIC with four sections for frames."""
    rig = Rig(receive_pages=range(512, 521))
    assert rig.sections == 20
    return rig


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


# Rings ----------------------------------------------------------------------------------------------------


def test_one_signal_a_batch_and_none_while_the_guest_reads(rig: Rig) -> None:
    for section in range(8):
        rig.send(rndis(frame_of(60)), section=section)
    rig.queue.run()
    assert rig.queue.signals == 1
    assert len(rig.statuses()) == 8
    rig.queue.to_guest.set_word(MASK, 1)
    rig.send(rndis(frame_of(60)))
    rig.arrive(frame_of(60))
    rig.queue.run()
    assert rig.queue.signals == 1
    assert rig.queue.engine.inspect() == {"packets_in": 9, "packets_out": 10, "signals": 1}
    assert rig.queue.engine.name == "direct"


def test_the_guest_is_signalled_without_python_once_there_is_a_target(rig: Rig) -> None:
    synic = SynIC(rig.memory.hot, -1, 0, 0)
    for msr, value in ((0x40000080, 1), (0x40000082, 40 * PAGE_SIZE | 1), (0x40000092, 0x31)):
        assert synic.write_msr(msr, value, 0)
    rig.queue.engine.set_target(synic, 2, 9)
    rig.arrive(frame_of(60))
    rig.queue.run()
    assert rig.queue.signals == 0
    assert synic.take_interrupts() == [0x31]
    assert rig.queue.engine.inspect()["signals"] == 1
    for bad in ((synic, 16, 0), (synic, 2, 2048)):
        with pytest.raises(ValueError, match="no event flag"):
            rig.queue.engine.set_target(*bad)


def test_the_ring_is_left_unmasked_when_there_is_nothing_to_do(rig: Rig) -> None:
    rig.send(rndis(frame_of(60)))
    assert rig.queue.to_host.word(MASK) == 1
    rig.queue.run()
    assert rig.queue.to_host.word(MASK) == 0


def test_what_a_full_ring_has_no_room_for_goes_to_python_in_order() -> None:
    rig = Rig(ring_pages=2)
    expected: list[bytes] = []
    completed: list[int] = []
    while True:
        number = rig.send(rndis(frame_of(60)))
        rig.arrive(frame_of(60, len(expected)))
        expected.append(frame_of(60, len(expected)))
        completed.append(number)
        _, unsent = rig.queue.run()
        rig.sent()
        if unsent:
            break
    packets = rig.queue.take() + unsent
    assert [number for kind, _, number, _, _ in packets if kind == PACKET_COMPLETION] == completed
    seen = []
    for kind, flags, _, header, payload in packets:
        if kind != PACKET_TRANSFER_PAGES:
            continue
        assert flags == COMPLETION_REQUESTED
        assert len(payload) == 28 or payload[28:] == bytes(len(payload) - 28)
        size, offset = struct.unpack_from("<II", header, 8)
        seen.append(rig.read_section(offset, size)[112:])
    assert seen + [frame for frame in expected if frame not in seen] == expected
    for kind, _, number, _, _ in packets:
        if kind == PACKET_TRANSFER_PAGES:
            rig.give_back(number)
    assert rig.queue.run() == (0, [])
    rig.close()


def test_a_read_index_that_is_none_gives_what_is_to_be_sent_to_python(rig: Rig) -> None:
    rig.send(rndis(frame_of(60)))
    rig.queue.to_guest.set_word(OUT, 12)
    left, unsent = rig.queue.run()
    assert left == 0
    assert [packet[0] for packet in unsent] == [PACKET_COMPLETION]


@pytest.mark.parametrize("index", [4, 1 << 20, 0xFFFFFFF8])
def test_a_write_index_that_is_none_is_pythons_to_name(rig: Rig, index: int) -> None:
    rig.queue.to_host.set_word(0, index)
    assert rig.queue.run() == (1, [])


def test_messages_are_as_long_as_the_protocols_version_has_them(rig: Rig) -> None:
    assert rig.device.message_size == 28
    rig.device.message_size = 40
    rig.send(rndis(frame_of(60)))
    rig.arrive(frame_of(60))
    rig.queue.run()
    assert [len(packet[4]) for packet in rig.queue.take()] == [40, 40]
    for bad in (15, 41, -1):
        with pytest.raises((ValueError, OverflowError)):
            rig.device.message_size = bad


# Control messages -----------------------------------------------------------------------------------------


def controls_of(rig: Rig, complete: bool = True) -> list[bytes]:
    found = []
    for kind, _, number, header, payload in rig.queue.take():
        assert kind == PACKET_TRANSFER_PAGES
        assert struct.unpack_from("<III", payload) == (RNDIS, 1, NO_SECTION)
        assert struct.unpack_from("<HxxI", header) == (BUFFER_ID, 1)
        size, offset = struct.unpack_from("<II", header, 8)
        assert offset < 16 * SECTION
        found.append(rig.read_section(offset, size))
        if complete:
            rig.give_back(number)
    return found


def test_control_messages_wait_for_their_sections_in_order(rig: Rig) -> None:
    rig.queue.run()
    messages = [b"control %d" % number for number in range(80)]
    assert [rig.queue.engine.send_control(message) for message in messages] == [True] * 64 + [False] * 16
    assert readable(rig.queue.doorbell)
    rig.queue.run()
    found = controls_of(rig)
    assert len(found) == 16
    while len(found) < 64:
        rig.queue.run()
        found += controls_of(rig)
    assert found == messages[:64]
    assert rig.queue.engine.send_control(b"x" * SECTION)
    assert not rig.queue.engine.send_control(b"x" * (SECTION + 1))
    assert not rig.queue.engine.send_control(b"")


def test_data_never_uses_the_sections_of_control_messages() -> None:
    rig = small_rig()
    for at in range(6):
        rig.arrive(frame_of(100, at))
    assert rig.queue.engine.send_control(b"hello")
    rig.queue.run()
    packets = rig.queue.take()
    offsets = [struct.unpack_from("<I", packet[3], 12 + 8 * at)[0] for packet in packets[1:] for at in range(4)]
    assert sorted(offsets) == [SECTION * at for at in range(16, 20)]
    rig.close()


def test_control_messages_need_no_link_and_no_filter() -> None:
    rig = Rig(connect=False)
    rig.device.set_filter(0, MAC)
    assert rig.queue.engine.send_control(b"hello")
    rig.queue.run()
    assert controls_of(rig) == [b"hello"]
    rig.device.set_receive_buffer(None)
    assert not rig.queue.engine.send_control(b"hello")
    rig.close()


def test_control_messages_for_a_receive_buffer_are_not_put_into_another(rig: Rig) -> None:
    for _ in range(20):
        assert rig.queue.engine.send_control(b"x" * SECTION)
    rig.device.set_receive_buffer([(512 * PAGE_SIZE, 17 * 1280)], BUFFER_ID, 1280)
    rig.queue.run()
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


# Life -----------------------------------------------------------------------------------------------------


def test_a_new_queue_takes_the_place_of_the_channels_one_before(rig: Rig) -> None:
    old = rig.queue
    new = Queue(rig, 0, 5)
    rig.arrive(frame_of(60))
    assert old.run() == (0, [])
    assert readable(rig.end.fileno())
    new.run()
    rig.queue = rig.queues[0] = new
    assert len(rig.received()) == 1
    old.close()


def test_nobody_touches_the_rings_after_quiesce_until_the_next_serve(rig: Rig) -> None:
    rig.queue.run()
    assert rig.queue.engine.quiesce() == ([], [])
    rig.arrive(frame_of(60))
    rig.device.set_filter(DIRECTED | PROMISCUOUS, MAC)
    assert rig.queue.engine.send_control(b"hello")
    assert not readable(rig.queue.doorbell)
    assert rig.queue.take() == []
    rig.queue.run()
    assert len(rig.queue.take()) == 2


def test_a_saved_nic_knows_what_the_guest_holds() -> None:
    rig, other = small_rig(), small_rig()
    for at in range(3):
        rig.arrive(frame_of(60, at))
        rig.queue.run()
    held = [packet[2] for packet in rig.queue.take()]
    for number in range(18):
        assert rig.queue.engine.send_control(b"control %d" % number)
    rig.queue.run()
    rig.queue.take()
    rig.queue.engine.quiesce()
    state = rig.device.save()
    assert len(state["held"]) == 19
    other.device.restore(state)
    assert other.device.save() == state
    # One section is free; the guest gives the others back under the numbers that it knows.
    for at in range(4):
        other.arrive(frame_of(60, at))
    other.queue.run()
    assert len(other.received(complete=False)) == 1
    for number in held:
        other.give_back(number)
    assert other.queue.run() == (0, [])
    assert len(other.received(complete=False)) == 3
    for rig_ in (rig, other):
        rig_.close()


def test_frames_of_a_coalesced_one_are_saved_in_order(rig: Rig) -> None:
    rig.device.set_offloads(0x20)
    frame = frames.packet4(frames.tcp(bytes(9000), source="10.0.0.1", to="10.0.0.2"), frames.TCP)
    made = frames.partial(frame, 1448)
    rig.arrive(made[10:], made[:10])
    rig.queue.run()
    ((_, chain),) = rig.device.save()["held"]
    (packet,) = rig.queue.take()
    assert [SECTION * at for at in chain] == [struct.unpack_from("<I", packet[3], 12 + 8 * at)[0] for at in range(6)]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"generation": 1, "held": [(0, [99])], "controls": []},
        {"generation": 1, "held": [(0, [17]), (0, [17])], "controls": []},
        {"generation": 1, "held": [(64, [17])], "controls": []},
        {"generation": 1, "held": [(0, [])], "controls": []},
        {"generation": 1, "held": [], "controls": ["text"]},
        {"generation": "1", "held": [], "controls": []},
        {"generation": 1, "held": [5], "controls": []},
    ],
)
def test_a_damaged_state_is_refused(state: dict[str, object]) -> None:
    rig = small_rig()
    with pytest.raises(ValueError, match="damaged"):
        rig.device.restore(state)
    rig.close()


def test_the_port_can_be_changed_while_frames_move() -> None:
    rig = Rig(ring_pages=9)
    other = Rig(ring_pages=9)
    ends = [rig.end.fileno(), -1, other.end.fileno()]
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            rig.queue.engine.serve()

    worker = threading.Thread(target=work)
    worker.start()
    completed = 0
    try:
        for round_ in range(300):
            rig.device.set_port(ends[round_ % 3])
            sent = 0
            for section in range(8):
                sent += bool(rig.send(rndis(frame_of(60)), section=section))
            while sent:
                done = rig.statuses()
                sent -= len(done)
                completed += len(done)
                rig.sent()
                other.sent()
    finally:
        stop.set()
        worker.join()
    assert completed == 2400
    assert rig.device.statistics()["sent_frames"] + rig.device.statistics()["sent_unplugged"] == 2400
    rig.close()
    other.close()


def test_a_file_that_cannot_be_watched_is_refused(rig: Rig, tmp_path: object) -> None:
    fd = os.memfd_create("file")
    with pytest.raises(PermissionError):
        rig.device.set_port(fd)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        rig.device.set_port(fd)
    rig.device.set_port(rig.end.fileno())
    rig.arrive(frame_of(60))
    rig.queue.run()
    assert len(rig.received()) == 1


def test_there_are_no_more_than_64_channels(rig: Rig) -> None:
    with pytest.raises(ValueError, match="no channel 64"):
        NetQueue(rig.device, 64, rig.memory.hot, *rig.queue.rings, rig.queue.doorbell)


def test_completions_say_how_the_message_was(rig: Rig) -> None:
    rig.send(rndis(frame_of(60)))
    rig.queue.run()
    ((_, _, _, header, payload),) = rig.queue.take()
    assert header == b""
    assert payload[:28] == struct.pack("<II20x", COMPLETE, SUCCESS)


def test_channels_on_threads_of_their_own_lose_nothing_and_keep_the_order_of_connections() -> None:
    rig = Rig(queues=3, ring_pages=9)
    rig.device.set_rss(bytes(range(1, 41)), [0, 1, 2, 1], 0x200)
    stop = threading.Event()

    def work(queue: Queue) -> None:
        while not stop.is_set():
            idle, _, _, unsent, _ = queue.engine.serve()
            assert not unsent
            if idle and select.select([queue.doorbell, queue.engine.event], [], [], 5)[0]:
                with suppress(BlockingIOError):
                    os.eventfd_read(queue.doorbell)

    workers = [threading.Thread(target=work, args=(queue,)) for queue in rig.queues]
    for worker in workers:
        worker.start()
    seen: dict[int, list[int]] = {}
    completed = sent = arrived = 0
    try:
        for round_ in range(200):
            for connection in range(6):
                packet = frames.tcp(b"", source="10.0.0.1", to="10.0.0.2", ports=(connection, 80), sequence=round_)
                rig.arrive(frames.packet4(packet, frames.TCP))
                arrived += 1
            for index in range(3):
                rig.send(rndis(frame_of(60)), section=index, queue=index)
                os.eventfd_write(rig.queues[index].doorbell, 1)
                sent += 1
            while completed < sent or sum(map(len, seen.values())) < arrived:
                for index, queue in enumerate(rig.queues):
                    for kind, _, number, header, payload in queue.take():
                        if kind == PACKET_COMPLETION:
                            assert struct.unpack_from("<II", payload) == (COMPLETE, SUCCESS)
                            completed += 1
                            continue
                        for at in range(8, len(header), 8):
                            size, offset = struct.unpack_from("<II", header, at)
                            data = rig.read_section(offset, size)[112:]
                            port, sequence = struct.unpack_from(">HxxI", data, 34)
                            seen.setdefault(port, []).append(sequence)
                        rig.give_back(number, index)
                        os.eventfd_write(queue.doorbell, 1)
            if round_ % 50 == 49:
                rig.device.set_filter(PROMISCUOUS | DIRECTED, MAC)
                rig.device.set_frame_size(1514)
                assert len(rig.sent()) == 150
    finally:
        stop.set()
        for queue, worker in zip(rig.queues, workers, strict=True):
            os.eventfd_write(queue.doorbell, 1)
            worker.join()
    assert seen == {connection: list(range(200)) for connection in range(6)}
    assert all(queue.engine.inspect()["packets_out"] > 200 for queue in rig.queues)
    rig.close()
