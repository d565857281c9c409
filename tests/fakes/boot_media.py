"""Boot media for firmware: a disk whose first sector prints a line, and a CD that does."""

from __future__ import annotations

import struct
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

#: Prints MESSAGE on the first serial port; then port 0xf4 ends the run, and where that is nobody's, a reset does.
_BOOT_SECTOR = """
.code16
    xorw %ax, %ax
    movw %ax, %ds
    call here
here:
    popw %si
    addw $message - here, %si
next:
    lodsb
    testb %al, %al
    jz done
    movw $0x3f8, %dx
    outb %al, %dx
    jmp next
done:
    movb $0x10, %al
    outb %al, $0xf4
    movb $6, %al
    movw $0xcf9, %dx
    outb %al, %dx
    hlt
message: .asciz "MESSAGE"
.org 510
    .word 0xaa55
"""

_SECTOR = 2048


def boot_sector(message: str, folder: Path) -> bytes:
    """512 bytes that a BIOS loads and starts."""
    source, thing, binary = (folder / f"boot.{suffix}" for suffix in ("S", "o", "bin"))
    source.write_text(_BOOT_SECTOR.replace("MESSAGE", message))
    subprocess.run(["as", "--32", "-o", str(thing), str(source)], check=True)
    link = ["ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0", "-e", "0", "-o", str(binary), str(thing)]
    subprocess.run(link, check=True)
    return binary.read_bytes()


def boot_cd(message: str, folder: Path) -> bytes:
    """An ISO image with nothing but a boot catalogue and a boot sector. El Torito specification 1.0, figures 2 to 5."""
    descriptor = struct.pack("<B5sB", 0, b"CD001", 1)
    boot_record = (descriptor + b"EL TORITO SPECIFICATION".ljust(64, b"\0") + struct.pack("<I", 19)).ljust(
        _SECTOR, b"\0"
    )
    primary = (struct.pack("<B5sB", 1, b"CD001", 1)).ljust(_SECTOR, b"\0")
    end = (struct.pack("<B5sB", 255, b"CD001", 1)).ljust(_SECTOR, b"\0")
    validation = bytearray(struct.pack("<BBH24sHBB", 1, 0, 0, b"pyvmm", 0, 0x55, 0xAA))
    words = sum(struct.unpack("<16H", validation))
    struct.pack_into("<H", validation, 28, -words & 0xFFFF)
    # Bootable, no emulation, segment 0x7c0, four sectors of 512 bytes from sector 20 on.
    entry = struct.pack("<BBHBxHI20x", 0x88, 0, 0, 0, 4, 20)
    catalogue = (bytes(validation) + entry).ljust(_SECTOR, b"\0")
    program = boot_sector(message, folder).ljust(_SECTOR, b"\0")
    return bytes(16 * _SECTOR) + primary + boot_record + end + catalogue + program + bytes(8 * _SECTOR)
