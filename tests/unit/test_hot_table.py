"""The block allocation table in C: what goes in comes out, and a check finds every wrong entry."""

from __future__ import annotations

import resource
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.core._hot import BlockTable

MIB = 1 << 20
ABSENT, UNDEFINED, ZERO, UNMAPPED, PRESENT, PARTIAL = 0, 1, 2, 3, 6, 7


def entry(state: int, mib: int = 0) -> int:
    return mib << 20 | state


def table_of(*entries: int) -> BlockTable:
    table = BlockTable(len(entries))
    table.load(0, struct.pack(f"<{len(entries)}Q", *entries))
    return table


# Entries ----------------------------------------------------------------------------------------------


def test_entries_are_zero_until_loaded_and_come_out_as_they_went_in() -> None:
    table = BlockTable(5)
    assert (len(table), table.entries(0, 5)) == (5, bytes(40))
    raw = bytes(range(1, 17))
    table.load(2, raw)
    assert table.entries(0, 5) == bytes(16) + raw + bytes(8)
    assert table.get(3) == int.from_bytes(raw[8:], "little")


def test_loading_zeros_clears_entries() -> None:
    table = table_of(1, 2, 3)
    table.load(1, bytes(16))
    assert [table.get(i) for i in range(3)] == [1, 0, 0]


def test_set_changes_one_entry() -> None:
    table = table_of(1, 2, 3)
    table.set(1, 2**64 - 1)
    assert [table.get(i) for i in range(3)] == [1, 2**64 - 1, 3]


@pytest.mark.parametrize("index", [-1, 3, 2**40])
def test_an_index_outside_is_refused(index: int) -> None:
    table = table_of(1, 2, 3)
    with pytest.raises(IndexError):
        table.get(index)
    with pytest.raises(IndexError):
        table.set(index, 1)
    with pytest.raises(IndexError):
        table.load(index, bytes(8))
    with pytest.raises(IndexError):
        table.entries(index, 1)
    with pytest.raises(IndexError):
        table.entries(0, 4)


def test_values_that_are_no_entries_are_refused() -> None:
    table = BlockTable(3)
    with pytest.raises(OverflowError):
        table.set(0, 2**64)
    with pytest.raises(OverflowError):
        table.set(0, -1)
    with pytest.raises(ValueError, match="whole entries"):
        table.load(0, bytes(12))
    with pytest.raises(ValueError, match="table of"):
        BlockTable(0)
    with pytest.raises(ValueError, match="table of"):
        BlockTable(2**40)


def test_a_large_table_without_blocks_costs_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    table = BlockTable(1 << 26)  # 512 MiB of entries
    zeros = bytes(1 << 20)
    for first in range(0, 1 << 24, 1 << 17):
        table.load(first, zeros)
    table.set((1 << 26) - 1, 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_draining_lets_other_threads_run() -> None:
    threads = [threading.Thread(target=BlockTable(1).drain) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# Checking ---------------------------------------------------------------------------------------------

# Chunks of two blocks of 2 MiB: entries 0, 1, 3, 4, 6 are of blocks, 2 and 5 of sector bitmaps.


def check(table: BlockTable, has_parent: bool = False, file_mib: int = 100, limit: int = 10) -> list[tuple[int, str]]:
    return table.check(2, 2 * MIB, file_mib * MIB, [(0, MIB), (10 * MIB, MIB + 1)], has_parent=has_parent, limit=limit)


def test_blocks_side_by_side_up_to_the_end_of_the_file_are_good() -> None:
    table = table_of(entry(PRESENT, 1), entry(PRESENT, 3), 0, entry(PRESENT, 98), entry(PRESENT, 8), 0)
    assert check(table) == []


@pytest.mark.parametrize("state", [ABSENT, UNDEFINED, ZERO, UNMAPPED])
def test_where_an_absent_block_once_was_does_not_matter(state: int) -> None:
    assert check(table_of(entry(PRESENT, 1), entry(state, 1), 0, entry(state, 10), entry(state, 2**40))) == []


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (entry(4, 20), "state"),
        (entry(5, 20), "state"),
        (entry(PARTIAL, 20), "state"),
        (entry(PRESENT, 99), "outside"),
        (entry(PRESENT, 2**44 - 1), "outside"),
        (entry(PRESENT, 0), "reserved"),
        (entry(PRESENT, 9), "reserved"),
        (entry(PRESENT, 11), "reserved"),
        (entry(PRESENT, 2), "overlap"),
        (entry(PRESENT, 0xFFFFF), "outside"),
    ],
)
def test_a_bad_block_is_found_and_named(bad: int, kind: str) -> None:
    assert check(table_of(entry(PRESENT, 1), 0, 0, bad)) == [(3, kind)]


