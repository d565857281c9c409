"""A stock guest in a lab session: ``pyvmm run`` as a user starts it, what its console tells, and ``pyvmm ctl``."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_GRACE_SECONDS = 20.0  # for a pyvmm that ends by its --timeout
_CTL_SECONDS = 240.0


class Vm:
    """One ``pyvmm run``, of `seconds` at most, and what its guest said so far; its files are in `folder`."""

    def __init__(self, folder: Path, seconds: float, *arguments: str) -> None:
        self.control = str(folder / "control")
        self.report = folder / "report.json"
        own = ("--control", self.control, "--timeout", f"{seconds:g}", "--report", str(self.report))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyvmm", "run", *arguments, *own],
            stdin=subprocess.DEVNULL,
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
