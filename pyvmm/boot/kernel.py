"""Which loader a kernel file is for, told by its content. A loader is imported once it is chosen."""

from __future__ import annotations

from pyvmm.boot import elf
from pyvmm.boot.entry import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.entry import EntryState
    from pyvmm.core.memory import GuestMemory

#: Where a Linux bzImage says that it is one.
_LINUX_MAGIC_OFFSET, _LINUX_MAGIC = 0x202, b"HdrS"
#: A Multiboot header stands in the first 8 KiB.
_START_SIZE = 8192


def load_kernel(memory: GuestMemory, path: str, initrd: str | None, cmdline: str) -> EntryState:
    """Load a bzImage, a 64-bit ELF executable, or a Multiboot kernel, with `initrd` and `cmdline`.

    Works on memory that a guest has used before, so a reset loads again. Raises BootError, which names the file, if it
    cannot be read, is none of these, or does not fit into guest RAM.
    """
    try:
        with open(path, "rb") as file:
            if _is_multiboot(file.read(_START_SIZE)):
                from pyvmm.boot.multiboot import load_multiboot

                return load_multiboot(memory, file, path, initrd, cmdline)
            from pyvmm.boot.linux import load_linux

            return load_linux(memory, file, path, initrd, cmdline)
    except OSError as error:
        raise BootError(f"{path}: {error.strerror or error}") from error


def _is_multiboot(start: bytes) -> bool:
    if start.startswith(elf.MAGIC):
        if start[elf.CLASS_OFFSET : elf.CLASS_OFFSET + 1] == bytes([elf.CLASS_32]):
            return True  # nothing else starts a 32-bit one
    elif start[_LINUX_MAGIC_OFFSET:].startswith(_LINUX_MAGIC):
        return False
    from pyvmm.boot.multiboot import find_header

    header = find_header(start)
    return header is not None and (header.has_addresses or not start.startswith(elf.MAGIC))
