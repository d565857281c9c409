"""What an exit costs: the same guest loop under pyvmm, in this process, and under a bare KVM_RUN loop in C."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from enlightenments.tlfs import (
    HVCALL_GET_VP_REGISTERS,
    HVCALL_LONG_SPIN_WAIT,
    MSR_EOM,
    MSR_REFERENCE_TSC,
    MSR_STIMER0_CONFIG,
    MSR_TIME_REF_COUNT,
)
from pyvmm.core.bus import BusHandler
from pyvmm.core.kvm import abi
from pyvmm.core.trace import GuestLog, Tracer
from pyvmm.core.worker import Worker
from pyvmm.machine.config import VmConfig
from pyvmm.machine.console import Console
from pyvmm.machine.machine import Machine
from tests.bench.figures import Figure, Samples
from tests.bench.native import BenchError, compile_c, output_of
from tests.fakes.rom import HYPERCALL_PAGE, SHOW_HYPERCALL_PAGE, build_rom, ring

_EXITS = 8000
_UNROLLED = 8
_RINGS = 200
_MARK_PORT = 0x5A0
_CONNECTION = 0x2001
#: Where the guest keeps the time of its last ring, and the host the number of rings that it has heard.
_RUNG_AT, _HEARD = 0x500, 0x508
#: Input and output of hypercalls, and the reference TSC page.
_INPUT, _OUTPUT, _TIME_PAGE = 0x600, 0x700, 0x4000
#: Time per exit: 0.77 of the bare loop's rate.
_LIMIT = 1.3

#: A direct timer that enables itself when COUNT is written and is due in some months, as Linux sets it at each tick.
_TIMER_RUNS = f"""
    movl ${MSR_STIMER0_CONFIG}, %ecx
    movl $0x1ff8, %eax
    xorl %edx, %edx
    wrmsr
    incl %ecx
    movl $0x10000, %edx
"""
#: HvGetVpRegisters of the caller's VP index, a register that is no MSR in C.
_REGISTER_INPUT = f"""
    movl $-1, {_INPUT}
    movl $-1, {_INPUT + 4}
    movl $-2, {_INPUT + 8}
    movl $0, {_INPUT + 12}
    movl $0x90003, {_INPUT + 16}
    xorl %ebx, %ebx
    movl ${_INPUT}, %ecx
    xorl %edi, %edi
    movl ${_OUTPUT}, %esi
"""
_GET_REGISTER = f"""
    movl ${HVCALL_GET_VP_REGISTERS}, %eax
    movl $1, %edx
    call hypercall_page
"""
_SPIN_WAIT = f"""
    movl ${1 << 16 | HVCALL_LONG_SPIN_WAIT}, %eax
    xorl %edx, %edx
    call hypercall_page
"""
#: Reference time by the page: TLFS v6.0b, chapter 12.4.3. Of the product of TSC and scale only the largest part.
_READ_PAGE = f"""
    movl {_TIME_PAGE}, %esi
    rdtsc
    movl %edx, %eax
    mull {_TIME_PAGE + 12}
    addl {_TIME_PAGE + 16}, %eax
    adcl {_TIME_PAGE + 20}, %edx
    cmpl {_TIME_PAGE}, %esi
    jne wrong
