"""Runs the kit under pyvmm, and under QEMU with KVM's own Hyper-V code."""

from __future__ import annotations

from pathlib import Path

from guests.bare.run import Run, pyvmm, run

#: What the kit's exit makes of QEMU's isa-debug-exit, which pyvmm's --testdev is too, if no test is bad.
EXIT_GOOD = 1

#: What QEMU 7.2 and Debian's KVM have too, but for nested guests and a debugger: QEMU's names and the catalogue's.
SHARED = (
    *("relaxed", "vapic", "spinlocks", "vpindex", "runtime", "crash", "time", "synic", "stimer", "stimer-direct"),
    *("tlbflush", "ipi", "reset", "frequencies", "reenlightenment", "xmm-input"),
)
#: KVM does what CPUID says and no more.
HV_FLAGS = ",".join([*(f"hv-{name}" for name in SHARED), "hv-enforce-cpuid"]).replace("spinlocks", "spinlocks=0xfff")
SHARED_SPEC = ",".join(["none", "+base", *(f"+{name}" for name in SHARED)])


def _command_line(topics: str, *words: str) -> str:
    return " ".join([*words, *([f"kit={topics}"] if topics else [])])


def pyvmm_command(
    elf: Path, console: Path, *, cpus: int, topics: str = "", enlightenments: str = "full", timeout: float = 60.0
) -> list[str]:
    """The command that runs the kit under pyvmm for `timeout` seconds at most; all `topics` if none is named."""
    cmdline = _command_line(topics, "testdev")
    command = pyvmm(elf, console, cpus=cpus, memory="64M", cmdline=cmdline, enlightenments=enlightenments)
    return [*command, "--testdev", "--timeout", str(timeout)]


def qemu_command(elf: Path, console: Path, *, cpus: int, topics: str = "") -> list[str]:
    """The command that runs the kit under QEMU."""
    command = ["qemu-system-x86_64", "-M", "pc", "-accel", "kvm", "-m", "64", "-smp", str(cpus), "-kernel", str(elf)]
    command += ["-serial", f"file:{console}", "-display", "none", "-nic", "none", "-no-reboot"]
    command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    if Path("/sys/module/kvm_pvm").exists():
        # KVM without hardware virtualisation has no Hyper-V code, and refuses processors that QEMU does not spell out.
        return [*command, "-cpu", "qemu64", "-append", _command_line(topics, "qemu")]
    command += ["-cpu", f"host,{HV_FLAGS}", "-device", "hyperv-testdev"]
    return [*command, "-append", _command_line(topics, "testdev", "qemu")]


def run_command(command: list[str], console: Path) -> Run:
    """Run one of these commands."""
    return run("kit", command, console, EXIT_GOOD)
