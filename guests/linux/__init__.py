"""A stock Linux guest: Debian's own kernel, its own Hyper-V drivers, and an initramfs that runs one script.

The script runs as root under busybox's shell with its output on the console; when it ends the guest powers off. It
reports with ``result KEY VALUE``, which prints a line that `results` finds in the console's output.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from guests import initramfs, packages

COMMAND_LINE = "console=ttyS0 quiet panic=-1"
"""For these guests: a slow serial port isn't burdened with messages (dmesg has them all), and a panic resets."""

_HYPERV_MODULES = (
    *("hv_vmbus", "hv_storvsc", "sd_mod", "hv_utils", "hv_balloon", "hv_netvsc", "hv_sock"),
    *("hyperv-keyboard", "hid-hyperv"),
)
_FLAVOURS = {
    "cloud": ("cloud-amd64", (*_HYPERV_MODULES, "hyperv_fb", "ext4")),
    "generic": ("amd64", (*_HYPERV_MODULES, "hyperv_drm", "crc32c_generic", "ext4")),
}
_HERE = Path(__file__).parent

ROOT_LABEL = "root"
"""What `write_root` calls its file system."""

# The kernel calls it for an orderly shutdown (kernel.poweroff_cmd), so the shutdown integration service ends here too.
_POWER_OFF = b"#!/bin/sh\nexec busybox poweroff -f\n"
_REBOOT = b"#!/bin/sh\nexec busybox reboot -f\n"
# What root= switches to: everything is mounted and loaded by then.
_ROOT_INIT = b"#!/bin/sh\nsh /script\nsync\nmount -o remount,ro /\nexec /sbin/poweroff\n"
_RESULT = b'#!/bin/sh\nkey=$1\nshift\necho "RESULT $key=$*"\n'


@dataclass(frozen=True)
class Images:
    """The files of a bootable guest."""

    kernel: Path
    """Debian's bzImage."""

    vmlinux: Path
    """The ELF kernel within it, unpacked: the same guest, sooner up where the processor is emulated."""

    initrd: Path


def build(
    script: str | Path = "",
    *,
    flavour: str = "cloud",
    files: Mapping[str, Path | bytes] | None = None,
    extra_modules: Sequence[str] = (),
    programs: Sequence[str] = (),
) -> Images:
    """Return a guest that runs `script` (its text or its file; when empty, an interactive shell).

    `flavour` is ``cloud`` or ``generic``. `files` are added to the initramfs under their names, executable.
    `extra_modules` are loaded after the Hyper-V drivers. `programs` are the host's, with their libraries, and
    stand in for busybox's. Raises packages.RecipeError; KeyError for an unknown flavour.
    """
    meta_package, modules = _FLAVOURS[flavour]
    kernel = packages.kernel(meta_package)
    archive = _userland(programs)
    initramfs.add_modules(archive, kernel.modules, [*modules, *extra_modules])
    archive.add("init", _HERE / "init.sh")
    text = script.read_text() if isinstance(script, Path) else script
    if text:
        archive.add("script", text.encode())
    for name, content in (files or {}).items():
        archive.add(name.lstrip("/"), content)
    return Images(kernel.image, initramfs.unpacked_kernel(kernel.image), initramfs.stored(archive, f"linux-{flavour}"))


def write_root(image: Path, script: str | Path, mebibytes: int, programs: Sequence[str] = ()) -> None:
    """Write a raw ext4 image whose system runs `script` as PID 1's only child and then powers off.

    Boot it with `build`'s kernel and initramfs and ``root=LABEL=root`` on the command line; the tools are the same.
    Raises packages.RecipeError.
    """
    archive = _userland(programs)
    archive.add("script", (script.read_text() if isinstance(script, Path) else script).encode())
    archive.add("sbin/init", _ROOT_INIT)
    for folder in ("root", "run", "tmp", "mnt"):
        archive.folder(folder)
    with tempfile.TemporaryDirectory() as scratch:
        busybox = str(initramfs.BUSYBOX)
        subprocess.run([busybox, "cpio", "-id"], input=archive.to_bytes(), cwd=scratch, check=True, capture_output=True)
        mke2fs = shutil.which("mke2fs") or "/sbin/mke2fs"
        subprocess.run(
            [mke2fs, "-q", "-F", "-t", "ext4", "-L", ROOT_LABEL, "-d", scratch, str(image), f"{mebibytes}M"],
            check=True,
            capture_output=True,
        )


def _userland(programs: Sequence[str]) -> initramfs.Archive:
    archive = initramfs.Archive()
    initramfs.add_busybox(archive, without=("mke2fs", "poweroff", "reboot", *programs))
    initramfs.add_programs(archive, {"sbin/mke2fs": "mke2fs", **{f"bin/{program}": program for program in programs}})
    archive.link("sbin/mkfs.ext4", "mke2fs")
    archive.add("etc/mke2fs.conf", Path("/etc/mke2fs.conf"), 0o644)
    for folder in ("proc", "sys", "dev"):
        archive.folder(folder)
    archive.add("sbin/poweroff", _POWER_OFF)
    archive.add("sbin/reboot", _REBOOT)
    archive.add("bin/result", _RESULT)
    return archive


def results(console: str) -> dict[str, str]:
    """Return what the guest's script reported with ``result``, the last value for each key."""
    return dict(re.findall(r"^RESULT ([^=\s]+)=([^\r\n]*)", console, re.MULTILINE))
