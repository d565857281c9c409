"""Kernels of every format reach guest memory with what their first instruction relies on; broken ones are refused."""

from __future__ import annotations

import io
import itertools
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.boot import elf, linux, payload
from pyvmm.boot.entry import CODE_SELECTOR, DATA_SELECTOR, BootError, EntryState
from pyvmm.boot.kernel import load_kernel
from pyvmm.boot.layout import RSDP_ADDRESS
from pyvmm.boot.linux import load_linux
from pyvmm.core.memory import GuestMemory
from tests.fakes.boot_images import COMPRESSIONS, compress, make_bzimage, make_elf

MIB = 1 << 20
GIB = 1 << 30
KERNEL_BASE = 16 * MIB
KERNEL_VIRTUAL = 0xFFFF_FFFF_8100_0000
TEXT = bytes(range(256)) * 700
BSS = 0x3000


def kernel_elf(entry: int = KERNEL_BASE + 0x40) -> bytes:
    """Text, then a segment that is linked at virtual address 0 as Linux's per-CPU data is, then bss."""
    return make_elf(
        [
            (KERNEL_VIRTUAL, KERNEL_BASE, TEXT, len(TEXT)),
            (0, KERNEL_BASE + 0x10_0000, b"percpu", 0x2000),
            (KERNEL_VIRTUAL + 0x20_0000, KERNEL_BASE + 0x20_0000, b"data", 4 + BSS),
        ],
        entry,
    )


KERNEL_END = KERNEL_BASE + 0x20_0000 + 4 + BSS


def load(
    image: bytes, size: int = 64 * MIB, initrd: str | os.PathLike[str] | None = None, cmdline: str = ""
) -> tuple[GuestMemory, EntryState]:
    memory = GuestMemory(size)
    return memory, load_linux(memory, io.BytesIO(image), "kernel", initrd, cmdline)


def params_field(memory: GuestMemory, entry: EntryState, offset: int, layout: str) -> Any:
    return struct.unpack(layout, memory.read(entry.rsi + offset, struct.calcsize(layout)))[0]


def assert_kernel_in_place(memory: GuestMemory, entry: EntryState) -> None:
    assert entry.mode == "long64"
    assert entry.rip == KERNEL_BASE + 0x40
    assert memory.read(KERNEL_BASE, len(TEXT)) == TEXT
    assert memory.read(KERNEL_BASE + 0x10_0000, 8) == b"percpu\0\0"
    assert memory.read(KERNEL_BASE + 0x20_0000, 8) == b"data\0\0\0\0"


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_bzimage_payload_is_unpacked_to_its_physical_addresses(compression: str) -> None:
    # What follows the ELF file in a kernel with relocations is left alone.
    image = make_bzimage(compress(kernel_elf() + b"relocs" * 100, compression))
    assert_kernel_in_place(*load(image))


def test_setup_sects_0_means_4() -> None:
    assert_kernel_in_place(*load(make_bzimage(compress(kernel_elf(), "gzip"), setup_sects=0)))
    assert_kernel_in_place(*load(make_bzimage(compress(kernel_elf(), "gzip"), setup_sects=39)))


def test_elf_is_loaded_as_it_is() -> None:
    assert_kernel_in_place(*load(kernel_elf()))


def test_a_program_at_1_mib_loads_in_2_mib_of_memory() -> None:
    memory, entry = load(make_elf([(MIB, MIB, b"\xf4", 0x1000)], MIB), size=2 * MIB)
    assert entry.rip == MIB
    assert memory.read(MIB, 1) == b"\xf4"


def test_a_virtual_entry_point_is_translated() -> None:
    _, entry = load(kernel_elf(KERNEL_VIRTUAL + 0x123))
    assert entry.rip == KERNEL_BASE + 0x123


