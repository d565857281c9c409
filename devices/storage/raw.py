"""Raw images: a regular file or a block device whose bytes are the disk's."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from devices.storage.backend import Disk, DiskError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: Buffers that one preadv or pwritev takes: IOV_MAX of Linux.
_IOV_MAX = 1024
_ZEROS = bytes(1 << 20)

# struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")
# struct space_resv and FS_IOC_UNRESVSP64 of linux/falloc.h, which the kernel answers for every file
# system as fallocate(PUNCH_HOLE | KEEP_SIZE); BLKDISCARD of linux/fs.h takes start and length in bytes.
_SPACE_RESV = struct.Struct("hhqqiI4i")
_FS_IOC_UNRESVSP64 = 0x4030_582B
_BLK_RANGE = struct.Struct("QQ")
_BLKDISCARD = 0x1277

_CANNOT_DISCARD = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS)


class RawDisk(Disk):
    """A raw image, opened and locked for as long as this object lives.

    The lock is an open-file-description lock on the whole file, exclusive for a writer and shared for
    readers, so two VMs cannot write one image. Raises DiskError.
    """

    def __init__(
        self, path: str, readonly: bool = False, sector_size: int = 512, physical_sector_size: int = 4096
    ) -> None:
        if sector_size not in (512, 4096) or physical_sector_size % sector_size or physical_sector_size <= 0:
            sizes = f"{sector_size}/{physical_sector_size}"
            raise DiskError(f"{path}: sector sizes {sizes} do not fit; use 512/512, 512/4096 or 4096/4096")
        self.path = path
        self.readonly = readonly
        self.sector_size = sector_size
        self.physical_sector_size = physical_sector_size
        self._fd = self._open()
        try:
            self.size = self._measure()
            self._lock()
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        flags = os.O_CLOEXEC | (os.O_RDONLY if self.readonly else os.O_RDWR)
        try:
            mode = os.stat(self.path).st_mode
            self._is_block = stat.S_ISBLK(mode)
            if not self._is_block and not stat.S_ISREG(mode):
                raise DiskError(f"{self.path}: not a regular file or block device; name a disk image")
            if self._is_block and not self.readonly:
                flags |= os.O_EXCL  # refused while the host has it mounted
            fd = os.open(self.path, flags)
        except OSError as error:
            raise DiskError(f"{self.path}: {_explain(error, self.readonly)}") from None
        # A block device may keep old data in discarded blocks; a hole in a file never does.
        self.discard_zeroes = not self._is_block
        return fd

    def _measure(self) -> int:
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if size == 0:
            raise DiskError(f"{self.path}: empty; give it a size first, for example with truncate -s 8G")
        if size % self.sector_size:
            raise DiskError(
                f"{self.path}: {size} bytes is not a multiple of the {self.sector_size}-byte sector; "
                f"is it a raw image? if so, extend it with truncate -s %{self.sector_size}"
            )
        return size

    def _lock(self) -> None:
        kind = fcntl.F_RDLCK if self.readonly else fcntl.F_WRLCK
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise DiskError(f"{self.path}: cannot be locked: {error.strerror}; put it on a local disk") from None
            raise DiskError(
                f"{self.path}: in use by another VM or tool; stop that first, or open it readonly everywhere"
            ) from None

    @property
    def identity(self) -> bytes:
        """Sixteen bytes made from the real path, since a raw image holds no name of its own."""
        import hashlib  # not at the top: slow to load, and only wanted once the guest asks

        return hashlib.sha256(b"pyvmm raw disk\0" + os.fsencode(os.path.realpath(self.path))).digest()[:16]

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        total = sum(map(len, views))
        done = os.preadv(self._fd, views[:_IOV_MAX], offset)
        while done < total:
            views = _after(views, done)
            offset, total = offset + done, total - done
            done = os.preadv(self._fd, views[:_IOV_MAX], offset)
            if done == 0:
                raise OSError(errno.EIO, f"end of image at {offset}: it was truncated while in use")

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        total = sum(map(len, views))
        done = os.pwritev(self._fd, views[:_IOV_MAX], offset)
        while done < total:
            views = _after(views, done)
            offset, total = offset + done, total - done
            done = os.pwritev(self._fd, views[:_IOV_MAX], offset)
            if done == 0:
                raise OSError(errno.ENOSPC, "nothing more can be written")

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        try:
            if self._is_block:
                fcntl.ioctl(self._fd, _BLKDISCARD, _BLK_RANGE.pack(offset, length))
            else:
                fcntl.ioctl(self._fd, _FS_IOC_UNRESVSP64, _SPACE_RESV.pack(0, os.SEEK_SET, offset, length, *[0] * 6))
        except OSError as error:
            if error.errno not in _CANNOT_DISCARD:
                raise
            if self.discard_zeroes:
                self._write_zeros(offset, length)

    def _write_zeros(self, offset: int, length: int) -> None:
        while length:
            step = min(length, len(_ZEROS))
            self.writev(offset, [memoryview(_ZEROS)[:step]])
            offset, length = offset + step, length - step

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _after(views: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """What is left of `views` when their first `done` bytes are dealt with."""
    for index, view in enumerate(views):
        if done < len(view):
            return [view[done:], *views[index + 1 :]]
        done -= len(view)
    return []


def _explain(error: OSError, readonly: bool) -> str:
    if error.errno == errno.ENOENT:
        return "no such file; create it with truncate -s 8G, or correct the path"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        wish = "reading" if readonly else "writing; change its permissions or add ,readonly"
        return f"{error.strerror}: cannot be opened for {wish}"
    if error.errno == errno.EBUSY:
        return "the host or another VM is using this block device; end that first, or add ,readonly"
    return f"cannot be opened: {error.strerror}"
