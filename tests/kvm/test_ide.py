"""The IDE disk on /dev/kvm, from guest code: identification, PIO, bus-master DMA, interrupts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pyvmm.core.bus import Bus
from pyvmm.machine.config import DiskConfig, parse_cdrom
from tests.fakes.rom import PROTECTED_MODE

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kvm.conftest import Roms

pytestmark = pytest.mark.kvm

#: Waits for a channel, by default the primary; ends with status 0x71 on an error. Changes EAX and EDX.
WAIT = """
.macro WAIT status=0x3f6
    movw $\\status, %dx
1:  inb %dx, %al
    testb $0x80, %al
    jnz 1b
    testb $1, %al
    jz 2f
    EXIT 0x38
2:
.endm
.macro OUT port, value
    movw $\\port, %dx
    movb $\\value, %al
    outb %al, %dx
.endm
.macro COMMAND code, lba, count
    OUT 0x1f2, \\count
    OUT 0x1f3, \\lba
    OUT 0x1f4, 0
    OUT 0x1f5, 0
    OUT 0x1f6, 0xe0
    OUT 0x1f7, \\code
.endm
.macro TABLE direction, address, bytes
    movl $\\address, 0x3000
    movl $(0x80000000 + \\bytes), 0x3004
    movw $0xffa4, %dx
    movl $0x3000, %eax
    outl %eax, %dx
    OUT 0xffa2, 6
    OUT 0xffa0, \\direction
.endm
.macro START direction
    OUT 0xffa0, (\\direction + 1)
    movw $0xffa2, %dx
1:  inb %dx, %al
    testb $4, %al
    jz 1b
    OUT 0xffa0, 0
    WAIT
    movw $0x1f7, %dx
    inb %dx, %al
.endm
"""

#: IDENTIFY to 0x10000; sectors 1-4 by PIO to 0x11000, and back to sectors 9-12; sectors 5-8 by DMA to 0x12000, and back
#: to sectors 13-16.
TRANSFERS = """
    COMMAND 0xec, 0, 0
    WAIT
    movl $0x10000, %edi
    movl $256, %ecx
    movw $0x1f0, %dx
    rep insw
    COMMAND 0x20, 1, 4
    movl $0x11000, %edi
    movl $4, %ebx
read:
    WAIT
    movl $128, %ecx
    movw $0x1f0, %dx
    rep insl
    decl %ebx
    jnz read
    COMMAND 0x30, 9, 4
    movl $0x11000, %esi
    movl $4, %ebx
write:
    WAIT
    movl $256, %ecx
    movw $0x1f0, %dx
    rep outsw
    decl %ebx
    jnz write
    WAIT
    TABLE 8, 0x12000, 2048
    COMMAND 0xc8, 5, 4
    START 8
    TABLE 0, 0x12000, 2048
    COMMAND 0xca, 13, 4
    START 0
    EXIT 0x10
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(64 << 10))
    return image


def test_a_guest_reads_and_writes_its_disk_by_pio_and_by_dma(roms: Roms, image: Path) -> None:
    before = image.read_bytes()
    machine = roms.machine(WAIT + PROTECTED_MODE + TRANSFERS, disks=[DiskConfig(str(image), bus="ide")])
    outcome = machine.run()
    assert (outcome.kind, outcome.exit_code) == ("exit", 0x21), outcome.message
    name = machine.memory.read(0x10000 + 54, 40)
    assert bytes(name[index ^ 1] for index in range(40)).strip() == b"Virtual HD"
    assert machine.memory.read(0x11000, 2048) == before[512:2560]
    assert machine.memory.read(0x12000, 2048) == before[2560:4608]
    after = image.read_bytes()
    assert after[9 * 512 : 17 * 512] == before[512:4608]
    assert after[: 9 * 512] + after[17 * 512 :] == before[: 9 * 512] + before[17 * 512 :]


