"""Copying between disks of any format: no hole is read, and no zeros are written where zeros are already."""

from __future__ import annotations

import os
import signal
import threading

from devices.storage.backend import DATA, ZERO, DiskError
from devices.storage.raw import RawDisk
from pyvmm.core._hot import data_runs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from devices.storage.backend import Disk, Extent

    #: Told how far it is: a byte offset on the disk, which never falls.
    Progress = Callable[[int], None]

#: What one thread moves at once, and the size of zeros that are worth a hole.
CHUNK = 1 << 20
_BLOCK = 4096
#: Threads that read and write, for the GIL is free meanwhile; more only help where a medium has latency.
_THREADS = min(4, max(2, os.cpu_count() or 1))


def ignore(_: int) -> None:
    """Progress that nobody watches."""


def copy_disk(source: Disk, target: Disk, progress: Progress = ignore, share: bool = True) -> None:
    """Write what `source` holds to `target`, a blank disk at least as large; raises DiskError or OSError.

    With `share`, raw images may come to share their data where the file system can do that. Nothing is flushed.
    """
    if source.size > target.size:
        raise DiskError(f"{target.path}: {target.size} bytes is too small for the {source.size} of {source.path}")
    plain = isinstance(source, RawDisk) and isinstance(target, RawDisk) and source.size == target.size
    if share and plain and target.clone(source):  # type: ignore[attr-defined]
        progress(source.size)
        return
    # Not by copy_file_range(2): that would copy the zeros among the data, too.
    copy_extents(source, target, source.extents(0, source.size), progress, blank=True)


def copy_extents(
    source: Disk, target: Disk, extents: Iterable[Extent], progress: Progress = ignore, blank: bool = False
) -> None:
    """Write the DATA and ZERO among `extents` of `source` to `target`, and leave the rest of it alone.

    `blank` says that `target` reads as zeros wherever it is to be written. Otherwise as `copy_disk`.
    """

    def move(extent: Extent, buffer: memoryview) -> None:
        offset, length = extent.offset, extent.length
        if extent.kind == ZERO:
            target.write_zeros(offset, length)
            return
        view = buffer[:length]
        source.read(offset, [view])
        runs = data_runs(view, _BLOCK)
        if not runs and not blank:
            target.write_zeros(offset, length)
        elif not blank:
            runs = [(0, length)]  # small holes in what is stored already are not worth their system calls
        for start, end in runs:
            target.write(offset + start, [view[start:end]])

    kinds = (DATA,) if blank else (DATA, ZERO)
    in_parallel((piece for extent in extents if extent.kind in kinds for piece in pieces(extent)), move, progress)


def pieces(extent: Extent) -> Iterator[Extent]:
    """The parts of a DATA extent that one thread takes at once, cut where offsets are multiples of CHUNK."""
    if extent.kind != DATA:
        yield extent
        return
    offset, end = extent.offset, extent.offset + extent.length
    while offset < end:
        stop = min(end, offset - offset % CHUNK + CHUNK)
        yield type(extent)(offset, stop - offset, DATA)
        offset = stop


def in_parallel(work: Iterator[Extent], do: Callable[[Extent, memoryview], None], progress: Progress) -> None:
    """Take the extents of `work` in order, on several threads, each with a buffer of CHUNK bytes.

    The first exception ends it, also one that a signal handler raises here, and is raised once all threads stand
    still.
    """
    errors: list[BaseException] = []
    lock = threading.Lock()
    stop = False

    def take() -> Extent | None:
        with lock:
            extent = None if stop else next(work, None)
            if extent is not None:
                progress(extent.offset)
            return extent

    def run() -> None:
        nonlocal stop
        buffer = memoryview(bytearray(CHUNK))
        try:
            while (extent := take()) is not None:
                do(extent, buffer)
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            errors.append(error)
            stop = True

    threads = [threading.Thread(target=run, name=f"copy-{number}") for number in range(_THREADS)]
    try:
        # What a signal handler raises must not come in the middle of a start: nobody would wait for that thread then.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            for thread in threads:
                thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for thread in threads:
            thread.join()
    finally:
        stop = True
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if errors:
        raise errors[0]
