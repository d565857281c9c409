"""Multiboot kernels on /dev/kvm: what they find at their start, and QEMU's devices for test programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.fakes.multiboot import build_kernel
from tests.kvm.conftest import PATIENCE_S, run_cli

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kvm.conftest import Roms

pytestmark = pytest.mark.kvm

#: Ends with status 2 * number + 1 unless the condition code says equal.
CHECK = """
.macro CHECK number
    je 1f
    EXIT \\number
1:
.endm
.macro FWCFG key
    movw $0x510, %dx
    movw $\\key, %ax
    outw %ax, %dx
    incw %dx
.endm
"""
PASSED = "EXIT 0x55"
STATUS = 0x55 << 1 | 1


def test_the_kernel_finds_what_the_specification_promises(tmp_path: Path) -> None:
    module = tmp_path / "environ"
    module.write_bytes(b"NR_CPUS=2\n")
    body = f"""{CHECK}
    cmpl $0x2badb002, %eax
    CHECK 1
    movl (%ebx), %eax
    andl $0x4d, %eax
    cmpl $0x4d, %eax
    CHECK 2
    movl %cr0, %eax
    andl $0x80000001, %eax
    cmpl $1, %eax
    CHECK 3
    pushfl
    popl %eax
    testl $0x20200, %eax
    CHECK 4
    cmpl $639, 4(%ebx)
    CHECK 5
    cmpl $15 * 1024, 8(%ebx)
    CHECK 6

    movl 16(%ebx), %edi      # the command line: a name, then words
    xorl %eax, %eax
    movl $-1, %ecx
    repne scasb
    cmpl $0x7473616c, -5(%edi)
    CHECK 7

    cmpl $1, 20(%ebx)
    CHECK 8
    movl 24(%ebx), %esi      # the module
    movl 4(%esi), %eax
    subl (%esi), %eax
    cmpl $10, %eax
    CHECK 9
    movl (%esi), %edi
    testl $0xfff, %edi
    CHECK 10
    cmpl $0x435f524e, (%edi)
    CHECK 11

    movl 48(%ebx), %esi      # the memory map: add up usable RAM
    movl 44(%ebx), %ecx
    addl %esi, %ecx
    xorl %edx, %edx
entry:
    cmpl $1, 20(%esi)
    jne next
    addl 12(%esi), %edx
next:
    addl (%esi), %esi
    addl $4, %esi
    cmpl %ecx, %esi
    jb entry
    cmpl %ecx, %esi
    CHECK 12
    cmpl $0x9fc00 + 15 * 0x100000, %edx
    CHECK 13

    movw $0x18, %ax          # the loader's GDT still serves
    movw %ax, %ss
    ljmp $0x10, $1f
1:
    movl $0x12345678, 0      # RAM at 0, for the code that starts other processors
    cmpl $0x12345678, 0
    CHECK 14
    {PASSED}
"""
    kernel = build_kernel(body, tmp_path / "kernel")
    options = ["--cmdline", "first last", "--initrd", str(module), "--memory", "16M"]
    assert run_cli("--kernel", str(kernel), *options).returncode == STATUS


def test_fw_cfg_tells_the_number_of_processors_and_the_size_of_ram(tmp_path: Path) -> None:
    body = f"""{CHECK}
    FWCFG 0
    subl $4, %esp
    movl %esp, %edi
    movl $4, %ecx
    cld
    rep insb
    popl %eax
    cmpl $0x554d4551, %eax
    CHECK 1
    FWCFG 5
    inb %dx, %al
    cmpb $3, %al
    CHECK 2
    FWCFG 3
    inb %dx, %al
    inb %dx, %al
    inb %dx, %al
    cmpb $0x20, %al
    CHECK 3
    {PASSED}
