"""VHD images as disks.

How a dynamic or differencing image stays whole at every instant, without a log:

- New blocks come behind all others. The file is made longer first, by many blocks at once, with a footer at its new
  end, and that is on stable storage before the allocation table speaks of a block there. So no entry ever points beyond
  the file, and a new block reads as zeros: without a parent that is what it was, with one its bitmap says that nothing
  of it is there yet.
- The bit that says that a sector is there is written by a flush, once the data is on stable storage.
- The footer at the start changes only when the disk is resized. It counts when the one at the end is lost.
- What lies behind the last block belongs to nobody: a writer cuts it off when it opens the image.
"""

from __future__ import annotations

import errno
import struct
import threading

from devices.storage.backend import DATA, PARENT, ZERO, DiskError, Extent, Geometry
from devices.storage.chain import Layer
from devices.storage.file import SharedFlush
from devices.storage.vhd.bitmaps import Bitmaps
from devices.storage.vhd.image import Image
from devices.storage.vhd.layout import DIFFERENCING, FIXED, KINDS, MAX_SIZE, SECTOR, UNUSED
from devices.storage.vhd.parent import read_link
from devices.storage.views import Pieces, total

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from devices.storage.file import HostFile

#: Bytes by which a file grows at once: by as much as it has, within these. They are a hole, so nothing is used up
#: before it is written; but each time costs a flush.
_GROWTH = 64 << 20, 1 << 30
#: The data of new blocks begins at multiples of this, the pages of the host.
_ALIGNMENT = 4096


def open_vhd(file: HostFile) -> VhdDisk:
    """The disk in `file`, without its parents, which closes `file`; raises DiskError, with `file` closed."""
    try:
        image = Image(file)
        image.refuse(file.path)
        return FixedVhd(file, image) if image.footer.kind == FIXED else DynamicVhd(file, image)
    except OSError as error:
        file.close()
        raise DiskError(f"{file.path}: cannot be read: {error.strerror or error}") from None
    except BaseException:
        file.close()
        raise


class VhdDisk(Layer):
    """What all kinds of VHD share."""

    format = "vhd"
    sector_size = SECTOR
    physical_sector_size = SECTOR

    def __init__(self, file: HostFile, image: Image) -> None:
        if file.is_block:
            raise DiskError(f"{file.path}: a block device; a VHD image must be a regular file")
        self.file = file
        self.path = file.path
        self.readonly = file.readonly
        self.size = image.footer.size
        self._footer = image.footer

    @property
    def identity(self) -> bytes:
        return self._footer.unique_id

    @property
    def geometry(self) -> Geometry:
        # Disk2vhd writes the largest of all geometries for every disk.
        shape = self._footer.geometry
        return shape if 0 < shape.cylinders * shape.heads * shape.sectors * SECTOR <= self.size else super().geometry

    def _new_size(self, size: int) -> None:
        """Refuse what the disk cannot be resized to."""
        if size % SECTOR or size > MAX_SIZE:
            raise DiskError(f"{self.path}: a VHD's size is a multiple of 512 bytes, and at most 2040 GiB")
        if size < self.size:
            raise DiskError(f"{self.path}: a VHD can only grow; convert it to shrink it")
        if self._footer.saved_state:
            raise DiskError(f"{self.path}: belongs to a VM in saved state; start that and shut it down first")

    def inspect(self) -> dict[str, Any]:
        footer = self._footer
        return super().inspect() | {
            "kind": KINDS[footer.kind],
            "creator": footer.creator.decode("ascii", "replace").strip(" \0"),
            "saved_state": footer.saved_state,
        }


class FixedVhd(VhdDisk):
    """A fixed disk: its bytes, then the footer."""

    trim_zeroes = True

    def __init__(self, file: HostFile, image: Image) -> None:
        super().__init__(file, image)
        if image.untidy and not file.readonly:  # an interrupted resize
            file.truncate(self._footer.current_size + SECTOR)
            file.flush()

    def read_layer(self, offset: int, views: Sequence[memoryview]) -> list[tuple[int, list[memoryview]]]:
        self.file.read(offset, views)
        return []

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        self.file.write(offset, views)

    def flush(self) -> None:
        self.file.flush()

    def trim(self, offset: int, length: int) -> None:
        self.file.write_zeros(offset, length)

    def layer_extents(self, offset: int, length: int) -> Iterator[Extent]:
        for start, size, stored in self.file.extents(offset, length):
            yield Extent(start, size, DATA if stored else ZERO)

    def resize(self, size: int) -> None:
        """Let a footer with the old size stand at the new end, before the old one becomes zeros of the disk."""
        self._new_size(size)
        file, old = self.file, self._footer
        if file.size() > self.size + SECTOR:  # an earlier one was interrupted: its footer is no end to begin from
            file.write_bytes(self.size, old.pack())
            file.flush()
            file.truncate(self.size + SECTOR)
            file.flush()
        place = max(size, file.size() - SECTOR)
        file.write_bytes(place, old.pack())
        file.flush()
        if place > self.size:
            file.write_zeros(self.size, place - self.size)
            file.flush()
        new = old.resized(size)
        file.write_bytes(place, new.pack())
        file.flush()
        self._footer, self.size = new, new.size
        if place > size:
            file.write_bytes(size, new.pack())
            file.flush()
            file.truncate(size + SECTOR)

    def close(self) -> None:
        try:
            if self.file.fd >= 0 and not self.readonly:
                self.file.flush()
        finally:
            self.file.close()


