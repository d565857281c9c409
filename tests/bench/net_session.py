"""Runs where KVM is ordinary, for net.py: TCP between stock guests and their host over TAPs, the guests in turn."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PATIENCE_S = 180
_LOOK_S = 0.2
_SLACK_S = 60
_CPUS = 1
_MIB = 1 << 20
#: What the host's iperf3 client adds to its command.
DIRECTIONS = {"guest to host": ("--reverse",), "host to guest": ()}


@dataclass(frozen=True)
class Guest:
    """A stock guest that sets up ``eth0`` as ``net=`` on its command line says and serves iperf3 there."""

    vmm: str
    kernel: str
    initrd: str
    cmdline: str
    nic: str = "synthetic"

    def command(self, tap: str, network: str, console: Path) -> list[str]:
        """The command of the VMM, with its NIC on `tap` and COM1 in the file `console`."""
        kernel = ["--kernel", self.kernel, "--initrd", self.initrd, "--cmdline", f"{self.cmdline} net={network}"]
        if self.vmm == "pyvmm":
            pyvmm = [sys.executable, "-m", "pyvmm", "run", "--memory", "256M", "--cpus", str(_CPUS)]
            return [*pyvmm, *kernel, "--com1", f"file:{console}", "--nic", f"tap={tap},type={self.nic}"]
        qemu = ["qemu-system-x86_64", "-M", "pc", "-accel", "kvm", "-cpu", "host", "-m", "256", "-smp", str(_CPUS)]
        qemu += ["-nodefaults", "-no-reboot", "-display", "none", "-serial", f"file:{console}"]
        qemu += ["-netdev", f"tap,id=net,ifname={tap},script=no,downscript=no,vhost=off"]
        qemu += ["-device", f"{self.nic},netdev=net,mac=00:15:5d:00:00:01"]
        return [*qemu, "-kernel", self.kernel, "-initrd", self.initrd, "-append", kernel[-1]]


class Running:
    """One guest that serves, on a TAP of its own."""

    def __init__(self, number: int, guest: Guest, folder: Path) -> None:
        self._tap, network = f"bench{number}", f"10.77.{number}"
        self.address = f"{network}.2"
        _run("ip", "tuntap", "add", self._tap, "mode", "tap", "vnet_hdr")
        _run("ip", "address", "add", f"{network}.1/24", "dev", self._tap)
        _run("ip", "link", "set", self._tap, "up")
        self._console, self._errors = folder / f"console{number}", folder / f"errors{number}"
        command = guest.command(self._tap, network, self._console)
        self._command = " ".join(command)
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=errors)

    def wait(self) -> None:
        """Return once the guest serves."""
        deadline = time.monotonic() + _PATIENCE_S
        text = ""
        while time.monotonic() < deadline and self._process.poll() is None:
            text = self._console.read_text(errors="replace") if self._console.exists() else ""
            if "RESULT ready" in text:
                return
            time.sleep(_LOOK_S)
        raise SystemExit(f"{self._command} never served:\n{text[-2000:]}{self._errors.read_text()}")

    def end(self) -> None:
        """Stop the guest; remove its TAP."""
        self._process.terminate()
        self._process.wait()
        subprocess.run(["ip", "link", "delete", self._tap], check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def transfer(address: str, seconds: float, *options: str) -> float:
    """Microseconds for each MiB that arrived of one TCP stream of `seconds`."""
    command = ["iperf3", "--client", address, "--time", f"{seconds:g}", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + _SLACK_S)
    told: dict[str, Any] = json.loads(done.stdout or "{}")
    if "error" in told or done.returncode:
        raise SystemExit(f"iperf3 with {address}: {told.get('error', done.stderr)}")
    arrived = told["end"]["sum_received"]
    return float(arrived["seconds"] * 1e6 * _MIB / arrived["bytes"])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("guests", type=Path, help="JSON: the fields of `Guest` by name")
    parser.add_argument("rounds", type=int)
    parser.add_argument("seconds", type=float, help="of each transfer")
    parser.add_argument("result", type=Path, help="JSON: lists of microseconds a MiB by direction and guest")
    options = parser.parse_args()
    guests = {name: Guest(**fields) for name, fields in json.loads(options.guests.read_text()).items()}
    found: dict[str, dict[str, list[float]]] = {way: {name: [] for name in guests} for way in DIRECTIONS}
    running: dict[str, Running] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, (name, guest) in enumerate(guests.items()):
                running[name] = Running(number, guest, Path(folder))
                running[name].wait()
            for round_number in range(options.rounds + 1):  # the first one warms up
                for way, extra in DIRECTIONS.items():
                    for name, vm in running.items():
                        cost = transfer(vm.address, options.seconds, *extra)
                        print(f"bench: net: {way}, {name}: {1e6 / cost:.1f} MiB/s", file=sys.stderr, flush=True)
                        if round_number:
                            found[way][name].append(cost)
        finally:
            for vm in running.values():
                vm.end()
    options.result.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
