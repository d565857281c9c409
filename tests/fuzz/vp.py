"""Fuzzing through a VP on /dev/kvm: a guest that draws MSR accesses and hypercalls from a seed, under ``pyvmm run``."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from guests.bare.build import build as build_guest
from tests.fuzz.native import FuzzError

_ROUNDS = 4000
_PATIENCE_S = 120
#: What the guest's exit makes of QEMU's isa-debug-exit if nothing was wrong.
_EXIT_GOOD = 1


def build() -> Path:
    """Return the guest's ELF file, built if need be."""
    return build_guest("fuzz", Path(__file__).parent / "guest", flags=["-m32"])


def life(elf: Path, seed: int, rounds: int = _ROUNDS, enlightenments: str = "full,+tlbflush,+tlbflush-ext,+ipi") -> str:
    """Run the guest once; return its last line. Raises FuzzError if it did not reach its end."""
    command = [sys.executable, "-m", "pyvmm", "run", "--kernel", str(elf), "--memory", "32M", "--com1", "stdio"]
    command += ["--testdev", "--no-reboot", "--timeout", str(_PATIENCE_S), "--enlightenments", enlightenments]
    command += ["--cmdline", f"seed={seed} rounds={rounds}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    said = done.stdout.strip().splitlines()
    if done.returncode != _EXIT_GOOD or not said or not said[-1].startswith("fuzz: done"):
        raise FuzzError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return said[-1]


def run(first_seed: int, seconds: float) -> str:
    """Run guests with one seed after the other until the time is up; return what was done. Raises FuzzError."""
    elf, started, lives = build(), time.monotonic(), 0
    while not lives or time.monotonic() - started < seconds:
        life(elf, first_seed + lives)
        lives += 1
    took = time.monotonic() - started
    return f"seeds {first_seed} to {first_seed + lives - 1}: {lives} guests of {_ROUNDS} rounds in {took:.1f} s"