@pytest.mark.parametrize("state", [1, 2, 3, 4, 5, 7])
def test_a_sector_bitmap_is_present_or_not(state: int) -> None:
    assert check(table_of(0, 0, entry(state, 20)), has_parent=True) == [(2, "state")]


def test_a_sector_bitmap_takes_one_mebibyte() -> None:
    assert check(table_of(entry(PRESENT, 20), 0, entry(PRESENT, 22)), has_parent=True) == []
    assert check(table_of(entry(PRESENT, 20), 0, entry(PRESENT, 21)), has_parent=True) == [(2, "overlap")]
    assert check(table_of(0, 0, entry(PRESENT, 99)), has_parent=True) == []


def test_partial_blocks_need_their_chunks_bitmap() -> None:
    good = table_of(entry(PARTIAL, 20), entry(PARTIAL, 30), entry(PRESENT, 40), 0, 0, 0)
    assert check(good, has_parent=True) == []
    good.set(2, 0)
    assert check(good, has_parent=True) == [(0, "bitmap")]
    # The last chunk's bitmap may not even have an entry.
    assert check(table_of(entry(PRESENT, 20), entry(PARTIAL, 30)), has_parent=True) == [(1, "bitmap")]


def test_no_more_is_told_than_asked_for() -> None:
    table = table_of(*[entry(4)] * 8)
    assert check(table, limit=2) == [(0, "state"), (1, "state")]
    assert table.check(2, 2 * MIB, 100 * MIB, []) == [(0, "state")]
    assert check(table, limit=0) == []


def test_a_file_said_to_be_huge_takes_no_huge_map() -> None:
    table = table_of(entry(PRESENT, 2**27 - 2), entry(PRESENT, 2**27 - 1))
    assert table.check(2, 2 * MIB, 2**64 - 1, [], limit=9) == [(1, "outside")]


@pytest.mark.parametrize(("ratio", "block"), [(0, MIB), (1, 0), (1, MIB + 512), (1, 257 * MIB), (1, MIB - 1)])
def test_layouts_that_no_image_has_are_refused(ratio: int, block: int) -> None:
    with pytest.raises(ValueError, match="blocks are of"):
        BlockTable(1).check(ratio, block, 0, [])


def expected(
    entries: list[int], ratio: int, block: int, size: int, reserved: list[tuple[int, int]], has_parent: bool
) -> set[tuple[int, str]]:
    """What is wrong, worked out block by block of 1 MiB."""
    wrong = set()
    taken: set[int] = set()
    forbidden = {mib for start, length in reserved for mib in range(start, start + length)}
    for index, value in enumerate(entries):
        state, start = value & 7, value >> 20
        is_bitmap = index % (ratio + 1) == ratio
        good = {0, 6} if is_bitmap else {0, 1, 2, 3, 6, 7} if has_parent else {0, 1, 2, 3, 6}
        if state not in good:
            wrong.add((index, "state"))
        elif state >= PRESENT:
            place = set(range(start, start + (1 if is_bitmap else block)))
            if max(place) >= size:
                wrong.add((index, "outside"))
            elif place & forbidden:
                wrong.add((index, "reserved"))
            else:
                if place & taken:
                    wrong.add((index, "overlap"))
                taken |= place
    for first in range(0, len(entries), ratio + 1):
        chunk = entries[first : first + ratio + 1]
        partial = [first + i for i, value in enumerate(chunk[:ratio]) if has_parent and value & 7 == PARTIAL]
        if partial and (len(chunk) <= ratio or chunk[ratio] & 7 != PRESENT):
            wrong.add((partial[0], "bitmap"))
    return wrong


@settings(max_examples=300, deadline=None)
@given(
    entries=st.lists(
        st.builds(entry, st.sampled_from([0, 2, 6, 6, 6, 7, 5]), st.integers(0, 300)), min_size=1, max_size=40
    ),
    ratio=st.integers(1, 8),
    block=st.sampled_from([1, 2, 32, 64, 65, 200]),
    size=st.integers(0, 400),
    reserved=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 3)), max_size=3),
    has_parent=st.booleans(),
)
def test_a_check_finds_what_a_plain_one_finds(
    entries: list[int], ratio: int, block: int, size: int, reserved: list[tuple[int, int]], has_parent: bool
) -> None:
    ranges = [(start * MIB, length * MIB) for start, length in reserved]
    found = table_of(*entries).check(ratio, block * MIB, size * MIB, ranges, has_parent=has_parent, limit=1000)
    assert len(found) == len(set(found))
    assert set(found) == expected(entries, ratio, block, size, reserved, has_parent)
