"""Starts the lab's virtual machine and carries one command's output and exit status out of it."""

from __future__ import annotations

import os
import selectors
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from guests import initramfs, packages

_HERE = Path(__file__).parent
_BOOT_MODULES = (
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "qemu_fw_cfg",
    "tun",
    "loop",
    "kvm-amd",
)
"""Loaded before the job starts; the job's own modprobe, and the kernel's, find all the others."""

_COMMAND_LINE = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check random.trust_cpu=on"
_POWER_OFF_SECONDS = 10
_CONSOLE_LINES_SHOWN = 20
_LOOK_SECONDS = 5
_STANDSTILL_SECONDS = 60


class LabError(Exception):
    """The lab could not be started, or died; the message is one line, `console` the end of its kernel's messages."""

    def __init__(self, message: str, console: str = "") -> None:
        super().__init__(message)
        self.console = console


class LabTimeout(LabError):
    """The command did not end in time."""


class LabStandstill(LabError):
    """QEMU's processor sleeps and no interrupt wakes it any more: a fault of its SVM emulation, see docs/lab.md."""


@dataclass(frozen=True)
class Result:
    """How a command in the lab ended."""

    returncode: int
    boot_seconds: float
    """From QEMU's start to the command's."""

    seconds: float
    """From QEMU's start to the command's end."""


def run(
    command: Sequence[str],
    *,
    cpus: int = 1,
    memory_mib: int = 4096,
    results: Path | None = None,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    on_stdout: Callable[[bytes], object],
    on_stderr: Callable[[bytes], object],
) -> Result:
    """Run `command` in a fresh lab, in the current folder, with its output handed over as it comes.

    `results` (made if need be) is the one place where the command can leave files: a folder found inside at the same
    path, also named by ``PYVMM_LAB_RESULTS``. `environment` is the command's, by default this process's;
    ``PYVMM_LAB=1`` is added. `timeout` counts in seconds from QEMU's start.

    Raises LabError, LabTimeout, packages.RecipeError.
    """
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise LabError("qemu-system-x86_64 is missing; `make setup` installs it")
    kernel = packages.kernel("amd64")
    with tempfile.TemporaryDirectory(prefix="pyvmm-lab-") as scratch_name:
        scratch = Path(scratch_name)
        results = (results or scratch / "shared").absolute()
        results.mkdir(parents=True, exist_ok=True)
        settings = {
            "job": _job(command, dict(os.environ if environment is None else environment), results),
            "results": str(results),
            "modules": str(kernel.modules),
        }
        for name, text in settings.items():
            (scratch / name).write_text(text)
        console = scratch / "console"
        machine = _Machine(
            [
                *("setpriv", "--pdeathsig", "KILL", qemu, "-nodefaults", "-no-user-config", "-no-reboot"),
                # QEMU's SVM knows no XSETBV intercept, so a guest's XCR0 would be the lab's own.
                *("-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,-xsave"),
                *("-m", str(memory_mib), "-smp", str(cpus), "-display", "none", "-nic", "none"),
                *("-kernel", str(initramfs.unpacked_kernel(kernel.image)), "-initrd", str(_initrd(kernel))),
                *("-append", _COMMAND_LINE, "-serial", "chardev:console"),
                *("-chardev", f"file,id=console,path={console},append=on"),
                *_share("host", Path("/"), "readonly=on"),
                *_share("results", results),
                *(word for name in settings for word in ("-fw_cfg", f"opt/org.pyvmm/{name},file={scratch / name}")),
            ],
            console,
        )
        return machine.run(on_stdout, on_stderr, timeout)


