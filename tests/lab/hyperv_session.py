"""Runs inside the lab for test_hyperv.py: drives a stock guest with several disks through its life, as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.lab.guest_vm import Vm

RESULTS = Path(os.environ.get("PYVMM_LAB_RESULTS", "."))
DISKS = Path("/tmp/hyperv")  # not on the shared file system, which has no discard
MIB = 1 << 20
GUEST_SECONDS = 240.0


def image(name: str, mebibytes: int) -> str:
    """Make an empty disk image."""
    path = DISKS / name
    with path.open("wb") as file:
        file.truncate(mebibytes * MIB)
    return str(path)


def whole_life(vmlinux: str, initrd: str) -> dict[str, Any]:
    """Boot with 4 VPs, write, plug and unplug, pause, reset, boot again, shut down."""
    vm = Vm(
        DISKS,
        GUEST_SECONDS,
        *("--kernel", vmlinux, "--initrd", initrd, "--cmdline", "console=ttyS0 quiet panic=-1"),
        *("--cpus", "4", "--memory", "768M"),
        *("--disk", image("data.img", 128), "--disk", image("second.img", 24) + ",readonly"),
        *("--disk", image("other-controller.img", 16) + ",controller=1"),
    )
    steps: dict[str, Any] = {}
    if vm.until("ready", "hot-add"):
        steps["add"] = vm.ctl("add-disk", image("added.img", 20))
        vm.until("ready", "hot-remove")
        steps["heartbeat"] = vm.ctl("inspect", "synthetic/devices/heartbeat")
        lun = (steps["add"]["reply"] or {}).get("lun", 0)
        steps["remove"] = vm.ctl("remove-disk", f"0:{lun}")
    if vm.until("ready", "pause"):
        vm.until("clock")
        steps["pause"] = vm.ctl("pause")
        paused = time.monotonic()
        steps["paused_state"] = vm.ctl("status")
        # The VM stands still for 10 s of the host's time: that is the thing under test.
        time.sleep(max(0.0, 10 - (time.monotonic() - paused)))
        steps["resume"] = vm.ctl("resume")
        resumed = time.time()
        vm.until("ready", "reset")
        steps["clocks"] = [(seen, told) for seen, told in vm.clocks if seen > resumed]
        steps["reset"] = vm.ctl("reset")
    if vm.until("ready", "shutdown"):
        steps["shutdown"] = vm.ctl("shutdown")
    return {**vm.end(), "steps": steps}


def old_protocol(vmlinux: str, initrd: str, version: int) -> dict[str, Any]:
    """Boot a guest that may only speak an older protocol and reboots itself once; cut its power."""
    vm = Vm(
        DISKS,
        100,
        *("--kernel", vmlinux, "--initrd", initrd, "--memory", "512M", "--cpus", "2"),
        *("--cmdline", f"console=ttyS0 quiet panic=-1 hv_vmbus.max_version={version}"),
        *("--disk", image("old.img", 32)),
    )
    steps = {"poweroff": vm.ctl("poweroff")} if vm.until("ready", "poweroff") else {}
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
