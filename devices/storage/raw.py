"""Raw images: files and block devices whose bytes are the disk's. ISO images are the same for optical discs."""

from __future__ import annotations

import os

from devices.storage.backend import DATA, ZERO, Disk, DiskError, Extent, Finding
from devices.storage.file import HostFile
from pyvmm.core._hot import FastDisk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class RawDisk(Disk):
    """A raw image in `file`, which it closes. Raises DiskError, with the file closed, if it makes no disk."""

    format = "raw"

    def __init__(self, file: HostFile, sector_size: int = 512, physical_sector_size: int = 4096) -> None:
        self.path = file.path
        self.readonly = file.readonly
        self.sector_size = sector_size
        self.physical_sector_size = physical_sector_size
        self._file = file
        # A block device may keep old data in trimmed blocks; a hole in a file never does.
        self.trim_zeroes = not file.is_block
        try:
            if sector_size not in (512, 4096) or physical_sector_size % sector_size or physical_sector_size <= 0:
                sizes = f"{sector_size}/{physical_sector_size}"
                raise DiskError(f"{self.path}: sector sizes {sizes} do not fit; use 512/512, 512/4096 or 4096/4096")
            self.size = self._measure()
            if file.fd >= 0:
                self.fast = FastDisk(file.fd, self.size, sector_size, not self.readonly)
        except BaseException:
            self.close()
            raise

    def _measure(self) -> int:
        size = self._file.size()
        if size == 0:
            raise DiskError(f"{self.path}: empty; give it a size first, for example with pyvmm disk resize")
        if size % self.sector_size:
            raise DiskError(
                f"{self.path}: {size} bytes is not a multiple of the {self.sector_size}-byte sector; "
                f"is it a raw image? if so, extend it with truncate -s %{self.sector_size}"
            )
        return size

    @property
    def identity(self) -> bytes:
        """Sixteen bytes made from the real path, since a raw image holds no name of its own."""
        import hashlib  # not at the top: slow to load, and only wanted once the guest asks

        return hashlib.sha256(b"pyvmm raw disk\0" + os.fsencode(os.path.realpath(self.path))).digest()[:16]

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        self._file.read(offset, views)

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        self._file.write(offset, views)

    def flush(self) -> None:
        if self.fast is not None and self.fast.flush_failed:
            self._file.lose()
        self._file.flush()

    def trim(self, offset: int, length: int) -> None:
        self._file.trim(offset, length)

    def write_zeros(self, offset: int, length: int) -> None:
        self._file.write_zeros(offset, length)

    def layer_extents(self, offset: int, length: int) -> Iterator[Extent]:
        for start, size, stored in self._file.extents(offset, length):
            yield Extent(start, size, DATA if stored else ZERO)

    def resize(self, size: int) -> None:
        if size <= 0 or size % self.sector_size:
            raise DiskError(f"{self.path}: {size} bytes is not a multiple of the {self.sector_size}-byte sector")
        if self._file.is_block:
            raise DiskError(f"{self.path}: a block device; resize it with the host's tools")
        self._file.truncate(size)
        self.size = size
        if self.fast is not None:
            self.fast.size = size

    def clone(self, source: RawDisk) -> bool:
        """Share all data of `source`, a disk of this size, where the file system can; False where it cannot."""
        return self._file.clone(source._file)

    def close(self) -> None:
        if self.fast is not None:
            self.fast.close()
        try:
            if self._file.fd >= 0 and not self.readonly:
                self.flush()
        finally:
            self._file.close()


class IsoDisk(RawDisk):
    """An ISO 9660 or UDF image: the data of a CD or DVD, in sectors of 2048 bytes; always readonly."""

    format = "iso"
    optical = True

    def __init__(self, file: HostFile) -> None:
        super().__init__(file)
        self.fast = None
        self.sector_size = self.physical_sector_size = 2048
        # The last sector of an image may be cut short; the whole sectors are what a drive reads.
        self.size -= self.size % 2048
        if not self.size:
            self.close()
            raise DiskError(f"{self.path}: smaller than one 2048-byte sector; is it a CD or DVD image?")
        self.trim_zeroes = False

    def resize(self, size: int) -> None:
        raise DiskError(f"{self.path}: an iso image cannot be resized")


def create(
    file: HostFile, size: int, *, sector_size: int = 512, physical_sector_size: int = 4096, **_: object
) -> RawDisk:
    """Give the empty `file` a disk of `size` bytes; raises DiskError, OSError if the medium fails.

    Whatever else other formats can be told, a raw image has no place for it.
    """
    try:
        file.truncate(size)
    except BaseException:
        file.close()
        raise
    return RawDisk(file, sector_size, physical_sector_size)


def check(file: HostFile, repair: bool, sector_size: int) -> list[Finding]:
    """All that can be wrong with an image that has no structure: its size. Missing bytes are added as zeros."""
    size = file.size()
    if size == 0:
        return [Finding("error", "empty: it has lost everything, or was never given a size")]
    if size % sector_size == 0:
        return []
    if repair:
        file.truncate(size + -size % sector_size)
        file.flush()
    what = f"{size} bytes is not a multiple of the {sector_size}-byte sector: it may have been cut short"
    return [Finding("error", what, repaired=repair)]
