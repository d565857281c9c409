"""Runs a benchmark's session with guests where there is an ordinary KVM: here, or else in the lab."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guests import lab
from pyvmm.core.kvm.system import kvm_kind
from tests.bench.native import BenchError

_LAB_S = 1800.0


def run_session(module: str, guests: Mapping[str, Any], folder: Path, *arguments: str) -> Any:
    """``python -m MODULE GUESTS.json ARGUMENTS... FOUND.json``: what it found. Raises BenchError."""
    asked, found = folder / "guests.json", folder / "found.json"
    asked.write_text(json.dumps(guests))
    command = [sys.executable, "-m", module, str(asked), *arguments, str(found)]
    try:
        if kvm_kind() in ("kvm_amd", "kvm_intel"):
            status = subprocess.run(command, check=False).returncode
        else:
            write = sys.stderr.buffer.write
            status = lab.run(command, results=folder, timeout=_LAB_S, on_stdout=write, on_stderr=write).returncode
    except lab.LabError as error:
        raise BenchError(str(error)) from error
    if status:
        raise BenchError(f"{module} ended with status {status}")
    return json.loads(found.read_text())
