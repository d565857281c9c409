"""Linux by its 64-bit boot protocol, and other 64-bit ELF programs by the same registers.

Source: Linux, Documentation/x86/boot.rst and zero-page.rst, arch/x86/include/uapi/asm/bootparam.h. A bzImage's own
unpacking code is not used: its payload, an ELF vmlinux, is unpacked here and entered at its first instruction.
"""

from __future__ import annotations

import io
import os
import struct

from pyvmm.boot import elf, payload
from pyvmm.boot.entry import BootError, EntryState
from pyvmm.boot.image import put_file
from pyvmm.boot.layout import HIGH_MEMORY, RSDP_ADDRESS, e820
from pyvmm.core.memory import HOLE_END, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from pyvmm.core.memory import GuestMemory

# Low memory that the guest needs only until it has made tables of its own.
STACK_TOP = 0x6000
GDT_ADDRESS = 0x6000
BOOT_PARAMS_ADDRESS = 0x7000
PAGE_TABLES_ADDRESS = 0x8000
CMDLINE_ADDRESS = 0x1_0000

# Offsets in boot_params; those of the setup header are the same in a bzImage's first sectors.
_ACPI_RSDP_ADDR = 0x070
_E820_ENTRIES = 0x1E8
_SETUP_SECTS = 0x1F1
_BOOT_FLAG = 0x1FE
_JUMP_LENGTH = 0x201
_HEADER_MAGIC = 0x202
_VERSION = 0x206
_TYPE_OF_LOADER = 0x210
_LOADFLAGS = 0x211
_RAMDISK_IMAGE = 0x218
_RAMDISK_SIZE = 0x21C
_CMD_LINE_PTR = 0x228
_INITRD_ADDR_MAX = 0x22C
_CMDLINE_SIZE = 0x238
_PAYLOAD_OFFSET = 0x248
_PAYLOAD_LENGTH = 0x24C
_HEADER_END = 0x290
_E820_TABLE = 0x2D0

_SECTOR_SIZE = 512
_DEFAULT_SETUP_SECTS = 4
_MIN_VERSION = 0x208  # The first with a payload offset: Linux 2.6.26.
_UNDEFINED_LOADER = 0xFF
_LOADED_HIGH = 1
_CMDLINE_LIMIT = 4095
_ARM64_MAGIC = b"ARM\x64"

