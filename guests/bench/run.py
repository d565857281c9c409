"""Runs the benchmark guest under pyvmm and under QEMU, and reads what it measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guests.bare.report import Report
from guests.bare.run import pyvmm, run

BLOCK = 4096
#: What the guest's exit makes of QEMU's isa-debug-exit, which pyvmm's --testdev is too, if all data was right.
_EXIT_GOOD = 1
_TIMEOUT_S = 60.0
_VALUE = re.compile(r"(\d+) (?:requests|frames) (\d+) us (\d+) kicks")


class MeasureError(Exception):
    """A run gave no measurements, or found wrong data; the message is one line."""


@dataclass(frozen=True)
class Workload:
    """What the guest does for some time, with `size` bytes each time: `operation` is read, write, randread or randwrite
    of a disk, send or receive of a NIC."""

    operation: str
    size: int
    depth: int
    milliseconds: int

    @property
    def word(self) -> str:
        """Its word on the guest's command line."""
        return f"{self.operation}:{self.size}:{self.depth}:{self.milliseconds}"

    @property
    def name(self) -> str:
        """Its name in the guest's report, without the driver's."""
        return f"{self.operation}_{self.size}_{self.depth}"


@dataclass(frozen=True)
class Measured:
    """What the guest counted in one test: requests, or frames. `kicks` are the exits by which it told the host."""

    requests: int
    microseconds: int
    kicks: int

    @property
    def each(self) -> float:
        """Microseconds for each request."""
        return self.microseconds / self.requests


def write_image(path: Path, size: int) -> None:
    """Make a raw image of `size` bytes as the guest wants it: each block full of its own number."""
    # Large writes, for the page cache keeps in large pieces what comes in large pieces, and reads those faster.
    with path.open("wb", buffering=1 << 20) as file:
        for block in range(size // BLOCK):
            file.write(block.to_bytes(8, "little") * (BLOCK // 8))


def command_line(subject: str, tests: Sequence[Workload]) -> str:
    """What the guest does: ``disk=DRIVER`` or ``nic=DRIVER``, and tests."""
    return " ".join([subject, *(test.word for test in tests)])


def pyvmm_command(elf: Path, console: Path, image: Path, driver: str, tests: Sequence[Workload]) -> list[str]:
    """The command that measures a disk under pyvmm, by storvsc, ide-pio or ide-dma, where the driver looks for it."""
    disk = f"{image},bus=ide" if driver.startswith("ide") else str(image)
    return [*_pyvmm(elf, console, command_line(f"disk={driver}", tests)), "--disk", disk]


def pyvmm_nic_command(elf: Path, console: Path, tap: str, tests: Sequence[Workload]) -> list[str]:
    """The command that measures netvsc under pyvmm on the TAP interface named."""
    return [*_pyvmm(elf, console, command_line("nic=netvsc", tests)), "--nic", f"tap={tap}"]


def _pyvmm(elf: Path, console: Path, cmdline: str) -> list[str]:
    command = pyvmm(elf, console, cpus=1, memory="64M", cmdline=cmdline, enlightenments="full")
    return [*command, "--testdev", "--timeout", str(_TIMEOUT_S)]


def qemu_command(elf: Path, console: Path, image: Path, driver: str, tests: Sequence[Workload]) -> list[str]:
    """The command that measures virtio-blk under QEMU, with what makes that fastest."""
    return [
        *_qemu(elf, console, command_line(f"disk={driver}", tests)),
        *("-drive", f"if=none,id=disk,format=raw,file={image},cache=writeback,aio=io_uring"),
        *("-object", "iothread,id=io", "-device", "virtio-blk-pci,drive=disk,iothread=io"),
    ]


def qemu_nic_command(elf: Path, console: Path, tap: str, tests: Sequence[Workload]) -> list[str]:
    """The command that measures virtio-net under QEMU on the TAP interface named, without the kernel's vhost."""
    return [
        *_qemu(elf, console, command_line("nic=virtio-net", tests)),
        *("-netdev", f"tap,id=net,ifname={tap},script=no,downscript=no,vhost=off"),
        *("-device", "virtio-net-pci,netdev=net,romfile="),
    ]


def _qemu(elf: Path, console: Path, cmdline: str) -> list[str]:
    cpu = "qemu64" if Path("/sys/module/kvm_pvm").exists() else "host"
    return [
        *("timeout", str(_TIMEOUT_S), "qemu-system-x86_64", "-M", "pc", "-accel", "kvm", "-cpu", cpu, "-m", "64"),
        *("-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{console}", "-kernel", str(elf)),
        *("-append", cmdline, "-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
    ]


def measurements(report: Report) -> dict[str, Measured]:
    """What the guest measured, by the tests' names. Raises MeasureError unless all went well."""
    problem = report.problem
    if problem is not None:
        wrong = [f"{finding.name}: {finding.note}" for finding in report.failed]
        raise MeasureError("; ".join([problem, *wrong]))
    found = {}
    for finding in report.findings:
        match = _VALUE.fullmatch(finding.value)
        if match is None or match[1] == "0":
            raise MeasureError(f"{finding.name}: no measurement in {finding.value!r}")
        found[finding.name] = Measured(*map(int, match.groups()))
    return found


def measure(command: Sequence[str], console: Path) -> dict[str, Measured]:
    """Run one of these commands. Raises MeasureError."""
    done = run("bench", command, console, _EXIT_GOOD)
    if done.problem is not None and done.report.problem is None:
        raise MeasureError(f"{done.problem}: {done.stderr.strip()}")
    try:
        return measurements(done.report)
    except MeasureError as error:
        raise MeasureError(f"{error}; {done.stderr.strip() or 'nothing on stderr'}") from None
