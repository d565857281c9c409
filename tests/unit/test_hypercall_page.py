"""The hypercall page, disassembled and carried out in both modes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import capstone  # type: ignore[import-untyped]
import pytest

from enlightenments.hypercall_page import CONTENT, PORT_32, PORT_64, PORT_SIGNAL

if TYPE_CHECKING:
    from collections.abc import Callable

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
        "cmp rcx, 0x1005d",
        "jne 0x21",
        "mov eax, edx",
        "cmp rax, rdx",
        "jne 0x21",
        f"out {PORT_SIGNAL:#x}, eax",
        "sub rax, rdx",
        "ret",
        f"out {PORT_64:#x}, al",
        "ret",
    ]


def test_32_bit_code_sees_these_instructions_before_it_returns() -> None:
    assert listing(32)[:7] == [
        "push eax",
        "xor eax, eax",
        "inc eax",
        "je 0xa",
        "pop eax",
        f"out {PORT_32:#x}, al",
        "ret",
    ]


class Cpu:
    """As much of a processor as the page needs; anything else ends the test. `host` may change RAX at an `out`."""

    def __init__(self, bits: int, rcx: int = 0, rdx: int = 0, host: Callable[[Cpu], None] = lambda cpu: None) -> None:
        self._bits = bits
        self._machine = capstone.Cs(capstone.CS_ARCH_X86, MODES[bits])
        self._host = host
        self.rax = RAX & (1 << bits) - 1
        self.rcx, self.rdx = rcx, rdx
        self.stack = [0xCA11E4]
        self.out: list[tuple[int, int, int]] = []
        self.depth = len(self.stack)

    def _read(self, operand: str) -> int:
        if operand.startswith("0x"):
            return int(operand, 16)
        value: int = {"ax": self.rax, "cx": self.rcx, "dx": self.rdx}[operand[1:]]
        return value & 0xFFFF_FFFF if operand.startswith("e") else value

    def call(self) -> int:
        """Call the page; return where it returned to."""
        rip, zero = 0, False
        for _ in range(20):
            instruction = next(self._machine.disasm(CONTENT[rip : rip + 15], rip, 1))
            rip += instruction.size
            what, operands = instruction.mnemonic, instruction.op_str.split(", ")
            if what == "push":
                self.stack.append(self._read(operands[0]))
                self.depth = max(self.depth, len(self.stack))
            elif what == "pop":
                self.rax = self.stack.pop()
            elif what == "ret":
                return self.stack.pop()
            elif what in ("je", "jne"):
                rip = int(operands[0], 16) if zero == (what == "je") else rip
            elif what == "cmp":
                zero = self._read(operands[0]) == self._read(operands[1])
            elif what == "out":
                size = {"al": 1, "eax": 4}[operands[1]]
                self.out.append((int(operands[0], 16), size, self.rax & (1 << 8 * size) - 1))
                self._host(self)
            elif what in ("xor", "inc", "mov", "sub") and operands[0] in ("eax", "rax"):
                left, right = self.rax, self._read(operands[-1])
                result = {"xor": left ^ right, "inc": left + 1, "mov": right, "sub": left - right}[what]
                self.rax = result & (1 << (32 if operands[0] == "eax" else self._bits)) - 1
                zero = self.rax == 0 if what != "mov" else zero
            else:
                pytest.fail(f"unexpected {what} {instruction.op_str}")
        pytest.fail("it does not return")


@pytest.mark.parametrize(("bits", "port"), [(64, PORT_64), (32, PORT_32)])
def test_a_call_traps_once_at_its_modes_port_with_all_registers_as_they_were(bits: int, port: int) -> None:
    seen: list[int] = []
    cpu = Cpu(bits, rcx=0x5C, rdx=0x1000, host=lambda cpu: seen.append(cpu.rax))
    assert cpu.call() == 0xCA11E4
    assert cpu.out == [(port, 1, RAX & 0xFF)]
    assert seen == [RAX & (1 << bits) - 1]
    assert cpu.stack == []
    assert cpu.depth == 2, "one word of the caller's stack is used"


def test_a_32_bit_signal_is_a_call_like_others() -> None:
    cpu = Cpu(32, rcx=0x2001, rdx=0)
    cpu.call()
    assert [port for port, _, _ in cpu.out] == [PORT_32]


def test_a_64_bit_signal_shows_kvm_its_connection_and_succeeds_where_nothing_else_happens() -> None:
    cpu = Cpu(64, rcx=0x1005D, rdx=0xFFFF_2001)
    assert cpu.call() == 0xCA11E4
    assert cpu.out == [(PORT_SIGNAL, 4, 0xFFFF_2001)]
    assert cpu.rax == 0
    assert (cpu.rcx, cpu.rdx, cpu.stack) == (0x1005D, 0xFFFF_2001, [])


def test_the_hosts_status_of_a_signal_comes_back_when_it_adds_rdx() -> None:
    def host(cpu: Cpu) -> None:
        cpu.rax = 0x12 + cpu.rdx

    cpu = Cpu(64, rcx=0x1005D, rdx=0xFFFF_FFFF, host=host)
    cpu.call()
    assert cpu.rax == 0x12


@pytest.mark.parametrize(
    ("rcx", "rdx"), [(0x1005D, 0x1_0000_2001), (0x5D, 0x2001), (0x1_0001_005D, 0x2001), (0x3005D, 0x2001)]
)
def test_a_signal_with_a_flag_number_or_of_another_form_is_a_call_like_others(rcx: int, rdx: int) -> None:
    cpu = Cpu(64, rcx, rdx)
    cpu.call()
    assert [port for port, _, _ in cpu.out] == [PORT_64]
    assert (cpu.rcx, cpu.rdx) == (rcx, rdx)


def test_the_rest_of_the_page_is_breakpoints() -> None:
    assert len(CONTENT) == 4096
    assert set(CONTENT[36:]) == {0xCC}
