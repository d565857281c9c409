"""What an idle guest costs: CPU time of the VMM's process for each second of the guest, against QEMU in the lab.

On an ordinary KVM the same runs without the lab. It takes minutes, so it is only measured when it is asked for.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from guests import lab, linux
from guests.packages import RecipeError
from pyvmm.core.kvm.system import kvm_kind
from tests.bench.figures import Figure, Samples
from tests.bench.idle_session import Guest
from tests.bench.native import BenchError

_SOURCE = Path(__file__).with_name("idle_guest.S")
_TICK_HZ = 250
_TICK_S, _LINUX_S = 5.0, 15.0
_SETTLE_S = 5.0  # what a guest goes on beyond what is measured
_LAB_S = 1800.0
_FLAGS = ("-m32", "-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x100000,-n,--build-id=none,--no-warn-rwx-segments")
_LINUX_SCRIPT = f"result idle 1\nsleep {_LINUX_S + _SETTLE_S:.0f}\nresult done 1\nsleep 1000\n"


def build_tick_guest(program: Path, *, messages: bool, ticks: int) -> Path:
    """Build the guest of idle_guest.S as `program`. Raises BenchError."""
    defines = [f"-DTICKS={ticks}", *(["-DMESSAGES"] if messages else [])]
    try:
        subprocess.run(["gcc", *_FLAGS, *defines, "-o", str(program), str(_SOURCE)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchError(f"cannot build {_SOURCE.name}: {error}") from error
    return program


def _guests(folder: Path) -> dict[str, Guest]:
    ticks = int(_TICK_HZ * (_TICK_S + _SETTLE_S))
    guests = {
        f"{kind} tick": Guest(str(build_tick_guest(folder / kind, messages=kind == "message", ticks=ticks)), _TICK_S)
        for kind in ("direct", "message")
    }
    images = linux.build(_LINUX_SCRIPT)
    for name, options, enlightenments in (
        ("Linux", "", "full,-vmbus"),  # QEMU has no VMBus devices either
        ("Linux, heartbeat", "", "full"),
        ("Linux, nohz=off", " nohz=off", "full,-vmbus"),
    ):
        cmdline = linux.COMMAND_LINE + options
        guests[name] = Guest(str(images.vmlinux), _LINUX_S, str(images.initrd), cmdline, enlightenments)
    return guests


def measure(folder: Path, rounds: int) -> list[Figure]:
    """Run all guests under both `rounds` times in turn. Raises BenchError."""
    results = folder / "idle"
    results.mkdir()
    asked, found = results / "guests.json", results / "found.json"
    try:
        guests = _guests(results)
        asked.write_text(json.dumps({name: asdict(guest) for name, guest in guests.items()}))
        command = [sys.executable, "-m", "tests.bench.idle_session", str(asked), str(rounds), str(found)]
        if kvm_kind() in ("kvm_amd", "kvm_intel"):
            status = subprocess.run(command, check=False).returncode
        else:
            write = sys.stderr.buffer.write
            status = lab.run(command, results=results, timeout=_LAB_S, on_stdout=write, on_stderr=write).returncode
    except (lab.LabError, RecipeError) as error:
        raise BenchError(str(error)) from error
    if status:
        raise BenchError(f"the session with idle guests ended with status {status}")
    taken = json.loads(found.read_text())
    figures = []
    for name in guests:
        ours, rival = (Samples(vmm, tuple(taken[name][vmm])) for vmm in ("pyvmm", "QEMU"))
        figures.append(Figure(f"idle: {name}", "ms/s", ours, rival, 1.0))
    return figures
