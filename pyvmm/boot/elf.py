"""Static x86-64 ELF executables, loaded at their physical addresses.

Source: System V ABI, "Object Files" (gABI 4.1, chapters 4 and 5) and its x86-64 supplement.
"""

from __future__ import annotations

import struct

from pyvmm.boot.entry import BootError
from pyvmm.boot.layout import HIGH_MEMORY
from pyvmm.core.memory import GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from pyvmm.core.memory import GuestMemory

MAGIC = b"\x7fELF"
# After the 16 bytes of e_ident: type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum.
_HEADER = struct.Struct("<16xHHIQQQIHHH")
# type, flags, offset, vaddr, paddr, filesz, memsz, align
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_CLASS_64, _LITTLE_ENDIAN = 2, 1
_TYPE_EXECUTABLE = 2
_MACHINE_X86_64 = 62
_MACHINES = {3: "i386", 8: "MIPS", 21: "ppc64", 22: "s390", 40: "arm", 183: "arm64", 243: "RISC-V", 258: "LoongArch"}
_PT_LOAD = 1
_ZEROS = bytes(1 << 20)


def load_elf(memory: GuestMemory, file: BinaryIO, name: str) -> tuple[int, int]:
    """Load the PT_LOAD segments of `file`; return the physical entry address and the first address above the image.

    Bytes of a segment that are not in the file are zeroed, so that loading over a used guest works too. An entry
    point given as a virtual address is translated by its segment.
    Raises BootError naming `name` if the file is no such executable or does not fit into guest RAM from 1 MiB on.
    """
    size = file.seek(0, 2)
    entry, segments = _parse(file, name, size)
    end = 0
    for offset, _, paddr, filesz, memsz in segments:
        if filesz > memsz or offset + filesz > size:
            raise BootError(f"{name}: truncated ELF file, the segment for {paddr:#x} is not all there")
        if paddr < HIGH_MEMORY:
            raise BootError(f"{name}: ELF segment at {paddr:#x}, but programs are loaded from 1 MiB on")
        try:
            view = memory.view(paddr, memsz, write=True)
        except GuestMemoryError:
            needed = f"{paddr:#x}-{paddr + memsz:#x}"
            raise BootError(f"{name}: needs RAM at {needed}, guest memory is {memory.size >> 20} MiB") from None
        file.seek(offset)
        if file.readinto(view[:filesz]) != filesz:  # type: ignore[attr-defined]
            raise BootError(f"{name}: truncated while it was read")
        _zero(view[filesz:])
        end = max(end, paddr + memsz)
    for _, _, paddr, _, memsz in segments:
        if paddr <= entry < paddr + memsz:
            return entry, end
    for _, vaddr, paddr, _, memsz in segments:
        if vaddr <= entry < vaddr + memsz:
            return entry - vaddr + paddr, end
    raise BootError(f"{name}: the ELF entry point {entry:#x} lies in none of its segments")


def _parse(file: BinaryIO, name: str, size: int) -> tuple[int, list[tuple[int, int, int, int, int]]]:
    """Return the entry point and (offset, vaddr, paddr, filesz, memsz) of each segment that occupies memory."""
    file.seek(0)
    head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise BootError(f"{name}: truncated ELF header")
    if head[4] != _CLASS_64:
        raise BootError(f"{name}: a 32-bit ELF file, only 64-bit x86 can be booted")
    kind, machine, _, entry, phoff, _, _, _, phentsize, phnum = _HEADER.unpack(head)
    if machine != _MACHINE_X86_64 or head[5] != _LITTLE_ENDIAN:
        raise BootError(f"{name}: an ELF file for {_MACHINES.get(machine, f'machine {machine}')}, not for x86-64")
    if kind != _TYPE_EXECUTABLE:
        raise BootError(f"{name}: an ELF file linked at no fixed address (type {kind}), not a kernel")
    if phentsize != _PROGRAM_HEADER.size or phoff + phnum * phentsize > size:
        raise BootError(f"{name}: truncated or broken ELF program headers")
    file.seek(phoff)
    table = file.read(phnum * phentsize)
    if len(table) != phnum * phentsize:
        raise BootError(f"{name}: truncated while it was read")
    segments = []
    for kind, _, offset, vaddr, paddr, filesz, memsz, _ in _PROGRAM_HEADER.iter_unpack(table):
        if kind == _PT_LOAD and memsz:
            segments.append((offset, vaddr, paddr, filesz, memsz))
    if not segments:
        raise BootError(f"{name}: an ELF file with nothing to load")
    return entry, segments


def _zero(view: memoryview) -> None:
    for start in range(0, len(view), len(_ZEROS)):
        chunk = view[start : start + len(_ZEROS)]
        chunk[:] = _ZEROS[: len(chunk)]
