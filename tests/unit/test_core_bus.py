"""Buses: who answers an address."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.bus import Bus, BusHandler


class Register(BusHandler):
    """Remembers what was asked and answers with `value`."""

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.asked: list[Any] = []

    def read(self, offset: int, size: int) -> int:
        self.asked.append(("read", offset, size))
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.asked.append(("write", offset, size, value))


def test_an_access_goes_to_its_range_with_the_offset_from_its_start() -> None:
    bus, first, second = Bus("pio"), Register(1), Register(2)
    bus.register(0x100, 8, second, "second")
    bus.register(0x40, 4, first, "first")
    assert bus.read(0x43, 1) == 1
    assert bus.read(0x100, 2) == 2
    bus.write(0x107, 1, 0x55)
    assert first.asked == [("read", 3, 1)]
    assert second.asked == [("read", 0, 2), ("write", 7, 1, 0x55)]


@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFF_FFFF), (8, (1 << 64) - 1)])
def test_what_nobody_answers_reads_as_ones_and_swallows_writes(size: int, ones: int) -> None:
    bus = Bus("mmio")
    bus.register(0x1000, 4, Register(), "neighbour")
    assert bus.read(0x1004, size) == ones
    bus.write(0xFFF, size, 0)
    assert bus.unclaimed == {0x1004: 1, 0xFFF: 1}


def test_a_handler_cannot_answer_more_bits_than_were_asked_for() -> None:
    bus = Bus("pio")
    bus.register(0, 1, Register(-1), "wide")
    assert bus.read(0, 1) == 0xFF
    assert bus.read(0, 4) == 0xFFFF_FFFF


@pytest.mark.parametrize(("base", "length"), [(0x0F, 2), (0x10, 1), (0x17, 1), (0x0, 0x100), (0x12, 2)])
def test_ranges_do_not_overlap(base: int, length: int) -> None:
    bus = Bus("pio")
    bus.register(0x10, 8, Register(), "taken")
    with pytest.raises(ValueError, match="overlaps taken"):
        bus.register(base, length, Register(), "late")
    assert bus.read(base, 1) in (0, 0xFF)
    assert [entry["name"] for entry in bus.inspect()["ranges"]] == ["taken"]


@pytest.mark.parametrize("length", [0, -1])
def test_an_empty_range_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="empty"):
        Bus("pio").register(0x10, length, Register(), "nothing")


def test_ranges_may_touch() -> None:
    bus = Bus("pio")
    for base in (0x10, 0x20, 0x18):
        bus.register(base, 8, Register(base), str(base))
    assert [bus.read(address, 1) for address in (0x17, 0x18, 0x1F, 0x20)] == [0x10, 0x18, 0x18, 0x20]


def test_string_accesses_are_single_ones_to_a_handler_that_knows_no_better() -> None:
    bus, register = Bus("pio"), Register(0x12345)
    bus.register(0x40, 4, register, "register")
    assert bus.read_string(0x41, 2, 3) == bytes.fromhex("452345234523")
    bus.write_string(0x42, 2, bytes.fromhex("01020304"))
    assert register.asked == [*[("read", 1, 2)] * 3, ("write", 2, 2, 0x0201), ("write", 2, 2, 0x0403)]


def test_string_accesses_that_nobody_answers_read_as_ones_and_swallow_writes() -> None:
    bus = Bus("pio")
    assert bus.read_string(0x1F0, 4, 2) == b"\xff" * 8
    bus.write_string(0x1F0, 2, bytes(4))


def test_a_range_that_went_is_nobodys_and_may_be_taken_again() -> None:
    bus = Bus("pio")
    for base in (0x10, 0x18, 0x20):
        bus.register(base, 8, Register(base), str(base))
    bus.unregister(0x18)
    assert [bus.read(address, 1) for address in (0x17, 0x18, 0x20)] == [0x10, 0xFF, 0x20]
    bus.register(0x1C, 4, Register(0x1C), "new")
    assert [bus.read(address, 1) for address in (0x1B, 0x1C, 0x20)] == [0xFF, 0x1C, 0x20]
    with pytest.raises(ValueError, match="not in"):
        bus.unregister(0x18)


def test_an_access_finds_its_range_while_others_come_and_go() -> None:
    bus = Bus("pio")
    bus.register(0x100, 8, Register(0x42), "steady")
    done = threading.Event()

    def churn() -> None:
        for base in [*range(0, 0x100, 8), *range(0x108, 0x1000, 8)] * 4:
            bus.register(base, 8, Register(), "fleeting")
            bus.unregister(base)
        done.set()

    thread = threading.Thread(target=churn)
    thread.start()
    wrong = sum(bus.read(0x104, 1) != 0x42 for _ in iter(done.is_set, True))
    thread.join()
    assert wrong == 0


def test_what_the_guest_touches_in_vain_is_counted_but_bounded() -> None:
    bus = Bus("pio")
    for address in range(1000):
        bus.read(address, 1)
        bus.write(address, 1, 0)
    assert len(bus.unclaimed) == 64
    assert bus.inspect()["unclaimed"]["0x0"] == 2


def test_inspect_while_the_guest_touches_new_addresses() -> None:
    bus = Bus("pio")
    bus._UNCLAIMED_LIMIT = 1 << 20
    done = threading.Event()

    def guest() -> None:
        for address in range(100_000):
            bus.read(address, 1)
        done.set()

    thread = threading.Thread(target=guest)
    thread.start()
    while not done.is_set():
        bus.inspect()
    thread.join()
    assert len(bus.inspect()["unclaimed"]) == 100_000


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), max_size=30), st.integers(0, 250))
def test_lookup_agrees_with_the_list_of_ranges(ranges: list[tuple[int, int]], address: int) -> None:
    bus = Bus("pio")
    taken: dict[int, int] = {}
    for number, (base, length) in enumerate(ranges):
        clash = any(where in taken for where in range(base, base + length))
        if clash:
            with pytest.raises(ValueError, match="overlaps"):
                bus.register(base, length, Register(number), str(number))
        else:
            bus.register(base, length, Register(number), str(number))
            taken.update(dict.fromkeys(range(base, base + length), number))
    assert bus.read(address, 4) == taken.get(address, 0xFFFF_FFFF)
