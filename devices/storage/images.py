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
#: Formats with differencing disks.
DIFFERENCING = ("vhd", "vhdx")


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
    """The disk in an open `file` with its parents; it closes `file`, also when this raises DiskError."""
    disk = open_layer(file, kind)
    if kind in DIFFERENCING:
        from devices.storage.chain import Layer, open_parents

        assert isinstance(disk, Layer)
        try:
            open_parents(disk)
        except BaseException:
            disk.close()
            raise
    return disk


def open_layer(file: HostFile, kind: str) -> Disk:
    """What an open `file` alone makes; of a differencing disk that is not all that can be read."""
    from devices.storage.raw import IsoDisk, RawDisk

    return IsoDisk(file) if kind == "iso" else RawDisk(file)
