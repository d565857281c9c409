"""Runs inside the lab for test_tulip.py: a guest with two 21140s, one of them on a TAP with DHCP, HTTP and a VLAN; then
iPXE, which SeaBIOS boots from a CD, on the same network."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

from tests.lab.guest_vm import Vm

RESULTS = Path(os.environ.get("PYVMM_LAB_RESULTS", "."))
PLACE = Path("/tmp/tulip")
GUEST_SECONDS = 140.0
TAP, NETWORK = "tulip0", "10.77.0"
DATA_BYTES = 2 << 20
IPXE, SEABIOS = "/usr/lib/ipxe/ipxe.iso", "/usr/share/seabios/bios.bin"
IPXE_MAC, IPXE_SECONDS = "00:15:5d:00:00:03", 100.0


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def make_network() -> None:
    """A TAP with an address, a VLAN on it, and DHCP."""
    run("modprobe", "8021q")
    run("ip", "tuntap", "add", TAP, "mode", "tap", "vnet_hdr")
    run("ip", "address", "add", f"{NETWORK}.1/24", "dev", TAP)
    run("ip", "link", "set", TAP, "up")
    run("ip", "link", "add", "link", TAP, "name", "tulip0.10", "type", "vlan", "id", "10")
    run("ip", "address", "add", "10.77.10.1/24", "dev", "tulip0.10")
    run("ip", "link", "set", "tulip0.10", "up")
    dnsmasq = ["dnsmasq", "--port=0", f"--interface={TAP}", "--bind-interfaces", "--user=root", "--conf-file=/dev/null"]
    dnsmasq.append("--no-ping")  # which would hold up the guest's other requests
    run(
        *dnsmasq,
        f"--dhcp-range={NETWORK}.50,{NETWORK}.51",
        f"--dhcp-boot=http://{NETWORK}.1:8000/script",
        "--dhcp-leasefile=/tmp/leases",
        "--pid-file=/tmp/dnsmasq",
    )


class Sink:
    """Takes one upload; `sum` is its SHA-256 once it has ended."""

    def __init__(self) -> None:
        self.sum = ""
        self._server = socket.create_server((f"{NETWORK}.1", 8001))
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        connection, _ = self._server.accept()
        digest = hashlib.sha256()
        with connection:
            while data := connection.recv(1 << 16):
                digest.update(data)
        self.sum = digest.hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves the files in PLACE; `asked` are the paths that were asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fetched = threading.Event()
        super().__init__((f"{NETWORK}.1", 8000), partial(Quiet, directory=str(PLACE)))
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Quiet(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        super().do_GET()
        if self.path.startswith("/fetched"):
            self.server.fetched.set()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def boot_ipxe(server: Server) -> dict[str, Any]:
    """Have iPXE get an address and a script, which fetches a file named after the adapter's address."""
    (PLACE / "script").write_text(f"#!ipxe\nimgfetch http://{NETWORK}.1:8000/fetched-by-${{net0/mac:hexhyp}}\n")
    folder = PLACE / "ipxe"
    folder.mkdir()
    vm = Vm(
        folder,
        IPXE_SECONDS,
        *("--firmware", SEABIOS, "--cdrom", IPXE, "--memory", "128M", "--enlightenments", "none"),
        *("--nic", f"tap={TAP},type=legacy,mac={IPXE_MAC}"),
    )
    server.fetched.wait(IPXE_SECONDS)
    vm.ctl("poweroff")
    return {**vm.end(), "asked": server.asked}


def main() -> None:
    vmlinux, initrd = sys.argv[1:]
    PLACE.mkdir()
    data = os.urandom(DATA_BYTES)
    (PLACE / "data").write_bytes(data)
    make_network()
    server = Server()
    sink = Sink()
    vm = Vm(
        PLACE,
        GUEST_SECONDS,
        *("--kernel", vmlinux, "--initrd", initrd, "--memory", "256M", "--cpus", "2"),
        *("--cmdline", "console=ttyS0 quiet panic=-1"),
        *("--nic", f"tap={TAP},type=legacy,mac=00:15:5d:00:00:01"),
        *("--nic", "none,type=legacy,mac=00:15:5d:00:00:02"),
    )
    steps = []
    if vm.until("ready", "unplug"):
        steps.append(vm.ctl("nic", "set", "0", "link=down"))
        vm.until("unplugged")
        steps.append(vm.ctl("nic", "set", "0", "link=up"))
        vm.until("end")
    told = vm.end()
    told["steps"] = steps
    told["sums"] = {"download": hashlib.sha256(data).hexdigest(), "uploaded": sink.sum}
    (RESULTS / "tulip.json").write_text(json.dumps(told))
    (RESULTS / "ipxe.json").write_text(json.dumps(boot_ipxe(server)))


if __name__ == "__main__":
    main()
