"""Whole commands of ``pyvmm disk`` against those of qemu-img."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

from devices.storage.create import create_image
from devices.storage.images import open_image
from tests.bench.figures import Figure, Samples
from tests.bench.native import BenchError, compile_c, output_of

_DATA = 512 << 20
_PIECE = 4 << 20
_LARGE = 64 << 40
#: Prints nanoseconds and the process's peak memory in KiB; ru_maxrss would count its parent's.
_OPEN = """
import sys, time
from devices.storage.images import open_image
start = time.perf_counter_ns()
disk = open_image(sys.argv[1])
end = time.perf_counter_ns()
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(end - start, peak.split()[1])
"""
#: What qemu-img calls the formats.
_QEMU = {"raw": "raw", "vhd": "vpc", "vhdx": "vhdx"}
_PAIRS = (("raw", "raw"), ("raw", "vhd"), ("raw", "vhdx"), ("vhd", "raw"), ("vhdx", "raw"), ("vhd", "vhdx"))


def convert(folder: Path, rounds: int) -> list[Figure]:
    """Convert `rounds` times in turn. Raises BenchError if a program is missing or fails.

    Each pair of formats twice: with both programs storing the new image before they end, as is our default and
    ``qemu-img -t writeback``, and with both leaving that to the host, as is ``--no-flush`` and qemu-img's default.
    """
    pyvmm, qemu = _programs()
    spawn = str(compile_c("spawn", folder))
    raw = _fill(folder / "source.raw")
    figures = []
    for ours, theirs in _PAIRS:
        source, target = folder / f"source.{ours}", folder / f"target.{theirs}"
        if not source.exists():
            output_of([spawn, pyvmm, "disk", "convert", str(raw), str(source)])
        for how, our_option, their_option in (("", [], ["-t", "writeback"]), (", unflushed", ["--no-flush"], [])):
            files, formats = map(str, (source, target)), ("-f", _QEMU[ours], "-O", _QEMU[theirs])
            commands = {
                "pyvmm": [pyvmm, "disk", "convert", *our_option, str(source), str(target), "-o", "json"],
                "qemu-img": [qemu, "convert", *their_option, *formats, *files],
            }
            mine, rival = _in_turn(spawn, commands, rounds, target)
            figures.append(Figure(f"convert {ours} to {theirs}{how}", "ms", mine, rival, 1.0))
    return figures


def open_large(folder: Path, rounds: int) -> list[Figure]:
    """Open a VHDX disk of 64 TiB, with blocks all over it so that its whole allocation table is there to be read."""
    image = str(folder / "large.vhdx")
    create_image(image, _LARGE)
    disk = open_image(image)
    for offset in range(0, _LARGE, _LARGE // 4096):
        disk.write(offset, [memoryview(b"data" * 128)])
    disk.close()
    found = [output_of([sys.executable, "-c", _OPEN, image]) for _ in range(rounds)]
    times = Samples("pyvmm", tuple(nanoseconds / 1e6 for nanoseconds, _ in found))
    peaks = Samples("pyvmm", tuple(kib / 1024 for _, kib in found))
    return [
        Figure("open a 64 TiB VHDX", "ms", times, Samples("aim", (100.0,) * rounds), 1.0),
        Figure("the same: peak memory", "MiB", peaks, Samples("aim", (50.0,) * rounds), 1.0),
    ]


def _programs() -> tuple[str, str]:
    qemu = shutil.which("qemu-img")
    pyvmm = Path(sys.executable).with_name("pyvmm")
    if qemu is None or not pyvmm.exists():
        raise BenchError("qemu-img or pyvmm is missing: make setup")
    return str(pyvmm), qemu


def _in_turn(spawn: str, commands: dict[str, list[str]], rounds: int, target: Path) -> list[Samples]:
    """Milliseconds that each of the commands takes to make `target`, which is not there before."""
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            target.unlink(missing_ok=True)
            nanoseconds, _, _, status = output_of([spawn, *command])
            if status:
                raise BenchError(f"{name} ended with status {status}: {' '.join(command)}")
            if number:  # the first one warms up
                taken[name].append(nanoseconds / 1e6)
    target.unlink()
    return [Samples(name, tuple(values)) for name, values in taken.items()]


def _fill(path: Path) -> Path:
    """A raw disk of twice `_DATA`: data with some zeros among it, then a hole, in turn."""
    numbers = random.Random(4)
    with path.open("wb") as file:
        file.truncate(2 * _DATA)
        for offset in range(0, 2 * _DATA, 2 * _PIECE):
            file.seek(offset)
            file.write(numbers.randbytes(_PIECE * 3 // 4) + bytes(_PIECE // 4))
    return path
