"""Timers that interrupt without a message: the VP stays in KVM_RUN, and they rest while the VM is paused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyvmm.core.kvm import abi

if TYPE_CHECKING:
    from tests.kvm.conftest import Roms

pytestmark = pytest.mark.kvm

TICKS_AT = 0x500
_PERIOD = 20_000  # 2 ms in 100 ns

# Counts ticks in HLT. STIMER0: periodic, direct, vector 0x60. The LAPIC is above what real mode reaches: x2APIC mode.
_TICKING = f"""
    movw $tick, 4 * 0x60
    movw %cs, 4 * 0x60 + 2
    movl $0x1b, %ecx
    rdmsr
    orl $0xc00, %eax
    wrmsr
    movl $0x80f, %ecx
    movl $0x1ff, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x400000b1, %ecx
    movl ${_PERIOD}, %eax
    wrmsr
    movl $0x400000b0, %ecx
    movl $(1 << 12 | 0x60 << 4 | 1 << 1 | 1), %eax
    wrmsr
wait:
    sti
    hlt
    cli
    cmpl ${{last}}, {TICKS_AT}
    jb wait
    EXIT 0
tick:
    incl {TICKS_AT}
    movl $0x80b, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    iret
"""


def test_ticks_do_not_take_the_vp_out_of_kvm(roms: Roms) -> None:
    machine = roms.machine(_TICKING.replace("{last}", "100"))
    reference = machine.partition.reference
    assert reference is not None
    started = reference.now()
    assert machine.run().kind == "exit"
    assert reference.now() - started >= 100 * _PERIOD
    assert machine.partition.synics[0].inspect()["interrupts"] >= 100
    assert machine.processors[0].hot.counts()["exits"].get(abi.EXIT_INTR, 0) < 20


def test_a_paused_vm_has_no_ticks(roms: Roms) -> None:
    vm = roms.start(_TICKING.replace("{last}", "0x7fffffff"))
    machine = vm.machine
    reference, synic = machine.partition.reference, machine.partition.synics[0]
    assert reference is not None
    vm.until(lambda: vm.word(TICKS_AT) > 5, "ticks")
    machine.pause()
    raised, until = synic.inspect()["interrupts"], reference.now() + 20 * _PERIOD
    vm.until(lambda: reference.now() > until, "20 periods")
    assert synic.inspect()["interrupts"] == raised
    ticks = vm.word(TICKS_AT)
    machine.resume()
    vm.until(lambda: vm.word(TICKS_AT) > ticks + 5, "ticks again")
