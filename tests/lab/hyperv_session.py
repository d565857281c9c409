"""Runs inside the lab for test_hyperv.py: drives a stock guest with several disks through its life, as a user would."""

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

RESULTS = Path(os.environ.get("PYVMM_LAB_RESULTS", "."))
DISKS = Path("/tmp/hyperv")  # not on the shared file system, which has no discard
CONTROL = str(DISKS / "control")
MIB = 1 << 20
GUEST_SECONDS = 240.0
_GRACE_SECONDS = 20.0  # for a pyvmm that ends by its --timeout


class Vm:
    """One ``pyvmm run`` and what its guest said so far."""

    def __init__(self, *arguments: str) -> None:
        self.report = DISKS / "report.json"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyvmm", "run", *arguments, "--report", str(self.report)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )
        self._deadline = time.monotonic() + GUEST_SECONDS + _GRACE_SECONDS
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


def ctl(*arguments: str) -> dict[str, Any]:
    """``pyvmm ctl``: its exit status and JSON output. It ends by itself, whatever the VM does."""
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "ctl", CONTROL, *arguments, "-o", "json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=GUEST_SECONDS,
    )
    try:
        reply = json.loads(done.stdout)
    except ValueError:
        reply = None
    return {"exit": done.returncode, "reply": reply, "stderr": done.stderr}


def image(name: str, mebibytes: int) -> str:
    """Make an empty disk image."""
    path = DISKS / name
    with path.open("wb") as file:
        file.truncate(mebibytes * MIB)
    return str(path)


def whole_life(vmlinux: str, initrd: str) -> dict[str, Any]:
    """Boot with 4 VPs, write, plug and unplug, pause, reset, boot again, shut down."""
    vm = Vm(
        *("--kernel", vmlinux, "--initrd", initrd, "--cmdline", "console=ttyS0 quiet panic=-1"),
        *("--cpus", "4", "--memory", "768M", "--control", CONTROL, "--timeout", str(GUEST_SECONDS)),
        *("--disk", image("data.img", 128), "--disk", image("second.img", 24) + ",readonly"),
        *("--disk", image("other-controller.img", 16) + ",controller=1"),
    )
    steps: dict[str, Any] = {}
    if vm.until("ready", "hot-add"):
        steps["add"] = ctl("add-disk", image("added.img", 20))
        vm.until("ready", "hot-remove")
        steps["heartbeat"] = ctl("inspect", "synthetic/devices/heartbeat")
        lun = (steps["add"]["reply"] or {}).get("lun", 0)
        steps["remove"] = ctl("remove-disk", f"0:{lun}")
    if vm.until("ready", "pause"):
        vm.until("clock")
        steps["pause"] = ctl("pause")
        paused = time.monotonic()
        steps["paused_state"] = ctl("status")
        # The VM stands still for 10 s of the host's time: that is the thing under test.
        time.sleep(max(0.0, 10 - (time.monotonic() - paused)))
        steps["resume"] = ctl("resume")
        resumed = time.time()
        vm.until("ready", "reset")
        steps["clocks"] = [(seen, told) for seen, told in vm.clocks if seen > resumed]
        steps["reset"] = ctl("reset")
    if vm.until("ready", "shutdown"):
        steps["shutdown"] = ctl("shutdown")
    return {**vm.end(), "steps": steps}


def old_protocol(vmlinux: str, initrd: str, version: int) -> dict[str, Any]:
    """Boot a guest that may only speak an older protocol and reboots itself once; cut its power."""
    vm = Vm(
        *("--kernel", vmlinux, "--initrd", initrd, "--memory", "512M", "--cpus", "2", "--timeout", "100"),
        *("--control", CONTROL),
        *("--cmdline", f"console=ttyS0 quiet panic=-1 hv_vmbus.max_version={version}"),
        *("--disk", image("old.img", 32)),
    )
    steps = {"poweroff": ctl("poweroff")} if vm.until("ready", "poweroff") else {}
    return {**vm.end(), "steps": steps}


def main() -> None:
    vmlinux, initrd, plain_initrd, image_out = sys.argv[1:]
    DISKS.mkdir()
    life = whole_life(vmlinux, initrd)
    (RESULTS / "life.json").write_text(json.dumps(life))
    subprocess.run(["cp", "--sparse=always", str(DISKS / "data.img"), image_out], check=True)
    (RESULTS / "old.json").write_text(json.dumps(old_protocol(vmlinux, plain_initrd, 2 << 16 | 4)))


if __name__ == "__main__":
    main()
