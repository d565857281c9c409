"""Runs inside the lab for test_ipxe.py: a network that iPXE boots a script from, with its own driver for VMBus NICs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

RESULTS = Path(os.environ.get("PYVMM_LAB_RESULTS", "."))
SECONDS = 120
MAC = "00:15:5d:00:00:01"
TAP = "ipxe0"
SEABIOS, IPXE = "/usr/share/seabios/bios-256k.bin", "/usr/lib/ipxe/ipxe.iso"
#: Ends with a reset, as iPXE has no command that turns a machine off.
SCRIPT = "#!ipxe\nimgfetch second\nreboot\n"


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def main() -> None:
    files = Path("/tmp/tftp")
    files.mkdir()
    (files / "boot.ipxe").write_text(SCRIPT)
    (files / "second").write_bytes(bytes(range(256)) * 100)
    run("ip", "tuntap", "add", TAP, "mode", "tap", "vnet_hdr")
    run("ip", "address", "add", "10.78.0.1/24", "dev", TAP)
    run("ip", "link", "set", TAP, "up")
    serve = ["dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", f"--interface={TAP}", "--bind-interfaces"]
    serve += ["--user=root", "--no-ping", "--dhcp-range=10.78.0.50,10.78.0.50", "--dhcp-leasefile=/tmp/leases"]
    serve += ["--enable-tftp", f"--tftp-root={files}", "--dhcp-boot=boot.ipxe"]
    server = subprocess.Popen(serve, stderr=subprocess.PIPE, text=True)
    report = Path("/tmp/report.json")
    command = [sys.executable, "-m", "pyvmm", "run", "--firmware", SEABIOS, "--cdrom", IPXE, "--memory", "256M"]
    command += ["--nic", f"tap={TAP},mac={MAC}", "--no-reboot", "--timeout", str(SECONDS), "--com1", "none"]
    command += ["--trace", "netvsp", "--report", str(report)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    server.terminate()
    _, log = server.communicate()
    found = {
        "exit": done.returncode,
        "stderr": done.stderr[-8000:],
        "server": log,
        "report": json.loads(report.read_text()) if report.exists() else None,
    }
    (RESULTS / "ipxe.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
