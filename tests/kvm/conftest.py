"""Tiny guests, run in this process or by the command line."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.core.trace import GuestLog, Tracer
from pyvmm.machine.config import VmConfig
from pyvmm.machine.console import open_console
from pyvmm.machine.machine import Machine
from tests.fakes.rom import build_rom

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyvmm.machine.outcome import Outcome

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60


class RunningVm:
    """A machine whose life cycle runs on a thread of its own."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.outcome: Outcome | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.outcome = self.machine.run()

    def start(self) -> RunningVm:
        self._thread.start()
        return self

    def wait(self) -> Outcome:
        """The end of the VM."""
        self._thread.join(PATIENCE_S)
        assert self.outcome is not None, "the machine does not end"
        return self.outcome

    def word(self, gpa: int) -> int:
        """A 32-bit word of guest memory."""
        return int.from_bytes(self.machine.memory.read(gpa, 4), "little")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for the guest to do something."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"never came: {what}"
            assert self.outcome is None, f"ended before: {what}: {self.outcome.kind} {self.outcome.message}"


def run_cli(*options: str) -> subprocess.CompletedProcess[str]:
    """``pyvmm run`` with the test devices and no console."""
    command = [sys.executable, "-m", "pyvmm", "run", "--com1", "none", "--testdev"]
    command += ["--timeout", str(PATIENCE_S), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False)


class Roms:
    """Makes ROMs and runs them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._machines: list[Machine] = []

    def build(self, body: str) -> Path:
        """Assemble a ROM; return its file."""
        return build_rom(body, self._folder / f"rom{len(list(self._folder.iterdir()))}")

    def cli(self, body: str, *options: str, seconds: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """Run a ROM with ``pyvmm run``."""
        return run_cli("--firmware", str(self.build(body)), "--timeout", str(seconds), *options)

    def machine(self, body: str, **config: Any) -> Machine:
        """Make, but do not run, a machine with a ROM."""
        values = {"memory": 1 << 20, "testdev": True, "timeout": PATIENCE_S, "com1": "none", **config}
        values.setdefault("firmware", str(self.build(body)))
        machine = Machine(VmConfig(**values), tracer=Tracer(), log=GuestLog(), console=open_console("none"))
        self._machines.append(machine)
        return machine

    def start(self, body: str, **config: Any) -> RunningVm:
        """Run a ROM in this process."""
        return RunningVm(self.machine(body, **config)).start()

    def close(self) -> None:
        for machine in self._machines:
            machine.stop(0)
            machine.close()


@pytest.fixture
def roms(tmp_path: Path) -> Iterator[Roms]:
    roms = Roms(tmp_path)
    yield roms
    roms.close()
