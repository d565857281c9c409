"""Multiboot kernels reach guest memory with the boot information of the specification; broken ones are refused."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.boot.entry import BootError, EntryState
from pyvmm.boot.kernel import load_kernel
from pyvmm.boot.multiboot import INFO_ADDRESS
from pyvmm.core.memory import GuestMemory
from tests.fakes.boot_images import compress, make_bzimage, make_elf, make_multiboot_header

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30
BASE = 4 * MIB
CODE = b"code" * 100
EM_386 = 3


def kernel(flags: int = 0, machine: int = EM_386) -> bytes:
    """A program as objcopy makes it from a 64-bit one: header and code at 4 MiB, data and bss behind."""
    segments = [(BASE, BASE, make_multiboot_header(flags) + CODE, 0x1000), (0, BASE + 0x7000, b"data", 0x3001)]
    return make_elf(segments, BASE + 12, machine=machine, elf_class=1)


KERNEL_END = BASE + 0x7000 + 0x3001


class Loaded:
    """A loaded kernel, read as the guest would read it."""

    def __init__(self, memory: GuestMemory, entry: EntryState) -> None:
        self.memory = memory
        self.entry = entry

    def words(self, gpa: int, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}I", self.memory.read(gpa, 4 * count))

    def field(self, offset: int) -> int:
        return self.words(self.entry.rbx + offset, 1)[0]

    def string(self, gpa: int) -> bytes:
        return self.memory.read(gpa, 4096).partition(b"\0")[0]

    def memory_map(self) -> list[tuple[int, ...]]:
        length, gpa = self.field(44), self.field(48)
        entries = []
        end = gpa + length
        while gpa < end:
            size, *entry = struct.unpack("<IQQI", self.memory.read(gpa, 24))
            entries.append(tuple(entry))
            gpa += size + 4
        assert gpa == end
        return entries


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(image: bytes, size: int = 64 * MIB, initrd: str | None = None, cmdline: str = "") -> Loaded:
        path = tmp_path / "kernel"
        path.write_bytes(image)
        memory = GuestMemory(size)
        return Loaded(memory, load_kernel(memory, str(path), initrd, cmdline))

    return load


def test_a_32_bit_elf_file_is_entered_in_protected_mode(load: Any) -> None:
    loaded = load(kernel())
    assert (loaded.entry.mode, loaded.entry.rip, loaded.entry.rax) == ("protected32", BASE + 12, 0x2BADB002)
    assert loaded.memory.read(BASE + 12, len(CODE)) == CODE
    assert loaded.memory.read(BASE + 0x7000, 8) == b"data\0\0\0\0"
    code, data = struct.unpack("<2Q", loaded.memory.read(loaded.entry.gdt_base + 0x10, 16))
    assert (code, data) == (0x00CF9B000000FFFF, 0x00CF93000000FFFF)
    assert loaded.entry.gdt_limit == 0x1F


def test_the_information_tells_memory_command_line_and_loader(load: Any, tmp_path: Path) -> None:
    loaded = load(kernel(flags=0b111), cmdline="direct  x=1")
    assert loaded.field(0) == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (loaded.field(4), loaded.field(8)) == (639, 63 * 1024)
    assert loaded.string(loaded.field(16)) == f"{tmp_path / 'kernel'} direct  x=1".encode()
    assert loaded.field(20) == 0
    assert loaded.string(loaded.field(64)) == b"pyvmm"
    assert loaded.memory_map() == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x60400, 2),
        (MIB, 63 * MIB, 1),
        (0xFEFFB000, 0x5000, 2),
    ]


def test_the_memory_map_goes_beyond_4_gib(load: Any) -> None:
    loaded = load(kernel(), size=5 * GIB)
    assert loaded.field(8) == 3 * 1024 * 1024 - 1024
    assert loaded.memory_map()[-1] == (4 * GIB, 2 * GIB, 1)


def test_the_initrd_is_a_page_aligned_module_behind_the_kernel(load: Any, tmp_path: Path) -> None:
    module = tmp_path / "environ"
    module.write_bytes(b"NR_CPUS=2\nMEMSIZE=128\n")
    loaded = load(kernel(), initrd=str(module), cmdline="x")
    assert loaded.field(20) == 1
    assert loaded.field(24) % 4 == 0
    start, end, string, reserved = loaded.words(loaded.field(24), 4)
    assert start == (KERNEL_END + 4095) // 4096 * 4096
    assert loaded.memory.read(start, end - start) == module.read_bytes()
    assert loaded.string(string) == str(module).encode()
    assert reserved == 0


def test_a_module_that_does_not_fit_is_named(load: Any, tmp_path: Path) -> None:
    module = tmp_path / "big"
    module.write_bytes(bytes(4 * MIB))
    load(kernel(), size=9 * MIB, initrd=str(module))
    with pytest.raises(BootError, match=r"big: a module of 4 MiB does not fit between 0x40b000 and 0x800000"):
        load(kernel(), size=8 * MIB, initrd=str(module))


def test_loading_again_over_a_used_guest_gives_the_same(load: Any, tmp_path: Path) -> None:
    loaded = load(kernel(), cmdline="a b")
    before = [loaded.memory.read(gpa, 0x10000) for gpa in (INFO_ADDRESS, BASE)]
    loaded.memory.write(INFO_ADDRESS, b"\xff" * 100)
    loaded.memory.write(BASE, b"\xff" * 0x1000)
    loaded.memory.write(BASE + 0x7000, b"\xff" * 0x3001)
    load_kernel(loaded.memory, str(tmp_path / "kernel"), None, "a b")
    assert [loaded.memory.read(gpa, 0x10000) for gpa in (INFO_ADDRESS, BASE)] == before


ADDRESSES = 1 << 16


def by_addresses(*addresses: int, before: bytes = b"junk" * 4, flags: int = ADDRESSES) -> bytes:
    return before + make_multiboot_header(flags, addresses) + CODE


def test_a_header_with_addresses_places_a_flat_file(load: Any) -> None:
    # The header stands 16 bytes into the file, and the file's first 8 bytes are not loaded.
    loaded = load(by_addresses(BASE + 8, BASE, BASE + 8 + 32 + 100, BASE + 0x1000, BASE + 8 + 32))
    assert loaded.entry.rip == BASE + 40
    assert loaded.memory.read(BASE, 8) == b"junkjunk"
    assert loaded.memory.read(BASE + 40, 104) == CODE[:100] + bytes(4)


def test_a_header_with_addresses_may_leave_the_ends_to_the_file(load: Any) -> None:
    loaded = load(by_addresses(BASE + 16, BASE, 0, 0, BASE + 48))
    assert loaded.memory.read(BASE + 48, len(CODE) + 4) == CODE + bytes(4)


@pytest.mark.parametrize(("elf_class", "machine"), [(1, EM_386), (2, 62)])
def test_addresses_go_before_those_of_an_elf_file(load: Any, elf_class: int, machine: int) -> None:
    header = make_multiboot_header(ADDRESSES, (2 * MIB, 2 * MIB, 0, 0, 2 * MIB + 32))
    image = make_elf([(BASE, BASE, header + CODE, 0x1000)], BASE, machine=machine, elf_class=elf_class)
    loaded = load(image)
    assert (loaded.entry.mode, loaded.entry.rip) == ("protected32", 2 * MIB + 32)
    assert loaded.memory.read(2 * MIB + 32, len(CODE)) == CODE


def test_64_bit_kernels_and_bzimages_keep_to_linuxs_protocol(load: Any) -> None:
    vmlinux = make_elf([(BASE, BASE, make_multiboot_header() + CODE, 0x1000)], BASE)
    assert load(vmlinux).entry.mode == "long64"
    bzimage = bytearray(make_bzimage(compress(vmlinux, "gzip")))
    bzimage[0x400:0x420] = make_multiboot_header(ADDRESSES, (BASE, BASE, 0, 0, BASE))
    assert load(bytes(bzimage)).entry.mode == "long64"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (make_elf([(BASE, BASE, CODE, 0x1000)], BASE, machine=3, elf_class=1), "without a Multiboot header"),
        (make_elf([(BASE, BASE, b"", 0)], BASE, machine=40, elf_class=1), "without a Multiboot header"),
        (kernel(machine=62), "an ELF file for x86-64, not for i386"),
        (kernel(flags=0x88), "requires features that are not here .flags 0x88."),
        (kernel()[:-1], "truncated file, the segment for 0x407000"),
        (b"\x7fELF\x01\x01\x01" + bytes(9) + make_multiboot_header(), "truncated ELF header"),
        (by_addresses(BASE, BASE, flags=0), "no ELF file, and its Multiboot header has no addresses"),
        (by_addresses(BASE - 1, BASE, 0, 0, BASE), "contradict each other"),
        (by_addresses(BASE + 17, BASE, 0, 0, BASE), "contradict each other"),
        (by_addresses(BASE, BASE, BASE, 0, BASE), "contradict each other"),
        (by_addresses(BASE, BASE, BASE - 1, 0, BASE), "contradict each other"),
        (by_addresses(BASE, BASE, BASE + 100, BASE + 99, BASE), "contradict each other"),
        (by_addresses(BASE, BASE, 0, 0, BASE - 1), "its entry point 0x3fffff lies outside"),
        (by_addresses(BASE, BASE, BASE + 0x1000, 0, BASE), "truncated file, the segment for 0x400000"),
        (
            by_addresses(0x9F000, 0x9F000, 0, 0x9FC01, 0x9F000),
            "a segment for 0x9f000-0x9fc01, but programs are loaded up to 0x9fc00 and from 1 MiB on",
        ),
        (by_addresses(0x18000, 0x18000, 0, 0x98000, 0x18000), "leaves no room for the boot information at 0x98000"),
        (by_addresses(BASE, BASE, 0, GIB, BASE), "needs RAM at 0x400000-0x40000000, guest memory is 64 MiB"),
    ],
)
def test_what_cannot_be_booted_gets_one_line_that_says_why(
    load: Any, tmp_path: Path, image: bytes, message: str
) -> None:
    with pytest.raises(BootError, match=message) as caught:
        load(image)
    assert str(caught.value).startswith(f"{tmp_path / 'kernel'}: ")
    assert "\n" not in str(caught.value)


def test_a_kernel_may_stand_below_1_mib_and_the_information_makes_room(load: Any, tmp_path: Path) -> None:
    module = tmp_path / "module"
    module.write_bytes(b"module")
    for start, size in ((0x8000, 0x8000), (0x8000, 0x8001), (0x1FFFF, 0x1000), (0x20000, 0x7FC00)):
        code = make_multiboot_header() + b"\xcc" * 50
        loaded = load(make_elf([(0, start, code, size)], start + 12, machine=3, elf_class=1), initrd=str(module))
        assert loaded.entry.rip == start + 12
        assert loaded.memory.read(start, size) == code.ljust(size, b"\0")
        low, high = loaded.entry.gdt_base, loaded.entry.rsp
        assert high <= start or low >= start + size
        assert high <= 0x9FC00
        assert low <= loaded.entry.rbx < loaded.field(64) < high - 4096
        assert loaded.words(loaded.field(24), 1)[0] >= MIB


def test_a_kernel_on_both_sides_of_1_mib_has_the_information_behind_it(load: Any, tmp_path: Path) -> None:
    module = tmp_path / "module"
    module.write_bytes(b"module")
    code = make_multiboot_header() + CODE
    segments = [(0, 0x1000, code, 0x90000), (0, 2 * MIB, b"high", 0x1001)]
    image = make_elf(segments, 0x100C, machine=3, elf_class=1)
    loaded = load(image, initrd=str(module))
    assert loaded.entry.gdt_base == 2 * MIB + 0x2000
    assert loaded.words(loaded.field(24), 1)[0] >= loaded.entry.rsp
    with pytest.raises(BootError, match="no room for the boot information"):
        load(image, size=2 * MIB + 0x11000)


def test_the_command_line_has_a_limit(load: Any) -> None:
    load(kernel(), cmdline="x" * 60_000)
    with pytest.raises(BootError, match="command line of 66000 characters is too long"):
        load(kernel(), cmdline="x" * 66_000)


def test_a_header_beyond_8_kib_or_unaligned_or_with_a_wrong_sum_is_none(load: Any) -> None:
    addresses = (BASE, BASE, 0, 0, BASE)
    load(by_addresses(*addresses, before=bytes(8192 - 32)))
    wrong = bytearray(by_addresses(*addresses))
    wrong[16 + 8] ^= 1
    for image in (
        by_addresses(*addresses, before=bytes(8192 - 28)),
        by_addresses(*addresses, before=bytes(2)),
        bytes(wrong),
    ):
        with pytest.raises(BootError, match="neither"):
            load(image)
    assert load(bytes(wrong) + by_addresses(*addresses)).entry.rip == BASE


SMALL_MEMORY = GuestMemory(4 * MIB)
SMALL = [
    make_elf([(MIB, MIB, make_multiboot_header() + CODE, 0x2000)], MIB + 12, machine=3, elf_class=1),
    by_addresses(MIB, MIB, 0, MIB + 0x1000, MIB + 32),
]


@settings(max_examples=400, deadline=None)
@given(data=st.data(), image=st.sampled_from(SMALL))
def test_broken_headers_never_raise_anything_else(tmp_path_factory: Any, data: st.DataObject, image: bytes) -> None:
    mutated = bytearray(image)
    header = image.index(make_multiboot_header()[:4])
    for _ in range(data.draw(st.integers(1, 6))):
        offset = data.draw(st.integers(0, header + 31) | st.sampled_from(range(header + 12, header + 32, 4)))
        value = data.draw(st.sampled_from([0, 1, 0xFFFF_FFFF, 0x8000_0000, MIB]) | st.integers(0, 2**32 - 1))
        struct.pack_into("<I", mutated, min(offset, len(mutated) - 4), value)
    if data.draw(st.booleans()):  # a right checksum over wrong flags
        magic, flags = struct.unpack_from("<II", mutated, header)
        struct.pack_into("<I", mutated, header + 8, -(magic + flags) & 0xFFFF_FFFF)
    path = tmp_path_factory.getbasetemp() / "mutated"
    path.write_bytes(mutated[: data.draw(st.just(len(mutated)) | st.integers(0, len(mutated)))])
    try:
        entry = load_kernel(SMALL_MEMORY, str(path), None, "x")
    except BootError:
        return
    assert entry.rip < 0x9FC00 or MIB <= entry.rip < 4 * MIB
