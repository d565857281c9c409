"""A VHDX image as a disk that can be changed. Sources: MS-VHDX, and QEMU's block/vhdx.c for what other writers do."""

from __future__ import annotations

import threading

from devices.storage.backend import DiskError
from devices.storage.file import SharedFlush
from devices.storage.vhdx.format import (
    ABSENT,
    LOG_SECTOR,
    MIB,
    OFFSET_MASK,
    PARTIAL,
    PRESENT,
    STATE_MASK,
    ZEROED,
    Damage,
    guid_text,
    new_guid,
)
from devices.storage.vhdx.image import VhdxImage
from devices.storage.vhdx.journal import Journal
from devices.storage.vhdx.metadata import locator_changes
from devices.storage.vhdx.space import Space, used_by
from devices.storage.views import total
from pyvmm.core._hot import FastDisk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.storage.file import HostFile

_SECTOR_ENTRIES = LOG_SECTOR // 8
#: Changed pages of bitmaps and freed blocks that wait for a flush at most: a guest may never ask for one.
_MAX_PENDING = 4096


class VhdxDisk(VhdxImage):
    """A VHDX image in `file`, which it closes. Raises DiskError, with the file closed, if it makes no disk.

    What is on stable storage is consistent at any time: new blocks and freed ones, bits of sector bitmaps and the
    like stay in memory until `flush`, which first makes the data durable, then logs these changes, then
    writes them in place. So a crash loses nothing but writes that no flush had acknowledged.
    """

    trim_zeroes = True

    def __init__(self, file: HostFile, checked: bool = True) -> None:
        super().__init__(file, checked)
        self.journal = Journal(self.file, self.headers)
        #: Held while the log is written, and taken before `lock`; never by I/O that `inflight` counts.
        self.flush_lock = threading.Lock()
        self._shared_flush = SharedFlush(self.write_back, self.flush_lock)
        #: What the disk is known by from its first change in this session on, and whether that has come.
        self._next_data_write = new_guid()
        self._changing = False
        # Guarded by `lock`: sectors of the BAT that differ from what was last logged; what is to be free once the log
        # says so, and what is free, in MiB.
        self.dirty: set[int] = set()
        self.freed: list[tuple[int, int]] = []
        self._space: Space | None = None
        self.serve_fast()

    def serve_fast(self) -> None:
        """Let C code reach what is fully present, by the table as it is now."""
        if self.fast is not None:
            self.fast.close()
        if self.file.fd >= 0:
            self.fast = FastDisk(
                self.file.fd,
                self.size,
                self.sector_size,
                self._changing,
                table=self.table,
                block_size=self.layout.block_size,
                chunk_ratio=self.layout.chunk_blocks,
                zero_when_absent=not self.metadata.has_parent,
            )

    def _begin(self, changes_data: bool = True) -> None:
        """Before a change of the file, and by default also of what the disk holds."""
        with self.flush_lock:
            if not self.journal.started:
                self.journal.start(self._next_data_write if changes_data else self.data_write)
            elif changes_data and not self._changing:
                self.headers.update(data_write=self._next_data_write)
            if changes_data:
                self._changing = True
                if self.fast is not None:
                    self.fast.writable = True

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        if not self._changing:
            self._begin()
        turn = self.inflight.enter()
        try:
            for block, within, part in self.pieces_of(offset, views):
                entry = self.table.get(self.layout.block_entry(block))
                if entry & STATE_MASK < PRESENT:
                    entry = self.allocate(block)
                self.file.write((entry & OFFSET_MASK) + within, part)
                if entry & STATE_MASK == PARTIAL:
                    self._set_present(block, entry, within, total(part))
        finally:
            self.inflight.leave(turn)
        self._bound_pending()

    def _bound_pending(self) -> None:
        if len(self.bitmaps.dirty) + len(self.freed) > _MAX_PENDING:
            self.flush()

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
        """What is free in the file; to be called, with the lock held, before the first entry of the table changes."""
        if self._space is None:
            self._space = Space(self.file, self.structures() + used_by(self.table, self.layout, self.loaded))
        return self._space

    def trim(self, offset: int, length: int) -> None:
        # Zeros are what the guest was promised, so the block's state is "zero" rather than "unmapped".
        self.write_zeros(offset, length)

    def write_zeros(self, offset: int, length: int) -> None:
        if not self._changing:
            self._begin()
        self.zero(offset, length)
        self._bound_pending()

    def zero(self, offset: int, length: int) -> None:
        """What `write_zeros` does to a range, in a session that has begun."""
        turn = self.inflight.enter()
        try:
            while length:
                block, within = divmod(offset, self.layout.block_size)
                step = min(length, self.layout.block_size - within)
                whole = not within and offset + step in ((block + 1) * self.layout.block_size, self.layout.size)
                if not (whole and self._free(block)):
                    self._zero_part(block, within, step)
                offset, length = offset + step, length - step
        finally:
            self.inflight.leave(turn)

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
            self._shared_flush()

    def write_back(self) -> None:
        """Make everything durable: data first, then what was changed around it. The caller has the flush lock."""
        with self.lock:
            dirty, pages, freed = self.dirty, self.bitmaps.dirty, self.freed
            # Bitmaps come before the BAT, and the BAT from its end, where the entry of a chunk's bitmap follows those
            # of its blocks. So however many entries of the log this takes, none depends on a later one.
            sectors = [(self.locate_bitmap(page), bytes(self.bitmaps.page(page))) for page in sorted(pages)]
            sectors += [self._table_sector(number) for number in sorted(dirty, reverse=True)]
            size = self.file.size()
            self.dirty, self.bitmaps.dirty, self.freed = set(), set(), []
            self.bitmaps.pinned = pages
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
        self.inflight.drain()
        self.table.drain()
        for start, length in freed:
            try:
                self.file.trim(start * MIB, length * MIB)
            except OSError:
                pass  # the flush is good all the same, and whoever takes the space zeroes it
        with self.lock:
            self.get_space().give(freed)

    def before_merge(self) -> None:
        # The locator may name two versions of the parent (MS-VHDX 2.6.2.6.3): the one before the merge, and the one
        # that it makes. So this disk finds its parent also after a merge that did not come to its end.
        parent, locator = self.parent, dict(self.metadata.locator or {})
        assert isinstance(parent, VhdxDisk)
        for key, version in (("parent_linkage", parent.data_write), ("parent_linkage2", parent._next_data_write)):
            locator[key] = "{" + guid_text(version) + "}"
        self._begin(changes_data=False)  # children of this disk are to go on knowing it
        try:
            with self.flush_lock:
                self.journal.commit_bytes(locator_changes(self.file, self.regions.metadata, locator))
        except Damage as damage:
            raise DiskError(f"{self.path}: cannot be merged: {damage}; merge it into a new image") from None
        self.metadata.locator = locator

    def resize(self, size: int) -> None:
        from devices.storage.vhdx.resize import resize

        if not self._changing:
            self._begin()
        with self.flush_lock:
            resize(self, size)

    def close(self) -> None:
        if self.fast is not None:
            self.fast.close()
            self.fast = None
        try:
            if self.journal.started and self.file.fd >= 0:
                with self.flush_lock:
                    self.write_back()
                    self.journal.end()
        finally:
            self.file.close()
            if self.parent is not None:
                self.parent.close()
