"""Runs where KVM is ordinary, for idle.py: idle guests under pyvmm and QEMU in turn, and the CPU time of both."""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

#: What Linux uses of Hyper-V when it idles.
_HV_FLAGS = (
    "hv-relaxed,hv-vpindex,hv-runtime,hv-time,hv-frequencies,hv-reset,hv-crash,hv-synic,hv-stimer,hv-stimer-direct"
)
_PATIENCE_S = 120
_LOOK_S = 0.2
_BEGIN_S = 1.0
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Guest:
    """A guest that writes a line with "idle" to COM1, and one with "done" some while after `seconds`."""

    kernel: str
    seconds: float
    initrd: str = ""
    cmdline: str = ""
    enlightenments: str = "full"

    def commands(self, console: Path) -> dict[str, list[str]]:
        """The command of each VMM, with COM1 in the file `console`."""
        pyvmm = [sys.executable, "-m", "pyvmm", "run", "--memory", "256M", "--com1", f"file:{console}"]
        pyvmm += ["--kernel", self.kernel, "--cmdline", self.cmdline, "--enlightenments", self.enlightenments]
        qemu = ["qemu-system-x86_64", "-M", "pc", "-accel", "kvm", "-cpu", f"host,kvm=off,{_HV_FLAGS}", "-m", "256"]
        qemu += ["-nodefaults", "-no-reboot", "-display", "none", "-serial", f"file:{console}"]
        qemu += ["-kernel", self.kernel, "-append", self.cmdline]
        if self.initrd:
            pyvmm += ["--initrd", self.initrd]
            qemu += ["-initrd", self.initrd]
        return {"pyvmm": pyvmm, "QEMU": qemu}


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process with all its threads, the guest's included."""
    clock = ctypes.c_int()
    if _LIBC.clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise SystemExit(f"process {pid} has ended")
    return time.clock_gettime(clock.value)


def _wait_for(mark: str, console: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    text = ""
    while time.monotonic() < deadline and process.poll() is None:
        text = console.read_text(errors="replace") if console.exists() else ""
        if mark in text:
            return
        time.sleep(_LOOK_S)
    raise SystemExit(f"{' '.join(map(str, process.args))} never said {mark!r}:\n{text[-2000:]}")  # type: ignore[arg-type]


def _measure(command: list[str], console: Path, seconds: float) -> float:
    """Milliseconds of CPU time for each second in which the guest idles."""
    console.unlink(missing_ok=True)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for("idle", console, process)
        time.sleep(_BEGIN_S)
        cpu, start = _cpu_seconds(process.pid), time.monotonic()
        time.sleep(seconds)
        cost = (_cpu_seconds(process.pid) - cpu) / (time.monotonic() - start) * 1e3
        if "done" in console.read_text(errors="replace"):
            raise SystemExit(f"{command[0]}: the guest has not idled for {seconds} s")
        _wait_for("done", console, process)
    finally:
        process.terminate()
        process.wait()
    return cost


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("guests", type=Path, help="JSON: the fields of `Guest` by name")
    parser.add_argument("rounds", type=int)
    parser.add_argument("result", type=Path, help="JSON: lists of milliseconds a second by name and VMM")
    options = parser.parse_args()
    guests = {name: Guest(**fields) for name, fields in json.loads(options.guests.read_text()).items()}
    found: dict[str, dict[str, list[float]]] = {name: {"pyvmm": [], "QEMU": []} for name in guests}
    with tempfile.TemporaryDirectory() as folder:
        console = Path(folder) / "console"
        for _ in range(options.rounds):
            for name, guest in guests.items():
                for vmm, command in guest.commands(console).items():
                    cost = _measure(command, console, guest.seconds)
                    print(f"bench: idle: {name}, {vmm}: {cost:.1f} ms/s", file=sys.stderr, flush=True)
                    found[name][vmm].append(cost)
    options.result.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
