"""The NIC's fast path to the network: frames from a guest's rings to its port."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import pytest

from devices.vmbus.packets import (
    PACKET_COMPLETION,
    PACKET_GPA_DIRECT,
    PACKET_INBAND,
)
from pyvmm.core._hot import RingError
from tests.fakes.net_rig import (
    INVALID,
    NO_SECTION,
    RNDIS,
    SUCCESS,
    Rig,
    counted,
    frame_of,
    readable,
    rndis,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

NO_OFFLOAD = (0, 0, 0, 0, 0, 0)


@pytest.fixture(name="rig")
def make_rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


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
