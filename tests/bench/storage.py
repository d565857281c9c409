"""Disk I/O of the bare-metal guest of guests/bench: storvsp against QEMU's virtio-blk, in turn."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from guests.bare.build import BuildError
from guests.bench.build import build
from guests.bench.run import MeasureError, Workload, measure, pyvmm_command, qemu_command, write_image
from tests.bench.figures import Figure, Samples
from tests.bench.native import BenchError

_IMAGE_BYTES = 256 << 20
#: Files there are in the page cache, and no disk of the host's writes them back meanwhile.
_MEMORY = Path("/dev/shm")

#: What is measured, its title, and the ratio to QEMU that is aimed at.
_TESTS = (
    (Workload("randread", 4096, 32, 300), "random 4 KiB reads x 32", 1.0),
    (Workload("randread", 4096, 1, 150), "random 4 KiB reads x 1", None),
    (Workload("randwrite", 4096, 32, 150), "random 4 KiB writes x 32", None),
    (Workload("read", 128 << 10, 32, 150), "128 KiB reads x 32", None),
    (Workload("write", 128 << 10, 32, 150), "128 KiB writes x 32", None),
)


def measure_all(folder: Path, rounds: int) -> list[Figure]:
    """Run all legs `rounds` times in turn. Raises BenchError."""
    if shutil.which("qemu-system-x86_64") is None:
        raise BenchError("qemu-system-x86_64 is missing: make setup")
    tests = [test for test, _, _ in _TESTS]
    console = folder / "storage.com1"
    taken: dict[tuple[str, str], list[float]] = {}
    try:
        elf = build()
        with tempfile.TemporaryDirectory(prefix="pyvmm-bench-", dir=_MEMORY if _MEMORY.is_dir() else None) as memory:
            raw = Path(memory) / "disk.img"
            write_image(raw, _IMAGE_BYTES)
            legs = {
                "storvsp": pyvmm_command(elf, console, raw, "storvsc", tests),
                "QEMU": qemu_command(elf, console, raw, "virtio-blk", tests),
            }
            for number in range(rounds + 1):
                for leg, command in legs.items():
                    console.unlink(missing_ok=True)
                    for name, found in measure(command, console).items():
                        if number:  # the first one warms up
                            taken.setdefault((leg, name), []).append(found.each)
    except (BuildError, MeasureError, OSError) as error:
        raise BenchError(str(error)) from error

    def samples(leg: str, test: Workload) -> Samples:
        return Samples(leg, tuple(taken[leg, test.name]))

    return [
        Figure(f"storvsp: {title}", "us", samples("storvsp", test), samples("QEMU", test), limit)
        for test, title, limit in _TESTS
    ]
