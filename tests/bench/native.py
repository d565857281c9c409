"""The C programs beside the benchmarks, built anew for each run."""

from __future__ import annotations

import subprocess
from pathlib import Path

_SOURCES = Path(__file__).parent


class BenchError(Exception):
    """Something cannot be measured here; the message is for people."""


def compile_c(name: str, folder: Path) -> Path:
    """Build `name`.c into `folder` with optimisation; return the program. Raises BenchError."""
    program = folder / name
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"]
    try:
        subprocess.run(["gcc", *flags, "-o", str(program), str(_SOURCES / f"{name}.c")], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchError(f"cannot build {name}.c: {error}") from error
    return program


def output_of(command: list[str], pass_fds: tuple[int, ...] = ()) -> list[int]:
    """The numbers that a program prints. Raises BenchError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, pass_fds=pass_fds)
    if done.returncode:
        raise BenchError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return [int(word) for word in done.stdout.split()]
