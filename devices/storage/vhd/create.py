"""Making VHD images."""

from __future__ import annotations

import struct
import time

from devices.storage.backend import DiskError
from devices.storage.vhd.disk import VhdDisk, open_vhd
from devices.storage.vhd.layout import (
    DEFAULT_BLOCK,
    EPOCH,
    HEADER_SIZE,
    KINDS,
    MAX_BLOCK,
    MAX_ENTRIES,
    MAX_SIZE,
    MIN_BLOCK,
    SECTOR,
    UNUSED,
    Footer,
    Header,
    new_id,
)
from devices.storage.vhd.parent import NewLink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.storage.chain import Layer
    from devices.storage.file import HostFile


def create(
    file: HostFile,
    size: int,
    *,
    kind: str = "dynamic",
    block_size: int | None = None,
    sector_size: int = SECTOR,
    parent: Layer | None = None,
    now: Callable[[], float] = time.time,
    **_: object,
) -> VhdDisk:
    """Give the empty `file` a disk of `size` bytes, which takes over `file` as well as the `parent`.

    `kind` is fixed, dynamic or differencing; only the last has a parent. Raises DiskError for what makes no disk,
    OSError. Whatever else other formats can be told, a VHD has no place for it.
    """
    try:
        block_size = block_size or DEFAULT_BLOCK
        if sector_size != SECTOR:
            raise DiskError(f"{file.path}: a VHD has 512-byte sectors only; use VHDX for {sector_size}")
        if not isinstance(parent, VhdDisk | None):
            raise DiskError(f"{file.path}: the parent of a VHD is a VHD too, and not {parent.path}; convert that first")
        _check(file.path, size, block_size, kind)
        codes = {name: code for code, name in KINDS.items()}
        footer = Footer.make(codes[kind], size, new_id(), int(now()) - EPOCH)
        if kind == "fixed":
            file.write_bytes(size, footer.pack())
        else:
            _write_structures(file, footer, block_size, parent)
        file.flush()
        disk = open_vhd(file)
    except BaseException:
        file.close()
        if parent is not None:
            parent.close()
        raise
    disk.parent = parent
    return disk


def _check(path: str, size: int, block_size: int, kind: str) -> None:
    if not 0 < size <= MAX_SIZE or size % SECTOR:
        raise DiskError(f"{path}: a VHD's size is a multiple of 512 bytes, and at most 2040 GiB; use VHDX for more")
    if not MIN_BLOCK <= block_size <= MAX_BLOCK or block_size & (block_size - 1):
        raise DiskError(f"{path}: a VHD's block size is a power of two from 4 KiB to 256 MiB; 2 MiB is usual")
    if kind != "fixed" and size > block_size * MAX_ENTRIES:
        raise DiskError(f"{path}: too many blocks of {block_size} bytes; choose a larger block size")


def _write_structures(file: HostFile, footer: Footer, block_size: int, parent: VhdDisk | None) -> None:
    """The copy of the footer, the header, the names of the parent, the table, the footer: in this order in the file."""
    entries = -(-footer.size // block_size)
    place = SECTOR + HEADER_SIZE
    if parent is None:
        header, names = Header.make(place, entries, block_size), b""
    else:
        link = NewLink(file.path, parent, place)
        names = link.sectors
        header = Header.make(place + len(names), entries, block_size, link)
    table = struct.pack(">I", UNUSED) * (entries + -entries % (SECTOR // 4))
    file.write_bytes(0, footer.pack() + header.pack() + names + table + footer.pack())
