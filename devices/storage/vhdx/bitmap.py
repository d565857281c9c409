"""Sector bitmaps of a differencing VHDX: which sectors of a partially present block are in this file. MS-VHDX 2.5."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from devices.storage.file import HostFile

#: Bytes of a bitmap that are read, kept and logged together.
PAGE = 4096
#: Pages of one bitmap.
BITMAP_PAGES = 256
_PAGE_SECTORS = PAGE * 8
#: Pages without changes that are kept.
_MAX_PAGES = 4096


class SectorBitmaps:
    """The bits of all sectors of the disk, by sector number. Calls are serialised by the caller; they raise OSError.

    `locate` tells where in the file the bitmap page of a number is. Pages are numbered through.
    """

    def __init__(self, file: HostFile, locate: Callable[[int], int]) -> None:
        self._file = file
        self._locate = locate
        self._pages: dict[int, bytearray] = {}
        #: Numbers of pages that differ from what was last put into the log.
        self.dirty: set[int] = set()
        #: Numbers of pages that are being logged, so that the file does not have their content yet.
        self.pinned: set[int] = set()

    def page(self, number: int) -> bytearray:
        """The page's content as it is now."""
        page = self._pages.get(number)
        if page is None:
            page = bytearray(PAGE)
            self._file.read(self._locate(number), [memoryview(page)])
            while len(self._pages) >= _MAX_PAGES and (victim := self._clean_page()) is not None:
                del self._pages[victim]
            self._pages[number] = page
        return page

    def _clean_page(self) -> int | None:
        return next((number for number in self._pages if number not in self.dirty and number not in self.pinned), None)

    def runs(self, sector: int, count: int) -> Iterator[tuple[int, bool]]:
        """How many sectors from `sector` on are alike, and whether they are in this file, until `count` is covered."""
        while count:
            number, bit = divmod(sector, _PAGE_SECTORS)
            inside = min(count, _PAGE_SECTORS - bit)
            first, last = bit // 8, -(-(bit + inside) // 8)
            bits = int.from_bytes(self.page(number)[first:last], "little") >> bit % 8
            sector, count = sector + inside, count - inside
            while inside:
                present = bool(bits & 1)
                alike = ~bits if present else bits
                length = min((alike & -alike).bit_length() - 1 if alike else inside, inside)
                yield length, present
                bits >>= length
                inside -= length

    def change(self, sector: int, count: int, present: bool) -> None:
        """Say of sectors that they are in this file, or aren't."""
        while count:
            number, bit = divmod(sector, _PAGE_SECTORS)
            inside = min(count, _PAGE_SECTORS - bit)
            first, last = bit // 8, -(-(bit + inside) // 8)
            page = self.page(number)
            before = int.from_bytes(page[first:last], "little")
            mask = (1 << inside) - 1 << bit % 8
            after = before | mask if present else before & ~mask
            if after != before:
                page[first:last] = after.to_bytes(last - first, "little")
                self.dirty.add(number)
            sector, count = sector + inside, count - inside

    def all_present(self, sector: int, count: int) -> bool:
        """Whether all of these sectors are in this file."""
        return all(present for _, present in self.runs(sector, count))

    def drop(self, chunk: int) -> None:
        """Forget the bitmaps from this one on, which the disk is no longer to have."""
        gone = {number for number in self._pages if number >= chunk * BITMAP_PAGES}
        self.dirty -= gone
        for number in gone:
            del self._pages[number]
