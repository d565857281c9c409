"""Tiny Multiboot kernels: a 32-bit ELF file made of a few assembly lines."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

#: The body runs in 32-bit protected mode at 1 MiB with EAX and EBX as the loader left them and a stack; EXIT ends the
#: run with status (value << 1) | 1.
_KERNEL = """
.section .text
.macro EXIT value
    movl $\\value, %eax
    outl %eax, $0xf4
    hlt
.endm
.balign 4
    .long 0x1badb002, FLAGS, -(0x1badb002 + FLAGS)
.globl _start
_start:
    movl $0x90000, %esp
BODY
"""


def build_kernel(body: str, name: Path, flags: int = 0) -> Path:
    """Assemble a kernel; return its file, which is `name` with a suffix."""
    source, kernel = name.with_suffix(".S"), name.with_suffix(".elf")
    source.write_text(_KERNEL.replace("BODY", body).replace("FLAGS", hex(flags)))
    subprocess.run(["as", "--32", "-o", str(name), str(source)], check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-n", "-Ttext", "0x100000", "-o", str(kernel), str(name)], check=True)
    return kernel
