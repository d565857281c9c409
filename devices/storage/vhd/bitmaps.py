"""The sector bitmaps of a VHD image's blocks: in memory, and on the medium only after the data that they speak of."""

from __future__ import annotations

import threading

from devices.storage.vhd.layout import SECTOR, UNUSED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array

    from devices.storage.file import HostFile

#: Bytes of bitmaps that are kept at most, but for those that wait to be written.
_KEPT = 4 << 20
#: Bytes of bitmaps that may wait to be written.
_WAITING = 4 << 20


class Bitmaps:
    """Which sectors of each block the image holds. A block whose sectors are all there, the usual case, costs a byte.

    The first sector of a block is the highest bit of its bitmap's first byte. May be used from several threads.
    """

    def __init__(self, file: HostFile, table: array[int], block_size: int, bitmap_size: int) -> None:
        self._file = file
        self._table = table
        self._used = block_size // SECTOR // 8
        self._size = bitmap_size
        self._limit = max(8, _KEPT // bitmap_size)
        self._full = bytearray(len(table))
        self._kept: dict[int, bytearray] = {}
        self._waiting: set[int] = set()
        self._writing: set[int] = set()
        self._lock = threading.Lock()

    def grow(self) -> None:
        """Follow the table, which has grown."""
        self._full += bytes(len(self._table) - len(self._full))

    def fill(self, block: int) -> None:
        """Note that a new block's bitmap has been written with all its sectors there."""
        self._full[block] = 1

    def is_full(self, block: int) -> bool:
        """Whether the image holds all sectors of an allocated block; raises OSError."""
        if self._full[block]:
            return True
        with self._lock:
            self._bitmap(block)
        return bool(self._full[block])

    def runs(self, block: int, first: int, count: int) -> list[tuple[bool, int, int]]:
        """Cut `count` sectors of an allocated block into runs of (whether they are there, first, count)."""
        with self._lock:
            bitmap = self._bitmap(block)
            start, stop = first // 8, -(-(first + count) // 8)
            bits = f"{int.from_bytes(bitmap[start:stop], 'big'):0{(stop - start) * 8}b}"
        base = start * 8
        at, end = first - base, first + count - base
        runs = []
        while at < end:
            there = bits[at] == "1"
            stop = bits.find("0" if there else "1", at, end)
            if stop < 0:
                stop = end
            runs.append((there, base + at, stop - at))
            at = stop
        return runs

    def mark(self, block: int, first: int, count: int) -> None:
        """Note that sectors of an allocated block, written already, are there; raises OSError."""
        if self._full[block]:
            return
        with self._lock:
            bitmap = self._bitmap(block)
            start, stop = first // 8, -(-(first + count) // 8)
            mask = ((1 << count) - 1) << (stop * 8 - first - count)
            bits = int.from_bytes(bitmap[start:stop], "big")
            if bits | mask != bits:
                bitmap[start:stop] = (bits | mask).to_bytes(stop - start, "big")
                self._waiting.add(block)
                self._all_there(block, bitmap)

    @property
    def too_many(self) -> bool:
        """Whether so many bitmaps wait to be written that the disk should flush."""
        return len(self._waiting) * self._size > _WAITING

    def take(self) -> list[tuple[int, bytes]]:
        """(block, bitmap) of all that wait to be written, as they are now; `done` or `not_done` is to follow."""
        with self._lock:
            self._writing, self._waiting = self._waiting, set()
            return [(block, bytes(self._kept[block])) for block in sorted(self._writing)]

    def done(self) -> None:
        """What was taken is on stable storage."""
        with self._lock:
            self._writing = set()

    def not_done(self) -> None:
        """What was taken may not be: it waits on."""
        with self._lock:
            self._waiting |= self._writing
            self._writing = set()

    def _bitmap(self, block: int) -> bytearray:
        bitmap = self._kept.pop(block, None)
        if bitmap is None:
            entry = self._table[block]
            assert entry != UNUSED
            bitmap = bytearray(self._file.read_bytes(entry * SECTOR, self._size))
            if self._all_there(block, bitmap):
                return bitmap
            self._make_room()
        self._kept[block] = bitmap  # at the end: what was used last is dropped last
        return bitmap

    def _all_there(self, block: int, bitmap: bytearray) -> bool:
        if bitmap.count(0xFF, 0, self._used) == self._used:
            self._full[block] = 1
        return bool(self._full[block])

    def _make_room(self) -> None:
        if len(self._kept) < self._limit:
            return
        for block in self._kept:
            if block not in self._waiting and block not in self._writing:
                del self._kept[block]
                return
