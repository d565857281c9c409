"""Making VHDX images."""

from __future__ import annotations

from array import array

from devices.storage.backend import DiskError
from devices.storage.chain import absolute_name, relative_name
from devices.storage.vhdx.disk import VhdxDisk
from devices.storage.vhdx.format import (
    CREATOR_SIZE,
    FILE_SIGNATURE,
    HEADER_OFFSETS,
    MIB,
    NO_GUID,
    PRESENT,
    REGION_BAT,
    REGION_METADATA,
    REGION_TABLE_OFFSETS,
    Damage,
    guid_text,
    new_guid,
)
from devices.storage.vhdx.header import Header, Region, pack_regions
from devices.storage.vhdx.metadata import Metadata, pack_metadata, region_length

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.storage.chain import Layer
    from devices.storage.file import HostFile
    from devices.storage.vhdx.format import Layout

_CREATOR = "pyvmm"
_LOG = Region(NO_GUID, MIB, MIB, True)
_METADATA = Region(REGION_METADATA, 2 * MIB, MIB, True)
_BAT_OFFSET = 3 * MIB
# What Hyper-V chooses; a differencing disk of more than that has a BAT that opens slowly in small blocks.
_BLOCK, _CHILD_BLOCK, _CHILD_BLOCK_UP_TO = 32 * MIB, 2 * MIB, 2 << 40


def create(
    file: HostFile,
    size: int,
    *,
    kind: str = "dynamic",
    block_size: int | None = None,
    sector_size: int = 512,
    physical_sector_size: int = 4096,
    parent: Layer | None = None,
) -> VhdxDisk:
    """Give the empty `file` a disk of `size` bytes, which takes over `file` as well as the `parent`.

    `kind` is fixed, dynamic or differencing; only the last has a parent, whose sector sizes count then. A fixed
    disk has all its blocks in the file, which is sparse at first. Raises DiskError for what makes no disk, OSError.
    """
    try:
        metadata = _describe(file, size, kind, block_size, sector_size, physical_sector_size, parent)
        _write(file, metadata)
    except BaseException:
        file.close()
        if parent is not None:
            parent.close()
        raise
    disk = VhdxDisk(file)
    disk.parent = parent
    return disk


def _describe(
    file: HostFile, size: int, kind: str, block_size: int | None, sector: int, physical: int, parent: Layer | None
) -> Metadata:
    if file.is_block:
        raise DiskError(f"{file.path}: a VHDX image must be in a file, this is a block device")
    if (parent is not None) != (kind == "differencing"):
        raise DiskError(f"{file.path}: a differencing disk has a parent, others have none")
    locator, disk_id = None, new_guid()
    if parent is not None:
        if not isinstance(parent, VhdxDisk):
            raise DiskError(f"{file.path}: the parent of a VHDX image must be one too, {parent.path} is not")
        locator, disk_id = _locator(file.path, parent), parent.metadata.disk_id
        sector, physical = parent.sector_size, parent.physical_sector_size
    if block_size is None:
        block_size = _CHILD_BLOCK if locator and size <= _CHILD_BLOCK_UP_TO else _BLOCK
    if physical < sector:
        raise DiskError(f"{file.path}: physical sectors of {physical} bytes are smaller than sectors of {sector}")
    metadata = Metadata(size, block_size, sector, physical, disk_id, kind == "fixed", locator)
    try:
        metadata.check()
    except Damage as reason:
        raise DiskError(f"{file.path}: {reason}") from None
    return metadata


def _write(file: HostFile, metadata: Metadata) -> None:
    layout = metadata.layout()
    bat = Region(REGION_BAT, _BAT_OFFSET, region_length(layout), True)
    data = bat.offset + bat.length
    file.truncate(data + (layout.blocks * layout.block_size if metadata.leave_allocated else 0))
    if metadata.leave_allocated:
        _fill_table(file, layout, bat.offset, data)
    file.write_bytes(_METADATA.offset, pack_metadata(metadata))
    for offset in REGION_TABLE_OFFSETS:
        file.write_bytes(offset, pack_regions([bat, _METADATA]))
    file_write, data_write = new_guid(), new_guid()
    for sequence, offset in enumerate(HEADER_OFFSETS, 1):
        header = Header(sequence, file_write, data_write, NO_GUID, _LOG.length, _LOG.offset)
        file.write_bytes(offset, header.pack())
    file.flush()
    # Last, so that half an image is none.
    file.write_bytes(0, FILE_SIGNATURE + _CREATOR.encode("utf-16-le").ljust(CREATOR_SIZE, b"\0"))
    file.flush()


def _fill_table(file: HostFile, layout: Layout, offset: int, data: int) -> None:
    """Write the entries of blocks that are all there, in order."""
    step = layout.block_size
    for first in range(0, layout.blocks, layout.chunk_blocks):
        count = min(layout.chunk_blocks, layout.blocks - first)
        start = (data + first * step) | PRESENT
        entries = array("Q", range(start, start + count * step, step))
        file.write_bytes(offset + layout.block_entry(first) * 8, entries.tobytes())


def _locator(path: str, parent: VhdxDisk) -> dict[str, str]:
    """The parent locator of the image at `path`. MS-VHDX 2.6.2.6.3 has the keys."""
    version = "{" + guid_text(parent.data_write) + "}"
    return {
        "parent_linkage": version,
        "parent_linkage2": version,  # for merging, see `VhdxDisk.before_merge`
        "relative_path": relative_name(path, parent.path),
        "absolute_win32_path": absolute_name(parent.path),
    }
