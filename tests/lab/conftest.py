"""Tests of stock guests. They run on the host; what needs an ordinary KVM runs in a lab session that they start.

A session costs a boot, so a test module starts one (in a fixture of module scope) for all its checks: a script run
inside leaves JSON files in the results folder, and the tests, out here where Python is fast, assert on them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from guests import lab


@dataclass(frozen=True)
class Session:
    """One finished lab session."""

    returncode: int
    stdout: bytes
    stderr: bytes
    results: Path
    boot_seconds: float

    def report(self, name: str) -> Any:
        """Return what the session wrote into NAME.json; fail with its output when it did not."""
        file = self.results / f"{name}.json"
        if not file.exists():
            pytest.fail(f"the lab session (exit status {self.returncode}) left no {file.name}\n{self.output_end()}")
        return json.loads(file.read_text())

    def output_end(self) -> str:
        """Return the end of what the session said."""
        lines = (self.stdout + self.stderr).decode(errors="replace").splitlines()
        return "\n".join(lines[-40:])


StartSession = Callable[..., Session]


def told(report: dict[str, Any], key: str) -> str:
    """What a guest reported, by the report of its VM (`Vm.end`), or a failure with the end of its console."""
    results: dict[str, str] = report["results"]
    assert key in results, f"the guest never reported {key}\n{report['console'][-3000:]}\n{report['stderr']}"
    return results[key]


def guest_script(*names: str) -> str:
    """The text of a stock guest's script in this folder, in parts, after what all share."""
    return "".join((Path(__file__).parent / part).read_text() for part in ("guest_common.sh", *names))


_ATTEMPTS = 3
"""How often a session is started whose lab comes to a standstill."""


@pytest.fixture(scope="session")
def lab_session(tmp_path_factory: pytest.TempPathFactory) -> StartSession:
    """A function that runs ``python ARGUMENTS...`` (this environment's) in a lab of its own and returns the Session.

    Its keywords: `cpus`, `memory_mib`, `timeout` in seconds (by default 300).
    """
    if "PYVMM_LAB" in os.environ:
        pytest.skip("already inside the lab")

    def start(*arguments: str, cpus: int = 1, memory_mib: int = 4096, timeout: float = 300) -> Session:
        for _ in range(_ATTEMPTS - 1):
            try:
                return attempt(*arguments, cpus=cpus, memory_mib=memory_mib, timeout=timeout)
            except lab.LabStandstill as error:  # QEMU's fault, not that of what is tested
                print(error)
        return attempt(*arguments, cpus=cpus, memory_mib=memory_mib, timeout=timeout)

    def attempt(*arguments: str, cpus: int, memory_mib: int, timeout: float) -> Session:
        results = tmp_path_factory.mktemp("lab")
        stdout, stderr = bytearray(), bytearray()
        try:
            ended = lab.run(
                [sys.executable, *arguments],
                cpus=cpus,
                memory_mib=memory_mib,
                results=results,
                timeout=timeout,
                on_stdout=stdout.extend,
                on_stderr=stderr.extend,
            )
        except lab.LabStandstill:
            raise
        except lab.LabError as error:
            said = (stdout + stderr).decode(errors="replace")
            pytest.fail(f"{error}\n{error.console}\n{said[-4000:]}")
        return Session(ended.returncode, bytes(stdout), bytes(stderr), results, ended.boot_seconds)

    return start
