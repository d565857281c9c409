"""Frames of the bare-metal guest of guests/bench through a TAP: netvsp against QEMU's virtio-net, in turn."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guests.bare.build import BuildError
from guests.bench.build import build
from guests.bench.run import MeasureError, Workload, measure, pyvmm_nic_command, qemu_nic_command
from tests.bench.figures import Figure, Samples
from tests.bench.native import BenchError, compile_c

_TAP = "pyvmm-bench"
_OURS, _RIVAL = "netvsp", "QEMU"
_SMALL, _LARGE = 60, 1514
#: Frames under way, or taken before the host is told, and for how long.
_HOW = 64, 300


@contextmanager
def _tap() -> Iterator[None]:
    if os.geteuid():
        raise BenchError("a TAP needs root")
    for words in (["tuntap", "add", "dev", _TAP, "mode", "tap"], ["link", "set", _TAP, "up"]):
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "delete", _TAP], check=False)


@contextmanager
def _blast(program: Path, size: int) -> Iterator[None]:
    """The host sends frames as fast as it can."""
    with subprocess.Popen([str(program), _TAP, str(size)]) as sender:
        try:
            yield
        finally:
            sender.kill()


def measure_all(folder: Path, rounds: int) -> list[Figure]:
    """Run both `rounds` times in turn. Raises BenchError."""
    if shutil.which("qemu-system-x86_64") is None:
        raise BenchError("qemu-system-x86_64 is missing: make setup")
    console = folder / "packets.com1"
    makers = {_OURS: pyvmm_nic_command, _RIVAL: qemu_nic_command}
    sends = [Workload("send", size, *_HOW) for size in (_SMALL, _LARGE)]
    taken: dict[tuple[str, str], list[float]] = {}

    def run(leg: str, tests: list[Workload], count: bool) -> None:
        console.unlink(missing_ok=True)
        for name, found in measure(makers[leg](elf, console, _TAP, tests), console).items():
            if count:
                taken.setdefault((leg, name), []).append(found.each)

    try:
        elf = build()
        blast = compile_c("blast", folder)
        with _tap():
            for number in range(rounds + 1):  # the first one warms up
                for leg in makers:
                    run(leg, sends, number > 0)
                for size in (_SMALL, _LARGE):
                    with _blast(blast, size):
                        for leg in makers:
                            run(leg, [Workload("receive", size, *_HOW)], number > 0)
    except (BuildError, MeasureError, OSError) as error:
        raise BenchError(str(error)) from error
    figures = []
    for operation in ("send", "receive"):
        for size in (_SMALL, _LARGE):
            name = Workload(operation, size, *_HOW).name
            ours, rival = (Samples(leg, tuple(taken[leg, name])) for leg in (_OURS, _RIVAL))
            figures.append(Figure(f"{operation} frames of {size} bytes", "us", ours, rival, 1.0))
    return figures
