"""Runs inside the lab for test_storage.py: a stock guest on our disks, root included, under load and with mishaps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from devices.storage.images import open_image
from tests.lab.guest_vm import Vm

RESULTS = Path(os.environ.get("PYVMM_LAB_RESULTS", "."))
DISKS = Path("/tmp/storage")  # not on the shared file system, which has no holes
MIB = 1 << 20
BOOT_SECONDS = 300.0
KILLED_AFTER = 60


def image(name: str, mebibytes: int, *options: str) -> str:
    """Make an empty image of the format that the name's suffix tells."""
    path = str(DISKS / name)
    subprocess.run([sys.executable, "-m", "pyvmm", "disk", "create", path, f"{mebibytes}M", *options], check=True)
    return path


def checked(*names: str) -> dict[str, Any]:
    """What ``pyvmm disk check`` says of images that no VM uses any more."""
    found = {}
    for name in names:
        command = [sys.executable, "-m", "pyvmm", "disk", "check", str(DISKS / name), "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found[name] = {"exit": done.returncode, "says": done.stdout + done.stderr}
    return found


def storvsp(vmlinux: str, initrd: str, root: str, seconds: float) -> dict[str, Any]:
    """Root on VHDX over storvsp; load on a dynamic VHDX of 4096-byte sectors while disks come, go, grow and fail."""
    shutil.copyfile(root, DISKS / "root.vhdx")
    failing = Path(image("failing.img", 16))
    vm = Vm(
        DISKS,
        BOOT_SECONDS + seconds,
        *("--kernel", vmlinux, "--initrd", initrd, "--cpus", "2", "--memory", "768M"),
        *("--cmdline", f"console=ttyS0 quiet panic=-1 root=LABEL=root fio_seconds={seconds:g}"),
        *(
            "--disk",
            str(DISKS / "root.vhdx"),
            "--disk",
            image("load.vhdx", 256, "--sector-size", "4096"),
            "--disk",
            str(failing),
        ),
    )
    steps: dict[str, Any] = {}
    if vm.until("ready", "under-load"):
        steps["add"] = vm.ctl("add-disk", image("added.vhdx", 20))
        vm.until("ready", "hot-remove")
        steps["remove"] = vm.ctl("remove-disk", f"0:{(steps['add']['reply'] or {}).get('lun', 0)}")
    if vm.until("ready", "grow"):
        steps["grow"] = vm.ctl("resize-disk", "0:1", "384M")
    if vm.until("ready", "fail"):
        os.truncate(failing, MIB)  # a host whose disk lost data: reads beyond it end in EIO
        steps["failed"] = True
    if vm.until("ready", "heal"):
        os.truncate(failing, 16 * MIB)
        steps["healed"] = True
    vm.until("ready", "inspect")
    steps["inspect"] = vm.ctl("inspect", "synthetic/devices/scsi0")
    return {**vm.end(), "steps": steps, "checks": checked("root.vhdx", "load.vhdx", "added.vhdx")}


def killed(vmlinux: str, initrd: str, root: str) -> dict[str, Any]:
    """SIGKILL to the VM while its guest writes and flushes block after block of a differencing disk."""
    shutil.copyfile(root, DISKS / "killed-root.vhdx")
    child = str(DISKS / "child.vhdx")
    create = ("disk", "create", child, "--parent", str(DISKS / "load.vhdx"), "--block-size", "1M")
    subprocess.run([sys.executable, "-m", "pyvmm", *create], check=True)
    vm = Vm(
        DISKS,
        BOOT_SECONDS,
        *("--kernel", vmlinux, "--initrd", initrd, "--cpus", "2", "--memory", "768M"),
        *("--cmdline", "console=ttyS0 quiet panic=-1 root=LABEL=root until_killed"),
        *("--disk", str(DISKS / "killed-root.vhdx"), "--disk", child),
    )
    vm.until("flushed", str(KILLED_AFTER))
    vm.process.kill()
    told = vm.end()
    flushed = int(told["results"].get("flushed", -1))
    # A writer replays the log; that is what the next VM does too.
    disk = open_image(child)
    lost = []
    for number in range(flushed + 1):
        block = bytearray(4096)
        disk.read(number * 97 * 4096, [memoryview(block)])
        if block != (f"{number}\n".encode() * 4096)[:4096]:
            lost.append(number)
    disk.close()
    return {**told, "flushed": flushed, "lost": lost, "checks": checked("child.vhdx", "killed-root.vhdx")}


def ide(vmlinux: str, initrd: str, root: str, seconds: float, enlightened: bool) -> dict[str, Any]:
    """Root on an IDE disk: by ata_piix, or by the same disk's channel on VMBus."""
    name = f"ide-{'vmbus' if enlightened else 'piix'}.vhdx"
    shutil.copyfile(root, DISKS / name)
    choice = ("--enlightenments", "full" if enlightened else "full,-vmbus")
    vm = Vm(
        DISKS,
        BOOT_SECONDS + seconds,
        *("--kernel", vmlinux, "--initrd", initrd, "--cpus", "2", "--memory", "768M", *choice),
        *("--cmdline", f"console=ttyS0 quiet panic=-1 root=LABEL=root fio_seconds={seconds:g} only_root"),
        *("--disk", f"{DISKS / name},bus=ide"),
    )
    return {**vm.end(), "checks": checked(name)}


def main() -> None:
    vmlinux, initrd, root, seconds = sys.argv[1:]
    DISKS.mkdir()
    guest = (vmlinux, initrd, root, float(seconds))
    report("storvsp", storvsp(*guest))
    report("killed", killed(*guest[:3]))
    report("ide-piix", ide(*guest, enlightened=False))
    report("ide-vmbus", ide(*guest, enlightened=True))


def report(leg: str, told: dict[str, Any]) -> None:
    """Leave what one leg told for the tests."""
    (RESULTS / f"{leg}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