def test_loading_again_into_used_memory_clears_bss_and_tables() -> None:
    memory, entry = load(kernel_elf(), cmdline="first and longer")
    memory.write(KERNEL_END - BSS, b"\xff" * BSS)
    memory.write(entry.rsi, b"\xff" * 4096)
    memory.write(entry.cr3, b"\xff" * 4096)
    again = load_linux(memory, io.BytesIO(kernel_elf()), "kernel", None, "second")
    fresh, _ = load(kernel_elf(), cmdline="second")
    assert memory.read(KERNEL_END - BSS, BSS) == bytes(BSS)
    assert memory.read(again.rsi, 4096) == fresh.read(again.rsi, 4096)
    assert memory.read(again.cr3, 4096) == fresh.read(again.cr3, 4096)


def test_the_same_open_file_can_be_loaded_twice() -> None:
    file = io.BytesIO(kernel_elf())
    for _ in range(2):
        memory = GuestMemory(64 * MIB)
        assert_kernel_in_place(memory, load_linux(memory, file, "kernel", None, ""))


@pytest.mark.parametrize("image", [kernel_elf(), make_bzimage(compress(kernel_elf(), "zstd"))], ids=["elf", "bzimage"])
def test_boot_params_tell_the_kernel_what_it_needs(image: bytes) -> None:
    memory, entry = load(image, cmdline="console=ttyS0 quiet")
    cmdline = params_field(memory, entry, 0x228, "<I")
    assert memory.read(cmdline, 20) == b"console=ttyS0 quiet\0"
    assert params_field(memory, entry, 0x070, "<Q") == RSDP_ADDRESS
    assert params_field(memory, entry, 0x1EF, "<B") == 0  # the sentinel: these boot_params were zeroed first
    assert params_field(memory, entry, 0x202, "4s") == b"HdrS"
    assert params_field(memory, entry, 0x1FE, "<H") == 0xAA55
    assert params_field(memory, entry, 0x206, "<H") == 0x20F
    assert params_field(memory, entry, 0x210, "<B") == 0xFF
    assert params_field(memory, entry, 0x211, "<B") & 1
    assert params_field(memory, entry, 0x218, "<Q") == 0  # no initrd


def test_the_setup_header_ends_where_its_jump_goes() -> None:
    image = bytearray(make_bzimage(compress(kernel_elf(), "gzip")))
    struct.pack_into("<I", image, 0x268, 0xAAAA_AAAA)  # the header's last field
    struct.pack_into("<I", image, 0x26C, 0xBBBB_BBBB)  # code
    memory, entry = load(bytes(image))
    assert params_field(memory, entry, 0x268, "<I") == 0xAAAA_AAAA
    assert params_field(memory, entry, 0x26C, "<I") == 0


def memory_map(memory: GuestMemory, entry: EntryState) -> list[tuple[int, int, int]]:
    count = params_field(memory, entry, 0x1E8, "<B")
    table = memory.read(entry.rsi + 0x2D0, 20 * count)
    return list(struct.iter_unpack("<QQI", table))


def test_e820_of_a_small_guest() -> None:
    assert memory_map(*load(kernel_elf())) == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x60400, 2),
        (MIB, 63 * MIB, 1),
        (0xFEFF_B000, 0x5000, 2),
    ]


def test_e820_of_a_guest_beyond_4_gib() -> None:
    entries = memory_map(*load(kernel_elf(), size=64 * GIB))
    assert entries[2] == (MIB, 3 * GIB - MIB, 1)
    assert entries[4] == (4 * GIB, 61 * GIB, 1)
    assert sum(size for _, size, kind in entries if kind == 1) == 64 * GIB - 0x60400


@pytest.mark.parametrize("gpa", [0, 0x7123, KERNEL_BASE + 5, 0xBFFF_FFFF, 0xFEE0_0030, 0xFFFF_FFFF])
def test_page_tables_map_the_first_4_gib_one_to_one(gpa: int) -> None:
    memory, entry = load(kernel_elf())
    table = entry.cr3
    for shift in (39, 30):
        item = int.from_bytes(memory.read(table + (gpa >> shift & 511) * 8, 8), "little")
        assert item & 0x83 == 0x03  # present, writable, not a large page
        table = item & ~0xFFF
    item = int.from_bytes(memory.read(table + (gpa >> 21 & 511) * 8, 8), "little")
    assert item & 0x83 == 0x83
    assert (item & ~0x1F_FFFF) + (gpa & 0x1F_FFFF) == gpa


