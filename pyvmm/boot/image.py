"""Files, and parts of them, that go to guest memory as they are."""

from __future__ import annotations

from pyvmm.boot.entry import BootError
from pyvmm.boot.layout import HIGH_MEMORY
from pyvmm.core.memory import GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from typing import BinaryIO

    from pyvmm.core.memory import GuestMemory

_ZEROS = bytes(1 << 20)


def put_segment(memory: GuestMemory, file: BinaryIO, name: str, offset: int, filesz: int, gpa: int, memsz: int) -> None:
    """Copy `filesz` bytes at `offset` of `file` to `gpa` and zero what follows them, up to `memsz` bytes.

    Raises BootError naming `name` if they are not all in the file or there is no RAM from 1 MiB on for them.
    """
    if filesz > memsz or offset + filesz > file.seek(0, 2):
        raise BootError(f"{name}: truncated file, the segment for {gpa:#x} is not all there")
    if gpa < HIGH_MEMORY:
        raise BootError(f"{name}: has a segment for {gpa:#x}, but programs are loaded from 1 MiB on")
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
