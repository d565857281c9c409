"""The file layer: the only place that talks to the kernel about image files.

Formats are written against `HostFile`; tests put a file in its place that loses, tears and reorders what was not
flushed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import threading

from devices.storage.backend import DiskError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, TypeVar

    _Call = TypeVar("_Call", bound=Callable[..., Any])

#: Buffers that one preadv or pwritev takes: IOV_MAX of Linux.
_IOV_MAX = 1024
_ZEROS = bytes(1 << 20)

# struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")
# struct space_resv and FS_IOC_UNRESVSP64 of linux/falloc.h, which the kernel answers for every file
# system as fallocate(PUNCH_HOLE | KEEP_SIZE); BLKDISCARD and BLKZEROOUT of linux/fs.h take start and length in bytes.
_SPACE_RESV = struct.Struct("hhqqiI4i")
_FS_IOC_UNRESVSP64 = 0x4030_582B
_BLK_RANGE = struct.Struct("QQ")
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F

#: linux/fs.h; ioctl_ficlonerange(2) tells the errors.
_FICLONE = 0x4004_9409

_CANNOT_TRIM = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS)
_CANNOT_CLONE = (*_CANNOT_TRIM, errno.EXDEV, errno.EINVAL, errno.EBADF, errno.EPERM, errno.ETXTBSY)


def _naming(call: _Call) -> _Call:
    """Have an OSError tell the path of the file, for whoever works on several."""

    def named(self: HostFile, *words: Any) -> Any:
        try:
            return call(self, *words)
        except OSError as error:
            error.filename = self.path
            raise

    return named  # type: ignore[return-value]


class InUse(DiskError):
    """Another process has the image, or this one has it twice."""


class SharedFlush:
    """A flush by several threads at once: those who ask while one is under way share the next.

    `lock` is held meanwhile.
    """

    def __init__(self, flush: Callable[[], None], lock: threading.Lock | None = None) -> None:
        self._flush = flush
        self._lock = lock or threading.Lock()
        self._begun = self._done = 0

    def __call__(self) -> None:
        """Return once a flush that began after this call is done; raises what it raises."""
        following = self._begun + 1
        with self._lock:
            if self._done < following:
                self._begun = number = self._begun + 1
                self._flush()
                self._done = number


class HostFile:
    """A regular file or block device, opened and locked for as long as this object lives.

    The lock is an open-file-description lock on the whole file, exclusive for a writer and shared for
    readers, so two VMs cannot write one image. With `lock` false a reader looks at what others may be writing. Raises
    DiskError from its making; afterwards what goes wrong is an OSError with the path as its file name. Methods may be
    called from several threads at once.
    """

    def __init__(self, path: str, readonly: bool = False, lock: bool = True) -> None:
        self.path = path
        self.readonly = readonly
        #: For code that does I/O past this object (the C fast path); -1 once closed.
        self.fd = -1
        self._flush = SharedFlush(self._flush_once)
        self._flush_error = 0
        self._open()
        if lock:
            try:
                self._lock()
            except BaseException:
                self.close()
                raise

    def _open(self) -> None:
        flags = os.O_CLOEXEC | (os.O_RDONLY if self.readonly else os.O_RDWR)
        try:
            mode = os.stat(self.path).st_mode
            self.is_block = stat.S_ISBLK(mode)
            if not self.is_block and not stat.S_ISREG(mode):
                raise DiskError(f"{self.path}: not a regular file or block device; name a disk image")
            if self.is_block and not self.readonly:
                flags |= os.O_EXCL  # refused while the host has it mounted
            self.fd = os.open(self.path, flags)
        except OSError as error:
            raise DiskError(f"{self.path}: {_explain(error, self.readonly)}") from None

    @classmethod
    def create(cls, path: str, name: str = "") -> HostFile:
        """Make an empty file, opened for writing and locked; raises DiskError, also if the path is taken.

        `name` is the path that it will have once it is complete, and by which messages and its children call it.
        """
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        except FileExistsError:
            raise DiskError(f"{path}: exists already; choose another name") from None
        except OSError as error:
            raise DiskError(f"{name or path}: cannot be created: {error.strerror}") from None
        file = cls(path)
        file.path = name or path
        return file

    @_naming
    def allocate(self, length: int) -> None:
        """Give the first `length` bytes of a regular file their room now, so that writing them cannot lack any."""
        os.posix_fallocate(self.fd, 0, length)

    def clone(self, source: HostFile) -> bool:
        """Share all of the data of `source`, copied only once one of the two is written; False where that cannot be."""
        try:
            fcntl.ioctl(self.fd, _FICLONE, source.fd)
        except OSError as error:
            if error.errno not in _CANNOT_CLONE:
                raise
            return False
        return True

    def _lock(self) -> None:
        kind = fcntl.F_RDLCK if self.readonly else fcntl.F_WRLCK
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise DiskError(f"{self.path}: cannot be locked: {error.strerror}; put it on a local disk") from None
            raise InUse(
                f"{self.path}: in use by another VM or tool; stop that first, or open it readonly everywhere"
            ) from None

    def written(self) -> bool:
        """Whether somebody else has it open for writing."""
        found = fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
        return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)

    def key(self) -> tuple[int, int]:
        """What tells this file from all others of the host, whatever path led to it: its device and inode."""
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino

    def size(self) -> int:
        """Bytes in the file or device now."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    @_naming
    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill all of `views` from `offset` on; the end of the file inside them is an OSError (EIO)."""
        total = sum(map(len, views))
        done = os.preadv(self.fd, views[:_IOV_MAX], offset)
        while done < total:
            views = after(views, done)
            offset, total = offset + done, total - done
            done = os.preadv(self.fd, views[:_IOV_MAX], offset)
            if done == 0:
                raise OSError(errno.EIO, f"end of image at {offset}: it was truncated while in use")

    def read_bytes(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes; the end of the file inside them is an OSError (EIO)."""
        data = bytearray(length)
        if length:
            self.read(offset, [memoryview(data)])
        return bytes(data)

    @_naming
    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        """Write all of `views` from `offset` on."""
        total = sum(map(len, views))
        done = os.pwritev(self.fd, views[:_IOV_MAX], offset)
        while done < total:
            views = after(views, done)
            offset, total = offset + done, total - done
            done = os.pwritev(self.fd, views[:_IOV_MAX], offset)
            if done == 0:
                raise OSError(errno.ENOSPC, "nothing more can be written")

    def write_bytes(self, offset: int, data: bytes) -> None:
        """Write all of `data` at `offset`."""
        if data:
            self.write(offset, [memoryview(data)])

    @_naming
    def flush(self) -> None:
        """Return once everything written, and the file's size, is on stable storage.

        Once this has failed it always does: the kernel tells of data that it could not write only once, and drops it.
        """
        self._flush()

    def lose(self) -> None:
        """Let no flush succeed any more: one that was not done here has failed."""
        self._flush_error = self._flush_error or errno.EIO

    def _flush_once(self) -> None:
        if self._flush_error:
            raise OSError(self._flush_error, "an earlier flush failed; what was written before it may be lost")
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self._flush_error = error.errno or errno.EIO
            raise

    @_naming
    def trim(self, offset: int, length: int) -> None:
        """Give storage back. The range of a regular file reads as zeros then; that of a device reads as anything."""
        try:
            if self.is_block:
                fcntl.ioctl(self.fd, _BLKDISCARD, _BLK_RANGE.pack(offset, length))
            else:
                self._punch(offset, length)
        except OSError as error:
            if error.errno not in _CANNOT_TRIM:
                raise
            if not self.is_block:
                self._fill(offset, length)

    @_naming
    def write_zeros(self, offset: int, length: int) -> None:
        """Make the range read as zeros: as a hole, or as the device does it best; raises OSError."""
        try:
            if self.is_block:
                fcntl.ioctl(self.fd, _BLKZEROOUT, _BLK_RANGE.pack(offset, length))
            else:
                self._punch(offset, length)
        except OSError as error:
            if error.errno not in _CANNOT_TRIM:
                raise
            self._fill(offset, length)

    def _punch(self, offset: int, length: int) -> None:
        fcntl.ioctl(self.fd, _FS_IOC_UNRESVSP64, _SPACE_RESV.pack(0, os.SEEK_SET, offset, length, *[0] * 6))

    def _fill(self, offset: int, length: int) -> None:
        while length:
            step = min(length, len(_ZEROS))
            self.write(offset, [memoryview(_ZEROS)[:step]])
            offset, length = offset + step, length - step

    @_naming
    def truncate(self, size: int) -> None:
        """Set the size of a regular file; what is added reads as zeros."""
        os.ftruncate(self.fd, size)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Cover a range with (offset, length, whether it is stored); the rest are holes, which read as zeros."""
        end = offset + length
        if self.is_block:
            yield offset, length, True
            return
        while offset < end:
            try:
                start = min(os.lseek(self.fd, offset, os.SEEK_DATA), end)
            except OSError as error:
                if error.errno != errno.ENXIO:  # nothing but a hole up to the end of the file
                    raise
                start = end
            if start > offset:
                yield offset, start - offset, False
            if start < end:
                offset = min(os.lseek(self.fd, start, os.SEEK_HOLE), end)
                yield start, offset - start, True
            else:
                offset = end

    def close(self) -> None:
        """Release the file; harmless if done twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def after(views: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """What is left of `views` when their first `done` bytes are dealt with."""
    for index, view in enumerate(views):
        if done < len(view):
            return [view[done:], *views[index + 1 :]]
        done -= len(view)
    return []


def _explain(error: OSError, readonly: bool) -> str:
    if error.errno == errno.ENOENT:
        return "no such file; create it with pyvmm disk create, or correct the path"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        wish = "reading" if readonly else "writing; change its permissions or add ,readonly"
        return f"{error.strerror}: cannot be opened for {wish}"
    if error.errno == errno.EBUSY:
        return "the host or another VM is using this block device; end that first, or add ,readonly"
    return f"cannot be opened: {error.strerror}"