class DynamicVhd(VhdDisk):
    """A dynamic or differencing disk: blocks, each behind the bitmap of its sectors, which a table finds."""

    def __init__(self, file: HostFile, image: Image) -> None:
        super().__init__(file, image)
        assert image.header is not None
        self._header = image.header
        self._block_size = self._header.block_size
        self._bitmap_size = self._header.bitmap_size
        self._table = image.table
        self._bitmaps = Bitmaps(file, self._table, self._block_size, self._bitmap_size)
        if image.footer.kind == DIFFERENCING:
            self.link = read_link(file, self._header)
        self.trim_zeroes = self.link is None
        #: Where what is used ends, and where the footer stands: there, or where some blocks to come will end.
        self._end = self._footer_place = image.end
        self._names = image.names(self._header, file.size())
        self._allocating = threading.Lock()
        self._flush = SharedFlush(self._write_bitmaps)
        if image.untidy and not self.readonly:
            self._tidy()

    def _tidy(self) -> None:
        """Put the footer where it belongs, with nothing before it that new blocks would show."""
        file = self.file
        if file.read_bytes(0, SECTOR) != self._footer.pack():
            file.write_bytes(0, self._footer.pack())
            file.flush()
        file.truncate(self._end)
        file.write_bytes(self._end, self._footer.pack())
        file.flush()

    # Reading

    def read_layer(self, offset: int, views: Sequence[memoryview]) -> list[tuple[int, list[memoryview]]]:
        length = total(views)
        block, inside = divmod(offset, self._block_size)
        entry = self._table[block]
        if entry != UNUSED and inside + length <= self._block_size and self._bitmaps.is_full(block):
            self.file.read(entry * SECTOR + self._bitmap_size + inside, views)  # the usual case, for its speed
            return []
        pieces = Pieces(views)
        missing: list[tuple[int, list[memoryview]]] = []
        gap_end = -1
        for there, start, step, place in self._runs(offset, length):
            piece = pieces.take(step)
            if there:
                self.file.read(place, piece)
                continue
            if start == gap_end:
                missing[-1][1].extend(piece)
            else:
                missing.append((start, piece))
            gap_end = start + step
        return missing

    def _blocks(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Cut a range into (block, offset inside it, length)."""
        size, end = self._block_size, offset + length
        while offset < end:
            block, inside = divmod(offset, size)
            step = min(size - inside, end - offset)
            yield block, inside, step
            offset += step

    def _runs(self, offset: int, length: int) -> Iterator[tuple[bool, int, int, int]]:
        """Cut a range into (whether it is there, offset, length, place in the file)."""
        table, bitmaps, size = self._table, self._bitmaps, self._block_size
        for block, inside, step in self._blocks(offset, length):
            entry = table[block]
            if entry == UNUSED:
                yield False, block * size + inside, step, 0
                continue
            data = entry * SECTOR + self._bitmap_size
            if bitmaps.is_full(block):
                yield True, block * size + inside, step, data + inside
                continue
            for there, first, count in bitmaps.runs(block, inside // SECTOR, step // SECTOR):
                at = first * SECTOR
                yield there, block * size + at, count * SECTOR, data + at

    def layer_extents(self, offset: int, length: int) -> Iterator[Extent]:
        absent = ZERO if self.link is None else PARENT
        last: Extent | None = None
        for there, start, size, place in self._runs(offset, length):
            pieces = self.file.extents(place, size) if there else [(place, size, False)]
            for at, step, stored in pieces:
                kind = DATA if stored else ZERO if there else absent
                if last is not None and last.kind == kind:
                    last.length += step
                    continue
                if last is not None:
                    yield last
                last = Extent(start + at - place, step, kind)
        if last is not None:
            yield last

    # Writing

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        pieces = Pieces(views)
        for block, inside, length in self._blocks(offset, total(views)):
            self.file.write(self._place(block) + inside, pieces.take(length))
            self._bitmaps.mark(block, inside // SECTOR, length // SECTOR)
        if self._bitmaps.too_many:
            self.flush()

    def trim(self, offset: int, length: int) -> None:
        for there, _, size, place in self._runs(offset, length):
            if there:
                self.file.write_zeros(place, size)

    def write_zeros(self, offset: int, length: int) -> None:
        if self.link is None:
            self.trim(offset, length)
            return
        for block, inside, size in self._blocks(offset, length):
            self.file.write_zeros(self._place(block) + inside, size)
            self._bitmaps.mark(block, inside // SECTOR, size // SECTOR)
            if self._bitmaps.too_many:
                self.flush()

    def flush(self) -> None:
        self._flush()

    def _write_bitmaps(self) -> None:
        """Make all data durable, then the bits that tell of it; one thread at a time."""
        waiting = self._bitmaps.take()
        try:
            self.file.flush()
            if waiting:
                for block, bitmap in waiting:
                    self.file.write_bytes(self._table[block] * SECTOR, bitmap)
                self.file.flush()
        except BaseException:
            self._bitmaps.not_done()
            raise
        self._bitmaps.done()

    def _place(self, block: int) -> int:
        """Where the block's data begins in the file; it gets room there if it has none."""
        entry = self._table[block]
        if entry == UNUSED:
            with self._allocating:
                entry = self._table[block]
                if entry == UNUSED:
                    entry = self._allocate(block)
        return entry * SECTOR + self._bitmap_size

    def _allocate(self, block: int) -> int:
        file = self.file
        place = self._next_place(self._end)
        end = place + self._bitmap_size + self._block_size
        if place // SECTOR >= UNUSED:
            raise OSError(errno.EFBIG, "a VHD file has no room for blocks beyond 2 TiB")
        if end > self._footer_place:
            self._move_footer(self._grown(end))
        entry = place // SECTOR
        if self.link is None:
            file.write_bytes(place, b"\xff" * self._bitmap_size)
        # Whatever becomes of the entry, nothing else may come to lie there.
        self._end = end
        file.write_bytes(self._header.table_offset + 4 * block, struct.pack(">I", entry))
        if self.link is None:
            self._bitmaps.fill(block)
        self._table[block] = entry
        return entry

    def _next_place(self, end: int) -> int:
        """Where a block's bitmap goes behind `end`: not where a footer may be, and so that its data is aligned."""
        place = end + SECTOR
        return place + -(place + self._bitmap_size) % _ALIGNMENT

    def _grown(self, end: int) -> int:
        """Where blocks that follow one another from `end` on will end, once the file is longer."""
        size = self._bitmap_size + self._block_size
        least, most = _GROWTH
        for _ in range(min(max(end, least), most) // size):
            end = self._next_place(end) + size
        return end

    def _move_footer(self, place: int) -> None:
        """Make the file longer, with its footer at `place`, on stable storage."""
        self.file.write_bytes(place, self._footer.pack())
        self.file.flush()
        self._footer_place = place

    def _cut_off(self) -> None:
        """Give up the room for blocks to come."""
        self.file.write_bytes(self._end, self._footer.pack())
        self.file.flush()
        self.file.truncate(self._end + SECTOR)
        self.file.flush()
        self._footer_place = self._end

    # The whole image

    def resize(self, size: int) -> None:
        self._new_size(size)
        if self.link is not None and self.parent is None:
            raise DiskError(f"{self.path}: its parent is not open; open the disk with it to resize it")
        file, old = self.file, self.size
        with self._allocating:
            entries = -(-size // self._block_size)
            if entries > self._header.entries:
                self._grow_table(entries)
        self._clear(old, size)
        self.flush()
        with self._allocating:
            footer = self._footer.resized(size)
            file.write_bytes(0, footer.pack())
            file.flush()
            self._footer = footer
            self._move_footer(self._footer_place)
            self.size = size

    def _clear(self, old: int, size: int) -> None:
        """Make all that is added read as zeros, also where a parent is larger, or a block beyond the end held data."""
        shown = min(size, self.parent.size) if self.parent is not None else 0
        if shown > old:
            self.write_zeros(old, shown - old)
        self.trim(max(old, shown), size - max(old, shown))

    def _grow_table(self, entries: int) -> None:
        file, header = self.file, self._header
        added = struct.pack(">I", UNUSED) * (entries - header.entries)
        end = header.table_offset + 4 * header.entries
        if len(added) <= -end % SECTOR and not any(
            start < end + len(added) and end < stop for start, stop, _ in self._names
        ):
            place = header.table_offset
            file.write_bytes(end, added)
        else:
            self._cut_off()
            place = self._end + SECTOR
            old = file.read_bytes(header.table_offset, 4 * header.entries)
            self._end = place + len(old) + len(added)
            self._end += -self._end % SECTOR
            self._move_footer(self._end)
            file.write_bytes(place, old + added)
        file.flush()
        header = header.moved(place, entries)
        file.write_bytes(self._footer.header_offset, header.pack())
        file.flush()
        self._header = header
        self._table.extend([UNUSED] * (entries - len(self._table)))
        self._bitmaps.grow()

    def close(self) -> None:
        try:
            if self.file.fd >= 0 and not self.readonly:
                self.flush()
                if self._footer_place != self._end:
                    self._cut_off()
        finally:
            self.file.close()
            if self.parent is not None:
                self.parent.close()

    def inspect(self) -> dict[str, Any]:
        used = len(self._table) - self._table.count(UNUSED)
        found = super().inspect() | {"block_size": self._block_size, "blocks": len(self._table), "blocks_used": used}
        if self.link is not None:
            found["parent_name"] = self.link.name
        return found
