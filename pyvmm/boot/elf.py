"""Static x86 ELF executables of 32 and 64 bits, loaded at their physical addresses.

Source: System V ABI, "Object Files" (gABI 4.1, chapters 4 and 5) and its i386 and x86-64 supplements.
"""

from __future__ import annotations

import struct

from pyvmm.boot.entry import BootError
from pyvmm.boot.image import Image, put_segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from pyvmm.core.memory import GuestMemory

MAGIC = b"\x7fELF"
#: Where e_ident names the class, and the class of 32-bit files.
CLASS_OFFSET, CLASS_32 = 4, 1
_IDENT_SIZE = 16
_LITTLE_ENDIAN = 1
_TYPE_EXECUTABLE = 2
_MACHINES = {
    3: "i386",
    8: "MIPS",
    21: "ppc64",
    22: "s390",
    40: "arm",
    62: "x86-64",
    183: "arm64",
    243: "RISC-V",
    258: "LoongArch",
}


class _Format:
    """What the two classes of ELF files differ in.

    `header` unpacks, after e_ident, to type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize and phnum;
    `program_header` to type, offset, vaddr, paddr, filesz and memsz.
    """

    def __init__(self, bits: int, elf_class: int, machine: int, header: str, program_header: str) -> None:
        self.bits = bits
        self.elf_class = elf_class
        self.machine = machine
        self.header = struct.Struct(header)
        self.program_header = struct.Struct(program_header)


_FORMATS = {
    32: _Format(32, CLASS_32, 3, "<16xHHIIIIIHHH", "<IIIIII8x"),
    64: _Format(64, 2, 62, "<16xHHIQQQIHHH", "<I4xQQQQQ8x"),
}
_PT_LOAD = 1


def load_elf(memory: GuestMemory, file: BinaryIO, name: str, bits: int = 64) -> Image:
    """Load the PT_LOAD segments of `file`.

    `bits`, 32 or 64, is the class that the file must have; a 32-bit one may stand below 1 MiB. Bytes of a segment that
    are not in the file are zeroed, so that loading over a used guest works too. An entry point given as a virtual
    address is translated by its segment.
    Raises BootError naming `name` if the file is no such executable or does not fit into guest RAM.
    """
    entry, segments = _parse(file, name, _FORMATS[bits])
    if sum(memsz for _, _, _, _, memsz in segments) > memory.size:
        raise BootError(f"{name}: its ELF segments need more than {memory.size >> 20} MiB of guest memory")
    for offset, _, paddr, filesz, memsz in segments:
        put_segment(memory, file, name, offset, filesz, paddr, memsz, low=bits == 32)
    start = min(paddr for _, _, paddr, _, _ in segments)
    end = max(paddr + memsz for _, _, paddr, _, memsz in segments)
    for _, _, paddr, _, memsz in segments:
        if paddr <= entry < paddr + memsz:
            return Image(entry, start, end)
    for _, vaddr, paddr, _, memsz in segments:
        if vaddr <= entry < vaddr + memsz:
            return Image(entry - vaddr + paddr, start, end)
    raise BootError(f"{name}: the ELF entry point {entry:#x} lies in none of its segments")


def _parse(file: BinaryIO, name: str, form: _Format) -> tuple[int, list[tuple[int, int, int, int, int]]]:
    """Return the entry point and (offset, vaddr, paddr, filesz, memsz) of each segment that occupies memory."""
    file.seek(0)
    head = file.read(form.header.size)
    if len(head) >= _IDENT_SIZE and head[CLASS_OFFSET] != form.elf_class:
        raise BootError(f"{name}: an ELF file, but not one of the {form.bits}-bit class that is needed here")
    if len(head) < form.header.size:
        raise BootError(f"{name}: truncated ELF header")
    kind, machine, _, entry, phoff, _, _, _, phentsize, phnum = form.header.unpack(head)
    if machine != form.machine or head[5] != _LITTLE_ENDIAN:
        found = _MACHINES.get(machine, f"machine {machine}")
        raise BootError(f"{name}: an ELF file for {found}, not for {_MACHINES[form.machine]}")
    if kind != _TYPE_EXECUTABLE:
        raise BootError(f"{name}: an ELF file linked at no fixed address (type {kind}), not a kernel")
    if phentsize != form.program_header.size or phoff + phnum * phentsize > file.seek(0, 2):
        raise BootError(f"{name}: truncated or broken ELF program headers")
    file.seek(phoff)
    table = file.read(phnum * phentsize)
    if len(table) != phnum * phentsize:
        raise BootError(f"{name}: truncated while it was read")
    segments = []
    for kind, offset, vaddr, paddr, filesz, memsz in form.program_header.iter_unpack(table):
        if kind == _PT_LOAD and memsz:
            segments.append((offset, vaddr, paddr, filesz, memsz))
    if not segments:
        raise BootError(f"{name}: an ELF file with nothing to load")
    return entry, segments
