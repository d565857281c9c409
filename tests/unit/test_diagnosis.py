"""The story of a stopped VP: causes, modes, the guest's page tables, the instruction."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.core.kvm import abi
from pyvmm.core.kvm.errors import KvmError
from pyvmm.core.memory import GuestMemory
from pyvmm.machine import diagnosis

if TYPE_CHECKING:
    from pyvmm.core.kvm.vp import Vp

PE, PG, PAE, LA57, LMA = 1, 1 << 31, 1 << 5, 1 << 12, 1 << 10
PRESENT, LARGE = 3, 1 << 7
CR3 = 0x10_0000
SIZE = 4 << 20


class StoppedVp:
    """A VP that stopped in some mode at some address."""

    def __init__(self, bits: int, rip: int, base: int = 0) -> None:
        self.index = 1
        self.run = abi.Run()
        self.regs = abi.Regs(rip=rip, rax=0x1122, rflags=2)
        self.sregs = abi.Sregs(cr3=CR3)
        self.sregs.cs = abi.Segment(base=base, selector=0x10, dpl=0)
        if bits > 16:
            self.sregs.cr0 = PE
        self.sregs.cs.db, self.sregs.cs.l = bits == 32, bits == 64
        if bits == 64:
            self.sregs.cr0 |= PG
            self.sregs.cr4, self.sregs.efer = PAE, LMA

    def get_regs(self) -> abi.Regs:
        return self.regs

    def get_sregs(self) -> abi.Sregs:
        return self.sregs

    def diagnose(self, reason: int, memory: GuestMemory) -> str:
        return diagnosis.diagnose(cast("Vp", self), reason, memory)


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(SIZE)


def put(memory: GuestMemory, table: int, index: int, value: int, size: int = 8) -> None:
    memory.write(table + index * size, value.to_bytes(size, "little"))


# The cause


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (abi.EXIT_SHUTDOWN, "VP 1: triple fault: the guest could not handle an exception"),
        (abi.EXIT_FAIL_ENTRY, "VP 1: the processor refused the guest's state (0x80000021)"),
        (5, "VP 1: KVM exit hlt (5), which nothing here answers"),
        (63, "VP 1: KVM exit number (63), which nothing here answers"),
    ],
)
def test_the_first_line_names_the_cause(memory: GuestMemory, reason: int, text: str) -> None:
    vp = StoppedVp(16, 0x100)
    vp.run.fail_entry.hardware_entry_failure_reason = 0x80000021
    assert vp.diagnose(reason, memory).splitlines()[0] == text


@pytest.mark.parametrize("kind", ["kvm_pvm", "kvm_amd"])
@pytest.mark.parametrize(
    ("suberror", "text"), [(1, "cannot emulate the instruction"), (3, "event"), (77, "suberror 77")]
)
def test_an_instruction_that_kvm_pvm_lacks_comes_with_the_way_out(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, kind: str, suberror: int, text: str
) -> None:
    monkeypatch.setattr(diagnosis, "kvm_kind", lambda: kind)
    vp = StoppedVp(16, 0x100)
    vp.run.internal.suberror = suberror
    story = vp.diagnose(abi.EXIT_INTERNAL_ERROR, memory)
    assert text in story.splitlines()[0]
    assert ("python -m guests.lab" in story) == (kind == "kvm_pvm" and suberror == 1)


def test_registers_that_cannot_be_read_are_no_second_failure(memory: GuestMemory) -> None:
    class Broken(StoppedVp):
        def get_regs(self) -> abi.Regs:
            raise KvmError("KVM_GET_REGS", 5)

    story = Broken(16, 0x100).diagnose(abi.EXIT_SHUTDOWN, memory)
    assert "registers cannot be read: KVM_GET_REGS" in story


def test_a_vp_that_kvm_has_reset_is_told_from_one_that_stopped(memory: GuestMemory) -> None:
    for vp, reset in ((StoppedVp(16, 0xFFF0, base=0xFFFF0000), True), (StoppedVp(16, 0x7C00), False)):
        assert ("KVM has reset the VP since" in vp.diagnose(abi.EXIT_SHUTDOWN, memory)) is reset


# Modes and instructions


@pytest.mark.parametrize(
    ("bits", "mode", "code", "text"),
    [
        (16, "real mode", b"\xb8\x34\x12", "mov ax, 0x1234  (b8 34 12)"),
        (32, "32-bit protected mode", b"\xb8\x34\x12\x00\x00", "mov eax, 0x1234  (b8 34 12 00 00)"),
        (16, "real mode", b"\x9b", "wait"),
    ],
)
def test_the_instruction_is_read_in_the_vps_mode(
    memory: GuestMemory, bits: int, mode: str, code: bytes, text: str
) -> None:
    memory.write(0x7C00, code)
    story = StoppedVp(bits, 0x7C00).diagnose(abi.EXIT_SHUTDOWN, memory)
    assert f"mode: {mode}, CPL 0" in story
    assert f"instruction at 0010:0000000000007c00: {text}" in story


def test_real_mode_adds_the_segments_base(memory: GuestMemory) -> None:
    memory.write(0x12340, b"\xf4")
    assert "0010:0000000000000340: hlt" in StoppedVp(16, 0x340, base=0x12000).diagnose(8, memory)


def test_16_bit_protected_mode_and_its_privilege_level(memory: GuestMemory) -> None:
    vp = StoppedVp(32, 0x7C00)
    vp.sregs.cs.db, vp.sregs.cs.dpl = 0, 3
    assert "mode: 16-bit protected mode, CPL 3" in vp.diagnose(8, memory)


def test_registers_are_shown(memory: GuestMemory) -> None:
    story = StoppedVp(16, 0x7C00).diagnose(8, memory)
    assert "rax=0000000000001122" in story
    assert "rip=0000000000007c00" in story
    assert f"cr3={CR3:x}" in story


@pytest.mark.parametrize("rip", [SIZE, 0xFFFF_FFF8])
def test_an_instruction_outside_memory_is_no_second_failure(memory: GuestMemory, rip: int) -> None:
    assert "(its address is not mapped)" in StoppedVp(32, rip).diagnose(8, memory)


def test_bytes_that_are_no_instruction_are_shown_as_they_are(memory: GuestMemory) -> None:
    memory.write(0x7C00, b"\xff" * 15)
    assert "unknown bytes ff ff" in StoppedVp(32, 0x7C00).diagnose(8, memory)


# Page tables

LINEAR = 0xFFFF_8123_4567_8000
INDICES = [LINEAR >> shift & 0x1FF for shift in (39, 30, 21, 12)]
CODE = b"\x0f\x0b"


def map_4k(memory: GuestMemory, linear: int, gpa: int, root: int = CR3) -> None:
    table = root
    for level, shift in enumerate((39, 30, 21)):
        put(memory, table, linear >> shift & 0x1FF, table + 0x1000 | PRESENT)
        table += 0x1000
        assert level < 3
    put(memory, table, linear >> 12 & 0x1FF, gpa | PRESENT | 1 << 63)


def test_four_levels_of_tables_are_walked(memory: GuestMemory) -> None:
    map_4k(memory, LINEAR, 0x5000)
    memory.write(0x5010, CODE)
    story = StoppedVp(64, LINEAR + 0x10).diagnose(8, memory)
    assert "mode: 64-bit mode" in story
    assert f"{LINEAR + 0x10:016x}: ud2  (0f 0b)" in story


def test_five_levels_of_tables_are_walked(memory: GuestMemory) -> None:
    linear = 0x00FE_1234_5678_9000
    put(memory, CR3, linear >> 48 & 0x1FF, CR3 + 0x1000 | PRESENT)
    map_4k(memory, linear, 0x5000, CR3 + 0x1000)
    memory.write(0x5000, CODE)
    vp = StoppedVp(64, linear)
    vp.sregs.cr4 |= LA57
    assert "ud2" in vp.diagnose(8, memory)


@pytest.mark.parametrize(("levels", "size"), [(2, 1 << 30), (3, 2 << 20)])
def test_large_pages_are_walked(memory: GuestMemory, levels: int, size: int) -> None:
    linear = 0x40_0000_0000 + 0x12_3450
    table = CR3
    for shift in (39, 30, 21)[: levels - 1]:
        put(memory, table, linear >> shift & 0x1FF, table + 0x1000 | PRESENT)
        table += 0x1000
    put(memory, table, linear >> (30 if levels == 2 else 21) & 0x1FF, PRESENT | LARGE | 1 << 12)  # PAT: not an address
    memory.write(linear % size, CODE)
    assert "ud2" in StoppedVp(64, linear).diagnose(8, memory)


def test_an_instruction_across_two_pages_is_put_together(memory: GuestMemory) -> None:
    map_4k(memory, LINEAR, 0x5000)
    put(memory, CR3 + 0x3000, INDICES[3] + 1, 0x9000 | PRESENT)
    memory.write(0x5FFF, CODE[:1])
    memory.write(0x9000, CODE[1:])
    assert "ud2" in StoppedVp(64, LINEAR + 0xFFF).diagnose(8, memory)


def test_an_instruction_at_the_end_of_what_is_mapped_is_shown_as_far_as_it_goes(memory: GuestMemory) -> None:
    map_4k(memory, LINEAR, 0x5000)
    memory.write(0x5FFF, CODE[:1])
    assert "unknown bytes 0f" in StoppedVp(64, LINEAR + 0xFFF).diagnose(8, memory)


@pytest.mark.parametrize("low_bits", [0, 0x18, 0xFE0])
def test_two_levels_of_32_bit_tables_are_walked(memory: GuestMemory, low_bits: int) -> None:
    linear = 0xC012_3000
    put(memory, CR3, linear >> 22, CR3 + 0x1000 | PRESENT, 4)
    put(memory, CR3 + 0x1000, linear >> 12 & 0x3FF, 0x5000 | PRESENT, 4)
    memory.write(0x5000, CODE)
    vp = StoppedVp(32, linear)
    vp.sregs.cr0 |= PG
    vp.sregs.cr3 |= low_bits
    story = vp.diagnose(8, memory)
    assert "32-bit protected mode, paging" in story
    assert "ud2" in story


def test_a_4_mib_page_is_walked(memory: GuestMemory) -> None:
    put(memory, CR3, 0xC012_3000 >> 22, PRESENT | LARGE, 4)
    memory.write(0x12_3000, CODE)
    vp = StoppedVp(32, 0xC012_3000)
    vp.sregs.cr0 |= PG
    assert "ud2" in vp.diagnose(8, memory)


def test_three_levels_of_pae_tables_are_walked(memory: GuestMemory) -> None:
    linear, root = 0xC012_3000, CR3 + 0x20
    put(memory, root, linear >> 30, CR3 + 0x1000 | 1)
    put(memory, CR3 + 0x1000, linear >> 21 & 0x1FF, CR3 + 0x2000 | PRESENT)
    put(memory, CR3 + 0x2000, linear >> 12 & 0x1FF, 0x5000 | PRESENT)
    memory.write(0x5000, CODE)
    vp = StoppedVp(32, linear)
    vp.sregs.cr0 |= PG
    vp.sregs.cr3, vp.sregs.cr4 = root, PAE
    assert "ud2" in vp.diagnose(8, memory)


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("entry", [0, 2, (1 << 45) | 3])
def test_a_hole_in_the_tables_is_told(memory: GuestMemory, level: int, entry: int) -> None:
    map_4k(memory, LINEAR, 0x5000)
    put(memory, CR3 + 0x1000 * level, INDICES[level], entry)
    assert "(its address is not mapped)" in StoppedVp(64, LINEAR).diagnose(8, memory)


SHARED = GuestMemory(SIZE)


@settings(deadline=None)
@given(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 23) - 1),
    st.sampled_from([0, LMA]),
    st.binary(min_size=64, max_size=64),
    st.integers(0, 3),
)
def test_any_state_has_a_story(rip: int, cr3: int, cr0: int, cr4: int, efer: int, page: bytes, size_bits: int) -> None:
    SHARED.write(0, page * 256)
    vp = StoppedVp(64, rip, base=rip >> 7)
    vp.sregs.cr0, vp.sregs.cr3, vp.sregs.cr4, vp.sregs.efer = cr0, cr3, cr4, efer
    vp.sregs.cs.l, vp.sregs.cs.db = size_bits & 1, size_bits >> 1
    for reason in (8, 17, 0):
        story = vp.diagnose(reason, SHARED)
        assert len(story.splitlines()) >= 8
