"""What an exit costs: the same guest loop under pyvmm, in this process, and under a bare KVM_RUN loop in C."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from enlightenments.tlfs import MSR_TIME_REF_COUNT
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
_MSR_EOM = 0x4000_0084
#: Where the guest keeps the time of its last ring, and the host the number of rings that it has heard.
_RUNG_AT, _HEARD = 0x500, 0x508
_LIMIT = 1.3

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
    """Takes the time whenever the guest writes."""

    def __init__(self) -> None:
        self.times: list[int] = []

    def write(self, offset: int, size: int, value: int) -> None:
        self.times.append(time.perf_counter_ns())


def _run(rom: Path, prepare: Callable[[Machine], None]) -> int:
    """Run a ROM to its end; return how often its VP left the guest."""
    config = VmConfig(firmware=str(rom), memory=1 << 20, com1="none", testdev=True, timeout=120.0)
    machine = Machine(config, tracer=Tracer(), log=GuestLog(), console=Console())
    try:
        prepare(machine)
        outcome = machine.run()
        if outcome.kind != "exit":
            raise BenchError(f"{rom.name} ended by {outcome.kind}: {outcome.message}")
        exits: dict[int, int] = machine.processors[0].hot.counts()["exits"]
        return sum(count for reason, count in exits.items() if reason != abi.EXIT_INTR)
    finally:
        machine.close()


def _ours(rom: Path) -> float:
    """Nanoseconds that the ROM's loop takes under pyvmm."""
    marks = _Marks()
    bell = os.eventfd(0, os.EFD_NONBLOCK)

    def prepare(machine: Machine) -> None:
        machine.board.pio.register(_MARK_PORT, 1, marks, "marks")
        machine.partition.connect_event_port(_CONNECTION, bell)

    try:
        exits = _run(rom, prepare)
    finally:
        os.close(bell)
    if len(marks.times) != 2 or exits < _EXITS:
        raise BenchError(f"{rom.name} left the guest {exits} times, and marked {len(marks.times)}")
    return marks.times[1] - marks.times[0]


def _compare(title: str, body: str, folder: Path, rounds: int, limit: float | None) -> Figure:
    rom = build_rom(body, folder / title.replace(" ", "-"))
    bare = str(compile_c("bare_kvm", folder))
    ours, rival = [], []
    for number in range(rounds + 1):
        mine = _ours(rom)
        theirs, exits = output_of([bare, str(rom)])
        if exits != _EXITS:
            raise BenchError(f"{rom.name} left the guest {exits} times instead of {_EXITS} under the bare loop")
        if number:  # the first one warms up
            ours.append(mine / _EXITS / 1e3)
            rival.append(theirs / _EXITS / 1e3)
    return Figure(title, "us", Samples("pyvmm", tuple(ours)), Samples("bare C", tuple(rival)), limit)


def pio(folder: Path, rounds: int) -> list[Figure]:
    """Port writes answered in C, and port reads answered by a device in Python."""
    return [
        _compare("port 80 write", _loop("outb %al, $0x80"), folder, rounds, _LIMIT),
        _compare("RTC read in Python", _loop("inb $0x71, %al"), folder, rounds, None),
    ]


def msr(folder: Path, rounds: int) -> list[Figure]:
    """MSR accesses answered in C."""
    read = _loop("rdmsr", f"movl ${MSR_TIME_REF_COUNT}, %ecx")
    eom = _loop("wrmsr", f"movl ${_MSR_EOM}, %ecx\n xorl %eax, %eax\n xorl %edx, %edx")
    return [
        _compare("reference time MSR read", read, folder, rounds, _LIMIT),
        _compare("EOM MSR write", eom, folder, rounds, _LIMIT),
    ]


def doorbell(folder: Path, rounds: int) -> list[Figure]:
    """HvSignalEvent through the hypercall page, and the time until a worker in Python hears of it."""
    return [
        _compare("doorbell", _loop(ring(_CONNECTION), SHOW_HYPERCALL_PAGE, HYPERCALL_PAGE), folder, rounds, _LIMIT),
        Figure("doorbell until worker runs", "us", Samples("pyvmm", tuple(_latencies(folder)))),
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
