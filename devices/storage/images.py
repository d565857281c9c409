"""Opening disk images of every format."""

from __future__ import annotations

from devices.storage.backend import DiskError
from devices.storage.file import HostFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.storage.backend import Disk

#: By suffix of the file's name. Content is never asked: a guest can write any header into a raw image.
SUFFIXES = {".img": "raw", ".raw": "raw", ".iso": "iso"}
FORMATS = ("raw", "iso")


def format_of(path: str) -> str:
    """The format that a path's suffix tells; whatever has none of ours is raw, block devices among it."""
    name = path.rsplit("/", 1)[-1].lower()
    dot = name.rfind(".")
    return SUFFIXES.get(name[dot:], "raw") if dot >= 0 else "raw"


def open_image(path: str, readonly: bool = False, format: str | None = None) -> Disk:
    """Open and lock the image at `path`; raises DiskError."""
    kind = format or format_of(path)
    if kind not in FORMATS:
        raise DiskError(f"{path}: unknown format {kind}; choose from {', '.join(FORMATS)}")
    return open_file(HostFile(path, readonly or kind == "iso"), kind)


def open_file(file: HostFile, kind: str) -> Disk:
    """The disk in an open `file`, which it closes, also when it raises DiskError."""
    from devices.storage.raw import IsoDisk, RawDisk

    return IsoDisk(file) if kind == "iso" else RawDisk(file)
