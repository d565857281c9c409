"""Builds the probe with gcc and ld, once for each state of its sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent

#: Only what KVM's instruction emulator knows: no SSE, no x87, nothing newer than the first x86-64.
_FLAGS = [
    *("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-march=x86-64", "-mgeneral-regs-only", "-mno-sse"),
    *("-mno-red-zone", "-ffreestanding", "-fno-pic", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
    *("-fcf-protection=none", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none"),
]


class BuildError(Exception):
    """The probe cannot be built; the message is one line, with the compiler's own output after it if it ran."""


def cache_dir() -> Path:
    """Where built probes are kept: ``pyvmm/probe`` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyvmm" / "probe"


def build(cache: Path | None = None) -> Path:
    """Return the path of the probe's ELF file, built if these sources have not been built before.

    Raises BuildError if there is no compiler or it fails.
    """
    script = SOURCE / "probe.ld"
    sources = sorted([*SOURCE.glob("*.c"), *SOURCE.glob("*.S")])
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in [*sources, *sorted(SOURCE.glob("*.h")), script]:
        digest.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    folder = (cache or cache_dir()) / digest.hexdigest()[:16]
    elf = folder / "probe.elf"
    if elf.exists():
        return elf
    compiler = shutil.which("gcc")
    if compiler is None:
        raise BuildError("gcc is needed to build the probe: apt-get install gcc libc6-dev")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            result = Path(work) / "probe.elf"
            command = [compiler, *_FLAGS, f"-Wl,-T,{script}", "-o", str(result), *map(str, sources)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise BuildError(f"gcc failed with status {done.returncode}:\n{done.stderr.rstrip()}")
            result.replace(elf)
    except OSError as error:
        raise BuildError(f"cannot build the probe in {folder}: {error.strerror}") from error
    return elf