"""

_MARK = f"pushw %dx\n movw ${_MARK_PORT}, %dx\n outb %al, %dx\n popw %dx"


def _loop(instruction: str, before: str = "", after: str = "") -> str:
    return f"""{before}
    {_MARK}
    movl ${_EXITS // _UNROLLED}, %ebp
again:
    .rept {_UNROLLED}
    {instruction}
    .endr
    decl %ebp
    jnz again
    {_MARK}
    EXIT 0
    {after}
    """


def _single_rings() -> str:
    return f"""{SHOW_HYPERCALL_PAGE}
    movl $1, %ebp
again:
    rdtsc
    movl %eax, {_RUNG_AT}
    movl %edx, {_RUNG_AT + 4}
    {ring(_CONNECTION)}
unheard:
    cmpl %ebp, {_HEARD}
    jne unheard
    movw $200, %cx  # long enough for the worker to wait again
rest:
    loop rest
    incl %ebp
    cmpl ${_RINGS}, %ebp
    jbe again
    EXIT 0
    {HYPERCALL_PAGE}
    """


class _Marks(BusHandler):
    """Takes the CPU time of the VP's thread, and how often it has left the guest, whenever the guest writes.

    A VP that never waits takes as much CPU time as time, but other work on the host does not count.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.times: list[int] = []
        self.exits: list[int] = []

    def write(self, offset: int, size: int, value: int) -> None:
        self.times.append(time.thread_time_ns())
        exits: dict[int, int] = self._machine.processors[0].hot.counts()["exits"]
        self.exits.append(sum(count for reason, count in exits.items() if reason != abi.EXIT_INTR))
        if len(self.times) == 1:
            self.times[0] = time.thread_time_ns()


def _run(rom: Path, prepare: Callable[[Machine], None]) -> None:
    """Run a ROM to its end."""
    config = VmConfig(firmware=str(rom), memory=1 << 20, com1="none", testdev=True, timeout=120.0)
    machine = Machine(config, tracer=Tracer(), log=GuestLog(), console=Console())
    try:
        prepare(machine)
        outcome = machine.run()
        if outcome.kind != "exit":
            raise BenchError(f"{rom.name} ended by {outcome.kind}: {outcome.message}")
    finally:
        machine.close()


def _ours(rom: Path) -> tuple[int, int]:
    """Nanoseconds of CPU time that the ROM's loop takes under pyvmm, and its exits."""
    found: list[_Marks] = []
    bell = os.eventfd(0, os.EFD_NONBLOCK)

    def prepare(machine: Machine) -> None:
        found.append(_Marks(machine))
        machine.board.pio.register(_MARK_PORT, 1, found[0], "marks")
        machine.partition.connect_event_port(_CONNECTION, bell)

    try:
        _run(rom, prepare)
    finally:
        os.close(bell)
    (marks,) = found
    if len(marks.times) != 2:
        raise BenchError(f"{rom.name} marked {len(marks.times)} times")
    return marks.times[1] - marks.times[0], marks.exits[1] - marks.exits[0] - 1


def _compare(
    title: str, body: str, folder: Path, rounds: int, limit: float | None = _LIMIT, *bare_options: str
) -> Figure:
    rom = build_rom(body, folder / title.replace(" ", "-"))
    bare = [str(compile_c("bare_kvm", folder)), str(rom), *bare_options]
    ours, rival = [], []
    for number in range(rounds + 1):
        mine, exits = _ours(rom)
        theirs, bare_exits = output_of(bare)
        if exits != _EXITS or bare_exits != _EXITS:
            raise BenchError(f"{rom.name} left the guest {exits} and {bare_exits} times instead of {_EXITS}")
        if number:  # the first one warms up
            ours.append(mine / _EXITS / 1e3)
            rival.append(theirs / _EXITS / 1e3)
    return Figure(title, "us", Samples("pyvmm", tuple(ours)), Samples("bare C", tuple(rival)), limit)


def _hypercall(title: str, call: str, folder: Path, rounds: int, limit: float | None, *bare_options: str) -> Figure:
    return _compare(title, _loop(call, SHOW_HYPERCALL_PAGE, HYPERCALL_PAGE), folder, rounds, limit, *bare_options)


def pio(folder: Path, rounds: int) -> list[Figure]:
    """Port writes answered in C, and port reads answered by a device in Python."""
    return [
        _compare("port 80 write", _loop("outb %al, $0x80"), folder, rounds),
        _compare("RTC read in Python", _loop("inb $0x71, %al"), folder, rounds, None),
    ]


def msr(folder: Path, rounds: int) -> list[Figure]:
    """MSR accesses answered in C."""
    read = _loop("rdmsr", f"movl ${MSR_TIME_REF_COUNT}, %ecx")
    eom = _loop("wrmsr", f"movl ${MSR_EOM}, %ecx\n xorl %eax, %eax\n xorl %edx, %edx")
    return [
        _compare("reference time MSR read", read, folder, rounds),
        _compare("EOM MSR write", eom, folder, rounds),
        # A new time each, so that the host's timer has to be set anew.
        _compare("stimer COUNT write", _loop("incl %eax\n wrmsr", _TIMER_RUNS), folder, rounds),
    ]


def page(folder: Path, rounds: int) -> list[Figure]:
    """Exits that it takes to read reference time."""
    show = f"movl ${MSR_REFERENCE_TSC}, %ecx\n movl ${_TIME_PAGE | 1}, %eax\n xorl %edx, %edx\n wrmsr"
    by_page = build_rom(_loop(_READ_PAGE, show, "wrong: EXIT 1"), folder / "by-page")
    by_msr = build_rom(_loop("rdmsr", f"movl ${MSR_TIME_REF_COUNT}, %ecx"), folder / "by-msr")
    exits = [Samples(name, (float(_ours(rom)[1]),)) for name, rom in (("page", by_page), ("by MSR", by_msr))]
    return [Figure(f"{_EXITS} reads of the time page", "exits", exits[0], exits[1], 0.0)]


def doorbell(folder: Path, rounds: int) -> list[Figure]:
    """HvSignalEvent through the hypercall page, and the time until a worker in Python hears of it."""
    return [
        _hypercall("doorbell", ring(_CONNECTION), folder, rounds, _LIMIT, "ring"),
        Figure("doorbell until worker runs", "us", Samples("pyvmm", tuple(_latencies(folder)))),
    ]


def hypercall(folder: Path, rounds: int) -> list[Figure]:
    """Hypercalls that wake nobody: one answered in C, one in Python."""
    get_register = _loop(_GET_REGISTER, SHOW_HYPERCALL_PAGE + _REGISTER_INPUT, HYPERCALL_PAGE)
    return [
        _hypercall("long spin wait", _SPIN_WAIT, folder, rounds, _LIMIT),
        _compare("VP register read in Python", get_register, folder, rounds, None),
    ]


def _latencies(folder: Path) -> list[float]:
    """Microseconds from the guest's ring to the worker's callback, each with the worker waiting before."""
    rom = build_rom(_single_rings(), folder / "latency")
    found: list[float] = []
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    errors: list[BaseException] = []
    worker = Worker("bench", errors.append)

    def prepare(machine: Machine) -> None:
        reference = machine.partition.reference
        assert reference is not None

        def heard() -> None:
            now = reference.now()
            tsc = int.from_bytes(machine.memory.read(_RUNG_AT, 8), "little")
            found.append((now - ((tsc * reference.scale >> 64) + reference.offset)) / 10)
            machine.memory.write(_HEARD, len(found).to_bytes(4, "little"))

        worker.add_event(bell, heard)
        worker.start()
        machine.partition.connect_event_port(_CONNECTION, bell)

    try:
        _run(rom, prepare)
    finally:
        worker.stop()
        os.close(bell)
    if errors or len(found) != _RINGS:
        raise BenchError(f"the worker heard {len(found)} rings of {_RINGS}; errors: {errors}")
    return found[_RINGS // 10 :]
