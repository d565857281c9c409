"""How a loaded guest starts: the state of the first VP, and the error of everything that cannot be loaded."""

from __future__ import annotations

#: Selectors of the GDT that Linux's 64-bit boot protocol asks for (Documentation/x86/boot.rst, "64-bit Boot Protocol").
CODE_SELECTOR = 0x10
DATA_SELECTOR = 0x18


class BootError(Exception):
    """A file that cannot be booted. The message is one line that names the file and what is wrong with it."""


class EntryState:
    """What the boot VP's registers must hold when it first runs; all addresses are guest physical.

    `mode` is one of

    ``reset``
        the VP keeps its own power-on state (CS base 0xFFFF0000, IP 0xFFF0); every other field is 0.
    ``long64``
        64-bit mode with paging (CR0.PE, CR0.PG, CR4.PAE, EFER.LME and EFER.LMA set) and interrupts off. CS is the
        flat 64-bit code segment CODE_SELECTOR, DS, ES and SS the flat data segment DATA_SELECTOR, of a GDT at
        `gdt_base` whose limit is `gdt_limit`. `cr3` is the root of tables that map the first 4 GiB one to one.
        `rip` is the entry point, `rsi` the address of Linux's boot_params, `rsp` the top of a small stack. RFLAGS is
        2, the other general registers are 0, the IDT is empty.
    ``protected32``
        as ``long64``, but in 32-bit protected mode without paging: CS is the flat 32-bit code segment of the GDT at
        `gdt_base`, and `cr3` is 0. `rax` and `rbx` are what Multiboot asks for in EAX and EBX.
    """

    __slots__ = ("cr3", "gdt_base", "gdt_limit", "mode", "rax", "rbx", "rip", "rsi", "rsp")

    def __init__(
        self,
        mode: str,
        rip: int = 0,
        rax: int = 0,
        rbx: int = 0,
        rsi: int = 0,
        rsp: int = 0,
        cr3: int = 0,
        gdt_base: int = 0,
        gdt_limit: int = 0,
    ) -> None:
        self.mode = mode
        self.rip = rip
        self.rax = rax
        self.rbx = rbx
        self.rsi = rsi
        self.rsp = rsp
        self.cr3 = cr3
        self.gdt_base = gdt_base
        self.gdt_limit = gdt_limit
