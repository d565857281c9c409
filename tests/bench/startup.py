"""Process start to the first guest instruction: the whole run of a ROM that ends at once, against QEMU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.bench.figures import Figure, Samples
from tests.bench.native import BenchError, compile_c, output_of

_ROOT = Path(__file__).parents[2]
_ROM_SIZE = 64 << 10
_RESET_VECTOR = _ROM_SIZE - 16
#: mov al, 0x10; out 0xf4, al; hlt
_CODE = bytes((0xB0, 0x10, 0xE6, 0xF4, 0xF4))
_STATUS = 0x10 << 1 | 1
_WARM_UP = 3
_TITLES = (("start-up: whole run", "ms"), ("start-up: CPU time", "ms"), ("start-up: peak memory", "MiB"))


def measure(folder: Path, rounds: int) -> list[Figure]:
    """Run both `rounds` times in turn. Raises BenchError if one of them is missing or gives the wrong status."""
    rom = folder / "startup.rom"
    image = bytearray(_ROM_SIZE)
    image[_RESET_VECTOR : _RESET_VECTOR + len(_CODE)] = _CODE
    rom.write_bytes(image)
    # What has changed since `make setup` would be compiled anew at each start where no byte code may be written.
    packages = ["pyvmm", "devices", "enlightenments"]
    subprocess.run([sys.executable, "-m", "compileall", "-q", *packages], cwd=_ROOT, check=True)
    spawn = str(compile_c("spawn", folder))
    pyvmm = Path(sys.executable).with_name("pyvmm")
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None or not pyvmm.exists():
        raise BenchError("qemu-system-x86_64 or pyvmm is missing: make setup")
    ours = [str(pyvmm), "run", "--firmware", str(rom), "--testdev", "--memory", "128M", "--com1", "none"]
    rival = [qemu, "-accel", "kvm", "-cpu", "qemu64", "-M", "pc", "-m", "128", "-nodefaults", "-display", "none"]
    rival += ["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios", str(rom)]
    runs: dict[str, list[tuple[float, float, float]]] = {"pyvmm": [], "QEMU": []}
    for number in range(_WARM_UP + rounds):
        for name, command in (("pyvmm", ours), ("QEMU", rival)):
            nanoseconds, cpu_microseconds, peak_kib, status = output_of([spawn, *command])
            if status != _STATUS:
                raise BenchError(f"{name} ended with status {status} instead of {_STATUS}: {' '.join(command)}")
            if number >= _WARM_UP:
                runs[name].append((nanoseconds / 1e6, cpu_microseconds / 1e3, peak_kib / 1024))
    figures = []
    for column, (title, unit) in enumerate(_TITLES):
        samples = [Samples(name, tuple(run[column] for run in taken)) for name, taken in runs.items()]
        figures.append(Figure(title, unit, samples[0], samples[1], None if column == 1 else 1.0))
    return figures
