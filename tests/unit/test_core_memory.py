"""Guest memory: its layout, its bounds, and that it costs and leaves nothing."""

from __future__ import annotations

import gc
import os
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core import _hot
from pyvmm.core.memory import HOLE_END, HOLE_START, PAGE_SIZE, GuestMemory, GuestMemoryError

MEGABYTE = 1 << 20
GIGABYTE = 1 << 30


def test_small_memory_is_one_run_from_zero() -> None:
    memory = GuestMemory(16 * MEGABYTE)
    assert list(memory.ram_ranges()) == [(0, 16 * MEGABYTE)]
    assert memory.top == 16 * MEGABYTE


def test_large_memory_leaves_the_hole_below_4_gib() -> None:
    memory = GuestMemory(64 * GIGABYTE)
    assert list(memory.ram_ranges()) == [(0, HOLE_START), (HOLE_END, 64 * GIGABYTE - HOLE_START)]
    assert memory.top == 64 * GIGABYTE + HOLE_END - HOLE_START
    memory.write(memory.top - 4, b"last")
    assert memory.read(memory.top - 4, 4) == b"last"
    for gpa in (HOLE_START, HOLE_END - 1, memory.top):
        with pytest.raises(GuestMemoryError):
            memory.read(gpa, 1)


def test_the_runs_on_both_sides_of_the_hole_are_different_memory() -> None:
    memory = GuestMemory(HOLE_START + MEGABYTE)
    memory.write(0, b"low")
    memory.write(HOLE_START - 4, b"end.")
    memory.write(HOLE_END, b"high")
    assert memory.read(0, 3) == b"low"
    assert memory.read(HOLE_START - 4, 4) == b"end."
    assert memory.read(HOLE_END, 4) == b"high"


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, PAGE_SIZE + 1])
def test_a_size_that_is_not_whole_pages_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4096"):
        GuestMemory(size)


def test_memory_starts_as_zeroes() -> None:
    assert GuestMemory(MEGABYTE).read(0, MEGABYTE) == bytes(MEGABYTE)


def test_a_view_is_the_memory_itself() -> None:
    memory = GuestMemory(MEGABYTE)
    view = memory.view(0x1000, 8, write=True)
    view[:] = b"12345678"
    assert memory.read(0x1002, 4) == b"3456"
    memory.write(0x1000, b"x")
    assert view[0] == ord("x")


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(-1, 1), (-8, 16), (MEGABYTE, 1), (MEGABYTE - 1, 2), (0, MEGABYTE + 1), (0, -1), (1 << 63, 8), (1 << 64, 8)],
)
def test_an_access_outside_is_refused_and_names_the_gpa(gpa: int, size: int) -> None:
    memory = GuestMemory(MEGABYTE)
    with pytest.raises(GuestMemoryError, match=f"GPA {gpa:#x}") as caught:
        memory.view(gpa, size)
    assert (caught.value.gpa, caught.value.size) == (gpa, size)


@given(st.integers(-(1 << 65), 1 << 65), st.integers(-4, 1 << 65))
def test_a_view_is_as_long_as_asked_or_refused(gpa: int, size: int) -> None:
    memory = SHARED
    try:
        view = memory.view(gpa, size)
    except GuestMemoryError:
        inside = size >= 0 and any(base <= gpa and gpa + size <= base + length for base, length in memory.ram_ranges())
        assert not inside
    else:
        assert len(view) == size


SHARED = GuestMemory(HOLE_START + MEGABYTE)


def test_a_rom_can_be_read_but_not_written() -> None:
    memory = GuestMemory(MEGABYTE)
    memory.add_rom(0xFFFF_0000, b"R" * 0x10000)
    assert memory.read(0xFFFF_FFF0, 16) == b"R" * 16
    with pytest.raises(GuestMemoryError, match="read-only"):
        memory.write(0xFFFF_0000, b"x")
    assert list(memory.ram_ranges()) == [(0, MEGABYTE)]
    assert memory.top == MEGABYTE


@pytest.mark.parametrize(("gpa", "length"), [(0xFFFF_0001, 0x1000), (0xFFFF_0000, 0xFFF), (0xFFFF_0000, 0)])
def test_a_rom_that_is_not_whole_pages_is_refused(gpa: int, length: int) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        GuestMemory(MEGABYTE).add_rom(gpa, bytes(length))


def test_a_rom_over_ram_is_refused_and_leaves_no_trace() -> None:
    memory = GuestMemory(MEGABYTE)
    with pytest.raises(ValueError, match="overlaps"):
        memory.add_rom(0x1000, b"R" * PAGE_SIZE)
    assert memory.read(0x1000, 1) == b"\0"
    assert len(memory.regions) == 1


def test_c_code_refuses_regions_beyond_its_table() -> None:
    hot = _hot.Memory()
    for number in range(8):
        hot.add(number * 0x10000, bytearray(PAGE_SIZE), False)
    with pytest.raises(RuntimeError, match="too many"):
        hot.add(0x100000, bytearray(PAGE_SIZE), False)


@pytest.mark.parametrize(("gpa", "size"), [(0, 0), ((1 << 64) - PAGE_SIZE + 1, PAGE_SIZE)])
def test_c_code_refuses_regions_that_are_empty_or_wrap(gpa: int, size: int) -> None:
    with pytest.raises(ValueError, match="empty or wraps"):
        _hot.Memory().add(gpa, bytearray(size), False)


def test_c_code_keeps_its_regions_mapped() -> None:
    hot = _hot.Memory()
    buffer = bytearray(PAGE_SIZE)
    hot.add(0, buffer, False)
    with pytest.raises(BufferError):
        buffer.append(0)
    del hot
    buffer.append(0)


def test_no_file_is_left_open() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        GuestMemory(MEGABYTE).write(0, b"x")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_forgotten_page_keeps_its_contents_and_a_rom_is_left_alone() -> None:
    memory = GuestMemory(2 * MEGABYTE)
    memory.write(0x3000, b"x" * PAGE_SIZE)
    memory.add_rom(HOLE_END - PAGE_SIZE, b"r" * PAGE_SIZE)
    for gpa in (0x3000, 0x3FFF, HOLE_END - PAGE_SIZE, HOLE_START):
        memory.forget_page(gpa)
    assert memory.read(0x3000, PAGE_SIZE) == b"x" * PAGE_SIZE
    assert memory.read(HOLE_END - PAGE_SIZE, PAGE_SIZE) == b"r" * PAGE_SIZE


def test_forgetting_a_page_unmaps_it_until_it_is_touched() -> None:
    memory = GuestMemory(2 * MEGABYTE)
    memory.write(0, bytes(MEGABYTE))
    before = minor_faults()
    memory.write(0x5000, b"x")
    assert minor_faults() == before
    memory.forget_page(0x5000)
    memory.write(0x5000, b"y")
    assert minor_faults() == before + 1


def minor_faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
