"""A stock guest in a lab session: ``pyvmm run`` as a user starts it, what its console tells, and ``pyvmm ctl``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_GRACE_SECONDS = 20.0  # for a pyvmm that ends by its --timeout
_CTL_SECONDS = 240.0


class Vm:
    """One ``pyvmm run``, of `seconds` at most, and what its guest said so far; its files are in `folder`."""

    def __init__(self, folder: Path, seconds: float, *arguments: str, stdin: int = subprocess.DEVNULL) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.control = str(folder / "control")
        self.report = folder / "report.json"
        own = ("--control", self.control, "--timeout", f"{seconds:g}", "--report", str(self.report))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyvmm", "run", *arguments, *own],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )
        self._deadline = time.monotonic() + seconds + _GRACE_SECONDS
        self.results: dict[str, str] = {}
        self.clocks: list[tuple[float, float]] = []
        self.console = ""
        self._rest = b""

    def until(self, key: str, value: str | None = None) -> bool:
        """Read the console until the guest reports `key` (with `value`); False if it never did."""
        assert self.process.stdout is not None
        while time.monotonic() < self._deadline:
            if key in self.results and value in (None, self.results[key]):
                return True
            if not select.select([self.process.stdout], [], [], 1)[0]:
                continue
            data = os.read(self.process.stdout.fileno(), 65536)
            now = time.time()
            if not data:
                return False
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._line(line.decode(errors="replace").strip(), now)
        return False

    def _line(self, line: str, now: float) -> None:
        self.console += line + "\n"
        match = re.match(r"RESULT ([^=\s]+)=(.*)", line)
        if match:
            self.results[match[1]] = match[2]
            if match[1] == "clock":
                self.clocks.append((now, float(match[2])))

    def end(self) -> dict[str, Any]:
        """Wait for the process; return all there is to tell."""
        try:
            stdout, stderr = self.process.communicate(timeout=max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:  # it outlived its own --timeout: have it tell where its threads are
            self.process.send_signal(signal.SIGABRT)
            stdout, stderr = self.process.communicate()
        for line in stdout.decode(errors="replace").splitlines():
            self._line(line.strip(), time.time())
        return {
            "exit": self.process.returncode,
            "stderr": stderr.decode(errors="replace"),
            "results": self.results,
            "console": self.console[-8000:],
            "report": json.loads(self.report.read_text() or "null") if self.report.exists() else None,
        }

    def ctl(self, *arguments: str) -> dict[str, Any]:
        """``pyvmm ctl``: its exit status and JSON output. It ends by itself, whatever the VM does."""
        done = subprocess.run(
            [sys.executable, "-m", "pyvmm", "ctl", self.control, *arguments, "-o", "json"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_CTL_SECONDS,
        )
        try:
            reply = json.loads(done.stdout)
        except ValueError:
            reply = None
        return {"exit": done.returncode, "reply": reply, "stderr": done.stderr}


class ShellVm(Vm):
    """A `Vm` whose guest ends its script with guest_shell.sh: it runs the commands that it is given."""

    def __init__(self, folder: Path, seconds: float, *arguments: str) -> None:
        super().__init__(folder, seconds, *arguments, stdin=subprocess.PIPE)
        self._count = 0

    def send(self, command: str) -> int:
        """Give the guest a command line; `wait` with the returned number for its end."""
        assert self.process.stdin is not None
        self._count += 1
        with contextlib.suppress(BrokenPipeError):  # `wait` will tell
            self.process.stdin.write(f"{self._count} {command}\n".encode())
            self.process.stdin.flush()
        return self._count

    def wait(self, number: int) -> tuple[int, str]:
        """The command's exit status and output; status -1 if the guest never reported its end."""
        key = f"done{number}"
        status = int(self.results[key]) if self.until(key) else -1
        said = re.search(rf"^RESULT begun{number}=.*\n((?s:.*?))^RESULT {key}=", self.console, re.MULTILINE)
        return status, "".join(re.findall(r"^OUT (.*\n)", said[1] if said else "", re.MULTILINE))

    def run(self, command: str) -> tuple[int, str]:
        """`send` and `wait`."""
        return self.wait(self.send(command))

    def says(self, command: str) -> str:
        """What a command printed, without white space around it."""
        return self.run(command)[1].strip()


def attempt(name: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a step of a session found, or why it broke off: the other steps have their say. stderr tells of its time."""
    begin = time.monotonic()
    try:
        found = step()
    except (OSError, ValueError, LookupError, TypeError, subprocess.SubprocessError) as error:
        found = {"failed": repr(error)}
    print(f"{name}: {time.monotonic() - begin:.1f} s {found.get('failed', '')}", file=sys.stderr, flush=True)
    return found
