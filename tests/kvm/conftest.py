"""Tiny guests: a ROM of 64 KiB made of a few assembly lines, run in this process or by the command line."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.core.trace import GuestLog, Tracer
from pyvmm.machine.config import VmConfig
from pyvmm.machine.console import open_console
from pyvmm.machine.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyvmm.machine.machine import Outcome

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60

#: The body runs in real mode at F000:0000 with DS and ES 0 and a stack; EXIT ends the run with status (value << 1) | 1.
_ROM = """
.code16
.section .text
.macro EXIT value
    movb $\\value, %al
    outb %al, $0xf4
    hlt
.endm
start:
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7000, %sp
    cld
BODY
.code16
.org 0xfff0
    ljmp $0xf000, $start
.org 0x10000
"""

#: Goes on in flat 32-bit protected mode; to be put first in the body.
PROTECTED_MODE = """
    cli
    lgdtl %cs:gdt_pointer
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $8, $(0xf0000 + protected)
.balign 8
gdt:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    .word 23
    .long 0xf0000 + gdt
.code32
protected:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0x7000, %esp
"""


class RunningVm:
    """A machine whose life cycle runs on a thread of its own."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.outcome: Outcome | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.outcome = self.machine.run()

    def start(self) -> RunningVm:
        self._thread.start()
        return self

    def wait(self) -> Outcome:
        """The end of the VM."""
        self._thread.join(PATIENCE_S)
        assert self.outcome is not None, "the machine does not end"
        return self.outcome

    def word(self, gpa: int) -> int:
        """A 32-bit word of guest memory."""
        return int.from_bytes(self.machine.memory.read(gpa, 4), "little")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for the guest to do something."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"never came: {what}"
            assert self.outcome is None, f"ended before: {what}: {self.outcome.kind} {self.outcome.message}"


class Roms:
    """Makes ROMs and runs them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._machines: list[Machine] = []

    def build(self, body: str) -> Path:
        """Assemble a ROM; return its file."""
        name = self._folder / f"rom{len(list(self._folder.iterdir()))}"
        source, binary = name.with_suffix(".S"), name.with_suffix(".bin")
        source.write_text(_ROM.replace("BODY", body))
        subprocess.run(["as", "--32", "-o", str(name), str(source)], check=True)
        link = ["ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0", "-e", "0", "-o", str(binary), str(name)]
        subprocess.run(link, check=True)
        assert binary.stat().st_size == 0x10000
        return binary

    def cli(self, body: str, *options: str, seconds: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """Run a ROM with ``pyvmm run``."""
        command = [sys.executable, "-m", "pyvmm", "run", "--firmware", str(self.build(body)), "--com1", "none"]
        command += ["--testdev", "--timeout", str(seconds), *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False)

    def machine(self, body: str, **config: Any) -> Machine:
        """Make, but do not run, a machine with a ROM."""
        values = {"memory": 1 << 20, "testdev": True, "timeout": PATIENCE_S, "com1": "none", **config}
        values.setdefault("firmware", str(self.build(body)))
        machine = Machine(VmConfig(**values), tracer=Tracer(), log=GuestLog(), console=open_console("none"))
        self._machines.append(machine)
        return machine

    def start(self, body: str, **config: Any) -> RunningVm:
        """Run a ROM in this process."""
        return RunningVm(self.machine(body, **config)).start()

    def close(self) -> None:
        for machine in self._machines:
            machine.stop(0)
            machine.close()


@pytest.fixture
def roms(tmp_path: Path) -> Iterator[Roms]:
    roms = Roms(tmp_path)
    yield roms
    roms.close()