def test_page_tables_map_nothing_above_4_gib() -> None:
    memory, entry = load(kernel_elf())
    assert memory.read(entry.cr3 + 8, 4096 - 8) == bytes(4096 - 8)
    assert memory.read(entry.cr3 + 4096 + 32, 4096 - 32) == bytes(4096 - 32)


def test_gdt_holds_flat_64_bit_code_and_data_where_the_protocol_wants_them() -> None:
    memory, entry = load(kernel_elf())
    gdt = memory.read(entry.gdt_base, entry.gdt_limit + 1)
    for selector, kind in ((CODE_SELECTOR, 0x9A), (DATA_SELECTOR, 0x92)):
        low, base_low, base_mid, access, flags, base_high = struct.unpack_from("<HHBBBB", gdt, selector)
        assert (low, flags & 0xF, base_low, base_mid, base_high) == (0xFFFF, 0xF, 0, 0, 0)
        assert access & ~1 == kind
        assert flags & 0x80  # 4 KiB granularity
        assert flags >> 5 & 3 == (0b01 if selector == CODE_SELECTOR else 0b10)  # L, or D/B
    assert (CODE_SELECTOR, DATA_SELECTOR) == (0x10, 0x18)


def test_stack_and_tables_do_not_touch_one_another() -> None:
    memory, entry = load(kernel_elf(), cmdline="x" * 2047)
    cmdline = params_field(memory, entry, 0x228, "<I")
    ranges = sorted(
        [
            (entry.rsp - 0x1000, entry.rsp),
            (entry.gdt_base, entry.gdt_base + entry.gdt_limit + 1),
            (entry.rsi, entry.rsi + 4096),
            (entry.cr3, entry.cr3 + 6 * 4096),
            (cmdline, cmdline + 2048),
            (0x9FC00, MIB),
        ]
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert entry.rsp % 16 == 0


def initrd_file(tmp_path: Path, size: int) -> Path:
    path = tmp_path / "initrd.img"
    path.write_bytes(bytes(index & 0xFF for index in range(size)))
    return path


def test_initrd_stands_highest_in_low_memory(tmp_path: Path) -> None:
    path = initrd_file(tmp_path, 10_000)
    memory, entry = load(kernel_elf(), initrd=path)
    gpa, size = params_field(memory, entry, 0x218, "<I"), params_field(memory, entry, 0x21C, "<I")
    assert (gpa, size) == (64 * MIB - 12288, 10_000)
    assert memory.read(gpa, size) == path.read_bytes()


def test_initrd_stays_below_the_kernels_limit(tmp_path: Path) -> None:
    path = initrd_file(tmp_path, 5000)
    image = make_bzimage(compress(kernel_elf(), "gzip"), initrd_addr_max=0x37FF_FFFF)
    memory, entry = load(image, size=5 * GIB, initrd=path)
    assert params_field(memory, entry, 0x218, "<I") == 0x3800_0000 - 8192


def test_initrd_that_reaches_the_kernel_does_not_fit(tmp_path: Path) -> None:
    room = 24 * MIB - (KERNEL_END + 4095) // 4096 * 4096
    load(kernel_elf(), size=24 * MIB, initrd=initrd_file(tmp_path, room))
    with pytest.raises(BootError, match=r"initrd\.img: an initrd of 5 MiB does not fit beside the kernel in 24 MiB"):
        load(kernel_elf(), size=24 * MIB, initrd=initrd_file(tmp_path, room + 1))


def test_bad_initrds_are_named(tmp_path: Path) -> None:
    with pytest.raises(BootError, match=r"initrd\.img: the initrd is empty"):
        load(kernel_elf(), initrd=initrd_file(tmp_path, 0))
    with pytest.raises(BootError, match="nothing: No such file or directory"):
        load(kernel_elf(), initrd=tmp_path / "nothing")


def test_command_line_length_is_limited_by_the_kernel() -> None:
    image = make_bzimage(compress(kernel_elf(), "gzip"), cmdline_size=100)
    load(image, cmdline="x" * 100)
    with pytest.raises(BootError, match="command line of up to 100 bytes, this one has 101"):
        load(image, cmdline="x" * 101)
    image = make_bzimage(compress(kernel_elf(), "gzip"), cmdline_size=0xFFFF_FFFF)
    with pytest.raises(BootError, match="up to 4095 bytes, this one has 4096"):
        load(image, cmdline="x" * 4096)
    with pytest.raises(BootError, match="NUL"):
        load(image, cmdline="a\0b")


GZIP_IMAGE = make_bzimage(compress(kernel_elf(), "gzip"))


def patched(image: bytes, offset: int, layout: str, *values: int) -> bytes:
    copy = bytearray(image)
    struct.pack_into(layout, copy, offset, *values)
    return bytes(copy)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "the file is empty"),
        (b"#!/bin/sh\n" * 100, "neither a Linux bzImage nor an ELF file"),
        (bytes(0x38) + b"ARM\x64" + bytes(1000), "an arm64 kernel image, not one for x86-64"),
        (compress(kernel_elf(), "zstd"), "a zstd file; unpack it, or give the kernel's bzImage"),
        (GZIP_IMAGE[:0x250], "truncated bzImage header"),
        (GZIP_IMAGE[:-100], "truncated bzImage, its payload of"),
        (patched(GZIP_IMAGE, 0x206, "<H", 0x204), "boot protocol 2.04, at least 2.08 is needed"),
        (patched(GZIP_IMAGE, 0x24C, "<I", 0), "unknown kernel compression"),
        (make_bzimage(b"BZh91AY&SY"), "kernel compressed with bzip2, only gzip, xz, lz4 and zstd are supported"),
        (make_bzimage(b"nothing of that kind"), "unknown kernel compression .payload begins with 6e 6f 74"),
        (make_bzimage(compress(b"not an ELF file", "xz")), "the payload of this bzImage is not an ELF file"),
        (make_bzimage(compress(make_elf([], 0, elf_class=1), "xz")), "not one of the 64-bit class"),
        (make_elf([], 0, machine=183), "an ELF file for arm64, not for x86-64"),
        (make_elf([], 0, machine=9999), "an ELF file for machine 9999, not for x86-64"),
        (make_elf([], 0, kind=3), "linked at no fixed address"),
        (make_elf([], 0), "an ELF file with nothing to load"),
        (kernel_elf()[:40], "truncated ELF header"),
        (kernel_elf()[:100], "truncated or broken ELF program headers"),
        (kernel_elf()[:-1], "truncated file, the segment for 0x1200000 is not all there"),
        (patched(kernel_elf(), 0x20, "<Q", (1 << 64) - 1), "truncated or broken ELF program headers"),
        (
            make_elf([(0, 0x9000, b"x", 1)], 0x9000),
            "has a segment for 0x9000-0x9001, but programs are loaded from 1 MiB on",
        ),
        (make_elf([(0, MIB, b"xx", 1)], MIB), "truncated file"),
        (make_elf([(0, MIB, b"x", 40 * MIB)] * 2, MIB), "its ELF segments need more than 64 MiB of guest memory"),
        (
            make_elf([(0, 63 * MIB, b"x", 2 * MIB)], 63 * MIB),
            "needs RAM at 0x3f00000-0x4100000, guest memory is 64 MiB",
        ),
        (make_elf([(0, (1 << 64) - 1, b"x", 1)], 0), "needs RAM at 0xffffffffffffffff-"),
        (make_elf([(0, MIB, b"x", 1)], 0x5000), "entry point 0x5000 lies in none of its segments"),
    ],
)
def test_what_is_no_kernel_gets_one_line_that_says_why(tmp_path: Path, image: bytes, message: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(image)
    with pytest.raises(BootError, match=message) as caught:
        load_kernel(GuestMemory(64 * MIB), str(path), None, "")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_corrupt_payload_is_refused(compression: str) -> None:
    packed = compress(kernel_elf(), compression)
    middle = len(packed) // 2
    wrong = [
        packed[:middle] + packed[-4:],
        packed[:-4] + struct.pack("<I", len(kernel_elf()) - 1),
        packed[:-4] + struct.pack("<I", len(kernel_elf()) + 1),
    ]
    if compression != "lz4":  # which has no checksum
        wrong.append(packed[:middle] + bytes([packed[middle] ^ 0xFF]) + packed[middle + 1 :])
    for broken in wrong:
        with pytest.raises(BootError):
            load(make_bzimage(broken))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_payload_is_never_unpacked_beyond_guest_memory(compression: str) -> None:
    packed = compress(bytes(3 * MIB), compression)
    with pytest.raises(BootError, match="kernel: kernel unpacks to 3 MiB, guest memory is 2 MiB"):
        payload.unpack("kernel", packed, 2 * MIB)
    # The same bomb with a lie about its size stops one byte after it.
    with pytest.raises(BootError, match=f"corrupt {compression} payload"):
        payload.unpack("kernel", packed[:-4] + struct.pack("<I", 1000), 2 * MIB)


def test_missing_files_and_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(BootError, match="vmlinuz: No such file or directory"):
        load_kernel(GuestMemory(64 * MIB), str(tmp_path / "vmlinuz"), None, "")
    with pytest.raises(BootError, match="Is a directory"):
        load_kernel(GuestMemory(64 * MIB), str(tmp_path), None, "")


def test_guest_memory_of_1_mib_is_too_small() -> None:
    with pytest.raises(BootError, match="guest memory of 1024 KiB is too small"):
        load(kernel_elf(), size=MIB)


SMALL_ELF = make_elf([(MIB, MIB, b"\x90" * 300 + b"\xf4", 0x2000), (0, 2 * MIB, b"data" * 20, 100)], MIB + 300)
SMALL_IMAGES = [SMALL_ELF, *(make_bzimage(compress(SMALL_ELF, compression)) for compression in COMPRESSIONS)]
SMALL_MEMORY = GuestMemory(4 * MIB)


def load_or_boot_error(image: bytes) -> None:
    try:
        entry = load_linux(SMALL_MEMORY, io.BytesIO(image), "kernel", None, "console=ttyS0")
    except BootError:
        return
    assert MIB <= entry.rip < 4 * MIB


@settings(max_examples=300, deadline=None)
@given(data=st.data(), image=st.sampled_from(SMALL_IMAGES))
def test_mutated_images_never_raise_anything_else(data: st.DataObject, image: bytes) -> None:
    # Headers and payload are where the meaning is, the padding before the boot sector's end is not.
    first = 0 if image.startswith(elf.MAGIC) else 0x1F1
    mutated = bytearray(image)
    for _ in range(data.draw(st.integers(1, 8))):
        mutated[data.draw(st.integers(first, len(image) - 1))] = data.draw(st.integers(0, 255))
    load_or_boot_error(bytes(mutated[: data.draw(st.integers(0, len(image)) | st.just(len(image)))]))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), compression=st.sampled_from(COMPRESSIONS))
def test_mutated_payloads_never_raise_anything_else(data: st.DataObject, compression: str) -> None:
    packed = bytearray(compress(SMALL_ELF, compression))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    load_or_boot_error(make_bzimage(bytes(packed)))


@settings(max_examples=200, deadline=None)
@given(
    fields=st.lists(st.tuples(st.integers(0, 175), st.sampled_from([0, 1, 0xFFF, 2**31, 2**32 - 1, 2**63, 2**64 - 1])))
)
def test_extreme_elf_fields_never_raise_anything_else(fields: list[tuple[int, int]]) -> None:
    image = bytearray(SMALL_ELF)
    for offset, value in fields:
        struct.pack_into("<Q", image, max(offset, 6), value)
    load_or_boot_error(bytes(image))


@settings(max_examples=100, deadline=None)
@given(junk=st.binary(max_size=2000))
def test_any_bytes_never_raise_anything_else(junk: bytes) -> None:
    load_or_boot_error(junk)


def test_low_memory_addresses_are_below_the_reserved_area() -> None:
    assert linux.CMDLINE_ADDRESS + 4096 < 0x9FC00
