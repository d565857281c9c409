"""Disk I/O of the bare-metal guest of guests/bench: storvsp against QEMU's virtio-blk and our other disks, in turn."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from guests.bare.build import BuildError
from guests.bench.build import build
from guests.bench.run import MeasureError, Workload, measure, pyvmm_command, qemu_command, write_image
from tests.bench.figures import Figure, Samples
from tests.bench.native import BenchError

_IMAGE_BYTES = 256 << 20
_RANDOM = Workload("randread", 4096, 32, 300)
_ALONE = Workload("randread", 4096, 1, 150)
_RANDOM_WRITE = Workload("randwrite", 4096, 32, 150)
_LARGE = Workload("read", 128 << 10, 32, 150)
_LARGE_WRITE = Workload("write", 128 << 10, 32, 150)
_ALL = [_RANDOM, _ALONE, _RANDOM_WRITE, _LARGE, _LARGE_WRITE]

_RAW, _VHDX, _QEMU, _PIO, _DMA = "storvsp", "VHDX", "QEMU", "IDE PIO", "IDE DMA"

#: Title; our leg and what it does; the other leg and what that does; the ratio of times that is aimed at. An IDE disk
#: has one request at a time.
_FIGURES = (
    ("random 4K reads x32", _RAW, _RANDOM, _QEMU, _RANDOM, 1.0),
    ("random 4K reads x1", _RAW, _ALONE, _QEMU, _ALONE, None),
    ("random 4K writes x32", _RAW, _RANDOM_WRITE, _QEMU, _RANDOM_WRITE, None),
    ("128K reads x32", _RAW, _LARGE, _QEMU, _LARGE, None),
    ("128K writes x32", _RAW, _LARGE_WRITE, _QEMU, _LARGE_WRITE, None),
    ("random 4K reads x32", _RAW, _RANDOM, _PIO, _ALONE, 0.1),
    ("random 4K reads x32", _RAW, _RANDOM, _DMA, _ALONE, 1 / 3),
    ("VHDX: random 4K reads x32", _VHDX, _RANDOM, _RAW, _RANDOM, 1 / 0.9),
    ("VHDX: random 4K writes x32", _VHDX, _RANDOM_WRITE, _RAW, _RANDOM_WRITE, None),
)


def _images(folder: Path) -> tuple[Path, Path]:
    """A raw image and a dynamic VHDX of the same data, all of it in the page cache and on the host's disk."""
    raw, vhdx = folder / "disk.img", folder / "disk.vhdx"
    write_image(raw, _IMAGE_BYTES)
    command = [sys.executable, "-m", "pyvmm", "disk", "convert", str(raw), str(vhdx)]
    subprocess.run(command, check=True, capture_output=True)
    os.sync()
    return raw, vhdx


def measure_all(folder: Path, rounds: int) -> list[Figure]:
    """Run all legs `rounds` times in turn. Raises BenchError."""
    if shutil.which("qemu-system-x86_64") is None:
        raise BenchError("qemu-system-x86_64 is missing: make setup")
    console = folder / "storage.com1"
    taken: dict[tuple[str, str], list[float]] = {}
    try:
        elf = build()
        raw, vhdx = _images(folder)
        legs = {
            _RAW: pyvmm_command(elf, console, raw, "storvsc", _ALL),
            _QEMU: qemu_command(elf, console, raw, "virtio-blk", _ALL),
            _VHDX: pyvmm_command(elf, console, vhdx, "storvsc", [_RANDOM, _RANDOM_WRITE]),
            _PIO: pyvmm_command(elf, console, raw, "ide-pio", [_ALONE]),
            _DMA: pyvmm_command(elf, console, raw, "ide-dma", [_ALONE]),
        }
        for number in range(rounds + 1):
            for leg, command in legs.items():
                console.unlink(missing_ok=True)
                for name, found in measure(command, console).items():
                    if number:  # the first one warms up
                        taken.setdefault((leg, name), []).append(found.each)
    except (BuildError, MeasureError, OSError, subprocess.CalledProcessError) as error:
        raise BenchError(str(error)) from error

    def samples(leg: str, workload: Workload) -> Samples:
        return Samples(leg, tuple(taken[leg, workload.name]))

    return [
        Figure(title, "us", samples(ours, workload), samples(rival, other), limit)
        for title, ours, workload, rival, other, limit in _FIGURES
    ]
