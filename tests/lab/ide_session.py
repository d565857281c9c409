"""Runs inside the lab for test_ide.py: one IDE disk, by each driver that a stock guest has for it in turn."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.lab.guest_vm import Vm

RESULTS = Path(os.environ.get("PYVMM_LAB_RESULTS", "."))
PLACE = Path("/tmp/ide")  # not on the shared file system, which has no discard
MIB = 1 << 20
GUEST_SECONDS = 200.0

#: What is given to pyvmm, and what to the kernel.
WAYS = {
    "ata": (["--enlightenments", "full,-vmbus"], ""),
    "pio": (["--enlightenments", "full,-vmbus"], " libata.dma=0"),
    "vmbus": ([], ""),
}


def boot(vmlinux: str, initrd: str, way: str) -> dict[str, Any]:
    """Run the guest to its end, with other discs in the drive each time."""
    options, words = WAYS[way]
    vm = Vm(
        PLACE,
        GUEST_SECONDS,
        *("--kernel", vmlinux, "--initrd", initrd, "--memory", "512M", "--cpus", "2"),
        *("--cmdline", f"console=ttyS0 quiet panic=-1 WAY={way}{words}"),
        *("--disk", f"{PLACE}/disk.img,bus=ide", "--cdrom", f"{PLACE}/first.iso", *options),
    )
    steps: dict[str, Any] = {}
    if vm.until("ready", "change"):
        for _ in range(5):  # the guest may have the drive locked
            steps["insert"] = vm.ctl("insert", "ide1:0", f"{PLACE}/second.iso")
            if steps["insert"]["exit"] == 0:
                break
        vm.until("end")
    return {**vm.end(), "steps": steps}


def main() -> None:
    vmlinux, initrd, first, second = sys.argv[1:]
    PLACE.mkdir()
    with (PLACE / "disk.img").open("wb") as file:
        file.truncate(32 * MIB)
    for name, source in (("first", first), ("second", second)):
        (PLACE / f"{name}.iso").write_bytes(Path(source).read_bytes())
    for way in WAYS:
        result = boot(vmlinux, initrd, way)
        result["stored"] = (PLACE / "disk.img").stat().st_blocks * 512
        (RESULTS / f"{way}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
