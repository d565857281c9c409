"""What an image is, told without disturbing those who use it."""

from __future__ import annotations

import os

from devices.storage.backend import DiskError
from devices.storage.file import HostFile
from devices.storage.images import DIFFERENCING, known, open_layer
from devices.storage.merge import layers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from devices.storage.backend import Disk

#: How often an image that somebody writes is looked at until it makes sense.
_TRIES = 5


def describe(path: str, format: str | None = None) -> dict[str, Any]:
    """The image at `path` and its parents, as plain JSON data; raises DiskError if it cannot be read.

    What `Disk.inspect` tells, and `size_on_disk`, `identity`, `geometry`; `in_use`: whether somebody writes it; and
    `problem`: why not all its parents are there. Nothing is locked, so nobody is kept from using it meanwhile.
    """
    kind = known(path, format)
    disk, in_use = _open(path, kind)
    try:
        problem = _open_parents(disk) if kind in DIFFERENCING else None
        found = disk.inspect()
        found.update(in_use=in_use, problem=problem)
        node = found
        for layer in layers(disk):
            node["size_on_disk"] = _size_on_disk(layer.path)
            node["identity"] = layer.identity.hex()
            shape = layer.geometry
            del node["readonly"]  # which tells of this look at it
            node["geometry"] = {"cylinders": shape.cylinders, "heads": shape.heads, "sectors": shape.sectors}
            node = node["parent"]
        return found
    finally:
        disk.close()


def _open(path: str, kind: str) -> tuple[Disk, bool]:
    """The image alone, and whether somebody writes it, who may just be between two states of it."""
    for left in reversed(range(_TRIES)):
        file = HostFile(path, readonly=True, lock=False)
        in_use = file.written()
        try:
            return open_layer(file, kind), in_use
        except DiskError:
            if not (in_use and left):
                raise
    raise AssertionError("the last try returns or raises")


def _open_parents(disk: Disk) -> str | None:
    """Open the parents there are; return what is wrong with the first that cannot be had."""
    from devices.storage.chain import Layer, open_parents

    assert isinstance(disk, Layer)
    try:
        open_parents(disk, lock=False)
    except DiskError as error:
        return str(error)
    return None


def _size_on_disk(path: str) -> int | None:
    """Bytes that a file takes on its file system, holes left out; None for a device."""
    status = os.stat(path)
    return status.st_blocks * 512 if status.st_size else None
