"""The NIC's fast path by itself: frames from a guest's rings to its port, and from the port to its receive buffer."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from devices.vmbus.packets import PACKET_INBAND
from tests.fakes.net_rig import (
    INVALID,
    MAC,
    OTHER,
    RNDIS,
    SUCCESS,
    Rig,
    rndis,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

NO_OFFLOAD = (0, 0, 0, 0, 0, 0)


def frame_of(size: int, fill: int = 0) -> bytes:
    """A frame of no known protocol."""
    return OTHER + MAC + b"\x88\xb5" + bytes((fill + at) & 0xFF for at in range(size - 14))


@pytest.fixture(name="rig")
def make_rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


# To the network -------------------------------------------------------------------------------------------


def test_a_frame_in_the_send_buffer_goes_to_the_port_and_is_completed(rig: Rig) -> None:
    number = rig.send(rndis(frame_of(100)), section=3)
    assert rig.queue.run() == (0, [])
    assert rig.sent() == [(NO_OFFLOAD, frame_of(100))]
    assert rig.statuses() == {number: SUCCESS}
    statistics = rig.device.statistics()
    assert (statistics["sent_frames"], statistics["sent_bytes"]) == (1, 100)


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
    number = rig.put(PACKET_INBAND, b"", struct.pack("<IIII", RNDIS, 1, 0, 24))
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


# From the network -----------------------------------------------------------------------------------------


def test_frames_from_the_port_come_in_one_packet_and_their_sections_are_used_again(rig: Rig) -> None:
    for round_ in range(50):
        frames = [frame_of(60 + 7 * at, round_) for at in range(10)]
        for frame in frames:
            rig.arrive(frame)
        rig.queue.run()
        received = rig.received()
        assert [entry.data for entry in received] == frames
        assert all(entry.ppis == {} for entry in received)
        assert len({entry.transaction for entry in received}) == 1
    statistics = rig.device.statistics()
    assert statistics["received_frames"] == 500


def test_nothing_is_read_while_the_guest_holds_all_sections() -> None:
    rig = Rig(receive_pages=range(512, 521), ring_pages=9)
    assert rig.sections == 20
    for at in range(6):
        rig.arrive(frame_of(100, at))
    rig.queue.run()
    first = rig.received(complete=False)
    assert [entry.data for entry in first] == [frame_of(100, at) for at in range(4)]
    rig.give_back(first[0].transaction)
    rig.queue.run()
    assert [entry.data for entry in rig.received()] == [frame_of(100, at) for at in range(4, 6)]
    rig.close()
