"""A VHDX image: its structures, and reading what it holds. Source: MS-VHDX."""

from __future__ import annotations

import threading

from devices.storage.backend import DATA, PARENT, ZERO, DiskError, Extent
from devices.storage.chain import Layer, ParentLink, parent_paths
from devices.storage.vhdx.bitmap import BITMAP_PAGES, PAGE, SectorBitmaps
from devices.storage.vhdx.format import (
    ABSENT,
    LOG_SECTOR,
    MIB,
    NO_GUID,
    OFFSET_MASK,
    PARTIAL,
    PRESENT,
    STATE_MASK,
    Damage,
    guid_text,
    new_guid,
)
from devices.storage.vhdx.header import Headers, Regions, check_identifier, read_creator
from devices.storage.vhdx.inflight import InFlight
from devices.storage.vhdx.log import is_dirty, replay
from devices.storage.vhdx.metadata import linkages, read_metadata
from devices.storage.vhdx.overlay import ReplayedFile
from devices.storage.views import Pieces, fill_zeros, total
from pyvmm.core._hot import BlockTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from devices.storage.file import HostFile

_SECTOR_ENTRIES = LOG_SECTOR // 8
#: What the smallest BAT region has room for.
_MIN_ENTRIES = MIB // 8
_TABLE_FAULTS = {
    "state": "has a state that is not defined",
    "outside": "points beyond the end of the file",
    "reserved": "points into the header, the log or a region",
    "overlap": "points to storage of another block",
    "bitmap": "needs a sector bitmap that is not there",
}


