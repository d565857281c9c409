"""What a virtual disk is to the controllers: an addressable run of bytes, whatever the image format beneath."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from pyvmm.core._hot import FastDisk

#: Kinds of `Extent`: stored bytes, bytes that read as zeros and take no room, and bytes that the parent has.
DATA, ZERO, PARENT = "data", "zero", "parent"

_ZEROS = bytes(1 << 20)


class DiskError(Exception):
    """A disk cannot be used. The message is one line for the user: which path, what is wrong, what to do."""


class Finding:
    """One thing that a check of an image found.

    `severity` is "error" where data is lost or wrong, or where the image is refused, and "warning" where nothing but
    room or speed is. `repaired` says that it is put right now, or was already while the image was opened.
    """

    __slots__ = ("message", "repaired", "severity")

    def __init__(self, severity: str, message: str, repaired: bool = False) -> None:
        self.severity = severity
        self.message = message
        self.repaired = repaired

    def __repr__(self) -> str:
        return f"Finding({self.severity}, {self.message!r}, repaired={self.repaired})"


class Extent:
    """A stretch of a disk, in bytes, that is stored one way: `kind` is DATA, ZERO or PARENT."""

    __slots__ = ("kind", "length", "offset")

    def __init__(self, offset: int, length: int, kind: str) -> None:
        self.offset = offset
        self.length = length
        self.kind = kind

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extent) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Extent({self.offset:#x}, {self.length:#x}, {self.kind})"

    def _key(self) -> tuple[int, int, str]:
        return self.offset, self.length, self.kind


class Geometry:
    """Cylinders, heads and sectors per track, for guests that address a disk by them."""

    __slots__ = ("cylinders", "heads", "sectors")

    def __init__(self, cylinders: int, heads: int, sectors: int) -> None:
        self.cylinders = cylinders
        self.heads = heads
        self.sectors = sectors


class Disk:
    """A virtual disk of `size` bytes.

    Offsets and lengths are in bytes and multiples of `sector_size`; callers have checked that they lie
    inside the disk. All methods may be called from several threads at once; those that change the medium
    are not called for a `readonly` disk. What goes wrong in reaching the medium is an OSError. What was
    written is on stable storage once a later `flush` has returned, and not before.
    """

    #: Where the disk came from, for people.
    path: str
    #: raw, vhd, vhdx or iso.
    format: str
    #: Capacity in bytes, a multiple of `sector_size`.
    size: int
    #: Bytes of a logical block as the guest addresses it: 512 or 4096, 2048 for an optical disc.
    sector_size: int
    #: Bytes that the medium writes at once; a multiple of `sector_size`.
    physical_sector_size: int
    readonly: bool
    #: Whether a trimmed range reads as zeros afterwards.
    trim_zeroes: bool
    #: Whether this is a CD or DVD rather than a hard disk.
    optical: bool = False
    #: What C code reads and writes the data with, past the methods here; None where it cannot.
    fast: FastDisk | None = None
    #: What a differencing disk differs from; this disk opened it and closes it.
    parent: Disk | None = None

    @property
    def identity(self) -> bytes:
        """Sixteen bytes that name this disk, the same each time it is opened."""
        raise NotImplementedError

    @property
    def geometry(self) -> Geometry:
        """The geometry that the disk shows, by the rule in the appendix of the VHD 1.0 specification."""
        return chs(self.size // 512)

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill all of `views` from `offset` on; raises OSError."""
        raise NotImplementedError

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        """Write all of `views` from `offset` on; raises OSError."""
        raise NotImplementedError

    def flush(self) -> None:
        """Return once everything written is on stable storage; raises OSError."""
        raise NotImplementedError

    def trim(self, offset: int, length: int) -> None:
        """Give the range's storage back where the medium can; raises OSError."""
        raise NotImplementedError

    def write_zeros(self, offset: int, length: int) -> None:
        """Make the range read as zeros, without storing them where the medium can do so; raises OSError."""
        if self.trim_zeroes:
            self.trim(offset, length)
            return
        while length:
            step = min(length, len(_ZEROS))
            self.write(offset, [memoryview(_ZEROS)[:step]])
            offset, length = offset + step, length - step

    def layer_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """How this image alone stores a range, in order and without gaps; raises OSError."""
        raise NotImplementedError

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """How the disk with all its parents stores a range: DATA and ZERO only; raises OSError."""
        for extent in self.layer_extents(offset, length):
            if extent.kind != PARENT:
                yield extent
                continue
            # A parent may be smaller than its child, which then reads as zeros beyond it.
            inside = 0
            if self.parent is not None:
                inside = max(0, min(extent.length, self.parent.size - extent.offset))
                if inside:
                    yield from self.parent.extents(extent.offset, inside)
            if inside < extent.length:
                yield Extent(extent.offset + inside, extent.length - inside, ZERO)

    def resize(self, size: int) -> None:
        """Change the capacity to `size` bytes; raises DiskError if that cannot be, OSError if it fails."""
        raise DiskError(f"{self.path}: a {self.format} image cannot be resized")

    def close(self) -> None:
        """Release the disk; what was written is on stable storage then. Harmless if done twice."""
        raise NotImplementedError

    def inspect(self) -> dict[str, Any]:
        """Return what the disk is, as plain JSON data."""
        return {
            "path": self.path,
            "format": self.format,
            "size": self.size,
            "sector_size": self.sector_size,
            "physical_sector_size": self.physical_sector_size,
            "readonly": self.readonly,
            "optical": self.optical,
            "parent": self.parent.inspect() if self.parent is not None else None,
        }


def chs(sectors: int) -> Geometry:
    """The geometry for a disk of `sectors` 512-byte sectors. VHD 1.0 specification, appendix: CHS calculation."""
    sectors = min(sectors, 65535 * 16 * 255)
    if sectors >= 65535 * 16 * 63:
        return Geometry(sectors // 255 // 16, 16, 255)
    per_track = 17
    tracks = sectors // per_track
    heads = max((tracks + 1023) // 1024, 4)
    if tracks >= heads * 1024 or heads > 16:
        per_track, heads = 31, 16
        tracks = sectors // per_track
    if tracks >= heads * 1024:
        per_track, heads = 63, 16
        tracks = sectors // per_track
    return Geometry(tracks // heads, heads, per_track)
