"""Whole commands that convert a disk image, against qemu-img for the same pair of formats."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

from devices.storage.images import FORMATS
from tests.bench.figures import Figure, Samples
from tests.bench.native import BenchError, compile_c, output_of

_DATA = 512 << 20
_PIECE = 4 << 20
#: What qemu-img calls the formats.
_QEMU = {"raw": "raw", "vhd": "vpc", "vhdx": "vhdx"}
_PAIRS = (("raw", "raw"), ("raw", "vhd"), ("raw", "vhdx"), ("vhd", "raw"), ("vhdx", "raw"), ("vhd", "vhdx"))


def measure(folder: Path, rounds: int) -> list[Figure]:
    """Convert `rounds` times in turn. Raises BenchError if a program is missing or fails.

    Both end with the data on stable storage: qemu-img flushes once at its end under ``-t writeback``, not by default.
    """
    qemu = shutil.which("qemu-img")
    pyvmm = Path(sys.executable).with_name("pyvmm")
    if qemu is None or not pyvmm.exists():
        raise BenchError("qemu-img or pyvmm is missing: make setup")
    spawn = str(compile_c("spawn", folder))
    raw = _fill(folder / "source.raw")
    figures = []
    for ours, theirs in _PAIRS:
        if not {ours, theirs} <= set(FORMATS):
            continue
        source, target = folder / f"source.{ours}", folder / f"target.{theirs}"
        if not source.exists():
            output_of([spawn, str(pyvmm), "disk", "convert", str(raw), str(source)])
        commands = {
            "pyvmm": [str(pyvmm), "disk", "convert", str(source), str(target), "-o", "json"],
            "qemu-img": [
                qemu,
                "convert",
                "-t",
                "writeback",
                "-f",
                _QEMU[ours],
                "-O",
                _QEMU[theirs],
                *map(str, (source, target)),
            ],
        }
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
        samples = [Samples(name, tuple(values)) for name, values in taken.items()]
        figures.append(Figure(f"convert {ours} to {theirs}", "ms", samples[0], samples[1], 1.0))
    return figures


def _fill(path: Path) -> Path:
    """A raw disk of twice `_DATA`: data with some zeros among it, then a hole, in turn."""
    numbers = random.Random(4)
    with path.open("wb") as file:
        file.truncate(2 * _DATA)
        for offset in range(0, 2 * _DATA, 2 * _PIECE):
            file.seek(offset)
            file.write(numbers.randbytes(_PIECE * 3 // 4) + bytes(_PIECE // 4))
    return path
