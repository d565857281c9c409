"""Guests that lie to a 21140: it ends in a bus error or an error in a descriptor, never in an exception or a hang."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.legacy.dec21140 import descriptors as d
from devices.legacy.dec21140 import registers as reg
from devices.legacy.pci import COMMAND
from tests.fakes.tulip import (
    MIB,
    MMIO,
    PORTS,
    RECEIVE_RING,
    SETUP,
    TRANSMIT_BUFFERS,
    TRANSMIT_RING,
    TulipGuest,
    frame,
    on_wire,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

WHOLE = d.FIRST_SEGMENT | d.LAST_SEGMENT
#: Beyond memory, across its end, at the end of 32 bits, in the interrupt controllers.
NOWHERE = (MIB, MIB - 8, 0xFFFF_FFFC, 0xFEE0_0000, 0xC000_0000)
ONES = 0xFFFF_FFFF


@pytest.fixture
def guest() -> Iterator[TulipGuest]:
    guest = TulipGuest()
    guest.plug()
    guest.start()
    yield guest
    guest.close()


def assert_failed_until_reset(guest: TulipGuest) -> None:
    """The chip has met a bus error; it keeps off memory, and a reset brings it back."""
    assert guest.wire is not None
    assert guest.status() & (reg.FBE | reg.AIS) == reg.FBE | reg.AIS
    assert guest.get(reg.STATUS) >> reg.ERROR_SHIFT & 7 == reg.MASTER_ABORT
    assert guest.line.level
    assert guest.states() == (reg.STOPPED, reg.STOPPED)
    guest.put(reg.STATUS, ONES)
    guest.put(reg.OPERATION, 0)
    guest.put(reg.OPERATION, reg.SR | reg.ST)
    guest.wire.give(frame())
    guest.work()
    assert guest.states() == (reg.STOPPED, reg.STOPPED)
    guest.put(reg.BUS_MODE, reg.SOFTWARE_RESET)
    guest.next_transmit = guest.next_receive = 0
    guest.start()
    assert_works(guest)


def assert_works(guest: TulipGuest) -> None:
    assert guest.wire is not None
    guest.wire.sent()
    guest.send(frame(b"o" * 60))
    assert guest.wire.sent() == [frame(b"o" * 60)]
    guest.wire.give(frame(b"i" * 60))
    guest.work()
    assert [data for _, data in guest.received()] == [on_wire(frame(b"i" * 60))]


@pytest.mark.parametrize("address", NOWHERE)
@pytest.mark.parametrize("what", ["list", "chain", "buffer", "second buffer", "setup"])
def test_transmit_lists_that_lead_nowhere_end_in_a_bus_error(guest: TulipGuest, address: int, what: str) -> None:
    if what == "list":
        guest.put(reg.TRANSMIT_LIST, address)
    elif what == "chain":
        guest.add(d.CHAINED | d.FIRST_SEGMENT | 10, TRANSMIT_BUFFERS, address)
    elif what == "buffer":
        guest.add(WHOLE | 60, address)
    elif what == "second buffer":
        guest.add(WHOLE | 60 << 11 | 60, TRANSMIT_BUFFERS, address)
    else:
        guest.add(d.SETUP | 192, address)
    guest.demand()
    assert_failed_until_reset(guest)


@pytest.mark.parametrize("address", NOWHERE)
@pytest.mark.parametrize("what", ["list", "chain", "buffer", "second buffer"])
def test_receive_lists_that_lead_nowhere_end_in_a_bus_error(guest: TulipGuest, address: int, what: str) -> None:
    assert guest.wire is not None
    if what == "list":
        guest.put(reg.RECEIVE_LIST, address)
    elif what == "chain":
        guest.descriptor(RECEIVE_RING, d.OWN, d.CHAINED | 20, 0x40000, address)
    elif what == "buffer":
        guest.descriptor(RECEIVE_RING, d.OWN, 60, address)
    else:
        guest.descriptor(RECEIVE_RING, d.OWN, 60 << 11 | 20, 0x40000, address)
    guest.wire.give(frame())
    guest.work()
    assert_failed_until_reset(guest)


def test_roms_are_not_written_to(guest: TulipGuest) -> None:
    assert guest.wire is not None
    guest.memory.add_rom(0xFFFF_0000, bytes(0x10000))
    guest.descriptor(RECEIVE_RING, d.OWN, 2000, 0xFFFF_0000)
    guest.wire.give(frame())
    guest.work()
    assert guest.memory.read(0xFFFF_0000, 64) == bytes(64)
    assert_failed_until_reset(guest)


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_frame_that_is_chained_to_itself_is_ended(guest: TulipGuest, size: int) -> None:
    guest.descriptor(0x5000, d.OWN, d.FIRST_SEGMENT | d.CHAINED | size, TRANSMIT_BUFFERS, 0x5000)
    guest.put(reg.TRANSMIT_LIST, 0x5000)
    guest.demand()
    assert not guest.status_of(0x5000) & d.OWN
    assert guest.states()[1] in (reg.STOPPED, reg.TRANSMIT_SUSPENDED)


@pytest.mark.parametrize("size", [0, 1, 100])
def test_room_that_is_chained_to_itself_is_used_once(guest: TulipGuest, size: int) -> None:
    assert guest.wire is not None
    guest.descriptor(0x5000, d.OWN, d.CHAINED | size, 0x40000, 0x5000)
    guest.put(reg.RECEIVE_LIST, 0x5000)
    guest.wire.give(frame(bytes(1000)))
    guest.work()
    status = guest.status_of(0x5000)
    assert status & (d.OWN | d.LAST | d.DESCRIPTOR_ERROR) == d.LAST | d.DESCRIPTOR_ERROR


def test_a_list_of_empty_room_without_end_is_not_followed_for_ever(guest: TulipGuest) -> None:
    assert guest.wire is not None
    for at in range(0x80000, 0x80000 + 16 * 1000, 16):
        guest.descriptor(at, d.OWN, 0)
    guest.put(reg.RECEIVE_LIST, 0x80000)
    guest.wire.give(frame())
    guest.work()
    used = [at for at in range(0x80000, 0x80000 + 16 * 1000, 16) if not guest.status_of(at) & d.OWN]
    assert len(used) == d.FRAME_LIMIT


def test_many_frames_leave_others_their_turn(guest: TulipGuest) -> None:
    """A list that the guest fills for ever does not keep the worker from what else it has to do."""
    assert guest.wire is not None
    for at in range(0x80000, 0x80000 + 16 * 200, 16):
        guest.descriptor(at, d.OWN, 0)
    guest.put(reg.TRANSMIT_LIST, 0x80000)
    guest.put(reg.TRANSMIT_POLL, 1)
    calls = 0
    while guest.worker.calls:
        guest.worker.calls.popleft()()
        calls += 1
    assert calls == 4, "of 64 descriptors each"


REGISTER = st.tuples(
    st.sampled_from([*range(0, 128, 8), 4, 0x39]),
    st.sampled_from([1, 2, 4]),
    st.one_of(st.integers(0, ONES), st.sampled_from([0, 1, TRANSMIT_RING, RECEIVE_RING, 0x2002, 0x2402, ONES])),
)
ADDRESS = st.one_of(st.integers(0, MIB), st.sampled_from([TRANSMIT_RING, RECEIVE_RING, SETUP, *NOWHERE]))
DESCRIPTOR = st.tuples(
    st.sampled_from([TRANSMIT_RING, RECEIVE_RING]),
    st.integers(0, 7),
    st.sampled_from([d.OWN, d.OWN, 0, ONES]),
    st.one_of(
        st.integers(0, ONES),
        st.builds(
            lambda flags, one, two: flags | two << 11 | one,
            st.sampled_from(
                [WHOLE, d.FIRST_SEGMENT, d.LAST_SEGMENT, d.CHAINED | WHOLE, d.SETUP, d.END_OF_RING | WHOLE, d.CHAINED]
            ),
            st.sampled_from([0, 1, 60, 192, 1514, 2047]),
            st.sampled_from([0, 0, 60, 2047]),
        ),
    ),
    ADDRESS,
    ADDRESS,
)
ACTION = st.one_of(
    st.tuples(st.just("register"), REGISTER),
    st.tuples(st.just("descriptor"), DESCRIPTOR),
    st.tuples(st.just("demand"), st.just(())),
    st.tuples(st.just("start"), st.just(())),
    st.tuples(st.just("frame"), st.binary(max_size=200)),
    st.tuples(st.just("time"), st.integers(0, 50_000_000)),
    st.tuples(st.just("link"), st.booleans()),
    st.tuples(st.just("config"), st.tuples(st.sampled_from([4, 0x10, 0x14, 0x30, 0x3C]), st.integers(0, ONES))),
    st.tuples(st.just("save"), st.just(())),
)


def act(guest: TulipGuest, kind: str, what: tuple[int, ...] | bytes | int) -> TulipGuest:
    """Do one thing to the NIC; return the guest, or the one that it has become."""
    assert guest.wire is not None
    if kind == "register":
        offset, size, value = what  # type: ignore[misc]
        bus, base = (guest.pio, PORTS) if value & 8 else (guest.mmio, MMIO)
        bus.write(base + offset, size, value & (1 << 8 * size) - 1)
        bus.read(base + offset, size)
    elif kind == "descriptor":
        ring, index, *words = what  # type: ignore[misc]
        guest.memory.write(ring + 16 * index, struct.pack("<IIII", *words))
    elif kind == "demand":
        guest.demand()
        guest.put(reg.RECEIVE_POLL, 0)
    elif kind == "start":
        guest.config(COMMAND, 7)
        guest.put(reg.RECEIVE_LIST, RECEIVE_RING)
        guest.put(reg.TRANSMIT_LIST, TRANSMIT_RING)
        guest.put(reg.OPERATION, reg.SR | reg.ST | reg.PR)
    elif kind == "frame":
        assert isinstance(what, bytes)
        guest.wire.give(frame(what))
    elif kind == "time":
        assert isinstance(what, int)
        guest.advance(what)
    elif kind == "link":
        guest.nic.set_link(bool(what))
    elif kind == "config":
        register, value = what  # type: ignore[misc]
        guest.config(register, value, 4)
    else:
        return saved_and_restored(guest)
    guest.work()
    guest.wire.sent()
    return guest


def saved_and_restored(guest: TulipGuest) -> TulipGuest:
    other = TulipGuest()
    other.plug()
    other.memory.write(0, guest.memory.read(0, MIB))
    state = guest.bus.save()
    other.bus.restore(state)
    assert other.bus.save() == state
    other.bus.resume()
    guest.close()
    return other


@settings(max_examples=int(os.environ.get("PYVMM_EXAMPLES", "150")), deadline=None)
@given(st.lists(ACTION, max_size=50))
def test_whatever_a_guest_does_a_reset_brings_the_nic_back(actions: list[tuple[str, tuple[int, ...]]]) -> None:
    guest = TulipGuest()
    try:
        guest.plug()
        guest.start()
        for kind, what in actions:
            guest = act(guest, kind, what)
        guest.bus.reset()
        guest.nic.set_link(True)
        guest.advance(50_000_000)
        guest.next_transmit = guest.next_receive = 0
        guest.start()
        assert_works(guest)
    finally:
        guest.close()
