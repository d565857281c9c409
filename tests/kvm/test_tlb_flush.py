"""Flushes by hypercall on a real TLB: user code changes its own page table and looks through it.

Where KVM shadows page tables (kvm_pvm, or without nested paging), neither the processor nor KVM sees the change of a
table that user code may write until something flushes, so the test can fail there. Elsewhere an exit may flush by
chance.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pyvmm.core.kvm.system import kvm_kind
from pyvmm.core.trace import GuestLog, Tracer
from pyvmm.machine.config import VmConfig
from pyvmm.machine.console import open_console
from pyvmm.machine.machine import Machine

pytestmark = pytest.mark.kvm

FLUSH_SPACE, SPIN_WAIT = 0x02, 0x10008
FIRST_VP, SECOND_VP = 1, 2
OLD, NEW = 0xA, 0xB

#: Where the guest leaves what each VP last read, the second VP's count of reads, and the results of its hypercalls.
READ_FIRST, READ_SECOND, READS, STARTED, CALLED = (0x730000 + offset for offset in (0, 8, 16, 24, 32))

# Entered in long mode. The first GiB is mapped for user code, one to one, but for the page at 0x400000, which the
# table at 0x303000 maps to one of two pages. Both VPs run user code with access to ports: KVM emulates kernel code on
# some hosts, and with it every look at the page table. The second VP reads for ever; the first changes the table, makes
# a hypercall, waits for two more reads of the second's and ends.
_KERNEL = """
.macro MSR number, low
    mov $\\number, %ecx
    mov $\\low, %eax
    xor %edx, %edx
    wrmsr
.endm
.macro WAIT_FOR_READS count
    mov READS, %rax
    add $\\count, %rax
1:  cmp READS, %rax
    ja 1b
.endm
.globl _start
_start:
    cli
    mov $0x280000, %rsp
    lgdt gdt_pointer
    pushq $0x08
    pushq $1f
    lretq
1:  mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    movl $0x301007, 0x300000
    movl $0x302007, 0x301000
    mov $0x302000, %edi
    mov $0x87, %eax
    mov $512, %ecx
1:  mov %eax, (%rdi)
    add $0x200000, %eax
    add $8, %edi
    dec %ecx
    jnz 1b
    movl $0x303007, 0x302010
    movl $0x700007, 0x303000
    movl $OLD, 0x700000
    movl $NEW, 0x701000
    mov $0x300000, %eax
    mov %rax, %cr3
    MSR 0x40000000, 1
    MSR 0x40000001, 0x310001
    MSR 0x174, 0x08
    mov $0x99, %ecx
    mov $start_second, %edx
    mov $0x310000, %eax
    call *%rax
    mov %rax, STARTED
    pushq $0x3002
    popfq
    mov $first, %edx
    mov $0x280000, %ecx
    rex.w sysexit

first:
    WAIT_FOR_READS 2
    mov 0x400000, %eax
    movl $0x701007, 0x303000  # the first write lets KVM know of the table
    movl $0x700007, 0x303000
    movl $0x701007, 0x303000
    mov $CALL, %ecx
    mov $flush, %edx
    xor %r8d, %r8d
    mov $0x310000, %eax
    call *%rax
    mov %rax, CALLED
    mov 0x400000, %eax
    mov %rax, READ_FIRST
    WAIT_FOR_READS 2
    outb %al, $0xf4
    hlt

second:
    mov 0x400000, %eax
    mov %rax, READ_SECOND
    incq READS
    jmp second

.balign 8
gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0, 0, 0x00affb000000ffff, 0x00cff3000000ffff
gdt_pointer:
    .word 55
    .quad gdt
.balign 0x1000
flush: .quad 0, 2, TARGETS  # all address spaces
.macro SEGMENT limit, selector, attributes
    .quad 0
    .long \\limit
    .word \\selector, \\attributes
.endm
.balign 0x1000
start_second:
    .quad -1  # this partition
    .long 1, 0
    .quad second, 0x290000, 0x3002
    SEGMENT 0xffffffff, 0x2b, 0xa0fb
    .rept 5
    SEGMENT 0xffffffff, 0x33, 0xc0f3
    .endr
    SEGMENT 0x67, 0, 0x8b
    SEGMENT 0, 0, 0x82
    .quad 0, 0
    .word 0, 0, 0, 55
    .quad gdt
    .quad 0x500, 0x80000033, 0x300000, 0x20, 0x0007040600070406
"""


def run(folder: Path, call: int, targets: int) -> dict[str, int]:
    """What the guest left in memory."""
    source, kernel = folder / "flush.S", folder / "flush.elf"
    values = {"CALL": call, "TARGETS": targets, "OLD": OLD, "NEW": NEW, "READ_FIRST": READ_FIRST}
    values |= {"READ_SECOND": READ_SECOND, "READS": READS, "STARTED": STARTED, "CALLED": CALLED}
    source.write_text("".join(f".set {name}, {value:#x}\n" for name, value in values.items()) + _KERNEL)
    subprocess.run(["as", "--64", "-o", str(folder / "flush.o"), str(source)], check=True)
    link = ["ld", "-m", "elf_x86_64", "-n", "-Ttext", "0x200000", "-o", str(kernel), str(folder / "flush.o")]
    subprocess.run(link, check=True)
    config = VmConfig(kernel=str(kernel), cpus=2, memory=16 << 20, testdev=True, timeout=60.0, com1="none")
    config.enlightenments = "full,+tlbflush"
    machine = Machine(config, tracer=Tracer(), log=GuestLog(), console=open_console("none"))
    try:
        outcome = machine.run()
        assert outcome.kind == "exit", outcome.message
        names = {"first": READ_FIRST, "second": READ_SECOND, "started": STARTED, "called": CALLED}
        return {name: int.from_bytes(machine.memory.read(gpa, 8), "little") for name, gpa in names.items()}
    finally:
        machine.close()


@pytest.mark.parametrize("targets", [FIRST_VP, SECOND_VP, FIRST_VP | SECOND_VP])
def test_after_a_flush_its_targets_look_through_the_changed_table(tmp_path: Path, targets: int) -> None:
    found = run(tmp_path, FLUSH_SPACE, targets)
    assert (found["started"], found["called"]) == (0, 0)
    if targets & FIRST_VP:
        assert found["first"] == NEW
    if targets & SECOND_VP:
        assert found["second"] == NEW


@pytest.mark.skipif(kvm_kind() != "kvm_pvm", reason="elsewhere an exit may flush by chance")
def test_without_a_flush_the_old_page_is_still_seen(tmp_path: Path) -> None:
    found = run(tmp_path, SPIN_WAIT, 0)
    assert found == {"first": OLD, "second": OLD, "started": 0, "called": 0}
