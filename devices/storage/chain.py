"""Differencing disks: what VHD and VHDX share for finding, opening and reading the parents of an image.

An image opens as one `Layer`, which knows by its `ParentLink` what its parent is called. `open_parents` opens the
others beneath it, all readonly and with shared locks, so several children may use one parent that nobody writes.
"""

from __future__ import annotations

import os

from devices.storage.backend import Disk, DiskError
from devices.storage.file import HostFile
from devices.storage.views import Pieces, fill_zeros, total

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Parents below one disk. Hyper-V's limit is lower; this one only keeps hostile images from using up files.
MAX_PARENTS = 256

_PATH_MAX = 4096


class ParentLink:
    """What an image says of its parent: what it calls it, the host's paths to try in this order, and its format.

    `mismatch` tells why an opened image is not that parent, or returns an empty string for the right one.
    """

    __slots__ = ("format", "mismatch", "name", "paths")

    def __init__(self, name: str, paths: Sequence[str], format: str, mismatch: Callable[[Layer], str]) -> None:
        self.name = name
        self.paths = paths
        self.format = format
        self.mismatch = mismatch


class Layer(Disk):
    """A disk in an image of its own `file`, which may differ from a `parent`."""

    file: HostFile
    link: ParentLink | None = None
    parent: Layer | None = None

    def read_layer(self, offset: int, views: Sequence[memoryview]) -> list[tuple[int, list[memoryview]]]:
        """Fill what this image alone knows of `views`; return the other places, which the parent has."""
        raise NotImplementedError

    def before_merge(self) -> None:
        """Called before the parent's content changes for good: see that this image goes on knowing its parent.

        Both are open for writing, and nothing was written yet. Raises DiskError or OSError.
        """

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        rest = self.read_layer(offset, views)
        layer = self.parent
        # A loop and not a recursion: chains may be deeper than Python's stack allows.
        while rest:
            if layer is None:
                for _, missing in rest:
                    fill_zeros(missing)
                return
            deeper = []
            for start, missing in rest:
                deeper += _read_inside(layer, start, missing)
            rest, layer = deeper, layer.parent


def _read_inside(layer: Layer, offset: int, views: list[memoryview]) -> list[tuple[int, list[memoryview]]]:
    """Read from a parent, which may be smaller than its child: beyond its end are zeros."""
    length = total(views)
    inside = max(0, min(length, layer.size - offset))
    if inside < length:
        pieces = Pieces(views)
        views = pieces.take(inside)
        fill_zeros(pieces.take(length - inside))
    return layer.read_layer(offset, views) if inside else []


def open_parents(leaf: Layer, writable: int = 0, lock: bool = True) -> None:
    """Open all that `leaf` differs from; raises DiskError. What was opened until then goes with `leaf.close`.

    The first `writable` parents are opened for writing, which nobody else may use then. Without `lock` all may be used
    meanwhile.
    """
    seen = {leaf.file.key()}
    layer = leaf
    while layer.link is not None:
        if len(seen) > MAX_PARENTS:
            raise DiskError(f"{leaf.path}: more than {MAX_PARENTS} parents down to {layer.path}; merge some of them")
        layer.parent = _open_parent(layer, layer.link, seen, len(seen) > writable, lock)
        layer = layer.parent


def _open_parent(child: Layer, link: ParentLink, seen: set[tuple[int, int]], readonly: bool, lock: bool) -> Layer:
    refusal = None
    for path in link.paths:
        try:
            status = os.stat(path)
        except OSError:
            continue
        key = status.st_dev, status.st_ino
        if key in seen:
            refusal = refusal or f"its parent {path} comes above it in the same chain, which thus never ends"
            continue
        try:
            parent = _open_layer(path, link.format, readonly, lock)
        except DiskError as error:
            refusal = refusal or f"its parent cannot be used: {error}"
            continue
        why = link.mismatch(parent)
        if not why:
            seen.add(key)
            return parent
        parent.close()
        refusal = refusal or f"{path} is not the parent that it was made from: {why}; find the right one"
    if refusal is None:
        where = ", ".join(link.paths) or "no path that a host could have"
        refusal = f"its parent {printable(link.name)} is missing, looked for at {where}; put it there, or a link to it"
    raise DiskError(f"{child.path}: {refusal}")


def _open_layer(path: str, format: str, readonly: bool, lock: bool) -> Layer:
    from devices.storage.images import open_layer  # not at the top: it imports the formats, and they this module

    layer = open_layer(HostFile(path, readonly, lock), format)
    assert isinstance(layer, Layer)
    return layer


def parent_paths(child: str, relative: Sequence[str], absolute: Sequence[str]) -> list[str]:
    """The host's paths that the parent of the image `child` may have, best first.

    Relative names count from the folder that `child` really lies in. Names may be Windows' own: with
    backslashes, on a drive (C:\\x is tried as /mnt/c/x, where such drives are mounted, and as /x), behind \\\\?\\, or
    on a server. Last comes the file's mere name beside the child, for images that moved together.
    """
    folder = os.path.dirname(os.path.realpath(child))
    paths = [os.path.join(folder, _slashes(name).lstrip("/")) for name in relative]
    for name in absolute:
        paths += _rooted(_slashes(name))
    paths += [os.path.join(folder, _slashes(name).rsplit("/", 1)[-1]) for name in (*relative, *absolute)]
    usable = (os.path.normpath(path) for path in paths if _possible(path))
    return list(dict.fromkeys(path for path in usable if path != folder))


def relative_name(child: str, parent: str) -> str:
    """How Windows writes the way from the image `child` to `parent`: .\\base.vhd; raises DiskError."""
    name = os.path.relpath(os.path.realpath(parent), os.path.dirname(os.path.realpath(child)))
    return _backslashes(name if name.startswith("../") else f"./{name}")


def absolute_name(parent: str) -> str:
    """The path of `parent` as Windows would write it, though without a drive; raises DiskError."""
    return _backslashes(os.path.realpath(parent))


def printable(text: str) -> str:
    """`text` from an image, fit for one line of a message."""
    return ascii(text[:256])


def _slashes(name: str) -> str:
    return name.replace("\\", "/")


def _backslashes(path: str) -> str:
    if "\\" in path or not _possible(path):
        raise DiskError(f"{printable(path)}: a child cannot name a parent whose path has such characters; rename it")
    return path.replace("/", "\\")


def _rooted(path: str) -> list[str]:
    """Absolute paths for `path`, which has slashes only; none for what lies on a server or an unnamed volume."""
    if path.startswith(("//?/", "//./")):
        path = path[4:]
    if path[1:3] == ":/" and path[0].isascii() and path[0].isalpha():
        return [f"/mnt/{path[0].lower()}{path[2:]}", path[2:]]
    return [path] if path.startswith("/") and not path.startswith("//") else []


def _possible(path: str) -> bool:
    """Whether the host could have such a path, and a message may show it as one line."""
    return path.isprintable() and len(os.fsencode(path)) < _PATH_MAX