def test_a_sector_read_by_a_string_instruction_is_one_access(
    roms: Roms, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_sector = """
    COMMAND 0x20, 1, 1
    WAIT
    movl $0x11000, %edi
    movl $256, %ecx
    movw $0x1f0, %dx
    rep insw
    EXIT 0x10
    """
    machine = roms.machine(WAIT + PROTECTED_MODE + one_sector, disks=[DiskConfig(str(image), bus="ide")])
    accesses = []

    def read_string(port: int, size: int, count: int) -> bytes:
        accesses.append((port, size, count))
        return Bus.read_string(machine.board.pio, port, size, count)

    monkeypatch.setattr(machine.board.pio, "read_string", read_string)
    assert machine.run().exit_code == 0x21
    assert machine.memory.read(0x11000, 512) == image.read_bytes()[512:1024]
    assert accesses == [(0x1F0, 2, 256)]


def test_without_ide_disks_the_controller_is_found_by_who_looks(roms: Roms) -> None:
    look = """
    inb $0x1f7, %al
    cmpb $0xff, %al
    jne wrong
    movw $0xcf8, %dx
    movl $0x80003900, %eax
    outl %eax, %dx
    movw $0xcfc, %dx
    inl %dx, %eax
    cmpl $0x71118086, %eax
    jne wrong
    movw $0x1f7, %dx
    inb %dx, %al
    testb %al, %al
    jnz wrong
    EXIT 0x10
wrong:
    EXIT 0x11
    """
    machine = roms.machine(PROTECTED_MODE + look.replace("inb $0x1f7", "movw $0x1f7, %dx\n inb %dx"))
    assert "pci" not in machine.board.inspect()["devices"]
    outcome = machine.run()
    assert outcome.exit_code == 0x21, outcome.message
    assert machine.board.inspect()["devices"]["pci"]["07.1"]["id"] == "8086:7111"


def test_the_disk_interrupts(roms: Roms, image: Path) -> None:
    """IRQ 14 through the PICs, to vector 0x26 of real mode."""
    wait_for_interrupt = """
    movw $handler, 0x76 * 4
    movw %cs, 0x76 * 4 + 2
    movb $0x11, %al
    outb %al, $0x20
    outb %al, $0xa0
    movb $0x08, %al
    outb %al, $0x21
    movb $0x70, %al
    outb %al, $0xa1
    movb $0x04, %al
    outb %al, $0x21
    movb $0x02, %al
    outb %al, $0xa1
    movb $0x01, %al
    outb %al, $0x21
    outb %al, $0xa1
    movb $0xfb, %al
    outb %al, $0x21
    movb $0xbf, %al
    outb %al, $0xa1
    COMMAND 0x20, 1, 1
    sti
again:
    hlt
    jmp again
handler:
    movw $0x1f7, %dx
    inb %dx, %al
    cmpb $0x58, %al
    jne wrong
    EXIT 0x10
wrong:
    EXIT 0x11
    """
    machine = roms.machine(WAIT + wait_for_interrupt, disks=[DiskConfig(str(image), bus="ide")])
    outcome = machine.run()
    assert outcome.exit_code == 0x21, outcome.message


#: Ends with status 0x71 where the drive does not ask for the packet, or reports an error; the data goes to EDI.
READ_CD = """
.macro SEND packet
    OUT 0x176, 0xa0
    OUT 0x171, 0
    OUT 0x174, 0x00
    OUT 0x175, 0x08
    OUT 0x177, 0xa0
    WAIT 0x376
    movl $0xf0000 + \\packet, %esi
    movl $6, %ecx
    movw $0x170, %dx
    rep outsw
    movw $0x376, %dx
1:  inb %dx, %al
    testb $0x80, %al
    jnz 1b
.endm
"""
CD = """
    jmp begin
.balign 16
sense: .byte 3, 0, 0, 0, 18, 0, 0, 0, 0, 0, 0, 0
read: .byte 0x28, 0, 0, 0, 0, 16, 0, 0, 2, 0, 0, 0
begin:
    SEND sense
    WAIT 0x376
    movl $0x10000, %edi
    movl $9, %ecx
    movw $0x170, %dx
    rep insw
    SEND read
    movl $0x11000, %edi
    movl $2, %ebx
block:
    WAIT 0x376
    movl $512, %ecx
    movw $0x170, %dx
    rep insl
    decl %ebx
    jnz block
    WAIT 0x376
    EXIT 0x10
"""


def test_a_guest_reads_a_cd(roms: Roms, tmp_path: Path) -> None:
    image = tmp_path / "cd.iso"
    image.write_bytes(os.urandom(64 << 10))
    machine = roms.machine(WAIT + READ_CD + PROTECTED_MODE + CD, disks=[parse_cdrom(str(image))])
    outcome = machine.run()
    assert (outcome.kind, outcome.exit_code) == ("exit", 0x21), outcome.message
    sense = machine.memory.read(0x10000, 18)
    assert (sense[2], sense[12]) == (6, 0x29), "the power-on is the first thing to hear"
    assert machine.memory.read(0x11000, 4096) == image.read_bytes()[16 * 2048 : 18 * 2048]
