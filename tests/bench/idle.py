"""What an idle guest costs: CPU time of the VMM's process for each second of the guest, against QEMU in the lab.

On an ordinary KVM the same runs without the lab. It takes minutes, so it is only measured when it is asked for.
"""

from __future__ import annotations

import subprocess
from dataclasses import asdict
from pathlib import Path

from guests import linux
from guests.packages import RecipeError
from tests.bench.figures import Figure, Samples
from tests.bench.idle_session import Guest
from tests.bench.native import BenchError
from tests.bench.session import run_session

_SOURCE = Path(__file__).with_name("idle_guest.S")
_TICK_HZ = 250
_TICK_S, _LINUX_S = 5.0, 15.0
_SETTLE_S = 5.0  # what a guest goes on beyond what is measured
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
    try:
        guests = _guests(results)
    except RecipeError as error:
        raise BenchError(str(error)) from error
    asked = {name: asdict(guest) for name, guest in guests.items()}
    taken = run_session("tests.bench.idle_session", asked, results, str(rounds))
    figures = []
    for name in guests:
        ours, rival = (Samples(vmm, tuple(taken[name][vmm])) for vmm in ("pyvmm", "QEMU"))
        figures.append(Figure(f"idle: {name}", "ms/s", ours, rival, 1.0))
    return figures
