"""TCP between a stock guest and its host over a TAP: netvsp against QEMU's virtio-net and our 21140, in the lab.

On an ordinary KVM the same runs without the lab. It takes minutes, so it is only measured when it is asked for.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from guests import linux
from guests.packages import RecipeError
from tests.bench.figures import Figure, Samples
from tests.bench.native import BenchError
from tests.bench.net_session import DIRECTIONS, Guest
from tests.bench.session import run_session

_TRANSFER_S = 5.0
_SCRIPT = """
for word in $(cat /proc/cmdline); do case $word in net=*) net=${word#net=} ;; esac; done
ip link set lo up
ip address add "$net.2/24" dev eth0
ip link set eth0 up
result ready "$(basename "$(readlink /sys/class/net/eth0/device/driver)")"
iperf3 --server
"""
#: Names of the guests, which are figures' rivals too.
_OURS, _VIRTIO, _LEGACY = "pyvmm", "QEMU", "21140"


def _guests() -> dict[str, Guest]:
    # The cloud kernel has no tulip, and all three guests are to be the same.
    images = linux.build(
        _SCRIPT, flavour="generic", extra_modules=("tulip", "virtio_pci", "virtio_net"), programs=("iperf3",)
    )
    kernel = (str(images.vmlinux), str(images.initrd), linux.COMMAND_LINE)
    return {
        _OURS: Guest("pyvmm", *kernel),
        _VIRTIO: Guest("QEMU", *kernel, nic="virtio-net-pci"),
        _LEGACY: Guest("pyvmm", *kernel, nic="legacy"),
    }


def measure(folder: Path, rounds: int) -> list[Figure]:
    """Run the three guests side by side and have each transfer in turn. Raises BenchError."""
    results = folder / "net"
    results.mkdir()
    try:
        asked = {name: asdict(guest) for name, guest in _guests().items()}
    except RecipeError as error:
        raise BenchError(str(error)) from error
    taken = run_session("tests.bench.net_session", asked, results, str(rounds), f"{_TRANSFER_S:g}")
    figures = []
    for way in DIRECTIONS:
        ours, virtio, legacy = (Samples(name, tuple(taken[way][name])) for name in (_OURS, _VIRTIO, _LEGACY))
        figures.append(Figure(f"TCP, {way}, a MiB", "us", ours, virtio, 1.0))
        figures.append(Figure(f"TCP, {way}, a MiB", "us", ours, legacy, 0.2))
    return figures
