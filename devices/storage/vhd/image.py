"""A look at a whole VHD image before it is used: its structures, where they lie, and what is wrong with them."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, bisect_right
from itertools import pairwise, repeat
from operator import add, gt

from devices.storage.backend import DiskError, Finding
from devices.storage.vhd.layout import (
    DIFFERENCING,
    FIXED,
    HEADER_SIZE,
    MAX_SIZE,
    SECTOR,
    UNUSED,
    Footer,
    Header,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.storage.file import HostFile

#: How far from the last stored byte of the file a footer is sought that an interrupted resize left behind.
_SEARCHED = 1 << 20


class Image:
    """What an image consists of. With an error among `findings` it cannot be used, with warnings it can.

    `end` is where all that the image needs ends, and the footer belongs; `untidy` says that a writer should put it
    there, and its copy at the start.
    """

    def __init__(self, file: HostFile) -> None:
        """Examine the image in `file`; raises DiskError if it is none at all, OSError if it cannot be read."""
        self.findings: list[Finding] = []
        self.untidy = False
        self.header: Header | None = None
        self.end = 0
        self.table = array("I")
        file_size = file.size()
        tail = _footer_at(file, file_size - SECTOR)
        # The end comes first: the guest of a fixed disk can write a footer to the start of the image, not to its end.
        if isinstance(tail, Footer) and tail.kind == FIXED:
            self.footer, self.end = tail, tail.current_size
        else:
            self._find_start(file, file_size, tail)
        if self.footer.kind != FIXED:
            self._read_header(file)
        size = self.footer.size
        if not 0 < size <= MAX_SIZE or size % SECTOR:
            self._error(f"disk size of {size} bytes; it must be a multiple of 512, and at most 2040 GiB")
        if self.header is not None:
            self._read_table(file, self.header)
        self._measure(file.size())  # anew: whoever writes the image may have made it larger meanwhile

    def _find_start(self, file: HostFile, file_size: int, tail: Footer | str) -> None:
        stray = None if isinstance(tail, Footer) else _stray_footer(file, file_size)
        copy = _footer_at(file, 0)
        if stray is not None:
            self.footer, self.end = stray, stray.current_size
            self._warning("a resize of it was interrupted; it has its old size")
        elif isinstance(copy, Footer) and copy.kind != FIXED:
            self.footer = copy
            if not isinstance(tail, Footer):
                self._warning(f"{tail} at the end of the file; there is a good copy at its start")
            elif tail.pack() != copy.pack():
                self._warning("the footer differs from its copy at the start of the file, which counts")
        elif isinstance(tail, Footer):
            self.footer = tail
            self._warning(
                f"{copy if isinstance(copy, str) else 'another footer'} at the start of the file, but at its end"
            )
        else:
            raise DiskError(f"{file.path}: {tail} at the end of the file, {copy} at its start; is it a VHD image?")

    def _read_header(self, file: HostFile) -> None:
        offset = self.footer.header_offset
        try:
            if offset < SECTOR or offset + HEADER_SIZE > file.size():
                raise ValueError(f"no dynamic disk header: {offset:#x} is outside the file")
            self.header = Header(file.read_bytes(offset, HEADER_SIZE))
        except ValueError as error:
            self._error(str(error))

    def _read_table(self, file: HostFile, header: Header) -> None:
        needed = -(-self.footer.size // header.block_size)
        if header.entries < needed:
            self._error(f"allocation table of {header.entries} entries for {needed} blocks")
            return
        length = 4 * header.entries
        if header.table_offset + length > file.size():
            self._error("the allocation table lies beyond the end of the file: it was cut short")
            return
        self.table = array("I", file.read_bytes(header.table_offset, length))
        if sys.byteorder == "little":
            self.table.byteswap()

    def _measure(self, file_size: int) -> None:
        """Find the end of what is used, and what overlaps on the way there."""
        if self.footer.kind == FIXED:
            if self.end + SECTOR > file_size:
                self._error(f"the file was cut short: {self.end} bytes of the disk and a footer do not fit")
            return
        if self.header is None:
            return
        structures = self.structures(self.header)
        for (_, end, one), (start, _, other) in pairwise(structures):
            if end > start:
                self._error(f"{one} and {other} overlap")
        regions = structures + self.names(self.header, file_size)
        self.end = max(end for _, end, _ in regions)
        self.end += -self.end % SECTOR
        stride = self.header.bitmap_size + self.header.block_size
        self._measure_blocks(stride // SECTOR, regions, file_size)
        unused = file_size - SECTOR - self.end
        if unused >= stride:
            self._warning(f"{unused} bytes behind its last block are unused: whoever wrote it did not close it")
        elif unused % SECTOR:
            self.untidy = True
        elif unused > 0 and not self.untidy:
            self.end += unused  # Hyper-V aligns what it writes

    def _measure_blocks(self, stride: int, regions: list[tuple[int, int, str]], file_size: int) -> None:
        blocks = sorted(entry for entry in self.table if entry != UNUSED)
        if not blocks:
            return
        for start, end, what in regions:
            if bisect_right(blocks, start // SECTOR - stride) < bisect_left(blocks, -(-end // SECTOR)):
                self._error(f"a block overlaps the {what}")
        if any(map(gt, map(add, blocks, repeat(stride)), blocks[1:])):
            self._error("blocks overlap: two parts of the disk lie in the same place of the file")
        beyond = len(blocks) - bisect_right(blocks, file_size // SECTOR - stride)
        if beyond:
            self._error(f"the file was cut short: {beyond} of {len(blocks)} blocks lie beyond its end")
        self.end = max(self.end, (blocks[-1] + stride) * SECTOR)

    def structures(self, header: Header) -> list[tuple[int, int, str]]:
        """(start, end, what) of those that no block may touch, in the order of the file."""
        at, table = self.footer.header_offset, header.table_offset
        return sorted(
            [
                (0, SECTOR, "copy of the footer"),
                (at, at + HEADER_SIZE, "header"),
                (table, table + 4 * header.entries, "allocation table"),
            ]
        )

    def names(self, header: Header, file_size: int) -> list[tuple[int, int, str]]:
        """The same of the parent's names, as far as the file has them."""
        if self.footer.kind != DIFFERENCING:
            return []
        places = [(offset, offset + length) for _, offset, length in header.locators()]
        return [(start, end, "name of the parent") for start, end in places if start < end <= file_size]

    def refuse(self, path: str) -> None:
        """Raise DiskError if there is an error."""
        for finding in self.findings:
            if finding.severity == "error":
                raise DiskError(f"{path}: damaged: {finding.message}")

    def _error(self, message: str) -> None:
        self.findings.append(Finding("error", message))

    def _warning(self, message: str) -> None:
        self.findings.append(Finding("warning", message))
        self.untidy = True


def _footer_at(file: HostFile, offset: int) -> Footer | str:
    """The footer at an offset of the file, or why it is none."""
    if offset < 0 or offset + SECTOR > file.size():
        return "no VHD footer"
    try:
        return Footer(file.read_bytes(offset, SECTOR))
    except ValueError as error:
        return str(error)


def _stray_footer(file: HostFile, file_size: int) -> Footer | None:
    """The footer of a fixed disk that is followed by nothing but zeros, up to the end of a longer file."""
    end = 0
    for start, length, stored in file.extents(0, file_size):
        if stored:
            end = start + length
    start = max(0, end - _SEARCHED)
    at = file.read_bytes(start, end - start).rfind(b"conectix")
    footer = _footer_at(file, start + at) if at >= 0 else ""
    if isinstance(footer, Footer) and footer.kind == FIXED and footer.current_size == start + at:
        return footer
    return None
