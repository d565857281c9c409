"""Runs a bare-metal guest under a virtual machine monitor, and reads its report."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guests.bare.report import Report, parse


@dataclass(frozen=True)
class Run:
    """How one run ended. `stderr` is the monitor's; `good_status` is its exit status after a good run."""

    report: Report
    status: int
    stderr: str
    seconds: float
    good_status: int = 0

    @property
    def problem(self) -> str | None:
        """In one line, what is not as expected; None if nothing is."""
        if self.report.problem is None and self.status != self.good_status:
            return f"the run ended with status {self.status}, not {self.good_status}"
        return self.report.problem


def pyvmm(elf: Path, console: Path, *, cpus: int, memory: str, cmdline: str, enlightenments: str) -> list[str]:
    """The command that runs `elf` under pyvmm with COM1 in the file `console`, up to what a guest adds."""
    return [
        *(sys.executable, "-m", "pyvmm", "run", "--kernel", str(elf), "--cpus", str(cpus), "--memory", memory),
        *("--com1", f"file:{console}", "--no-reboot", "--cmdline", cmdline, "--enlightenments", enlightenments),
    ]


def run(name: str, command: Sequence[str], console: Path, good_status: int = 0) -> Run:
    """Run `command`, which ends by itself and leaves the report of the guest `name` in `console`."""
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    text = console.read_text(errors="replace") if console.exists() else ""
    return Run(parse(name, text), done.returncode, done.stderr, seconds, good_status)
