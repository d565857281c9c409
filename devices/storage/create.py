"""Making disk images: beside the place where they belong, so that nobody ever finds half of one there."""

from __future__ import annotations

import os
from contextlib import contextmanager

from devices.storage.backend import DiskError
from devices.storage.file import HostFile
from devices.storage.images import DIFFERENCING, format_of, known, open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from devices.storage.backend import Disk

#: A write that is worth a system call of its own to get it going.
_LARGE = 64 << 10


class _EagerFile(HostFile):
    """Has the kernel begin to write what is large at once, so that the flush in the end finds little to wait for."""

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        super().write(offset, views)
        length = sum(map(len, views))
        if length >= _LARGE:
            # Dirty pages are queued for writing and stay; only clean ones would be dropped.
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)


class _LazyFile(HostFile):
    """Leaves it to the kernel when to store what is written."""

    def flush(self) -> None:
        pass


@contextmanager
def new_file(path: str, force: bool = False, flush: bool = True) -> Iterator[HostFile]:
    """A file to fill, which takes the place of `path` when the block ends, durably; after an exception nothing is left.

    The block closes the file. With `force` it replaces a file of that name, which stays as it is until then; raises
    DiskError if that is in use. Without `flush` it grows in its place, and may be gone, or worthless, after a crash of
    the host soon afterwards.
    """
    if not flush:
        if force:
            raise DiskError(f"{path}: what is replaced could be lost as well; leave --force or --no-flush out")
        file: HostFile = _LazyFile.create(path)
        try:
            yield file
        except BaseException:
            file.close()
            os.unlink(path)
            raise
        return
    place = os.path.realpath(path) if force else path
    old: HostFile | None = None
    if os.path.lexists(place):
        if not force:
            raise DiskError(f"{path}: exists already; choose another name, or replace it with --force")
        old = HostFile(place)
    folder, name = os.path.split(place)
    beside = os.path.join(folder, f".{name}.{os.urandom(4).hex()}.part")
    try:
        if old is not None and old.is_block:
            raise DiskError(f"{path}: a block device; only convert writes to one")
        file = _EagerFile.create(beside, path)
        try:
            yield file
            if old is not None:
                _resemble(beside, place)
                os.replace(beside, place)
            else:
                _move(beside, place)
        except BaseException:
            file.close()
            if os.path.exists(beside):
                os.unlink(beside)
            raise
        _sync_folder(folder or ".")
    finally:
        if old is not None:
            old.close()


def _move(beside: str, place: str) -> None:
    """Rename, but over nothing: the name is taken first, since rename(2) asks nobody."""
    try:
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise DiskError(f"{place}: somebody else made it meanwhile; choose another name") from None
    try:
        os.replace(beside, place)
    except BaseException:
        os.unlink(place)
        raise


def _resemble(beside: str, place: str) -> None:
    """Owner and mode as they were."""
    was = os.stat(place)
    try:
        os.chown(beside, was.st_uid, was.st_gid)
    except PermissionError:
        pass
    os.chmod(beside, was.st_mode & 0o7777)


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def new_image(
    path: str,
    size: int | None,
    format: str | None = None,
    *,
    force: bool = False,
    kind: str | None = None,
    block_size: int | None = None,
    sector_size: int = 512,
    physical_sector_size: int = 4096,
    parent: str | None = None,
    flush: bool = True,
) -> Iterator[Disk]:
    """A zeroed disk to fill, whose image takes the place of `path` when the block ends, as with `new_file`.

    `kind` is "dynamic", which takes room as it is written, "fixed", which takes all of it at once, or "differencing".
    `size` may only be None with a `parent`, whose size it is then. Raises DiskError for what cannot be made, OSError
    if the medium fails.
    """
    form = known(path, format)
    kind = kind or ("differencing" if parent is not None else "dynamic")
    if (kind == "differencing") != (parent is not None):
        raise DiskError(f"{path}: a differencing image has a parent, others do not; give --parent or another kind")
    if form not in DIFFERENCING and (block_size is not None or kind == "differencing"):
        raise DiskError(f"{path}: a {form} image has neither blocks nor a parent; make a vhd or vhdx image")
    if parent is not None and format_of(parent) not in ("raw", form):
        raise DiskError(f"{path}: the parent of a {form} image is one too, and not {parent}; convert that first")
    if parent is None and size is None:
        raise DiskError(f"{path}: no size; give one, such as 8G")
    if size is not None and not 0 < size < 1 << 63:
        raise DiskError(f"{path}: {size} bytes is no size for a disk; give one such as 8G")
    if form == "iso" and size is not None and size % 2048:
        raise DiskError(f"{path}: {size} bytes is not a multiple of the 2048-byte sectors of a CD or DVD")
    with new_file(path, force, flush) as file:
        base = open_image(parent, readonly=True, format=form) if parent is not None else None
        if size is None:
            assert base is not None
            size = base.size
        disk = _create(form)(
            file,
            size,
            kind=kind,
            block_size=block_size,
            sector_size=sector_size,
            physical_sector_size=physical_sector_size,
            parent=base,
        )
        try:
            if kind == "fixed":
                file.allocate(file.size())
            yield disk
        except BaseException:
            file.close()  # before the disk, which would wait until all that is thrown away now is stored
            raise
        finally:
            disk.close()


def _create(form: str) -> Callable[..., Disk]:
    """What gives an empty file a disk of that format. It takes over the file, and the parent of the disk."""
    if form == "vhd":
        from devices.storage.vhd.create import create as create_vhd

        return create_vhd
    if form == "vhdx":
        from devices.storage.vhdx.create import create as create_vhdx

        return create_vhdx
    from devices.storage.raw import create

    return create


def create_image(path: str, size: int | None, format: str | None = None, **options: Any) -> None:
    """Make an image as `new_image` does, and leave it at zeros."""
    with new_image(path, size, format, **options):
        pass
