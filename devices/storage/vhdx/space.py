"""Where in a VHDX file there is room for a block. Offsets and lengths are in MiB here, the format's unit."""

from __future__ import annotations

from array import array

from devices.storage.vhdx.format import MIB, PRESENT, STATE_MASK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.storage.file import HostFile
    from devices.storage.vhdx.format import Layout
    from pyvmm.core._hot import BlockTable

_PIECE = 1 << 16


class Space:
    """The unused ranges of `file` below its end, from which `take` serves before it makes the file longer.

    What it hands out reads as zeros. Calls are serialised by the caller.
    """

    def __init__(self, file: HostFile, used: list[tuple[int, int]]) -> None:
        """`used` has offset and length of everything in the file, in any order."""
        self._file = file
        self.end = -(-file.size() // MIB)
        #: Start and length of each unused range, in order.
        self.free: list[tuple[int, int]] = []
        at = 0
        for start, length in sorted(used):
            if start > at:
                self.free.append((at, min(start, self.end) - at))
            at = max(at, start + length)
        if at < self.end:
            self.free.append((at, self.end - at))

    def take(self, length: int) -> int:
        """Where `length` MiB of zeros are; raises OSError."""
        for index, (start, room) in enumerate(self.free):
            if room >= length:
                # An earlier session may have left anything there.
                self._file.write_zeros(start * MIB, length * MIB)
                if room == length:
                    del self.free[index]
                else:
                    self.free[index] = start + length, room - length
                return start
        start = self.end
        self._file.truncate((start + length) * MIB)
        self.end = start + length
        return start

    def give(self, ranges: list[tuple[int, int]]) -> None:
        """Take back what nothing on stable storage points to any more."""
        merged: list[tuple[int, int]] = []
        for start, length in sorted(self.free + ranges):
            if merged and sum(merged[-1]) == start:
                merged[-1] = merged[-1][0], merged[-1][1] + length
            else:
                merged.append((start, length))
        self.free = merged

    def cut(self) -> int:
        """Forget about unused room at the file's end; return where it can be cut off, in bytes."""
        if self.free and sum(self.free[-1]) == self.end:
            self.end = self.free.pop()[0]
        return self.end * MIB


def used_by(table: BlockTable, layout: Layout, loaded: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offset and length of everything that the table points to, in MiB.

    `loaded` has first entry and number of entries of what of the table may be in use.
    """
    block = layout.block_size // MIB
    stride = layout.chunk_blocks + 1
    used = []
    for start, count in loaded:
        for first in range(start, start + count, _PIECE):
            data = table.entries(first, min(_PIECE, start + count - first))
            if not data.strip(b"\0"):
                continue
            for index, entry in enumerate(array("Q", data), first):
                if entry & STATE_MASK >= PRESENT:
                    used.append((entry >> 20, 1 if index % stride == layout.chunk_blocks else block))
    return used
