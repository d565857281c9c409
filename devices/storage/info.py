"""What an image is, told without disturbing those who use it."""

from __future__ import annotations

import os

from devices.storage.file import InUse
from devices.storage.images import open_image
from devices.storage.merge import layers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def describe(path: str, format: str | None = None) -> dict[str, Any]:
    """The image at `path` and its parents, as plain JSON data; raises DiskError.

    What `Disk.inspect` tells, and `size_on_disk`, `identity`, `geometry` and `in_use`: whether somebody writes it.
    """
    in_use = False
    try:
        disk = open_image(path, readonly=True, format=format)
    except InUse:
        in_use = True
        disk = open_image(path, readonly=True, format=format, lock=False)
    try:
        found = disk.inspect()
        found["in_use"] = in_use
        node = found
        for layer in layers(disk):
            node["size_on_disk"] = _size_on_disk(layer.path)
            node["identity"] = layer.identity.hex()
            shape = layer.geometry
            node["geometry"] = {"cylinders": shape.cylinders, "heads": shape.heads, "sectors": shape.sectors}
            node = node["parent"]
        return found
    finally:
        disk.close()


def _size_on_disk(path: str) -> int | None:
    """Bytes that a file takes on its file system, holes left out; None for a device."""
    status = os.stat(path)
    return status.st_blocks * 512 if status.st_size else None
