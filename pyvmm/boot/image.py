"""Files, and parts of them, that go to guest memory as they are."""

from __future__ import annotations

from pyvmm.boot.entry import BootError
from pyvmm.boot.layout import EBDA_START, HIGH_MEMORY
from pyvmm.core.memory import GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from typing import BinaryIO

    from pyvmm.core.memory import GuestMemory

_ZEROS = bytes(1 << 20)


class Image:
    """A loaded program: its entry point, its first address and the first one above it, all guest physical."""

    __slots__ = ("end", "entry", "start")

    def __init__(self, entry: int, start: int, end: int) -> None:
        self.entry = entry
        self.start = start
        self.end = end


def put_segment(
    memory: GuestMemory, file: BinaryIO, name: str, offset: int, filesz: int, gpa: int, memsz: int, *, low: bool
) -> None:
    """Copy `filesz` bytes at `offset` of `file` to `gpa` and zero what follows them, up to `memsz` bytes.

    Raises BootError naming `name` if they are not all in the file or there is no RAM for them. With `low` set they may
    also stand below 1 MiB, in what the memory map calls usable.
    """
    if filesz > memsz or offset + filesz > file.seek(0, 2):
        raise BootError(f"{name}: truncated file, the segment for {gpa:#x} is not all there")
    if gpa < HIGH_MEMORY and not (low and gpa + memsz <= EBDA_START):
        where = f"up to {EBDA_START:#x} and from 1 MiB on" if low else "from 1 MiB on"
        raise BootError(f"{name}: has a segment for {gpa:#x}-{gpa + memsz:#x}, but programs are loaded {where}")
    try:
        view = memory.view(gpa, memsz, write=True)
    except GuestMemoryError:
        needed = f"{gpa:#x}-{gpa + memsz:#x}"
        raise BootError(f"{name}: needs RAM at {needed}, guest memory is {memory.size >> 20} MiB") from None
    file.seek(offset)
    if file.readinto(view[:filesz]) != filesz:  # type: ignore[attr-defined]
        raise BootError(f"{name}: truncated while it was read")
    for start in range(filesz, memsz, len(_ZEROS)):
        chunk = view[start : start + len(_ZEROS)]
        chunk[:] = _ZEROS[: len(chunk)]


def put_file(memory: GuestMemory, path: str | os.PathLike[str], place: Callable[[int], int]) -> tuple[int, int]:
    """Copy the file at `path` to the GPA that `place` gives for its size in bytes; return both.

    `place` raises BootError where the file does not fit; so does this for a file that cannot be read or is empty.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if not size:
                raise BootError(f"{path}: the initrd is empty")
            gpa = place(size)
            file.seek(0)
            if file.readinto(memory.view(gpa, size, write=True)) != size:
                raise BootError(f"{path}: truncated while it was read")
    except OSError as error:
        raise BootError(f"{path}: {error.strerror or error}") from error
    return gpa, size
