"""Comparing disks of any format by what a guest would read of them."""

from __future__ import annotations

import threading

from devices.storage.backend import DATA, Extent
from devices.storage.copy import CHUNK, ignore, in_parallel, pieces
from devices.storage.merge import extents_above, layers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from devices.storage.backend import Disk
    from devices.storage.copy import Progress

#: Ranges that are listed; a comparison of two large unlike disks is to end with a message, not with all memory taken.
MAX_RANGES = 100_000
_ZERO_CHUNK = bytes(CHUNK)


class Difference:
    """What `compare` found: `ranges` as (offset, length) in order, and the `differing` bytes in all.

    `listed` is false if there are more ranges than those. Zeros beyond the end of the smaller disk are no difference.
    """

    def __init__(self, ranges: list[tuple[int, int]], differing: int, listed: bool) -> None:
        self.ranges = ranges
        self.differing = differing
        self.listed = listed


class _Enough(Exception):
    """One difference was all that was asked for."""


def compare(first: Disk, second: Disk, progress: Progress = ignore, stop_at_first: bool = False) -> Difference:
    """Compare in steps of the smaller sector; raises OSError."""
    ranges: list[tuple[int, int]] = []
    differing = 0
    lock = threading.Lock()
    grain = min(first.sector_size, second.sector_size)

    def read(disk: Disk, extent: Extent, buffer: memoryview) -> None:
        inside = max(0, min(extent.length, disk.size - extent.offset))
        if inside:
            disk.read(extent.offset, [buffer[:inside]])
        buffer[inside:] = _ZERO_CHUNK[: len(buffer) - inside]

    def look(extent: Extent, buffer: memoryview) -> None:
        nonlocal differing
        ours = buffer[: extent.length]
        theirs = bytearray(extent.length)
        read(first, extent, ours)
        read(second, extent, memoryview(theirs))
        if theirs == ours:
            return
        found = _joined(_differing(bytes(ours), bytes(theirs), extent.offset, grain))
        with lock:
            differing += sum(length for _, length in found)
            ranges.extend(found[: MAX_RANGES - len(ranges)])
        if stop_at_first:
            raise _Enough

    try:
        in_parallel((piece for extent in _regions(first, second) for piece in pieces(extent)), look, progress)
    except _Enough:
        pass
    return Difference(_joined(sorted(ranges)), differing, len(ranges) < MAX_RANGES)


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours among ascending ranges made one."""
    found: list[tuple[int, int]] = []
    for offset, length in ranges:
        if found and sum(found[-1]) == offset:
            found[-1] = found[-1][0], found[-1][1] + length
        else:
            found.append((offset, length))
    return found


def _differing(ours: bytes, theirs: bytes, offset: int, grain: int) -> Iterator[tuple[int, int]]:
    """The ranges of `grain` bytes in which two buffers at `offset` differ, by halves; some of them are neighbours."""
    if ours == theirs:
        return
    if len(ours) <= grain:
        yield offset, len(ours)
        return
    half = max(grain, len(ours) // 2 // grain * grain)
    yield from _differing(ours[:half], theirs[:half], offset, grain)
    yield from _differing(ours[half:], theirs[half:], offset + half, grain)


def _regions(first: Disk, second: Disk) -> Iterator[Extent]:
    """DATA wherever the disks may differ: what one holds above the other, its parent, or else all data of both."""
    for child, base in ((first, second), (second, first)):
        if base in layers(child)[1:]:
            for extent in extents_above(child, base, 0, child.size):
                if extent.kind == DATA:
                    yield extent
                else:  # zeros that hide what the base holds
                    inside = max(0, min(extent.length, base.size - extent.offset))
                    yield from (item for item in base.extents(extent.offset, inside) if item.kind == DATA)
            if base.size > child.size:
                yield from (item for item in base.extents(child.size, base.size - child.size) if item.kind == DATA)
            return
    yield from _union(_data(first), _data(second))


def _data(disk: Disk) -> Iterator[tuple[int, int]]:
    for extent in disk.extents(0, disk.size):
        if extent.kind == DATA:
            yield extent.offset, extent.offset + extent.length


def _union(ours: Iterator[tuple[int, int]], theirs: Iterator[tuple[int, int]]) -> Iterator[Extent]:
    """What either covers, of (start, end) in ascending order."""
    from heapq import merge

    at = 0
    for start, end in merge(ours, theirs):
        start = max(start, at)
        if start < end:
            yield Extent(start, end - start, DATA)
            at = end