"""
    kernel = build_kernel(body, tmp_path / "kernel")
    assert run_cli("--kernel", str(kernel), "--cpus", "3", "--memory", "2M").returncode == STATUS


def test_the_test_device_raises_lines_keeps_bytes_and_flushes_pages(tmp_path: Path) -> None:
    body = f"""{CHECK}
    movb $0x0a, %al          # have the PIC show what is requested
    outb %al, $0x20
    inb $0x20, %al
    testb $0x20, %al
    CHECK 0
    movw $0x2005, %dx
    movb $1, %al
    outb %al, %dx
    inb $0x20, %al
    andb $0x20, %al
    cmpb $0x20, %al
    CHECK 1
    movl $0x11223344, %eax
    outl %eax, $0xe0
    inb $0xe2, %al
    cmpb $0x22, %al
    CHECK 2

    movl $0xff000ff0, %edi
    movl $0xabcdef01, (%edi)
    cmpw $0xabcd, 2(%edi)
    CHECK 4

    movl $0x55667788, 0x5000
    movl $0x5000, %eax
    outl %eax, $0xe4
    cmpl $0x55667788, 0x5000
    CHECK 5
    {PASSED}
"""
    assert run_cli("--kernel", str(build_kernel(body, tmp_path / "kernel"))).returncode == STATUS


def test_a_reset_loads_the_kernel_and_its_information_again(tmp_path: Path) -> None:
    """The guest spoils its data, its command line and EBX's structure; what counts the rounds is in CMOS memory."""
    body = f"""{CHECK}
    cmpl $0x2badb002, %eax
    CHECK 1
    cmpl $0x11111111, data
    CHECK 2
    testl $4, (%ebx)
    setz %al
    cmpb $0, %al
    CHECK 3
    movl 16(%ebx), %esi
    cmpb $0, (%esi)
    setz %al
    cmpb $0, %al
    CHECK 4
    movb $0x50, %al
    outb %al, $0x70
    inb $0x71, %al
    cmpb $2, %al
    je enough
    incb %al
    outb %al, $0x71
    movl $0, data
    movl $0, (%ebx)
    movb $0, (%esi)
    movw $0xcf9, %dx
    movb $6, %al
    outb %al, %dx
    hlt
enough:
    {PASSED}
data:
    .long 0x11111111
"""
    # The data is in the text, which ld makes read-only to nobody: there is no paging.
    assert run_cli("--kernel", str(build_kernel(body, tmp_path / "kernel"))).returncode == STATUS


@pytest.mark.parametrize("arguments", [["--kernel", "KERNEL"], ["--kernel", "KERNEL", "--initrd", "/dev/null"]])
def test_what_cannot_be_booted_is_one_line_and_status_2(tmp_path: Path, arguments: list[str]) -> None:
    kernel = build_kernel(PASSED, tmp_path / "kernel", flags=0 if "--initrd" in arguments else 0x8)
    result = run_cli(*(str(kernel) if word == "KERNEL" else word for word in arguments))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


def test_without_testdev_there_is_no_fw_cfg(roms: Roms, tmp_path: Path) -> None:
    body = f"""{CHECK}
    FWCFG 0
    inb %dx, %al
    cmpb $0xff, %al
    movw $0x604, %dx
    movw $0x3400, %ax
    outw %ax, %dx
    hlt
"""
    kernel = build_kernel(body, tmp_path / "kernel")
    machine = roms.machine("", firmware=None, kernel=str(kernel), memory=2 << 20, testdev=False, timeout=PATIENCE_S)
    assert machine.run().kind == "poweroff"
    assert machine.inspect()["board"]["pio"]["unclaimed"] == {"0x510": 1, "0x511": 1}


