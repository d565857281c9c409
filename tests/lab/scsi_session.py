"""Runs inside the lab for test_scsi.py: what a host does to the disks and drives of a stock guest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.lab.guest_vm import Vm

RESULTS = Path(os.environ.get("PYVMM_LAB_RESULTS", "."))
FOLDER = Path("/tmp/scsi")  # not on the shared file system, which has no discard
SMALL = Path("/tmp/small")  # a file system without room for its disk
MIB = 1 << 20
SECONDS = 300.0


def image(path: Path, mebibytes: int) -> str:
    """Make an empty disk image."""
    with path.open("wb") as file:
        file.truncate(mebibytes * MIB)
    return str(path)


def run(vmlinux: str, initrd: str, first_disc: str, second_disc: str) -> dict[str, Any]:
    """Go through the steps that the guest asks for."""
    data, broken = image(FOLDER / "data.img", 64), image(FOLDER / "broken.img", 16)
    vm = Vm(
        FOLDER,
        SECONDS,
        *("--kernel", vmlinux, "--initrd", initrd, "--cmdline", "console=ttyS0 quiet panic=-1"),
        *("--cpus", "3", "--memory", "512M"),
        *("--disk", data, "--disk", image(FOLDER / "limited.img", 16) + ",bandwidth=1M"),
        *("--disk", image(SMALL / "full.img", 32), "--disk", broken, "--disk", f"{first_disc},lun=9"),
    )
    steps: dict[str, Any] = {}

    def signal(lun: int) -> None:
        """Tell the guest that it is done: it waits for a disk there."""
        steps[f"signal{lun}"] = vm.ctl("add-disk", f"{image(FOLDER / f'signal{lun}.img', 1)},lun={lun}")

    if vm.until("ready", "flushes"):
        steps["flushes_before"] = vm.ctl("inspect", "synthetic/devices/scsi0/luns/0")
        signal(20)
    if vm.until("ready", "resize"):
        steps["flushes_after"] = vm.ctl("inspect", "synthetic/devices/scsi0/luns/0")
        steps["blocks"] = os.stat(data).st_blocks * 512
        steps["resize"] = vm.ctl("resize-disk", "0:0", "96M")
    if vm.until("ready", "eject-locked"):
        steps["eject_locked"] = vm.ctl("eject", "0:9")
        signal(21)
    if vm.until("ready", "insert"):
        steps["insert"] = vm.ctl("insert", "0:9", second_disc)
        signal(26)
    if vm.until("ready", "eject"):
        steps["eject"] = vm.ctl("eject", "0:9")
    if vm.until("ready", "truncate"):
        os.truncate(broken, 4 * MIB)
        signal(22)
    if vm.until("ready", "mend"):
        os.truncate(broken, 16 * MIB)
        signal(23)
    if vm.until("ready", "hot"):
        steps["hot"] = []
        for number in range(4):
            added = vm.ctl("add-disk", f"{image(FOLDER / f'hot{number}.img', 8)},lun=24")
            steps["hot"] += [added["exit"], vm.ctl("remove-disk", "0:24")["exit"]]
        signal(25)
    if vm.until("ready", "shutdown"):
        steps["shutdown"] = vm.ctl("shutdown")
    return {**vm.end(), "steps": steps}


def main() -> None:
    FOLDER.mkdir()
    SMALL.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "small", str(SMALL)], check=True)
    (RESULTS / "scsi.json").write_text(json.dumps(run(*sys.argv[1:])))


if __name__ == "__main__":
    main()
