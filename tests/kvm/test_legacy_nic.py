"""The legacy NIC on /dev/kvm, from guest code: its place on the PCI bus, its lists, its interrupt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyvmm.machine.config import parse_nic
from tests.fakes.tulip import frame, on_wire

if TYPE_CHECKING:
    from tests.kvm.conftest import Roms

pytestmark = pytest.mark.kvm

RECEIVE_BUFFER, TRANSMIT_BUFFER, COUNT = 0x4000, 0x5000, 0x2000
#: Registers of the first NIC, and its place in configuration space.
MACROS = """
.macro PUT csr, value
    movw $(0xec00 + 8 * \\csr), %dx
    movl $\\value, %eax
    outl %eax, %dx
.endm
.macro OUT port, value
    movw $\\port, %dx
    movb $\\value, %al
    outb %al, %dx
.endm
.macro ALLOW_BUS_MASTERING
    movw $0xcf8, %dx
    movl $0x80005004, %eax
    outl %eax, %dx
    movw $0xcfc, %dx
    movl $7, %eax
    outl %eax, %dx
.endm
"""
#: Sends one frame of 60 bytes to itself, in internal loopback, and waits for interrupt 10, which is a level: the first
#: time its cause is left as it is.
LOOPBACK = """
    movw $handler, 0x72 * 4
    movw %cs, 0x72 * 4 + 2
    OUT 0x20, 0x11
    OUT 0xa0, 0x11
    OUT 0x21, 0x08
    OUT 0xa1, 0x70
    OUT 0x21, 0x04
    OUT 0xa1, 0x02
    OUT 0x21, 0x01
    OUT 0xa1, 0x01
    OUT 0x21, 0xfb
    OUT 0xa1, 0xfb
    OUT 0x4d1, 0x04
    movw $0xcf8, %dx
    movl $0x80005000, %eax
    outl %eax, %dx
    movw $0xcfc, %dx
    inl %dx, %eax
    cmpl $0x00091011, %eax
    jne wrong
    ALLOW_BUS_MASTERING
    movl $0x80000000, 0x3000
    movl $0x02000600, 0x3004
    movl $0x4000, 0x3008
    movl $0x80000000, 0x3100
    movl $0x6200003c, 0x3104
    movl $0x5000, 0x3108
    PUT 3, 0x3000
    PUT 4, 0x3100
    PUT 7, 0x00010040
    PUT 6, 0x00002442
    sti
again:
    hlt
    jmp again
handler:
    incw 0x2000
    movw $0xec28, %dx
    inl %dx, %eax
    testb $0x40, %al
    jz wrong
    cmpw $2, 0x2000
    jb leave
    movl $0x40, %eax
    outl %eax, %dx
    EXIT 0x10
leave:
    OUT 0xa0, 0x20
    OUT 0x20, 0x20
    iret
wrong:
    EXIT 0x11
"""


def test_a_guest_sends_to_itself_and_is_interrupted_until_it_looks(roms: Roms) -> None:
    sent = frame(b"to itself").ljust(60, b"\0")
    machine = roms.machine(MACROS + LOOPBACK, nics=[parse_nic("none,type=legacy,mac=00:15:5d:00:01:02")])
    machine.memory.write(TRANSMIT_BUFFER, sent)
    outcome = machine.run()
    assert (outcome.kind, outcome.exit_code) == ("exit", 0x21), outcome.message
    assert machine.memory.read(RECEIVE_BUFFER, 64) == on_wire(sent)
    assert machine.memory.read(COUNT, 2) == b"\x02\x00"


#: Sends the same frame to itself for ever, and counts the times.
SENDING = """
    ALLOW_BUS_MASTERING
    movl $0x02000600, 0x3004
    movl $0x4000, 0x3008
    movl $0x6200003c, 0x3104
    movl $0x5000, 0x3108
    PUT 3, 0x3000
    PUT 4, 0x3100
    PUT 6, 0x00002442
again:
    movl $0x80000000, 0x3000
    movl $0x80000000, 0x3100
    PUT 1, 0
wait:
    testl $0x80000000, 0x3000
    jnz wait
    testl $0x80000000, 0x3100
    jnz wait
    incl 0x2000
    jmp again
"""


def test_a_vm_that_is_paused_or_reset_sends_on_afterwards(roms: Roms) -> None:
    vm = roms.start(MACROS + SENDING, nics=[parse_nic("none,type=legacy,mac=00:15:5d:00:01:02")])
    vm.until(lambda: vm.word(COUNT) > 10, "frames")
    vm.machine.pause()
    before = vm.word(COUNT)
    vm.machine.resume()
    vm.until(lambda: vm.word(COUNT) > before + 10, "frames after the pause")
    vm.machine.reset()
    before = vm.word(COUNT)
    vm.until(lambda: vm.word(COUNT) > before + 10, "frames after the reset")
    vm.machine.stop(0)
    assert vm.wait().kind == "stopped"
