"""Builds bare-metal guests with gcc and ld, once for each state of their sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

SHARED = Path(__file__).parent

#: Only what KVM's instruction emulator knows: no SSE, no x87, nothing newer than the first x86-64.
_FLAGS = [
    *("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-march=x86-64", "-mgeneral-regs-only", "-mno-sse"),
    *("-mno-red-zone", "-ffreestanding", "-fno-pic", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
    *("-fcf-protection=none", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none"),
]


class BuildError(Exception):
    """A guest cannot be built; the message is one line, with the tool's own output after it if it ran."""


def cache_dir() -> Path:
    """Where built guests are kept: ``pyvmm`` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyvmm"


def build(
    name: str,
    source: Path,
    cache: Path | None = None,
    *,
    pieces: Iterable[str] = (),
    flags: Iterable[str] = (),
    elf32: bool = False,
) -> Path:
    """Return the path of ``NAME.elf``, made of `source` and the shared pieces if it has not been before.

    `source` holds C and assembly files and one linker script. `pieces` are folders of the shared ones that not every
    guest needs; `flags` go to gcc. A 64-bit guest of a loader that only takes 32-bit files is turned into one with
    `elf32`. Raises BuildError if a tool is missing or fails.
    """
    (script,) = source.glob("*.ld")
    folders = [source, SHARED, *(SHARED / piece for piece in pieces)]
    sources = sorted(path for folder in folders for path in (*folder.glob("*.c"), *folder.glob("*.S")))
    headers = sorted(path for folder in folders for path in folder.glob("*.h"))
    flags = [*_FLAGS, *flags]
    digest = hashlib.sha256(" ".join([*flags, str(elf32)]).encode())
    for path in [*sources, *headers, script]:
        digest.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    folder = (cache or cache_dir() / name) / digest.hexdigest()[:16]
    elf = folder / f"{name}.elf"
    if elf.exists():
        return elf
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            result = Path(work) / "guest"
            _run(name, "gcc", *flags, f"-Wl,-T,{script}", "-o", str(result), *map(str, sources))
            if elf32:
                _run(name, "objcopy", "-O", "elf32-i386", str(result))
            result.replace(elf)
    except OSError as error:
        raise BuildError(f"cannot build the {name} in {folder}: {error.strerror}") from error
    return elf


def _run(name: str, tool: str, *arguments: str) -> None:
    path = shutil.which(tool)
    if path is None:
        raise BuildError(f"{tool} is needed to build the {name}: apt-get install gcc libc6-dev")
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{tool} failed with status {done.returncode}:\n{done.stderr.rstrip()}")