class VhdxImage(Layer):
    """What is in a VHDX `file`, which it closes. Raises DiskError, with the file closed, if that makes no disk.

    Opening one for writing replays its log; a reader sees it as if it was replayed.
    """

    format = "vhdx"
    trim_zeroes = True

    def __init__(self, file: HostFile, checked: bool = True) -> None:
        """Without `checked`, entries of the BAT may be wrong, which `check_table` will tell; not for use as a disk."""
        self.path = file.path
        self.readonly = file.readonly
        self.file = file
        #: Guards what is changed: the table and the bitmaps here.
        self.lock = threading.Lock()
        self.inflight = InFlight()
        try:
            self._load()
            for index, kind in self.check_table(1) if checked else ():
                raise Damage(self.table_fault(index, kind))
        except Damage as damage:
            self.file.close()
            raise DiskError(f"{self.path}: damaged VHDX: {damage}; see pyvmm disk check") from damage
        except OSError as error:
            self.file.close()
            raise DiskError(f"{self.path}: cannot be read: {error.strerror}") from None
        except BaseException:
            self.file.close()
            raise

    def _load(self) -> None:
        if self.file.is_block:
            raise DiskError(f"{self.path}: a VHDX image must be in a file, this is a block device")
        check_identifier(self.file)
        self.headers = Headers(self.file)
        header = self.headers.current
        self._creator = read_creator(self.file)
        self._was_dirty = is_dirty(header)
        if header.log_offset + header.log_length > self.file.size():
            raise Damage(
                f"the log at {header.log_offset:#x} with {header.log_length} bytes is beyond the end of the file"
            )
        if self._was_dirty and self.readonly:
            self.file = ReplayedFile(self.file, header)
        elif self._was_dirty:
            replay(self.file, header)
            self.headers.update(file_write=new_guid(), log_guid=NO_GUID)
        self.regions = Regions(self.file, header.log_offset, header.log_length)
        self.metadata, self.size_offset = read_metadata(self.file, self.regions.metadata)
        self.layout = self.metadata.layout()
        self.size = self.metadata.size
        self.sector_size = self.metadata.sector
        self.physical_sector_size = max(self.metadata.physical, self.metadata.sector)
        self.table = self._load_table()
        self.bitmaps = SectorBitmaps(self.file, self.locate_bitmap)
        self.link = self._link()

    def _load_table(self) -> BlockTable:
        length = self.layout.entries * 8
        bat = self.regions.bat
        if length > bat.length:
            raise Damage(f"the BAT region at {bat.offset:#x} with {bat.length} bytes is too small for the disk")
        # Room for growing is cheap, and saves C from changing tables.
        table = BlockTable(min(bat.length // 8, max(self.layout.entries, _MIN_ENTRIES)))
        #: First entry and number of entries of each part of the table that the file stores; zeros are in the others.
        self.loaded: list[tuple[int, int]] = []
        for offset, size, stored in self.file.extents(bat.offset, length):
            if stored:  # in sectors of the host's file system, so in multiples of an entry
                self.loaded.append(((offset - bat.offset) // 8, size // 8))
            for at in range(offset, offset + size if stored else offset, MIB):
                table.load((at - bat.offset) // 8, self.file.read_bytes(at, min(MIB, offset + size - at)))
        return table

    def locate_bitmap(self, page: int) -> int:
        chunk, place = divmod(page, BITMAP_PAGES)
        return (self.table.get(self.layout.bitmap_entry(chunk)) & OFFSET_MASK) + place * PAGE

    def check_table(self, limit: int) -> list[tuple[int, str]]:
        """What is wrong with the BAT: index of an entry and kind of fault, as `BlockTable.check` has them."""
        layout = self.layout
        reserved = [(offset * MIB, length * MIB) for offset, length in self.structures()]
        size = self.file.size()
        return self.table.check(
            layout.chunk_blocks, layout.block_size, size, reserved, has_parent=self.metadata.has_parent, limit=limit
        )

    def table_fault(self, index: int, kind: str) -> str:
        """What `check_table` found, for people."""
        chunk, place = divmod(index, self.layout.chunk_blocks + 1)
        what = f"block {index - chunk}" if place < self.layout.chunk_blocks else f"sector bitmap {chunk}"
        where = self.regions.bat.offset + index * 8
        return f"BAT entry {index} at {where:#x}, for {what}, {_TABLE_FAULTS[kind]}"

    def structures(self) -> list[tuple[int, int]]:
        """Offset and length in MiB of what is neither block nor bitmap."""
        header = self.headers.current
        ranges = [(0, MIB), (header.log_offset, header.log_length), *self.regions.ranges()]
        return [(offset // MIB, length // MIB) for offset, length in ranges]

    # What it is ------------------------------------------------------------------------------------

    def _link(self) -> ParentLink | None:
        """The way to the parent; MS-VHDX 2.6.2.6.3 has the keys. Raises Damage."""
        locator = self.metadata.locator
        if locator is None:
            return None
        wanted = linkages(locator)
        relative = [locator[key] for key in ("relative_path",) if key in locator]
        absolute = [locator[key] for key in ("volume_path", "absolute_win32_path") if key in locator]
        if not relative and not absolute:
            raise Damage("the parent locator has no path")

        def mismatch(parent: Layer) -> str:
            assert isinstance(parent, VhdxImage)
            if parent.data_write not in wanted:
                found = guid_text(parent.data_write)
                return f"its DataWriteGuid is {found}, not {guid_text(wanted[0])}, so it was changed or is another disk"
            if parent.sector_size != self.sector_size:
                return f"it has sectors of {parent.sector_size} bytes instead of {self.sector_size}"
            return ""

        return ParentLink((relative + absolute)[0], parent_paths(self.path, relative, absolute), "vhdx", mismatch)

    @property
    def data_write(self) -> bytes:
        """The GUID that changes with the content of the disk, by which children know their parent."""
        return self.headers.current.data_write

    @property
    def identity(self) -> bytes:
        """The virtual disk identifier (MS-VHDX 2.6.2.3); children share it with their parents."""
        return self.metadata.disk_id

    @property
    def kind(self) -> str:
        """fixed, dynamic or differencing."""
        if self.metadata.has_parent:
            return "differencing"
        return "fixed" if self.metadata.leave_allocated else "dynamic"

    # Reading ---------------------------------------------------------------------------------------

    def read_layer(self, offset: int, views: Sequence[memoryview]) -> list[tuple[int, list[memoryview]]]:
        missing: list[tuple[int, list[memoryview]]] = []
        absent = ABSENT if self.metadata.has_parent else -1
        turn = self.inflight.enter()
        try:
            for block, within, part in self.pieces_of(offset, views):
                entry = self.table.get(self.layout.block_entry(block))
                state = entry & STATE_MASK
                if state == PRESENT:
                    self.file.read((entry & OFFSET_MASK) + within, part)
                elif state == PARTIAL:
                    missing += self._read_partial(entry, block, within, part)
                elif state == absent:
                    missing.append((block * self.layout.block_size + within, list(part)))
                else:
                    fill_zeros(part)
        finally:
            self.inflight.leave(turn)
        return missing

    def pieces_of(self, offset: int, views: Sequence[memoryview]) -> Iterator[tuple[int, int, Sequence[memoryview]]]:
        """The parts of a range by block: its number, offset in it, buffers."""
        length = total(views)
        block, within = divmod(offset, self.layout.block_size)
        if within + length <= self.layout.block_size:
            yield block, within, views
            return
        pieces = Pieces(views)
        while length:
            step = min(length, self.layout.block_size - within)
            yield block, within, pieces.take(step)
            length -= step
            block, within = block + 1, 0

    def _read_partial(
        self, entry: int, block: int, within: int, views: Sequence[memoryview]
    ) -> list[tuple[int, list[memoryview]]]:
        missing = []
        offset = block * self.layout.block_size + within
        at = (entry & OFFSET_MASK) + within
        pieces = Pieces(views)
        for length, present in self._runs(offset, total(views)):
            part = pieces.take(length)
            if present:
                self.file.read(at, part)
            else:
                missing.append((offset, part))
            offset, at = offset + length, at + length
        return missing

    def _runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Lengths of what is alike in a range of a partially present block, and whether it is in this file."""
        with self.lock:
            runs = list(self.bitmaps.runs(offset // self.sector_size, length // self.sector_size))
        return [(count * self.sector_size, present) for count, present in runs]

    def layer_extents(self, offset: int, length: int) -> Iterator[Extent]:
        last: Extent | None = None
        for extent in self._layer_extents(offset, length):
            if last is not None and last.kind == extent.kind:
                last.length += extent.length
                continue
            if last is not None:
                yield last
            last = extent
        if last is not None:
            yield last

    def _layer_extents(self, offset: int, length: int) -> Iterator[Extent]:
        absent = PARENT if self.metadata.has_parent else ZERO
        while length:
            block, within = divmod(offset, self.layout.block_size)
            step = min(length, self.layout.block_size - within)
            entry = self.table.get(self.layout.block_entry(block))
            state = entry & STATE_MASK
            at = (entry & OFFSET_MASK) + within
            if state == PRESENT:
                yield from self._stored_extents(offset, at, step)
            elif state == PARTIAL:
                start = offset
                for size, present in self._runs(offset, step):
                    if present:
                        yield from self._stored_extents(start, at + start - offset, size)
                    else:
                        yield Extent(start, size, PARENT)
                    start += size
            else:
                yield Extent(offset, step, absent if state == ABSENT else ZERO)
            offset, length = offset + step, length - step

    def _stored_extents(self, offset: int, at: int, length: int) -> Iterator[Extent]:
        for start, size, stored in self.file.extents(at, length):
            yield Extent(offset + start - at, size, DATA if stored else ZERO)

    def inspect(self) -> dict[str, Any]:
        return {
            **super().inspect(),
            "kind": self.kind,
            "creator": self._creator,
            "log": "replayed" if self._was_dirty else "empty",
            "block_size": self.metadata.block_size,
            "disk_id": guid_text(self.metadata.disk_id),
            "data_write_id": guid_text(self.data_write),
            "parent_locator": self.metadata.locator,
        }
