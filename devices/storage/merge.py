"""Merging a differencing disk into one of the disks that it differs from."""

from __future__ import annotations

import os

from devices.storage.backend import PARENT, ZERO, DiskError, Extent
from devices.storage.chain import Layer, open_parents
from devices.storage.copy import copy_extents, ignore
from devices.storage.file import HostFile
from devices.storage.images import DIFFERENCING, known, open_image, open_layer

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


def open_to_merge(path: str, format: str | None = None, into: str | None = None) -> tuple[Disk, Disk]:
    """The image at `path`, and the parent to merge it into: its own, or the one at `into`; raises DiskError.

    Closing the first closes all. Both and what is between them are locked against all other use.
    """
    kind = known(path, format)
    if kind not in DIFFERENCING:
        raise DiskError(f"{path}: a {kind} image has no parent; merge takes a differencing image")
    depth = 1 if into is None else depth_of(into, path, kind)
    if depth is None:
        raise DiskError(f"{into}: is none of the parents of {path}; name one of them, or a new image")
    child = open_layer(HostFile(path), kind)
    try:
        assert isinstance(child, Layer)
        open_parents(child, writable=depth)
        found = layers(child)
        if len(found) == 1:
            raise DiskError(f"{path}: has no parent; merge takes a differencing image")
        return child, found[depth]
    except BaseException:
        child.close()
        raise


def depth_of(parent: str, path: str, format: str | None = None) -> int | None:
    """How far below the image at `path` the one at `parent` is, from 1 on, or None; raises DiskError."""
    child = open_image(path, readonly=True, format=format)
    try:
        found = layers(child)[1:]
        return next((depth for depth, layer in enumerate(found, 1) if os.path.samefile(layer.path, parent)), None)
    finally:
        child.close()


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
    above = layers(child)[layers(child).index(base) - 1]
    if isinstance(above, Layer):
        above.before_merge()
    if base.size < child.size:
        base.resize(child.size)
    copy_extents(child, base, extents_above(child, base, 0, child.size), progress)
    base.flush()
