"""Where the demo's guests run, on this host or in the lab, and the running of a session there."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guests import lab
from pyvmm.core.kvm.errors import KvmError
from pyvmm.core.kvm.system import System, kvm_kind

_LAB_SECONDS = 150


class SessionError(Exception):
    """A session left no findings. The message is one line, `log` the end of what it said."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Place:
    """Where to run a guest, and why there."""

    in_lab: bool
    why: str

    def __str__(self) -> str:
        return "in the lab" if self.in_lab else "on this host"


def kvm_problem() -> str | None:
    """Why pyvmm can run no VM on this host, with the remedy; None if it can."""
    try:
        with System() as system:
            system.require_capabilities()
    except KvmError as error:
        return str(error)
    return None


def place_for_probe(problem: str | None) -> Place:
    """Any KVM will do for the probe. `problem` is what `kvm_problem` said."""
    return Place(True, problem) if problem else Place(False, f"/dev/kvm is {kvm_kind()}")


def place_for_linux(problem: str | None) -> Place:
    """A stock kernel needs hardware virtualisation. `problem` is what `kvm_problem` said."""
    kind = kvm_kind()
    if problem is None and kind not in ("kvm_amd", "kvm_intel"):
        problem = f"/dev/kvm is {kind}, which runs the kernel's code in an emulator, too slowly for a stock Linux"
        if kind == "unknown":
            problem = "/dev/kvm is of an unknown kind, which may not run a stock Linux"
    return Place(True, problem) if problem else Place(False, f"/dev/kvm is {kind}, an ordinary one")


def run_session(place: Place, results: Path, job: str, *arguments: str, on_step: Callable[[str], object]) -> Any:
    """Run a session's job there; return what it left in JOB.json in the folder `results`.

    `on_step` gets its progress, a line at a time. Raises SessionError, packages.RecipeError.
    """
    command = [sys.executable, "-m", "guests.demo.session", str(results), job, *arguments]
    status, stderr = (_in_lab if place.in_lab else _here)(command, results, on_step)
    try:
        return json.loads((results / f"{job}.json").read_text())
    except FileNotFoundError:
        raise SessionError(f"the session ended with status {status} and without findings", stderr) from None


def _here(command: list[str], results: Path, on_step: Callable[[str], object]) -> tuple[int, str]:
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    on_step(line.rstrip())
            except BaseException:
                process.terminate()
                raise
        errors.seek(0)
        return process.returncode, errors.read().decode(errors="replace")


def _in_lab(command: list[str], results: Path, on_step: Callable[[str], object]) -> tuple[int, str]:
    errors = bytearray()
    lines = _Lines(on_step)
    try:
        ended = lab.run(command, results=results, timeout=_LAB_SECONDS, on_stdout=lines.feed, on_stderr=errors.extend)
    except lab.LabError as error:
        raise SessionError(str(error), error.console + errors.decode(errors="replace")) from error
    return ended.returncode, errors.decode(errors="replace")


class _Lines:
    """Cuts a stream into lines."""

    def __init__(self, sink: Callable[[str], object]) -> None:
        self._sink = sink
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._sink(line.decode(errors="replace"))