#: Turns on the LAPIC, the hypercall page at 0x6000, and the SynIC with message page 0x7000 and event page 0x8000.
#: SINTs 8 and 9 interrupt on vector 0x60, which counts at 0x5000.
SYNIC = """
.macro SETMSR index value
    movl $\\index, %ecx
    movl $\\value, %eax
    xorl %edx, %edx
    wrmsr
.endm
.macro COMMAND connection control sint
    movl $\\connection << 24 | \\control << 16 | \\sint, %eax
    movw $0x3000, %dx
    outl %eax, %dx
.endm
.macro AWAIT value address
2:  pause
    cmpl $\\value, \\address
    jne 2b
.endm
.macro POST              # the message at 0x9000
    movl $0x5c, %eax
    xorl %edx, %edx
    xorl %ebx, %ebx
    movl $0x9000, %ecx
    call *page
.endm
    jmp begin
interrupt:
    incl 0x5000
    movl $0, 0xfee000b0
    pushl 8(%esp)        # kvm_pvm has no iret here
    popfl
    ret $8
page:
    .long 0x6000
idt:
    .word 0x60 * 8 + 7
    .long 0xa000
begin:
    movl $interrupt, %eax
    movw %ax, 0xa300
    movw $0x10, 0xa302
    movw $0x8e00, 0xa304
    shrl $16, %eax
    movw %ax, 0xa306
    lidt idt
    movl $0x1ff, 0xfee000f0
    SETMSR 0x40000000 1
    SETMSR 0x40000001 0x6001
    SETMSR 0x40000082 0x8001
    SETMSR 0x40000083 0x7001
    SETMSR 0x40000080 1
    SETMSR 0x40000098 0x60
    SETMSR 0x40000099 0x60
    sti
"""


def test_the_hyperv_test_device_raises_sints_and_echoes_messages_and_events(tmp_path: Path) -> None:
    body = f"""{CHECK}{SYNIC}
    COMMAND 0 1 8            # a route, and its SINT
    COMMAND 0 3 8
    AWAIT 1 0x5000

    COMMAND 0x10 4 8         # a message comes back
    movl $0x10, 0x9000
    movl $7, 0x9008
    movl $4, 0x900c
    movl $0x64636261, 0x9010
    POST
    testl %eax, %eax
    CHECK 1
    AWAIT 7 0x7800
    AWAIT 2 0x5000
    cmpl $0x64636261, 0x7810
    CHECK 2

    movl $0x68676665, 0x9010 # the next one waits for its slot
    POST
    testl %eax, %eax
    CHECK 3
3:  testb $1, 0x7805
    jz 3b
    cmpl $0x64636261, 0x7810
    CHECK 4
    cmpl $2, 0x5000
    CHECK 5
    movl $0, 0x7800
    SETMSR 0x40000084 0
    AWAIT 7 0x7800
    AWAIT 3 0x5000
    cmpl $0x68676665, 0x7810
    CHECK 6

    movl $100, %esi          # and there is an end to waiting
4:  POST
    testl %eax, %eax
    jnz 5f
    decl %esi
    jnz 4b
5:  cmpl $0x13, %eax
    CHECK 7

    COMMAND 0x20 6 9         # an event sets the flag of its connection's number
    movl $0x1005d, %eax
    xorl %edx, %edx
    xorl %ebx, %ebx
    movl $0x20, %ecx
    call *page
    testl %eax, %eax
    CHECK 8
    AWAIT 1 0x8904
    AWAIT 4 0x5000

    COMMAND 0x10 5 0
    POST
    cmpl $0x12, %eax
    CHECK 9
    {PASSED}
"""
    assert run_cli("--kernel", str(build_kernel(body, tmp_path / "kernel"))).returncode == STATUS


def test_a_wrong_request_to_the_hyperv_test_device_ends_the_vm_in_one_line(tmp_path: Path) -> None:
    body = f"{SYNIC}\n COMMAND 0x10 5 8\n {PASSED}"
    result = run_cli("--kernel", str(build_kernel(body, tmp_path / "kernel")))
    assert result.returncode == 4
    assert result.stderr == "pyvmm: VP 0: hyperv-testdev: command 0x10050008 is about what was never made\n"
