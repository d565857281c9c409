"""Merging a differencing disk into one of the disks that it differs from."""

from __future__ import annotations

from devices.storage.backend import PARENT, ZERO, Extent
from devices.storage.copy import copy_extents, ignore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from devices.storage.backend import Disk
    from devices.storage.copy import Progress


def layers(disk: Disk) -> list[Disk]:
    """The disk, its parent, that one's parent and so on."""
    found = [disk]
    while (parent := found[-1].parent) is not None:
        found.append(parent)
    return found


def extents_above(disk: Disk, base: Disk, offset: int, length: int) -> Iterator[Extent]:
    """How the disk and its parents above `base` store a range: DATA and ZERO; what they leave to `base` is left out.

    Raises OSError.
    """
    for extent in disk.layer_extents(offset, length):
        parent = disk.parent
        if extent.kind != PARENT:
            yield extent
        elif parent is not None and parent is not base:
            inside = max(0, min(extent.length, parent.size - extent.offset))
            if inside:
                yield from extents_above(parent, base, extent.offset, inside)
            if inside < extent.length:
                yield Extent(extent.offset + inside, extent.length - inside, ZERO)


def merge(child: Disk, base: Disk, progress: Progress = ignore) -> None:
    """Make `base`, one of the parents of `child`, read as `child` does; raises DiskError or OSError.

    All of it is on stable storage then, and `child` still reads as before, so its image may go. Ended at any
    instant, a merge can be done again: the child is only read. A base that is smaller grows, a larger one stays so.
    """
    if base.size < child.size:
        base.resize(child.size)
    copy_extents(child, base, extents_above(child, base, 0, child.size), progress)
    base.flush()
