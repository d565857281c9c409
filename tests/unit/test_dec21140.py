"""The 21140: frames both ways, its lists, interrupts, the cable."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from devices.legacy.dec21140 import descriptors as d
from devices.legacy.dec21140 import registers as reg
from devices.legacy.pci import COMMAND
from tests.fakes.frames import tagged, vnet
from tests.fakes.tulip import (
    BROADCAST,
    BUFFER,
    MAC,
    RECEIVE_BUFFERS,
    RECEIVE_RING,
    TRANSMIT_BUFFERS,
    TRANSMIT_RING,
    TulipGuest,
    Wire,
    frame,
    on_wire,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

MILLISECOND = 1_000_000
WHOLE = d.FIRST_SEGMENT | d.LAST_SEGMENT


@pytest.fixture
def guest() -> Iterator[TulipGuest]:
    guest = TulipGuest()
    guest.plug()
    yield guest
    guest.close()


@pytest.fixture
def wire(guest: TulipGuest) -> Wire:
    """The network of a guest whose driver has started."""
    guest.start()
    assert guest.wire is not None
    return guest.wire


# Transmitting.


def test_a_frame_is_sent_padded_and_without_offload(guest: TulipGuest, wire: Wire) -> None:
    data = frame(b"short")
    at = guest.send(data)
    assert wire.sent() == [data.ljust(60, b"\0")]
    assert wire.offloads == 0
    assert guest.status_of(at) == 0


def test_padding_and_checksum_may_be_the_guests(guest: TulipGuest, wire: Wire) -> None:
    guest.send(frame(b"short"), d.NO_PADDING)
    guest.send(on_wire(frame(b"short")), d.NO_CRC)
    assert wire.sent() == [frame(b"short"), frame(b"short").ljust(60, b"\0")]


def test_a_frame_may_be_in_two_buffers_of_several_descriptors(guest: TulipGuest, wire: Wire) -> None:
    data = frame(bytes(range(100)))
    guest.memory.write(TRANSMIT_BUFFERS, data)
    first = guest.add(d.FIRST_SEGMENT | 7 << 11 | 10, TRANSMIT_BUFFERS, TRANSMIT_BUFFERS + 10)
    guest.add(20, TRANSMIT_BUFFERS + 17)
    last = guest.add(d.LAST_SEGMENT | len(data) - 37, TRANSMIT_BUFFERS + 37)
    guest.demand()
    assert wire.sent() == [data]
    assert guest.status_of(first) == guest.status_of(last) == 0


def test_a_list_may_be_chained(guest: TulipGuest, wire: Wire) -> None:
    places = (0x5000, 0x5800, 0x5400)
    for index, place in enumerate(places):
        data = frame(bytes([index]) * 50)
        guest.memory.write(TRANSMIT_BUFFERS + index * BUFFER, data)
        control = WHOLE | d.CHAINED | len(data)
        following = places[(index + 1) % 3]
        guest.descriptor(place, d.OWN, control, TRANSMIT_BUFFERS + index * BUFFER, following)
    guest.put(reg.TRANSMIT_LIST, places[0])
    guest.demand()
    assert wire.sent() == [frame(bytes([index]) * 50) for index in range(3)]
    assert guest.states()[1] == reg.TRANSMIT_SUSPENDED
    assert guest.get(reg.TRANSMIT_LIST) == places[0]


def test_descriptors_may_lie_apart(guest: TulipGuest, wire: Wire) -> None:
    guest.put(reg.BUS_MODE, 4 << reg.SKIP_SHIFT)
    for index in range(2):
        data = frame(bytes([index]) * 50)
        guest.memory.write(TRANSMIT_BUFFERS + index * BUFFER, data)
        guest.descriptor(0x5000 + 32 * index, d.OWN, WHOLE | len(data), TRANSMIT_BUFFERS + index * BUFFER)
    guest.put(reg.TRANSMIT_LIST, 0x5000)
    guest.demand()
    assert [data[14] for data in wire.sent()] == [0, 1]


def test_the_end_of_a_ring_leads_to_its_begin(guest: TulipGuest, wire: Wire) -> None:
    for index in range(3 * guest.ring):
        guest.send(frame(bytes([index]) * 50))
    assert [data[14] for data in wire.sent()] == list(range(3 * guest.ring))


def test_a_frame_whose_end_the_guest_still_owns_waits(guest: TulipGuest, wire: Wire) -> None:
    guest.acknowledge()
    data = frame(b"in two parts" * 6)
    guest.memory.write(TRANSMIT_BUFFERS, data)
    first = guest.add(d.FIRST_SEGMENT | 20, TRANSMIT_BUFFERS)
    guest.demand()
    assert guest.status() & (reg.UNF | reg.TU) == reg.UNF | reg.TU
    assert guest.status_of(first) == d.OWN
    guest.add(d.LAST_SEGMENT | len(data) - 20, TRANSMIT_BUFFERS + 20)
    guest.demand()
    assert wire.sent() == [data]


@pytest.mark.parametrize("control", [0, d.LAST_SEGMENT | 60, WHOLE | 13, WHOLE, d.FIRST_SEGMENT | 60])
def test_what_makes_no_frame_is_closed_and_the_next_one_sent(guest: TulipGuest, wire: Wire, control: int) -> None:
    at = guest.add(control | (d.NO_PADDING if control & d.FIRST_SEGMENT else 0), TRANSMIT_BUFFERS)
    data = frame(b"good" * 20)
    guest.send(data)
    assert wire.sent() == [data]
    assert guest.status_of(at) == 0


def test_the_guest_hears_of_completed_frames_for_which_it_asked(guest: TulipGuest, wire: Wire) -> None:
    guest.put(reg.INTERRUPTS, reg.NIS | reg.TI)
    guest.send(frame())
    assert not guest.line.level
    guest.send(frame(), d.ON_COMPLETION)
    assert guest.line.level
    assert guest.acknowledge() & reg.TI
    assert not guest.line.level
    assert len(wire.sent()) == 2


def test_an_endless_frame_stops_the_transmitter(guest: TulipGuest, wire: Wire) -> None:
    at = guest.add(d.FIRST_SEGMENT | d.LAST_SEGMENT | 1500 << 11 | 1500, TRANSMIT_BUFFERS, TRANSMIT_BUFFERS)
    guest.demand()
    assert guest.status_of(at) == d.ERROR_SUMMARY | d.JABBER
    assert guest.status() & (reg.TJT | reg.TPS) == reg.TJT | reg.TPS
    assert guest.states()[1] == reg.STOPPED
    assert wire.sent() == []


def test_only_a_poll_demand_or_auto_polling_wakes_a_suspended_transmitter(guest: TulipGuest, wire: Wire) -> None:
    assert guest.states()[1] == reg.TRANSMIT_SUSPENDED
    data = frame(b"later" * 20)
    guest.memory.write(TRANSMIT_BUFFERS, data)
    guest.add(WHOLE | len(data), TRANSMIT_BUFFERS)
    guest.advance(50 * MILLISECOND)
    assert wire.sent() == []
    guest.put(reg.BUS_MODE, 1 << reg.AUTO_POLL_SHIFT)
    guest.demand()
    assert wire.sent() == [data]
    guest.memory.write(TRANSMIT_BUFFERS, data)
    guest.add(WHOLE | len(data), TRANSMIT_BUFFERS)
    guest.work()
    assert wire.sent() == []
    guest.advance(2 * MILLISECOND)
    assert wire.sent() == [data]


def test_a_full_network_holds_the_guest_back_for_a_while(guest: TulipGuest, wire: Wire) -> None:
    data = frame(b"f" * 1000)
    while guest.status_of(guest.send(data)) == 0:
        assert guest.nic.inspect()["dropped"] == 0
    queued = len(wire.sent())
    guest.advance(2 * MILLISECOND)
    assert wire.sent() == [data], f"{queued} were queued before"
    while guest.status_of(at := guest.send(data)) == 0:
        pass
    guest.advance(25 * MILLISECOND)
    assert guest.status_of(at) == 0
    assert guest.nic.inspect()["dropped"] == 1


def test_a_network_that_is_gone_swallows_frames(guest: TulipGuest, wire: Wire) -> None:
    wire.other.close()
    assert guest.status_of(guest.send(frame())) == 0
    guest.work()
    assert guest.nic.inspect()["dropped"] == 1


# Receiving.


def test_a_frame_is_received_with_padding_and_checksum(guest: TulipGuest, wire: Wire) -> None:
    wire.give(frame(b"x"))
    guest.work()
    assert guest.received() == [(64 << d.LENGTH_SHIFT | d.FIRST | d.LAST | d.FRAME_TYPE, on_wire(frame(b"x")))]
    assert guest.line.level
    assert guest.acknowledge() & (reg.RI | reg.NIS) == reg.RI | reg.NIS
    assert not guest.line.level


def test_the_status_tells_what_kind_of_frame_came(guest: TulipGuest, wire: Wire) -> None:
    largest = tagged(frame(bytes(1500)), 10)
    assert len(largest) == 1518
    for data in (frame(to=BROADCAST), frame(bytes(46), kind=46), largest):
        wire.give(data)
    guest.work()
    told = [(status & ~(0x3FFF << 16), data) for status, data in guest.received()]
    whole = d.FIRST | d.LAST
    assert told == [
        (whole | d.MULTICAST | d.FRAME_TYPE, on_wire(frame(to=BROADCAST))),
        (whole, on_wire(frame(bytes(46), kind=46))),
        (whole | d.TOO_LONG | d.FRAME_TYPE, on_wire(largest)),
    ]


@pytest.mark.parametrize(
    ("data", "header"),
    [(frame(bytes(1505)), vnet()), (frame()[:13], vnet()), (frame(), vnet(flags=1)), (frame(), vnet(gso_type=1))],
)
def test_what_no_21140_can_receive_is_dropped(guest: TulipGuest, wire: Wire, data: bytes, header: bytes) -> None:
    wire.give(data, header)
    wire.give(frame(b"good"))
    guest.work()
    assert [data for _, data in guest.received()] == [on_wire(frame(b"good"))]
    assert guest.nic.inspect()["dropped"] == 1


def test_a_long_frame_goes_over_several_descriptors(guest: TulipGuest, wire: Wire) -> None:
    guest.start(setup=False, receive_control=100 << 11 | 50)
    for index in range(guest.ring):
        place = RECEIVE_BUFFERS + index * BUFFER
        guest.memory.write(RECEIVE_RING + 16 * index + 8, struct.pack("<II", place, place + 1000))
    data = frame(bytes(range(250)))
    wire.give(data)
    guest.work()
    statuses = [guest.status_of(RECEIVE_RING + 16 * index) for index in range(3)]
    assert statuses == [d.FIRST, d.LAST | d.FRAME_TYPE | 268 << d.LENGTH_SHIFT, d.OWN]
    pieces = [
        guest.memory.read(RECEIVE_BUFFERS + index * BUFFER + at, size)
        for index in range(2)
        for at, size in ((0, 50), (1000, 100))
    ]
    assert b"".join(pieces)[:268] == on_wire(data)


def test_a_frame_without_room_for_its_end_is_cut(guest: TulipGuest, wire: Wire) -> None:
    guest.start(setup=False, receive_control=100)
    wire.give(frame(bytes(1000)))
    guest.work()
    statuses = [guest.status_of(RECEIVE_RING + 16 * index) for index in range(guest.ring)]
    assert statuses[0] == d.FIRST and statuses[1] == statuses[2] == 0
    assert (
        statuses[3] & (d.LAST | d.ERROR_SUMMARY | d.DESCRIPTOR_ERROR) == d.LAST | d.ERROR_SUMMARY | d.DESCRIPTOR_ERROR
    )


def test_a_frame_waits_for_room_and_comes_when_there_is_some(guest: TulipGuest, wire: Wire) -> None:
    guest.put(reg.INTERRUPTS, reg.AIS | reg.RU)
    for index in range(guest.ring + 2):
        wire.give(frame(bytes([index]) * 50))
    guest.work()
    assert guest.states()[0] == reg.RECEIVE_SUSPENDED
    assert guest.line.level
    assert guest.acknowledge() & (reg.RU | reg.AIS) == reg.RU | reg.AIS
    first = guest.received()
    guest.put(reg.RECEIVE_POLL, 1)
    guest.work()
    assert guest.states()[0] == reg.RECEIVE_WAITING
    assert [data[14] for _, data in first + guest.received()] == list(range(guest.ring + 2))


def test_without_a_poll_demand_it_comes_soon(guest: TulipGuest, wire: Wire) -> None:
    for index in range(guest.ring + 1):
        wire.give(frame(bytes([index]) * 50))
    guest.work()
    assert len(guest.received()) == guest.ring
    guest.advance(2 * MILLISECOND)
    assert [data[14] for _, data in guest.received()] == [guest.ring]
    assert guest.get(reg.MISSED) == 0xE000_0000


def test_frames_for_which_there_is_no_room_for_long_are_missed(guest: TulipGuest, wire: Wire) -> None:
    for index in range(guest.ring + 3):
        wire.give(frame(bytes([index]) * 50))
    guest.work()
    guest.advance(30 * MILLISECOND)
    assert guest.get(reg.MISSED) == 0xE000_0003
    assert guest.get(reg.MISSED) == 0xE000_0000, "reading clears it"
    guest.received()
    wire.give(frame(b"at last"))
    guest.work()
    assert [data for _, data in guest.received()] == [on_wire(frame(b"at last"))]


def test_the_counter_of_missed_frames_tells_of_its_overflow(guest: TulipGuest) -> None:
    guest.nic.chip.miss(0xFFFF)
    guest.nic.chip.miss(1)
    assert guest.get(reg.MISSED) == 0xE001_0000


def test_a_stopped_receiver_takes_nothing(guest: TulipGuest, wire: Wire) -> None:
    guest.put(reg.OPERATION, reg.ST)
    wire.give(frame())
    guest.work()
    guest.put(reg.OPERATION, reg.ST | reg.SR)
    guest.work()
    assert guest.received() == []


@pytest.mark.parametrize("mode", [1, 2])
def test_in_loopback_frames_come_back_and_do_not_go_out(guest: TulipGuest, wire: Wire, mode: int) -> None:
    guest.put(reg.OPERATION, reg.ST | reg.SR | mode << reg.LOOPBACK_SHIFT)
    guest.send(frame(b"back"))
    [(status, data)] = guest.received()
    assert status >> d.DATA_TYPE_SHIFT & 3 == mode
    assert data == on_wire(frame(b"back"))
    assert wire.sent() == []


# Interrupts and the states of both processes.


def test_summaries_are_of_what_is_not_masked(guest: TulipGuest, wire: Wire) -> None:
    guest.put(reg.INTERRUPTS, reg.NIS | reg.AIS | reg.TI)
    wire.give(frame())
    guest.work()
    assert guest.status() & (reg.RI | reg.NIS) == reg.RI
    assert not guest.line.level
    guest.put(reg.INTERRUPTS, reg.AIS | reg.RI)
    assert guest.status() & reg.NIS
    assert not guest.line.level, "the summary is masked"
    guest.put(reg.INTERRUPTS, reg.NIS | reg.RI)
    assert guest.line.level
    guest.put(reg.INTERRUPTS, reg.NIS)
    assert not guest.line.level
    guest.put(reg.STATUS, reg.RI)
    guest.put(reg.INTERRUPTS, reg.NIS | reg.RI)
    assert not guest.line.level


def test_both_processes_stop_at_once(guest: TulipGuest, wire: Wire) -> None:
    assert guest.states() == (reg.RECEIVE_WAITING, reg.TRANSMIT_SUSPENDED)
    guest.put(reg.OPERATION, 0)
    assert guest.states() == (reg.STOPPED, reg.STOPPED)
    guest.send(frame())
    assert wire.sent() == []
    guest.advance(6 * MILLISECOND)
    assert guest.acknowledge() & (reg.TPS | reg.RPS) == reg.TPS | reg.RPS


def test_no_interrupt_tells_of_a_stop_that_is_over(guest: TulipGuest, wire: Wire) -> None:
    for way in (0, reg.SR, reg.ST):
        guest.put(reg.OPERATION, way)
        guest.put(reg.OPERATION, reg.SR | reg.ST)
    guest.advance(10 * MILLISECOND)
    assert not guest.status() & (reg.TPS | reg.RPS)


def test_a_stop_that_has_not_been_told_of_is_told_of_elsewhere(guest: TulipGuest, wire: Wire) -> None:
    guest.put(reg.OPERATION, reg.ST)
    other = TulipGuest()
    other.bus.restore(guest.bus.save())
    assert not other.status() & reg.RPS
    other.advance(6 * MILLISECOND)
    assert other.status() & (reg.RPS | reg.AIS) == reg.RPS | reg.AIS


def test_without_bus_mastering_memory_is_left_alone(guest: TulipGuest, wire: Wire) -> None:
    guest.config(COMMAND, 3)
    at = guest.send(frame())
    wire.give(frame())
    guest.work()
    assert (wire.sent(), guest.received(), guest.status_of(at)) == ([], [], d.OWN)
    guest.config(COMMAND, 7)
    guest.work()
    assert wire.sent() == [frame().ljust(60, b"\0")]


def test_the_timer_expires_once_or_again_and_again(guest: TulipGuest, wire: Wire) -> None:
    guest.put(reg.OPERATION, reg.PS)
    guest.put(reg.INTERRUPTS, reg.NIS | reg.GTE)
    guest.put(reg.STATUS, 0x1FFFF)
    guest.put(reg.TIMER, 100)
    guest.advance(4 * MILLISECOND)
    assert guest.get(reg.TIMER) & 0xFFFF == 51
    assert not guest.line.level
    guest.advance(5 * MILLISECOND)
    assert guest.line.level
    assert guest.acknowledge() & reg.GTE
    guest.advance(50 * MILLISECOND)
    assert not guest.line.level
    guest.put(reg.TIMER, reg.TIMER_CONTINUOUS | 100)
    for _ in range(3):
        guest.advance(9 * MILLISECOND)
        assert guest.acknowledge() & reg.GTE
    guest.put(reg.TIMER, 0)
    guest.advance(50 * MILLISECOND)
    assert not guest.line.level


# The cable.


def test_without_a_link_frames_are_lost_with_an_error(guest: TulipGuest, wire: Wire) -> None:
    guest.nic.set_link(False)
    at = guest.send(frame())
    assert guest.status_of(at) == d.ERROR_SUMMARY | d.NO_CARRIER | d.LOSS_OF_CARRIER
    wire.give(frame())
    guest.work()
    assert (wire.sent(), guest.received()) == ([], [])
    guest.nic.set_link(True)
    guest.send(frame())
    assert len(wire.sent()) == 1


def test_another_cable_is_used_once_the_old_one_is_given_back(guest: TulipGuest, wire: Wire) -> None:
    other = Wire()
    assert guest.nic.connect(other) is wire
    guest.send(frame())
    other.give(frame(b"from the other"))
    wire.give(frame(b"from the old one"))
    guest.work()
    assert (len(wire.sent()), len(other.sent())) == (0, 1)
    assert [data for _, data in guest.received()] == [on_wire(frame(b"from the other"))]
    wire.close()


def test_a_nic_without_a_cable_works_on(guest: TulipGuest, wire: Wire) -> None:
    assert guest.nic.connect(None) is wire
    at = guest.send(frame())
    assert guest.status_of(at) & d.NO_CARRIER
    assert guest.nic.inspect()["link"] is False
    assert guest.nic.connect(wire) is None
    guest.send(frame())
    assert len(wire.sent()) == 1


# Its life.


def test_a_software_reset_stops_all_and_forgets_addresses(guest: TulipGuest, wire: Wire) -> None:
    guest.put(reg.BUS_MODE, reg.SOFTWARE_RESET)
    assert [guest.get(number) for number in (0, 1, 2, 5, 6, 7, 8)] == [
        *(0xFE00_0000, 0xFFFF_FFFF, 0xFFFF_FFFF, 0xFC00_0000, 0x3200_0040, 0xF3FE_0000, 0xE000_0000)
    ]
    assert not guest.line.level
    guest.next_transmit = 0
    guest.start(setup=False)
    wire.give(frame())
    guest.work()
    assert guest.received() == []


def test_a_reset_of_the_board_takes_the_registers_back(guest: TulipGuest, wire: Wire) -> None:
    wire.give(frame())
    guest.work()
    assert guest.line.level
    guest.bus.reset()
    assert not guest.line.level
    assert guest.get(reg.OPERATION) == 0x3200_0040
    wire.give(frame())
    guest.work()
    assert guest.get(reg.STATUS) == 0xFC00_0000


def test_a_saved_nic_goes_on_elsewhere(guest: TulipGuest, wire: Wire) -> None:
    guest.send(frame())
    wire.give(frame(b"one"))
    guest.work()
    guest.put(reg.TIMER, reg.TIMER_CONTINUOUS | 1000)
    guest.bus.pause()
    other = TulipGuest()
    other_wire = other.plug()
    other.memory.write(0, guest.memory.read(0, 1 << 20))
    other.bus.restore(guest.bus.save())
    assert other.bus.save() == guest.bus.save()
    other.bus.resume()
    assert other.line.level, "for the frame"
    other.next_transmit, other.next_receive = guest.next_transmit, guest.next_receive
    other_wire.give(frame(b"two"))
    other_wire.give(frame(b"three", to=b"\x02" * 6))
    other.work()
    assert [data for _, data in other.received()] == [on_wire(frame(b"one")), on_wire(frame(b"two"))]
    other.send(frame(b"sent"))
    assert len(other_wire.sent()) == 1
    other.acknowledge()
    other.advance(300 * MILLISECOND)
    assert other.acknowledge() & reg.GTE
    other.close()


@pytest.mark.parametrize("part", ["chip", "csr", "status", "filter", "rom", "phy", "timer", "receive_list"])
def test_damaged_saved_state_is_refused(guest: TulipGuest, wire: Wire, part: str) -> None:
    state = guest.nic.save()
    if part == "chip":
        state["chip"] = 7
    elif part == "csr":
        state["chip"]["csr"] = bytes(64)
    else:
        state["chip"][part] = {}
    with pytest.raises(ValueError, match="saved state"):
        TulipGuest().nic.restore(state)


def test_people_see_what_passes(guest: TulipGuest, wire: Wire) -> None:
    guest.send(frame())
    wire.give(frame())
    wire.give(frame(to=b"\x02" * 6))
    guest.work()
    found = guest.nic.inspect()
    assert (found["mac"], found["link"]) == (MAC.hex(":"), True)
    assert found["port"] == {"network": "test network", "mtu": 1500, "link": True}
    counted = [found[name] for name in ("sent", "sent_bytes", "received", "received_bytes", "filtered")]
    assert counted == [1, 60, 1, len(frame()), 1]
    assert found["transmit_list"] == f"{TRANSMIT_RING + 16 * guest.next_transmit:#x}"