class _Machine:
    """One QEMU process with three virtio ports: the command's stdout, its stderr, and the session's reports."""

    def __init__(self, command: list[str], console: Path) -> None:
        self._console = console
        self._readers: list[int] = []
        writers = []
        for _ in range(3):
            reader, writer = os.pipe()
            self._readers.append(reader)
            writers.append(writer)
        ports = ["-device", "virtio-serial-pci"]
        for number, fd in enumerate(writers, 1):
            ports += [
                "-add-fd",
                f"fd={fd},set={number}",
                "-chardev",
                f"file,id=port{number},path=/dev/fdset/{number},append=on",
            ]
            ports += ["-device", f"virtserialport,chardev=port{number},nr={number}"]
        self._started = time.monotonic()
        try:
            with console.open("ab") as log:
                self._process = subprocess.Popen(
                    [*command, *ports], stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=writers
                )
        except FileNotFoundError as error:
            raise LabError(f"{error.filename} is missing; `make setup` installs it") from None
        finally:
            for fd in writers:
                os.close(fd)

    def run(
        self, on_stdout: Callable[[bytes], object], on_stderr: Callable[[bytes], object], timeout: float | None
    ) -> Result:
        """Pass output on until the machine is off; return what its session reported."""
        reports = bytearray()
        running = ended = None
        deadline = None if timeout is None else self._started + timeout
        moved, ticks = self._started, 0
        try:
            with selectors.DefaultSelector() as selector:
                for reader, sink in zip(self._readers, (on_stdout, on_stderr, reports.extend), strict=True):
                    selector.register(reader, selectors.EVENT_READ, sink)
                while selector.get_map():
                    left = _LOOK_SECONDS if deadline is None else deadline - time.monotonic()
                    ready = selector.select(min(max(0.0, left), _LOOK_SECONDS))
                    now = time.monotonic()
                    if ready or ticks != (ticks := self._cpu_ticks()):
                        moved = now
                    if now - moved >= _STANDSTILL_SECONDS:
                        raise LabStandstill("the lab's processor stands still", self._console_end())
                    if not ready and deadline is not None and now >= deadline:
                        break
                    for key, _ in ready:
                        data = os.read(key.fd, 65536)
                        if not data:
                            selector.unregister(key.fd)
                        key.data(data)
                    if running is None and reports:
                        running = time.monotonic()
                    if ended is None and reports.count(b"\n") == 2:
                        ended = time.monotonic()
                        deadline = ended + _POWER_OFF_SECONDS
        finally:
            self._end()
        if running is not None and ended is not None:
            return Result(int(reports.split()[2]), running - self._started, ended - self._started)
        place = "the command" if running else "the lab's own boot"
        if deadline is not None and time.monotonic() >= deadline:
            raise LabTimeout(f"the lab's time of {timeout:g} s ran out during {place}", self._console_end())
        raise LabError(f"the lab went down during {place}", self._console_end())

    def _cpu_ticks(self) -> int:
        """Processor time that QEMU has used; even an idle lab uses some every second."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        utime, stime = stat.rpartition(")")[2].split()[11:13]
        return int(utime) + int(stime)

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            os.close(reader)

    def _console_end(self) -> str:
        lines = self._console.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_CONSOLE_LINES_SHOWN:])


def _share(tag: str, folder: Path, *options: str) -> list[str]:
    # A comma ends an option's value unless doubled.
    path = str(folder).replace(",", ",,")
    words = ["local", f"path={path}", f"mount_tag={tag}", "security_model=none", "multidevs=remap", *options]
    return ["-virtfs", ",".join(words)]


def _initrd(kernel: packages.KernelPackage) -> Path:
    """Return the lab's initramfs, made anew when the kernel or this folder's scripts changed."""
    archive = initramfs.Archive()
    initramfs.add_busybox(archive)
    initramfs.add_modules(archive, kernel.modules, _BOOT_MODULES)
    for folder in ("proc", "sys", "dev"):
        archive.folder(folder)
    archive.add("init", _HERE / "init.sh")
    archive.add("session.sh", _HERE / "session.sh")
    return initramfs.stored(archive, "lab")


def _job(command: Sequence[str], environment: dict[str, str], results: Path) -> str:
    environment |= {"PYVMM_LAB": "1", "PYVMM_LAB_RESULTS": str(results)}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items() if name.isidentifier()]
    return "\n".join([*lines, f"cd {shlex.quote(os.getcwd())} || exit 125", f"exec {shlex.join(command)}", ""])
