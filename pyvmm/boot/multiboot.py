"""Kernels by the Multiboot 1 protocol: 32-bit ELF files, and files whose header says where they go.

Source: Multiboot Specification 0.6.96, sections 3.1 to 3.3. Where it leaves a choice, this does as QEMU's
``-kernel`` (hw/i386/multiboot.c): the command line starts with the kernel's name, modules stand right after the kernel,
and a wish for a video mode is passed over.
"""

from __future__ import annotations

import os
import struct

from pyvmm.boot import elf
from pyvmm.boot.entry import BootError, EntryState
from pyvmm.boot.image import Image, put_file, put_segment
from pyvmm.boot.layout import EBDA_START, HIGH_MEMORY, e820
from pyvmm.core.memory import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from pyvmm.core.memory import GuestMemory

#: Where the boot information and all that it points to stand, in memory that the map calls usable; behind the kernel if
#: that is there already. The GDT is at the start, and a stack grows down from the end.
INFO_ADDRESS = 0x1_0000
_INFO_SIZE_LIMIT = 0x1_0000
_STACK_SIZE = 0x1000

#: What the kernel finds in EAX.
LOADER_MAGIC = 0x2BAD_B002
_HEADER_MAGIC = 0x1BAD_B002
_HEADER_SEARCH = 8192
# magic, flags, checksum, then header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr.
_HEADER = struct.Struct("<8I")
#: Requirements that are met: page-aligned modules and memory information; see above for the third, the video mode.
_KNOWN_REQUIREMENTS = 0b111
_REQUIREMENTS = 0xFFFF
_HAS_ADDRESSES = 1 << 16

# flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, mmap_length, mmap_addr, boot_loader_name;
# the rest is about symbols, drives, APM and video, and stays zero.
_INFO = struct.Struct("<7I16x2I12xI")
_INFO_SIZE = 116
_HAS_MEMORY, _HAS_CMDLINE, _HAS_MODULES, _HAS_MEMORY_MAP, _HAS_LOADER_NAME = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9
_LOADER_NAME = b"pyvmm\0"
# mod_start, mod_end, string, reserved.
_MODULE = struct.Struct("<3I4x")

# Null, null, flat 32-bit code (execute/read), flat data (read/write), accessed: CODE_SELECTOR and DATA_SELECTOR.
_GDT = struct.pack("<4Q", 0, 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)


class Header:
    """A Multiboot header: its offset in the file, its flags, and its five address fields."""

    def __init__(self, offset: int, flags: int, addresses: tuple[int, ...]) -> None:
        self.offset = offset
        self.flags = flags
        self.addresses = addresses

    @property
    def has_addresses(self) -> bool:
        """Whether the header says where the file goes, whatever format the file has."""
        return bool(self.flags & _HAS_ADDRESSES)


def find_header(start: bytes) -> Header | None:
    """Return the header in the first 8 KiB of a file, or None."""
    start = start[:_HEADER_SEARCH].ljust(_HEADER_SEARCH, b"\0")
    magic = struct.pack("<I", _HEADER_MAGIC)
    offset = start.find(magic)
    while 0 <= offset <= _HEADER_SEARCH - _HEADER.size:
        _, flags, checksum, *addresses = _HEADER.unpack_from(start, offset)
        if offset % 4 == 0 and (_HEADER_MAGIC + flags + checksum) & 0xFFFF_FFFF == 0:
            return Header(offset, flags, tuple(addresses))
        offset = start.find(magic, offset + 1)
    return None


