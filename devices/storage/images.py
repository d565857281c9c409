"""Opening disk images of every format."""

from __future__ import annotations

from devices.storage.backend import DiskError
from devices.storage.file import HostFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.storage.backend import Disk, Finding

#: By suffix of the file's name. Content is never asked: a guest can write any header into a raw image.
SUFFIXES = {".img": "raw", ".raw": "raw", ".iso": "iso", ".vhd": "vhd", ".vhdx": "vhdx"}
FORMATS = ("raw", "iso", "vhd", "vhdx")
#: Formats with differencing disks.
DIFFERENCING = ("vhd", "vhdx")


def format_of(path: str) -> str:
    """The format that a path's suffix tells; whatever has none of ours is raw, block devices among it."""
    name = path.rsplit("/", 1)[-1].lower()
    dot = name.rfind(".")
    return SUFFIXES.get(name[dot:], "raw") if dot >= 0 else "raw"


def open_image(
    path: str, readonly: bool = False, format: str | None = None, lock: bool = True, sector_size: int | None = None
) -> Disk:
    """Open the image at `path`, locked unless `lock` is false, which only readers may ask for; raises DiskError.

    A raw image has sectors of `sector_size` bytes, by default 512; other formats have their own.
    """
    kind = known(path, format)
    if sector_size is not None:
        if kind != "raw":
            raise DiskError(f"{path}: a {kind} image has a sector size of its own; leave the option out")
        from devices.storage.raw import RawDisk

        return RawDisk(HostFile(path, readonly, lock), sector_size)
    return open_file(HostFile(path, readonly or kind == "iso", lock), kind)


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
    if kind == "vhd":
        from devices.storage.vhd.disk import open_vhd

        return open_vhd(file)
    if kind == "vhdx":
        from devices.storage.vhdx.disk import VhdxDisk

        return VhdxDisk(file)
    from devices.storage.raw import IsoDisk, RawDisk

    return IsoDisk(file) if kind == "iso" else RawDisk(file)


def check_image(path: str, format: str | None = None, repair: bool = False) -> list[Finding]:
    """What is wrong with the image at `path`, and with `repair` put right where that is safe.

    Its parents are only looked at as far as it takes to open them. Raises DiskError for what is no image at all,
    OSError if the medium fails.
    """
    kind = known(path, format)
    file = HostFile(path, readonly=not repair)
    try:
        if kind == "vhd":
            from devices.storage.vhd.check import check as check_vhd

            return check_vhd(file, repair)
        if kind == "vhdx":
            from devices.storage.vhdx.check import check as check_vhdx

            return check_vhdx(file, repair)
        from devices.storage.raw import check

        return check(file, repair, 2048 if kind == "iso" else 512)
    finally:
        file.close()


def known(path: str, format: str | None) -> str:
    """`format`, or the one that the suffix of `path` tells; raises DiskError if it is none of ours."""
    kind = format or format_of(path)
    if kind not in FORMATS:
        raise DiskError(f"{path}: unknown format {kind}; choose from {', '.join(FORMATS)}")
    return kind
