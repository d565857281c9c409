"""Firmware in a raw ROM file, started at the reset vector. On the start-up path: keep the imports few."""

from __future__ import annotations

from pyvmm.boot.entry import BootError, EntryState
from pyvmm.boot.layout import HIGH_MEMORY, ROM_END, ROM_MAX_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from os import PathLike

    from pyvmm.core.memory import GuestMemory

_ROM_UNIT = 64 << 10
_SHADOW_SIZE = 128 << 10


def load_firmware(memory: GuestMemory, path: str | PathLike[str]) -> EntryState:
    """Map the ROM file so that it ends at 4 GiB, and copy its last 128 KiB into RAM so that they end at 1 MiB.

    The copy is what a PC's chipset shows below 1 MiB; it is plain RAM, since firmware such as SeaBIOS unlocks it
    and writes its variables there. Called again for a reset it only renews the copy, from the ROM already mapped.
    Raises BootError if the file cannot be read or its size is not a multiple of 64 KiB up to 16 MiB, or if guest
    memory is smaller than 1 MiB.
    """
    if memory.size < HIGH_MEMORY:
        raise BootError(f"{path}: firmware needs at least 1 MiB of guest memory")
    for region in memory.regions:
        if region.readonly and region.gpa + region.size == ROM_END:
            break
    else:
        image = _read_rom(path)
        region = memory.add_rom(ROM_END - len(image), image)
    shadow = region.view[-_SHADOW_SIZE:]
    memory.write(HIGH_MEMORY - len(shadow), shadow)
    return EntryState("reset")


def _read_rom(path: str | PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            image = file.read(ROM_MAX_SIZE + 1)
    except OSError as error:
        raise BootError(f"{path}: {error.strerror or error}") from error
    if not image or len(image) % _ROM_UNIT or len(image) > ROM_MAX_SIZE:
        size = f"{len(image)} bytes" if len(image) <= ROM_MAX_SIZE else "more than 16 MiB"
        raise BootError(f"{path}: a firmware ROM is a multiple of 64 KiB up to 16 MiB, this file has {size}")
    return image