def load_multiboot(
    memory: GuestMemory, file: BinaryIO, name: str, initrd: str | os.PathLike[str] | None, cmdline: str
) -> EntryState:
    """Load a Multiboot kernel, and `initrd` as its only module, whose string is the file's name.

    Works on memory that a guest has used before, so a reset loads again. Raises BootError, naming `name`, if the file
    is no such kernel, is truncated, or wants what is not here; or if something does not fit into guest RAM.
    """
    low_end = next(gpa + size for gpa, size in memory.ram_ranges() if gpa == 0)
    if low_end <= HIGH_MEMORY:
        raise BootError(f"{name}: guest memory of {memory.size >> 10} KiB is too small for any kernel")
    file.seek(0)
    head = file.read(_HEADER_SEARCH)
    header = find_header(head)
    if header is None:
        raise BootError(f"{name}: a 32-bit ELF file without a Multiboot header in its first 8 KiB")
    if unknown := header.flags & _REQUIREMENTS & ~_KNOWN_REQUIREMENTS:
        raise BootError(f"{name}: its Multiboot header requires features that are not here (flags {unknown:#x})")
    if header.has_addresses:
        image = _load_by_addresses(memory, file, name, header)
    elif head.startswith(elf.MAGIC):
        image = elf.load_elf(memory, file, name, 32)
    else:
        raise BootError(f"{name}: no ELF file, and its Multiboot header has no addresses either")
    base = INFO_ADDRESS
    if image.start < base + _INFO_SIZE_LIMIT and image.end > base:
        base = _next_page(image.end)
    if base + _INFO_SIZE_LIMIT > (EBDA_START if base < HIGH_MEMORY else low_end):
        raise BootError(f"{name}: leaves no room for the boot information at {base:#x}")
    modules = []
    if initrd is not None:
        free = max(image.end, base + _INFO_SIZE_LIMIT, HIGH_MEMORY)
        start, size = put_file(memory, initrd, lambda size: _place_module(initrd, size, free, low_end))
        modules.append((start, start + size, os.fsencode(initrd)))
    info_address = base + len(_GDT)
    info = _boot_information(info_address, e820(memory), low_end, os.fsencode(f"{name} {cmdline}"), modules)
    if len(_GDT) + len(info) > _INFO_SIZE_LIMIT - _STACK_SIZE:
        raise BootError(f"{name}: the command line of {len(cmdline)} characters is too long")
    memory.write(base, _GDT + info)
    return EntryState(
        "protected32",
        rip=image.entry,
        rax=LOADER_MAGIC,
        rbx=info_address,
        rsp=base + _INFO_SIZE_LIMIT,
        gdt_base=base,
        gdt_limit=len(_GDT) - 1,
    )


def _load_by_addresses(memory: GuestMemory, file: BinaryIO, name: str, header: Header) -> Image:
    """Load the file as the header's address fields say."""
    header_addr, load_addr, load_end, bss_end, entry = header.addresses
    offset = header.offset - (header_addr - load_addr)
    length = load_end - load_addr if load_end else file.seek(0, 2) - offset
    end = bss_end or load_addr + length
    if header_addr < load_addr or offset < 0 or not 0 < length <= end - load_addr:
        raise BootError(f"{name}: the addresses in its Multiboot header contradict each other")
    if not load_addr <= entry < end:
        raise BootError(f"{name}: its entry point {entry:#x} lies outside {load_addr:#x}-{end:#x}")
    put_segment(memory, file, name, offset, length, load_addr, end - load_addr, low=True)
    return Image(entry, load_addr, end)


def _place_module(path: str | os.PathLike[str], size: int, free: int, low_end: int) -> int:
    gpa = _next_page(free)
    if gpa + size > low_end:
        raise BootError(f"{path}: a module of {size >> 20} MiB does not fit between {gpa:#x} and {low_end:#x}")
    return gpa


def _next_page(gpa: int) -> int:
    return (gpa + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE


def _boot_information(
    gpa: int,
    memory_map: list[tuple[int, int, int]],
    low_end: int,
    cmdline: bytes,
    modules: list[tuple[int, int, bytes]],
) -> bytes:
    """Return the information structure, which is to stand at `gpa`, and all that it points to."""
    tail = bytearray()

    def put(data: bytes) -> int:
        tail.extend(data)
        return gpa + _INFO_SIZE + len(tail) - len(data)

    # An entry's first field, its size, does not count itself.
    mmap = b"".join(struct.pack("<IQQI", 20, *entry) for entry in memory_map)
    mmap_addr = put(mmap)
    mods_addr = put(bytes(_MODULE.size * len(modules)))
    for index, (start, end, string) in enumerate(modules):
        _MODULE.pack_into(tail, mods_addr - gpa - _INFO_SIZE + _MODULE.size * index, start, end, put(string + b"\0"))
    info = _INFO.pack(
        _HAS_MEMORY | _HAS_CMDLINE | _HAS_MODULES | _HAS_MEMORY_MAP | _HAS_LOADER_NAME,
        EBDA_START >> 10,
        (low_end - HIGH_MEMORY) >> 10,
        0,
        put(cmdline + b"\0"),
        len(modules),
        mods_addr,
        len(mmap),
        mmap_addr,
        put(_LOADER_NAME),
    )
    return info.ljust(_INFO_SIZE, b"\0") + bytes(tail)
