"""The hypercall page, disassembled and carried out in both modes."""

from __future__ import annotations

import capstone  # type: ignore[import-untyped]
import pytest

from enlightenments.hypercall_page import CONTENT, PORT_32, PORT_64

MODES = {64: capstone.CS_MODE_64, 32: capstone.CS_MODE_32}
RAX = 0x0123_4567_89AB_CDEF


def listing(bits: int) -> list[str]:
    """The instructions from the page's start to its first breakpoint, read straight on."""
    machine = capstone.Cs(capstone.CS_ARCH_X86, MODES[bits])
    found = []
    for instruction in machine.disasm(CONTENT, 0):
        if instruction.mnemonic == "int3":
            break
        found.append(f"{instruction.mnemonic} {instruction.op_str}".strip())
    return found


def test_64_bit_code_sees_these_instructions() -> None:
    assert listing(64) == [
        "push rax",
        "xor eax, eax",
        "je 0xa",
        "pop rax",
        f"out {PORT_32:#x}, al",
        "ret",
        "pop rax",
        f"out {PORT_64:#x}, al",
        "ret",
    ]


def test_32_bit_code_sees_these_instructions() -> None:
    assert listing(32) == [
        "push eax",
        "xor eax, eax",
        "inc eax",
        "je 0xa",
        "pop eax",
        f"out {PORT_32:#x}, al",
        "ret",
        "pop eax",
        f"out {PORT_64:#x}, al",
        "ret",
    ]


class Cpu:
    """As much of a processor as the page needs; anything else ends the test."""

    def __init__(self, bits: int) -> None:
        self._mask = (1 << bits) - 1
        self._machine = capstone.Cs(capstone.CS_ARCH_X86, MODES[bits])
        self.rax = RAX & self._mask
        self.stack = [0xCA11E4]
        self.out: list[tuple[int, int]] = []
        self.depth = len(self.stack)

    def call(self) -> int:
        """Call the page; return where it returned to."""
        rip, zero = 0, False
        for _ in range(20):
            instruction = next(self._machine.disasm(CONTENT[rip : rip + 15], rip, 1))
            rip += instruction.size
            what = f"{instruction.mnemonic} {instruction.op_str}".replace("rax", "eax").strip()
            if what == "push eax":
                self.stack.append(self.rax)
                self.depth = max(self.depth, len(self.stack))
            elif what == "pop eax":
                self.rax = self.stack.pop()
            elif what == "xor eax, eax":
                self.rax, zero = 0, True
            elif what == "inc eax":
                self.rax = (self.rax + 1) & self._mask
                zero = self.rax == 0
            elif instruction.mnemonic == "je":
                rip = int(instruction.op_str, 16) if zero else rip
            elif instruction.mnemonic == "out":
                self.out.append((int(instruction.op_str.split(",")[0], 16), self.rax))
            elif what == "ret":
                return self.stack.pop()
            else:
                pytest.fail(f"unexpected {what}")
        pytest.fail("it does not return")


@pytest.mark.parametrize(("bits", "port"), [(64, PORT_64), (32, PORT_32)])
def test_a_call_traps_once_at_its_modes_port_with_all_registers_as_they_were(bits: int, port: int) -> None:
    cpu = Cpu(bits)
    assert cpu.call() == 0xCA11E4
    assert cpu.out == [(port, RAX & (1 << bits) - 1)]
    assert cpu.stack == []
    assert cpu.depth == 2, "one word of the caller's stack is used"


def test_the_rest_of_the_page_is_breakpoints() -> None:
    assert len(CONTENT) == 4096
    assert set(CONTENT[14:]) == {0xCC}
