"""Changing the size of a VHDX disk, so that a crash at any instant leaves it at the one or the other."""

from __future__ import annotations

from devices.storage.backend import DiskError
from devices.storage.vhdx.format import (
    LOG_SECTOR,
    MAX_DISK,
    MIB,
    PRESENT,
    REGION_BAT,
    REGION_TABLE_OFFSETS,
    STATE_MASK,
    Layout,
)
from devices.storage.vhdx.header import Region, Regions, pack_regions
from devices.storage.vhdx.metadata import region_length
from pyvmm.core._hot import BlockTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.storage.vhdx.disk import VhdxDisk


def resize(disk: VhdxDisk, size: int) -> None:
    """What `Disk.resize` does; the caller has the flush lock, and the session has started."""
    if size <= 0 or size % disk.sector_size:
        raise DiskError(f"{disk.path}: {size} bytes is not a multiple of the {disk.sector_size}-byte sector")
    if size > MAX_DISK:
        raise DiskError(f"{disk.path}: {size} bytes are more than the 64 TiB that a VHDX image can have")
    # Not the disk's own layout: an attempt that failed may have left another one behind.
    now, then = (
        Layout(bytes_, disk.layout.block_size, disk.sector_size, disk.metadata.has_parent)
        for bytes_ in (disk.size, size)
    )
    disk.write_back()
    if size > disk.size:
        _grow(disk, now, then)
    elif size < disk.size:
        _shrink(disk, now, then)


def _grow(disk: VhdxDisk, old: Layout, new: Layout) -> None:
    if new.entries > len(disk.table):
        _extend_table(disk, new)
    _forget_entries(disk, old, new)
    # What lies beyond the old end, in the last block or in the parent, is not to come into sight.
    visible = min(new.size, old.blocks * old.block_size)
    if disk.metadata.has_parent:
        visible = max(visible, min(new.size, disk.parent.size if disk.parent is not None else new.size))
    disk.layout = new
    if visible > old.size:
        disk.zero(old.size, visible - old.size)
    if disk.metadata.leave_allocated:
        for block in range(old.blocks, new.blocks):
            disk.allocate(block)
    disk.write_back()
    _commit_size(disk, new.size)


def _shrink(disk: VhdxDisk, old: Layout, new: Layout) -> None:
    # Smaller first: were entries gone before, a crash would leave the old size without the data.
    _commit_size(disk, new.size)
    disk.layout = new
    _forget_entries(disk, new, old)
    disk.write_back()
    with disk.lock:
        end = disk.get_space().cut()
        # Entries of the log so far would ask for the file's old size, and could touch what is to be given away.
        disk.journal.restart(end)
        disk.file.truncate(end)


def _commit_size(disk: VhdxDisk, size: int) -> None:
    disk.journal.commit_bytes([(disk.size_offset, size.to_bytes(8, "little"))])
    disk.size = disk.metadata.size = size
    if disk.fast is not None:
        disk.fast.size = size


def _forget_entries(disk: VhdxDisk, smaller: Layout, larger: Layout) -> None:
    """Clear the entries of blocks that only the larger disk has, whatever is in them, in memory and in the file."""
    with disk.lock:
        disk.get_space()
        disk.bitmaps.drop(smaller.chunks)
        first = smaller.block_entry(smaller.blocks - 1) + 1
        stride = smaller.chunk_blocks + 1
        for index in range(first, min(len(disk.table), larger.entries)):
            entry = disk.table.get(index)
            if not entry:
                continue
            bitmap = index % stride == smaller.chunk_blocks
            if bitmap and index // stride < smaller.chunks:
                continue
            if entry & STATE_MASK >= PRESENT:
                disk.freed.append((entry >> 20, 1 if bitmap else smaller.block_size // MIB))
            disk.set_entry(index, 0)
        # Beyond what the smaller disk uses of the region may be anything, and nobody looks there yet.
        disk.dirty.add((first - 1) * 8 // LOG_SECTOR)
        disk.dirty.add((smaller.entries - 1) * 8 // LOG_SECTOR)
    start = disk.regions.bat.offset + -(-smaller.entries * 8 // LOG_SECTOR) * LOG_SECTOR
    end = disk.regions.bat.offset + -(-larger.entries * 8 // LOG_SECTOR) * LOG_SECTOR
    if start < end:
        disk.file.write_zeros(start, end - start)


def _extend_table(disk: VhdxDisk, layout: Layout) -> None:
    """Give the table room for all entries of `layout`: in memory, and in the file, if need be in another place."""
    table = BlockTable(layout.entries)
    old, count = disk.table, len(disk.table)
    bat = disk.regions.bat
    if layout.entries * 8 > bat.length:
        with disk.lock:
            length = region_length(layout)
            place = Region(REGION_BAT, disk.get_space().take(length // MIB) * MIB, length, True)
        for first in range(0, count, MIB // 8):
            data = old.entries(first, min(MIB // 8, count - first))
            if data.strip(b"\0"):
                disk.file.write_bytes(place.offset + first * 8, data)
        _move_table(disk, place)
        with disk.lock:
            disk.get_space().give([(bat.offset // MIB, bat.length // MIB)])
    with disk.lock:
        for first in range(0, count, MIB // 8):
            table.load(first, old.entries(first, min(MIB // 8, count - first)))
        disk.table = table
        disk.serve_fast()


def _move_table(disk: VhdxDisk, place: Region) -> None:
    """Name `place` as the BAT region in both region tables, at once."""
    regions = [place if region.guid == REGION_BAT else region for region in disk.regions.all]
    data = pack_regions(regions)
    sectors = [
        (offset + at, data[at : at + LOG_SECTOR])
        for offset in REGION_TABLE_OFFSETS
        for at in range(0, len(data), LOG_SECTOR)
    ]
    disk.journal.commit(sectors, disk.file.size(), at_once=True)
    header = disk.headers.current
    disk.regions = Regions(disk.file, header.log_offset, header.log_length)
    # Old entries of the log are for the old place, which is free now.
    disk.journal.restart(disk.file.size())
