"""Runs inside the lab for test_lab.py: tells what the lab looks like from within."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01


def main() -> int:
    results = Path(os.environ["PYVMM_LAB_RESULTS"])
    with open("/dev/kvm", "rb+", buffering=0) as kvm:
        version = fcntl.ioctl(kvm, _KVM_GET_API_VERSION)
        os.close(fcntl.ioctl(kvm, _KVM_CREATE_VM))
    subprocess.run(["modprobe", "8021q"], check=True)
    report = {
        "kvm_api": version,
        "nested_paging": Path("/sys/module/kvm_amd/parameters/npt").read_text().strip(),
        "folder": os.getcwd(),
        "in_lab": os.environ.get("PYVMM_LAB"),
        "tun": Path("/dev/net/tun").exists(),
        "vlan": Path("/proc/net/vlan").exists(),
        "terminals": len(os.openpty()),
    }
    (results / "lab.json").write_text(json.dumps(report))
    Path("written-in-the-lab").write_text("x")
    sys.stdout.buffer.write(bytes(range(256)) * 4096)
    sys.stderr.write("to stderr\n")
    return 7


if __name__ == "__main__":
    sys.exit(main())
