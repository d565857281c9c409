"""What a virtual disk is to the controllers: an addressable run of bytes."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


class DiskError(Exception):
    """A disk cannot be used. The message is one line for the user: which path, what is wrong, what to do."""


class Disk:
    """A virtual disk of `size` bytes.

    Offsets and lengths are in bytes and multiples of `sector_size`; callers have checked that they lie
    inside the disk. All methods may be called from several threads at once. What goes wrong in reaching
    the medium is an OSError.
    """

    #: Where the disk came from, for people.
    path: str
    #: Capacity in bytes, a multiple of `sector_size`.
    size: int
    #: Bytes of a logical block as the guest addresses it: 512 or 4096.
    sector_size: int
    #: Bytes that the medium writes at once; a multiple of `sector_size`.
    physical_sector_size: int
    readonly: bool
    #: Whether a discarded range reads as zeros afterwards.
    discard_zeroes: bool

    @property
    def identity(self) -> bytes:
        """Sixteen bytes that name this disk, the same each time it is opened."""
        raise NotImplementedError

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill all of `views` from `offset` on; raises OSError."""
        raise NotImplementedError

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        """Write all of `views` from `offset` on; raises OSError."""
        raise NotImplementedError

    def flush(self) -> None:
        """Return once everything written is on stable storage; raises OSError."""
        raise NotImplementedError

    def discard(self, offset: int, length: int) -> None:
        """Give the range's storage back where the medium can; raises OSError."""
        raise NotImplementedError

    def close(self) -> None:
        """Release the disk; harmless if done twice."""
        raise NotImplementedError

    def inspect(self) -> dict[str, Any]:
        """Return what the disk is, as plain JSON data."""
        return {
            "path": self.path,
            "size": self.size,
            "sector_size": self.sector_size,
            "physical_sector_size": self.physical_sector_size,
            "readonly": self.readonly,
        }
