"""Tiny guests: a ROM of 64 KiB made of a few assembly lines."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from enlightenments import hypercall_page
from enlightenments.tlfs import HVCALL_SIGNAL_EVENT, MSR_GUEST_OS_ID, MSR_HYPERCALL

if TYPE_CHECKING:
    from pathlib import Path

#: The body runs in real mode at F000:0000 with DS and ES 0 and a stack; EXIT ends the run with status (value << 1) | 1.
_ROM = """
.code16
.section .text
.macro EXIT value
    movb $\\value, %al
    outb %al, $0xf4
    hlt
.endm
start:
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7000, %sp
    cld
BODY
.code16
.org 0xfff0
    ljmp $0xf000, $start
.org 0x10000
"""

#: Goes on in flat 32-bit protected mode; to be put first in the body.
PROTECTED_MODE = """
    cli
    lgdtl %cs:gdt_pointer
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $8, $(0xf0000 + protected)
.balign 8
gdt:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    .word 23
    .long 0xf0000 + gdt
.code32
protected:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0x7000, %esp
"""

#: Has the hypercall page laid over `HYPERCALL_PAGE`; real-mode code calls it as a 32-bit caller does.
SHOW_HYPERCALL_PAGE = f"""
    movl ${MSR_GUEST_OS_ID}, %ecx
    movl $1, %eax
    xorl %edx, %edx
    wrmsr
    movl ${MSR_HYPERCALL}, %ecx
    movl $0xfe001, %eax
    wrmsr
"""
#: To be put last. A VMM without hypercalls runs the same code, from the ROM.
HYPERCALL_PAGE = f".org 0xe000\nhypercall_page: .byte {','.join(map(str, hypercall_page.CONTENT[:16]))}\n"


def ring(connection: int) -> str:
    """HvSignalEvent in its fast form. TLFS v6.0b, chapter 11.11."""
    return f"""
    movl ${1 << 16 | HVCALL_SIGNAL_EVENT}, %eax
    xorl %edx, %edx
    movl ${connection}, %ecx
    xorl %ebx, %ebx
    call hypercall_page
    """


def build_rom(body: str, name: Path) -> Path:
    """Assemble a ROM; return its file, which is `name` with a suffix."""
    source, binary = name.with_suffix(".S"), name.with_suffix(".bin")
    source.write_text(_ROM.replace("BODY", body))
    subprocess.run(["as", "--32", "-o", str(name), str(source)], check=True)
    link = ["ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0", "-e", "0", "-o", str(binary), str(name)]
    subprocess.run(link, check=True)
    assert binary.stat().st_size == 0x10000
    return binary
