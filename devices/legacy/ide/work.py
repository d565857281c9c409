"""Carrying out an IDE channel's jobs: the part that waits for the medium. On the channel's own thread."""

from __future__ import annotations

from devices.legacy.ide.ata import FLUSH, IN, OUT, TRIM, VERIFY, CommandError
from devices.legacy.ide.channel import DmaFailure
from devices.legacy.ide.prd import part, regions
from devices.storage.backend import DiskError
from pyvmm.core.memory import GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.legacy.ide.ata import Job
    from devices.legacy.ide.channel import Channel
    from devices.storage.backend import Disk
    from pyvmm.core.memory import GuestMemory

#: The most that is moved by DMA in one step, between which a transfer can be stopped.
STEP = 1 << 20


class Stopped(Exception):
    """The job was cancelled half-way."""


def carry_out(channel: Channel, job: Job, memory: GuestMemory) -> None:
    """Do `job` and tell the channel how it ended."""
    more = False
    error: Exception | None = None
    if job.cancelled:
        return
    try:
        if job.table is not None:
            more = _dma(channel, job, memory, job.table)
        else:
            _pio(job)
    except Stopped:
        return
    except (OSError, DiskError, CommandError, DmaFailure) as failure:
        error = failure
        job.drive.counters["errors"] += 1
    else:
        _count(job)
    channel.finish(job, more, error)


def _count(job: Job) -> None:
    counters = job.drive.counters
    if job.offset is not None and job.direction == IN:
        counters["reads"] += 1
        counters["bytes_read"] += job.length
    elif job.offset is not None and job.direction == OUT:
        counters["writes"] += 1
        counters["bytes_written"] += job.length
    elif job.work in (FLUSH, TRIM):
        counters["flushes" if job.work == FLUSH else "trims"] += 1


def _medium(job: Job) -> Disk:
    medium = job.drive.medium
    if medium is None:  # taken out meanwhile
        raise OSError("no medium")
    return medium


def _pio(job: Job) -> None:
    medium = _medium(job)
    if job.direction == IN:
        assert job.offset is not None
        job.data = bytearray(job.length)
        medium.read(job.offset, [memoryview(job.data)])
    elif job.direction == OUT:
        assert job.offset is not None
        medium.write(job.offset, [memoryview(job.data)])
        if job.sync:
            medium.flush()
    elif job.work == FLUSH:
        medium.flush()
    elif job.work == VERIFY:
        assert job.offset is not None
        done = 0
        while done < job.length and not job.cancelled:
            step = min(job.length - done, STEP)
            medium.read(job.offset + done, [memoryview(bytearray(step))])
            done += step


def _dma(channel: Channel, job: Job, memory: GuestMemory, table: int) -> bool:
    """Move the job's data by its table; return whether the table has room for more."""
    try:
        views, more = regions(memory, table, job.length, job.direction == IN)
    except GuestMemoryError:
        raise DmaFailure(short=False) from None
    if sum(map(len, views)) < job.length:
        raise DmaFailure(short=True)
    if job.work == TRIM:
        medium = _medium(job)
        for offset, length in job.drive.trim_ranges(b"".join(views)):
            medium.trim(offset, length)
        return more
    for done in range(0, job.length, STEP):
        size = min(STEP, job.length - done)
        if job.direction == IN:
            _to_guest(channel, job, done, part(views, done, size))
        elif job.cancelled:
            raise Stopped
        elif job.offset is not None:
            _medium(job).write(job.offset + done, part(views, done, size))
    if job.sync:
        _medium(job).flush()
    return more


def _to_guest(channel: Channel, job: Job, done: int, views: Sequence[memoryview]) -> None:
    """Put what follows the first `done` bytes into `views`, all at once and only if the guest still wants it.

    A disk may answer long after the guest has given up and used the memory for something else.
    """
    size = sum(map(len, views))
    if job.offset is None:
        data = memoryview(job.data)[done : done + size]
    else:
        data = memoryview(bytearray(size))
        _medium(job).read(job.offset + done, [data])
    with channel.lock:
        if job.cancelled:
            raise Stopped
        for view in views:
            view[:] = data[: len(view)]
            data = data[len(view) :]
