"""A VHDX image as a disk. Sources: MS-VHDX, and QEMU's block/vhdx.c for what other writers do."""

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
    ZEROED,
    Damage,
    guid_text,
    new_guid,
)
from devices.storage.vhdx.header import Headers, Regions, check_identifier
from devices.storage.vhdx.inflight import InFlight
from devices.storage.vhdx.journal import Journal
from devices.storage.vhdx.log import is_dirty, replay
from devices.storage.vhdx.metadata import linkages, read_metadata
from devices.storage.vhdx.overlay import ReplayedFile
from devices.storage.vhdx.space import Space, used_by
from devices.storage.views import Pieces, fill_zeros, total
from pyvmm.core._hot import BlockTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from devices.storage.file import HostFile

_SECTOR_ENTRIES = LOG_SECTOR // 8
_TABLE_FAULTS = {
    "state": "has a state that is not defined",
    "outside": "points beyond the end of the file",
    "reserved": "points into the header, the log or a region",
    "overlap": "points to storage of another block",
    "bitmap": "needs a sector bitmap that is not there",
}


class VhdxDisk(Layer):
    """A VHDX image in `file`, which it closes. Raises DiskError, with the file closed, if it makes no disk.

    What is on stable storage is consistent at any time: new blocks and freed ones, bits of sector bitmaps and the
    like stay in memory until `flush`, which first makes the data durable, then logs these changes, then
    writes them in place. So a crash loses nothing but writes that no flush had acknowledged.
    """

    format = "vhdx"
    trim_zeroes = True

    def __init__(self, file: HostFile, checked: bool = True) -> None:
        """Without `checked`, entries of the BAT may be wrong, which `check_table` will tell; not for use as a disk."""
        self.path = file.path
        self.readonly = file.readonly
        self.file = file
        #: Guards the table, the bitmaps, the free space and the lists of what changed.
        self.lock = threading.Lock()
        #: Held while the log is written, and before `_lock`; never by I/O that `_inflight` counts.
        self.flush_lock = threading.Lock()
        self._inflight = InFlight()
        self.dirty: set[int] = set()  # sectors of the BAT that differ from what was last logged
        self.freed: list[tuple[int, int]] = []  # what is to be free once the log says so, in MiB
        self._space: Space | None = None
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
        if header.log_offset + header.log_length > self.file.size():
            raise Damage(
                f"the log at {header.log_offset:#x} with {header.log_length} bytes is beyond the end of the file"
            )
        if is_dirty(header) and self.readonly:
            self.file = ReplayedFile(self.file, header)
        elif is_dirty(header):
            replay(self.file, header)
            self.headers.update(file_write=new_guid(), log_guid=NO_GUID)
        self.journal = Journal(self.file, self.headers)
        self.regions = Regions(self.file, header.log_offset, header.log_length)
        self.metadata, self.size_offset = read_metadata(self.file, self.regions.metadata)
        self.layout = self.metadata.layout()
        self.size = self.metadata.size
        self.sector_size = self.metadata.sector
        self.physical_sector_size = max(self.metadata.physical, self.metadata.sector)
        self.table = self._load_table()
        self.bitmaps = SectorBitmaps(self.file, self._locate_bitmap)
        self.link = self._link()

    def _load_table(self) -> BlockTable:
        length = self.layout.entries * 8
        bat = self.regions.bat
        if length > bat.length:
            raise Damage(f"the BAT region at {bat.offset:#x} with {bat.length} bytes is too small for the disk")
        table = BlockTable(self.layout.entries)
        for offset, size, stored in self.file.extents(bat.offset, length):
            # Sectors of the host's file system, so multiples of an entry.
            for at in range(offset, offset + size if stored else offset, MIB):
                table.load((at - bat.offset) // 8, self.file.read_bytes(at, min(MIB, offset + size - at)))
        return table

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
            assert isinstance(parent, VhdxDisk)
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
        turn = self._inflight.enter()
        try:
            for block, within, part in self._pieces(offset, views):
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
            self._inflight.leave(turn)
        return missing

    def _pieces(self, offset: int, views: Sequence[memoryview]) -> Iterator[tuple[int, int, Sequence[memoryview]]]:
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

    # Writing ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        with self.flush_lock:
            if not self.journal.started:
                self.journal.start(new_guid())

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        if not self.journal.started:
            self._begin()
        turn = self._inflight.enter()
        try:
            for block, within, part in self._pieces(offset, views):
                entry = self.table.get(self.layout.block_entry(block))
                if entry & STATE_MASK < PRESENT:
                    entry = self.allocate(block)
                self.file.write((entry & OFFSET_MASK) + within, part)
                if entry & STATE_MASK == PARTIAL:
                    self._set_present(block, entry, within, total(part))
        finally:
            self._inflight.leave(turn)

    def allocate(self, block: int) -> int:
        """Give a block storage that reads as zeros; return its entry."""
        index = self.layout.block_entry(block)
        with self.lock:
            entry = self.table.get(index)
            state = entry & STATE_MASK
            if state >= PRESENT:
                return entry
            space = self.get_space()
            partial = state == ABSENT and self.metadata.has_parent
            if partial:
                self._give_bitmap(block // self.layout.chunk_blocks)
                # Bits that an earlier life of the block left behind must not count.
                sectors = self.layout.block_size // self.sector_size
                self.bitmaps.change(block * sectors, sectors, False)
            entry = space.take(self.layout.block_size // MIB) * MIB | (PARTIAL if partial else PRESENT)
            self.set_entry(index, entry)
            return entry

    def _give_bitmap(self, chunk: int) -> None:
        index = self.layout.bitmap_entry(chunk)
        if self.table.get(index) & STATE_MASK != PRESENT:
            self.set_entry(index, self.get_space().take(1) * MIB | PRESENT)

    def _locate_bitmap(self, page: int) -> int:
        chunk, place = divmod(page, BITMAP_PAGES)
        return (self.table.get(self.layout.bitmap_entry(chunk)) & OFFSET_MASK) + place * PAGE

    def _set_present(self, block: int, entry: int, within: int, length: int) -> None:
        """Note that sectors of a partially present block are in this file now."""
        sectors = self.layout.block_size // self.sector_size
        index = self.layout.block_entry(block)
        with self.lock:
            if self.table.get(index) != entry:
                return  # complete by another write, or trimmed meanwhile
            first = block * sectors
            self.bitmaps.change(first + within // self.sector_size, length // self.sector_size, True)
            if self.bitmaps.all_present(first, min(sectors, self.layout.size // self.sector_size - first)):
                self.set_entry(index, entry & OFFSET_MASK | PRESENT)

    def set_entry(self, index: int, entry: int) -> None:
        self.table.set(index, entry)
        self.dirty.add(index // _SECTOR_ENTRIES)

    def get_space(self) -> Space:
        if self._space is None:
            self._space = Space(self.file, self.structures() + used_by(self.table, self.layout))
        return self._space

    def trim(self, offset: int, length: int) -> None:
        # Zeros are what the guest was promised, so the block's state is "zero" rather than "unmapped".
        self.write_zeros(offset, length)

    def write_zeros(self, offset: int, length: int) -> None:
        if not self.journal.started:
            self._begin()
        turn = self._inflight.enter()
        try:
            while length:
                block, within = divmod(offset, self.layout.block_size)
                step = min(length, self.layout.block_size - within)
                whole = not within and offset + step in ((block + 1) * self.layout.block_size, self.layout.size)
                if not (whole and self._free(block)):
                    self._zero_part(block, within, step)
                offset, length = offset + step, length - step
        finally:
            self._inflight.leave(turn)

    def _free(self, block: int) -> bool:
        """Make a whole block zeros without storage; False if it is one that keeps its storage."""
        index = self.layout.block_entry(block)
        with self.lock:
            entry = self.table.get(index)
            state = entry & STATE_MASK
            if state >= PRESENT:
                if self.metadata.leave_allocated:
                    return False
                self.get_space()  # which must not find this storage free before it is
                self.set_entry(index, ZEROED)
                self.freed.append((entry >> 20, self.layout.block_size // MIB))
            elif state == ABSENT and self._parent_has(block * self.layout.block_size):
                self.set_entry(index, ZEROED)
            return True

    def _zero_part(self, block: int, within: int, length: int) -> None:
        entry = self.table.get(self.layout.block_entry(block))
        state = entry & STATE_MASK
        if state == ABSENT and self._parent_has(block * self.layout.block_size + within):
            entry = self.allocate(block)
        elif state < PRESENT:
            return
        self.file.write_zeros((entry & OFFSET_MASK) + within, length)
        if entry & STATE_MASK == PARTIAL:
            self._set_present(block, entry, within, length)

    def _parent_has(self, offset: int) -> bool:
        return self.metadata.has_parent and (self.parent is None or offset < self.parent.size)

    # Durability ------------------------------------------------------------------------------------

    def flush(self) -> None:
        if self.journal.started:
            with self.flush_lock:
                self.write_back()

    def write_back(self) -> None:
        """Make everything durable: data first, then what was changed around it. The caller has the flush lock."""
        with self.lock:
            dirty, pages, freed = self.dirty, self.bitmaps.dirty, self.freed
            self.dirty, self.bitmaps.dirty, self.freed = set(), set(), []
            self.bitmaps.pinned = pages
            # Bitmaps come before the BAT, and the BAT from its end, where the entry of a chunk's bitmap follows those
            # of its blocks. So however many entries of the log this takes, none depends on a later one.
            sectors = [(self._locate_bitmap(page), bytes(self.bitmaps.page(page))) for page in sorted(pages)]
            sectors += [self._table_sector(number) for number in sorted(dirty, reverse=True)]
            size = self.file.size()
        try:
            self.journal.commit(sectors, size)
        except BaseException:
            with self.lock:
                self.dirty |= dirty
                self.bitmaps.dirty |= pages
                self.freed += freed
            raise
        finally:
            self.bitmaps.pinned = set()
        if freed:
            self._release(freed)

    def _table_sector(self, number: int) -> tuple[int, bytes]:
        first = number * _SECTOR_ENTRIES
        entries = self.table.entries(first, min(_SECTOR_ENTRIES, len(self.table) - first))
        return self.regions.bat.offset + number * LOG_SECTOR, entries.ljust(LOG_SECTOR, b"\0")

    def _release(self, freed: list[tuple[int, int]]) -> None:
        """Give back storage that nothing points to any more, once nobody is on his way to it."""
        self._inflight.drain()
        self.table.drain()
        for start, length in freed:
            try:
                self.file.trim(start * MIB, length * MIB)
            except OSError:
                pass  # the flush is good all the same, and whoever takes the space zeroes it
        with self.lock:
            self.get_space().give(freed)

    def before_merge(self) -> None:
        from devices.storage.vhdx.relink import follow

        assert isinstance(self.parent, VhdxDisk)
        follow(self, self.parent)

    def resize(self, size: int) -> None:
        from devices.storage.vhdx.resize import resize

        if not self.journal.started:
            self._begin()
        with self.flush_lock:
            resize(self, size)

    def close(self) -> None:
        try:
            if self.journal.started and self.file.fd >= 0:
                with self.flush_lock:
                    self.write_back()
                    self.journal.end()
        finally:
            self.file.close()
            if self.parent is not None:
                self.parent.close()

    def inspect(self) -> dict[str, Any]:
        return {
            **super().inspect(),
            "kind": self.kind,
            "block_size": self.metadata.block_size,
            "disk_id": guid_text(self.metadata.disk_id),
            "data_write_id": guid_text(self.data_write),
            "parent_locator": self.metadata.locator,
        }
