"""Runs inside the lab for test_conformance.py: the kit under QEMU with KVM's own Hyper-V code, and under pyvmm.

What it writes to COM1 is left in the results folder; it is read and compared outside, where Python is fast.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from enlightenments.catalog import ENLIGHTENMENTS
from guests.conformance.run import SHARED_SPEC, pyvmm_command, qemu_command

RESULTS = Path(os.environ.get("PYVMM_LAB_RESULTS", "."))
#: The lab's emulated processor has no TSC of constant rate.
ALL_SPEC = ",".join(["full", *(f"+{name}" for name, entry in ENLIGHTENMENTS.items() if entry.host != "invariant-tsc")])
#: What KVM takes part in where it runs the timers.
TIMER_TOPICS = "synic,stimer,ports,autoeoi,idle"
VPS = 2
SECONDS = 60.0


def main() -> None:
    ended = {}
    for elf in map(Path, sys.argv[1:]):
        for monitor in ("qemu", "pyvmm", "all", "user"):
            console = RESULTS / f"{monitor}-{elf.stem}.txt"
            if monitor == "qemu":
                command = qemu_command(elf, console, cpus=VPS)
            else:
                spec = SHARED_SPEC if monitor == "pyvmm" else ALL_SPEC
                topics = TIMER_TOPICS if monitor == "user" else ""
                command = pyvmm_command(elf, console, cpus=VPS, topics=topics, enlightenments=spec, timeout=SECONDS)
                if monitor == "user":  # whoever traces MSRs wants to see the timers', so KVM does not run them
                    command += ["--trace", "msr"]
            done = subprocess.run(
                command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=2 * SECONDS
            )
            ended[console.stem] = {"status": done.returncode, "stderr": done.stderr}
    (RESULTS / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
