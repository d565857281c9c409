"""Runs the kit under pyvmm, and under QEMU with KVM's own Hyper-V code."""

from __future__ import annotations

from pathlib import Path

from guests.bare.run import Run, pyvmm, run

#: What the kit's exit makes of QEMU's isa-debug-exit, which pyvmm's --testdev is too, if no test is bad.
EXIT_GOOD = 1

#: All of QEMU 7.2 but those for nested guests and for a debugger; KVM does what CPUID says and no more.
HV_FLAGS = (
    "hv-relaxed,hv-vapic,hv-spinlocks=0xfff,hv-vpindex,hv-runtime,hv-crash,hv-time,hv-synic,hv-stimer,hv-stimer-direct,"
    "hv-tlbflush,hv-tlbflush-ext,hv-ipi,hv-reset,hv-frequencies,hv-reenlightenment,hv-xmm-input,hv-enforce-cpuid"
)


def _command_line(topics: str, testdev: bool) -> str:
    return " ".join([*(["testdev"] if testdev else []), *([f"kit={topics}"] if topics else [])])


def run_pyvmm(
    elf: Path,
    work: Path,
    *,
    cpus: int,
    topics: str = "",
    enlightenments: str = "full",
    timeout: float = 60.0,
) -> Run:
    """Run the kit under pyvmm, with ``com1.txt`` made in `work`. `timeout` is in seconds; `topics` are all if empty."""
    console = work / "com1.txt"
    cmdline = _command_line(topics, testdev=True)
    command = pyvmm(elf, console, cpus=cpus, memory="64M", cmdline=cmdline, enlightenments=enlightenments)
    return run("kit", [*command, "--testdev", "--timeout", str(timeout)], console, EXIT_GOOD)


def qemu_command(elf: Path, console: Path, *, cpus: int, topics: str = "") -> list[str]:
    """The command that runs the kit under QEMU with COM1 in the file `console`."""
    # KVM without hardware virtualisation has no Hyper-V code, and refuses processors that QEMU does not spell out.
    plain = Path("/sys/module/kvm_pvm").exists()
    cpu = "qemu64" if plain else f"host,{HV_FLAGS}"
    command = ["qemu-system-x86_64", "-M", "pc", "-accel", "kvm", "-cpu", cpu, "-m", "64", "-smp", str(cpus)]
    command += ["-kernel", str(elf), "-append", _command_line(topics, testdev=not plain), "-serial", f"file:{console}"]
    command += ["-display", "none", "-nic", "none", "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    return command if plain else [*command, "-device", "hyperv-testdev"]


def run_qemu(elf: Path, work: Path, *, cpus: int, topics: str = "") -> Run:
    """Run the kit under QEMU, with ``com1.txt`` made in `work`."""
    console = work / "com1.txt"
    return run("kit", qemu_command(elf, console, cpus=cpus, topics=topics), console, EXIT_GOOD)
