"""Which frames a 21140 receives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.legacy.dec21140 import descriptors as d
from devices.legacy.dec21140 import registers as reg
from devices.legacy.dec21140.address_filter import SETUP_SIZE, hash_index
from tests.fakes.tulip import BROADCAST, MAC, TulipGuest, frame, spread

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

GROUP, OTHER_GROUP, OTHER = bytes.fromhex("01005e000001"), bytes.fromhex("333300000016"), bytes.fromhex("00155d000999")
PERFECT, HASH, INVERSE, HASH_ONLY = range(4)


@pytest.fixture
def guest() -> Iterator[TulipGuest]:
    guest = TulipGuest(ring=8)
    guest.plug()
    guest.start(setup=False)
    yield guest
    guest.close()


def taken(guest: TulipGuest, *destinations: bytes) -> list[bytes]:
    """Those of the destinations whose frames come through."""
    assert guest.wire is not None
    for to in destinations:
        guest.wire.give(frame(to=to))
    guest.work()
    return [data[:6] for _, data in guest.received()]


def hash_frame(addresses: Sequence[bytes], own: bytes) -> bytes:
    """A setup frame with hash bits, as drivers make it."""
    bits = bytearray(64)
    for address in addresses:
        bits[hash_index(address) >> 3] |= 1 << (hash_index(address) & 7)
    return (spread(bytes(bits)).ljust(156, b"\0") + spread(own)).ljust(SETUP_SIZE, b"\0")


ALL = (MAC, OTHER, BROADCAST, GROUP, OTHER_GROUP)


def test_before_a_setup_frame_nothing_is_taken(guest: TulipGuest) -> None:
    assert taken(guest, *ALL) == []


def test_sixteen_perfect_addresses(guest: TulipGuest) -> None:
    table = [bytes([2, 0, 0, 0, 0, index]) for index in range(16)]
    guest.set_filter(table)
    guest.demand()
    assert taken(guest, *table[:8]) + taken(guest, *table[8:]) == table
    assert taken(guest, *ALL) == []
    assert guest.get(reg.OPERATION) & reg.FILTER_BITS == 0


def test_inverse_filtering_takes_all_others(guest: TulipGuest) -> None:
    guest.set_filter([OTHER, GROUP], INVERSE)
    guest.demand()
    assert taken(guest, *ALL) == [MAC, BROADCAST, OTHER_GROUP]
    assert guest.get(reg.OPERATION) & reg.FILTER_BITS == reg.IF


def test_hash_filtering_of_groups_with_one_perfect_address(guest: TulipGuest) -> None:
    guest.set_up(hash_frame([GROUP, BROADCAST, OTHER], MAC), HASH)
    guest.demand()
    assert taken(guest, *ALL) == [MAC, BROADCAST, GROUP]
    assert guest.get(reg.OPERATION) & reg.FILTER_BITS == reg.HP


def test_hash_filtering_of_all(guest: TulipGuest) -> None:
    guest.set_up(hash_frame([GROUP, OTHER], MAC), HASH_ONLY)
    guest.demand()
    assert taken(guest, *ALL) == [OTHER, GROUP]
    assert guest.get(reg.OPERATION) & reg.FILTER_BITS == reg.HP | reg.HO


def test_the_broadcast_address_has_the_hash_that_linux_sets() -> None:
    assert hash_index(BROADCAST) == 255


def test_the_filter_bits_are_read_only(guest: TulipGuest) -> None:
    guest.put(reg.OPERATION, guest.get(reg.OPERATION) | reg.FILTER_BITS)
    assert guest.get(reg.OPERATION) & reg.FILTER_BITS == 0


@pytest.mark.parametrize(
    ("mode", "expected", "failed"),
    [(reg.PR, ALL, ALL[1:]), (reg.PM, (MAC, BROADCAST, GROUP, OTHER_GROUP), ALL[2:]), (reg.RA, ALL, ALL[1:])],
)
def test_modes_that_take_more_than_the_table(
    guest: TulipGuest, mode: int, expected: tuple[bytes, ...], failed: tuple[bytes, ...]
) -> None:
    guest.set_filter([MAC])
    guest.demand()
    guest.put(reg.OPERATION, reg.SR | reg.ST | mode)
    guest.work()
    assert guest.wire is not None
    for to in ALL:
        guest.wire.give(frame(to=to))
    guest.work()
    came = guest.received()
    assert tuple(data[:6] for _, data in came) == expected
    assert {data[:6] for status, data in came if status & d.FILTERING_FAIL} == set(failed)


def test_a_setup_frame_says_that_it_is_done(guest: TulipGuest) -> None:
    guest.put(reg.STATUS, 0x1FFFF)
    at = guest.set_up(spread(MAC) * 16, PERFECT)
    guest.demand()
    assert guest.status_of(at) == d.SETUP_DONE
    assert not guest.status() & reg.TI
    at = guest.add(d.ON_COMPLETION | d.SETUP | SETUP_SIZE, 0x3000)
    guest.demand()
    assert guest.status() & reg.TI
    assert guest.wire is not None and guest.wire.sent() == []


@pytest.mark.parametrize("size", [0, 64, 191, 193])
def test_setup_frames_of_other_sizes_change_nothing(guest: TulipGuest, size: int) -> None:
    guest.set_filter([OTHER])
    guest.demand()
    at = guest.set_up(bytes(size), PERFECT)
    guest.demand()
    assert guest.status_of(at) == d.SETUP_DONE
    assert taken(guest, *ALL) == [OTHER]


@pytest.mark.parametrize("kind", range(4))
def test_the_filter_is_part_of_the_saved_state(guest: TulipGuest, kind: int) -> None:
    guest.set_up(hash_frame([GROUP], MAC) if kind & 1 else spread(GROUP) + spread(MAC) * 15, kind)
    guest.demand()
    state = guest.bus.save()
    before = taken(guest, *ALL)
    other = TulipGuest(ring=8)
    other.plug()
    other.start(setup=False)
    other.bus.restore(state)
    other.bus.resume()
    other.put(reg.RECEIVE_LIST, 0x1000)
    assert taken(other, *ALL) == before
    other.close()


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=6, max_size=6))
def test_the_hash_is_the_low_end_of_the_ethernet_checksum(address: bytes) -> None:
    crc = 0xFFFF_FFFF
    for byte in address:
        for bit in range(8):
            feedback = (crc ^ byte >> bit) & 1
            crc = crc >> 1 ^ (0xEDB8_8320 if feedback else 0)
    assert hash_index(address) == crc & 0x1FF