# Null, null, flat 64-bit code (execute/read), flat data (read/write), accessed: CODE_SELECTOR and DATA_SELECTOR.
_GDT = struct.pack("<4Q", 0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
_PRESENT_WRITABLE = 0x03
_LARGE_PAGE = 0x80
_LARGE_PAGE_SIZE = 2 << 20


def load_linux(
    memory: GuestMemory, file: BinaryIO, name: str, initrd: str | os.PathLike[str] | None, cmdline: str
) -> EntryState:
    """Load a bzImage or a 64-bit ELF executable, and whatever its first instruction relies on, into guest memory.

    The program gets its command line, the initrd and the memory map by boot_params; ACPI tables are expected, and
    announced, at RSDP_ADDRESS. Works on memory that a guest has used before, so a reset loads again.
    Raises BootError, naming `name`, if the file is no kernel for x86-64, is truncated or corrupt, does not fit into
    guest RAM, or if the command line is longer than the kernel takes.
    """
    low_end = next(gpa + size for gpa, size in memory.ram_ranges() if gpa == 0)
    if low_end <= HIGH_MEMORY:
        raise BootError(f"{name}: guest memory of {memory.size >> 10} KiB is too small for any kernel")
    file.seek(0)
    start = file.read(_HEADER_END)
    if start.startswith(elf.MAGIC):
        params = _params_of_elf()
        image = elf.load_elf(memory, file, name)
    else:
        params, vmlinux = _read_bzimage(file, name, start, memory.size)
        image = elf.load_elf(memory, io.BytesIO(vmlinux), name)
    _put_cmdline(memory, params, name, cmdline)
    if initrd is not None:
        _put_initrd(memory, params, initrd, image.end, low_end)
    entries = e820(memory)
    params[_E820_ENTRIES] = len(entries)
    for index, entry_of_map in enumerate(entries):
        struct.pack_into("<QQI", params, _E820_TABLE + 20 * index, *entry_of_map)
    struct.pack_into("<Q", params, _ACPI_RSDP_ADDR, RSDP_ADDRESS)
    params[_TYPE_OF_LOADER] = _UNDEFINED_LOADER
    params[_LOADFLAGS] |= _LOADED_HIGH
    memory.write(BOOT_PARAMS_ADDRESS, params)
    memory.write(GDT_ADDRESS, _GDT)
    memory.write(PAGE_TABLES_ADDRESS, _identity_map())
    return EntryState(
        "long64",
        rip=image.entry,
        rsi=BOOT_PARAMS_ADDRESS,
        rsp=STACK_TOP,
        cr3=PAGE_TABLES_ADDRESS,
        gdt_base=GDT_ADDRESS,
        gdt_limit=len(_GDT) - 1,
    )


def _params_of_elf() -> bytearray:
    """Return boot_params with the setup header that an ELF file, which has none of its own, is given."""
    params = bytearray(PAGE_SIZE)
    struct.pack_into("<H", params, _BOOT_FLAG, 0xAA55)
    params[_HEADER_MAGIC : _HEADER_MAGIC + 4] = b"HdrS"
    struct.pack_into("<H", params, _VERSION, 0x20F)
    struct.pack_into("<I", params, _INITRD_ADDR_MAX, 0x7FFF_FFFF)
    struct.pack_into("<I", params, _CMDLINE_SIZE, 2047)
    return params


def _read_bzimage(file: BinaryIO, name: str, start: bytes, limit: int) -> tuple[bytearray, bytes]:
    """Return boot_params with the file's setup header, and the unpacked payload of at most `limit` bytes."""
    if start[_HEADER_MAGIC : _HEADER_MAGIC + 4] != b"HdrS":
        raise BootError(f"{name}: {_what_instead(start)}")
    header_end = min(_HEADER_MAGIC + start[_JUMP_LENGTH], _HEADER_END)
    if len(start) < _HEADER_END:
        raise BootError(f"{name}: truncated bzImage header")
    params = bytearray(PAGE_SIZE)
    params[_SETUP_SECTS:header_end] = start[_SETUP_SECTS:header_end]
    (version,) = struct.unpack_from("<H", start, _VERSION)
    if version < _MIN_VERSION or header_end < _PAYLOAD_LENGTH + 4:
        raise BootError(f"{name}: boot protocol {version >> 8}.{version & 0xFF:02}, at least 2.08 is needed")
    offset, length = struct.unpack_from("<II", start, _PAYLOAD_OFFSET)
    offset += ((start[_SETUP_SECTS] or _DEFAULT_SETUP_SECTS) + 1) * _SECTOR_SIZE
    if offset + length > file.seek(0, 2):
        raise BootError(f"{name}: truncated bzImage, its payload of {length} bytes at {offset:#x} is not all there")
    file.seek(offset)
    image = payload.unpack(name, file.read(length), limit)
    if not image.startswith(elf.MAGIC):
        raise BootError(f"{name}: the payload of this bzImage is not an ELF file")
    return params, image


def _what_instead(start: bytes) -> str:
    if not start:
        return "the file is empty"
    if start[0x38:0x3C] == _ARM64_MAGIC:
        return "an arm64 kernel image, not one for x86-64"
    compression = payload.compression_of(start)
    if compression:
        return f"a {compression} file; unpack it, or give the kernel's bzImage"
    return "neither a Linux bzImage nor an ELF file"


def _put_cmdline(memory: GuestMemory, params: bytearray, name: str, cmdline: str) -> None:
    encoded = os.fsencode(cmdline)
    (limit,) = struct.unpack_from("<I", params, _CMDLINE_SIZE)
    limit = min(limit, _CMDLINE_LIMIT)
    if len(encoded) > limit:
        raise BootError(f"{name}: takes a command line of up to {limit} bytes, this one has {len(encoded)}")
    if b"\0" in encoded:
        raise BootError(f"{name}: the command line has a NUL character in it")
    memory.write(CMDLINE_ADDRESS, encoded + b"\0")
    struct.pack_into("<I", params, _CMD_LINE_PTR, CMDLINE_ADDRESS)


def _put_initrd(
    memory: GuestMemory, params: bytearray, path: str | os.PathLike[str], kernel_end: int, low_end: int
) -> None:
    """Read the initrd to the highest page below both the hole and the kernel's own limit."""
    highest: int = struct.unpack_from("<I", params, _INITRD_ADDR_MAX)[0]

    def place(size: int) -> int:
        gpa = (min(low_end, highest + 1) - size) // PAGE_SIZE * PAGE_SIZE
        if gpa < max(kernel_end, HIGH_MEMORY):
            room = f"beside the kernel in {memory.size >> 20} MiB of guest memory"
            raise BootError(f"{path}: an initrd of {size >> 20} MiB does not fit {room}")
        return gpa

    gpa, size = put_file(memory, path, place)
    struct.pack_into("<II", params, _RAMDISK_IMAGE, gpa, size)


def _identity_map() -> bytes:
    """Return page tables for PAGE_TABLES_ADDRESS that map the first 4 GiB by 2 MiB pages: PML4, PDPT, four PDs."""
    directories = HOLE_END >> 30
    pml4 = struct.pack("<Q", PAGE_TABLES_ADDRESS + PAGE_SIZE | _PRESENT_WRITABLE)
    first = PAGE_TABLES_ADDRESS + 2 * PAGE_SIZE
    pdpt = struct.pack(
        f"<{directories}Q", *(first + PAGE_SIZE * index | _PRESENT_WRITABLE for index in range(directories))
    )
    pages = range(0, HOLE_END, _LARGE_PAGE_SIZE)
    entries = struct.pack(f"<{len(pages)}Q", *(gpa | _LARGE_PAGE | _PRESENT_WRITABLE for gpa in pages))
    return pml4.ljust(PAGE_SIZE, b"\0") + pdpt.ljust(PAGE_SIZE, b"\0") + entries
