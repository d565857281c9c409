"""Kernels and initramfs images put together on the host, without root and without unpacking anything in the guest."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import struct
import subprocess
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from guests.packages import RecipeError, cache_dir
from pyvmm.boot import payload

BUSYBOX = Path("/bin/busybox")
_MAX_KERNEL_BYTES = 256 << 20


class Archive:
    """An uncompressed newc cpio archive (Linux: Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._names: set[str] = set()

    def add(self, name: str, content: Path | bytes, mode: int = 0o755) -> None:
        """Add a regular file as `name` (relative to the root), with the folders above it."""
        data = content if isinstance(content, bytes) else content.read_bytes()
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def folder(self, name: str) -> None:
        """Add a folder, with those above it."""
        self._entry(name, stat.S_IFDIR | 0o755, b"")

    def character_device(self, name: str, major: int, minor: int) -> None:
        """Add a character device node."""
        self._entry(name, stat.S_IFCHR | 0o600, b"", (major, minor))

    def to_bytes(self) -> bytes:
        """Return the archive with its trailer."""
        return b"".join([*self._chunks, self._record("TRAILER!!!", 0, b"", (0, 0))])

    def _entry(self, name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        if name in self._names:
            if stat.S_ISDIR(mode):
                return
            raise RecipeError(f"initramfs: {name} is given twice")
        parent = os.path.dirname(name)
        if parent:
            self.folder(parent)
        self._names.add(name)
        self._chunks.append(self._record(name, mode, data, device))

    def _record(self, name: str, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
        path = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (len(self._chunks) + 1, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + path
        return header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4)


def add_busybox(archive: Archive, without: Collection[str] = ()) -> None:
    """Add the host's static busybox as /bin/busybox, with links for all its applets but those in `without`."""
    if not BUSYBOX.exists():
        raise RecipeError("busybox-static is missing; `make setup` installs it")
    archive.add("bin/busybox", BUSYBOX)
    listing = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True)
    for name in listing.stdout.split():
        if name != "busybox" and name not in without:
            archive.link(f"bin/{name}", "busybox")


def add_programs(archive: Archive, programs: Mapping[str, str]) -> None:
    """Add the host's programs by their names in the archive, and the shared libraries they need at their own paths."""
    libraries: set[str] = set()
    for name, program in programs.items():
        path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if path is None:
            raise RecipeError(f"{program} is missing; `make setup` installs it")
        archive.add(name, Path(path))
        listing = subprocess.run(["ldd", path], capture_output=True, text=True, check=False).stdout
        libraries.update(re.findall(r"(/\S+) \(0x", listing))
    for library in sorted(libraries):
        archive.add(library.lstrip("/"), Path(library).resolve())


def modules_in_order(modules: Path, wanted: Iterable[str]) -> list[Path]:
    """Return the module files that `wanted` need, each after those it depends on.

    `modules` holds ``modules.dep`` and ``modules.builtin``. Built-in names need no file. Raises RecipeError for a name
    that this kernel doesn't have.
    """
    by_name: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, dependencies = line.partition(":")
        by_name[_module_name(path)] = [path, *dependencies.split()]
    built_in = {_module_name(line) for line in (modules / "modules.builtin").read_text().splitlines()}
    ordered: dict[str, None] = {}
    for name in wanted:
        if name.replace("-", "_") in built_in:
            continue
        if name.replace("-", "_") not in by_name:
            raise RecipeError(f"kernel {modules.name} has no module {name}")
        # modules.dep lists the nearest dependency first.
        ordered.update(dict.fromkeys(reversed(by_name[name.replace("-", "_")])))
    return [modules / path for path in ordered]


def add_modules(archive: Archive, modules: Path, wanted: Iterable[str]) -> None:
    """Add what `wanted` need under /modules, plus /modules/order: one file name a line, to be loaded in that order."""
    files = modules_in_order(modules, wanted)
    for file in files:
        archive.add(f"modules/{file.name}", file, 0o644)
    archive.add("modules/order", "".join(f"{file.name}\n" for file in files).encode(), 0o644)


def unpacked_kernel(image: Path) -> Path:
    """Return the ELF kernel within the bzImage `image`, unpacked beside it once.

    Booting it saves a guest the decompression, which takes an emulated processor seconds.
    """
    target = image.with_name(image.name.replace("vmlinuz", "vmlinux"))
    if not target.exists():
        write_atomically(target, _payload(image))
    return target


def stored(archive: Archive, name: str) -> Path:
    """Return a file in the cache with the archive's bytes, named after `name` and their hash."""
    data = archive.to_bytes()
    digest = hashlib.sha256(data).hexdigest()[:16]
    target = cache_dir() / "initramfs" / f"{name}-{digest}.cpio"
    if not target.exists():
        write_atomically(target, data)
    return target


def write_atomically(target: Path, data: bytes) -> None:
    """Write a file that others may be reading or writing at the same time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    scratch.write_bytes(data)
    scratch.rename(target)


def _payload(image: Path) -> bytes:
    # Linux: Documentation/arch/x86/boot.rst, setup_sects, payload_offset and payload_length.
    data = image.read_bytes()
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (data[0x1F1] + 1) * 512 + offset
    return payload.unpack(str(image), data[start : start + length], _MAX_KERNEL_BYTES)


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].split(".")[0].replace("-", "_")
