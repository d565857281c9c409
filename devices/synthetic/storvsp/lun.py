"""A SCSI logical unit: what its target plans, carried out on a `Disk`."""

from __future__ import annotations

import struct
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from devices.storage import plans
from devices.storage.backend import ZERO, DiskError
from devices.storage.mmc import OpticalDrive
from devices.storage.sense import (
    INVALID_FIELD_IN_CDB,
    READ_ERROR,
    WRITE_ERROR,
    ScsiStatus,
    Sense,
    from_os_error,
)
from devices.synthetic.storvsp.statistics import FLUSH, READ, WRITE, Statistics

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from devices.storage.backend import Disk
    from devices.synthetic.storvsp.lane import Lane
    from devices.synthetic.storvsp.qos import Limits
    from devices.synthetic.storvsp.scsi import Target
    from pyvmm.core._hot import FastDisk

_FILL_CHUNK = 1 << 20
#: What one GET LBA STATUS may tell, so that none takes long; initiators go on where an answer ends.
MAX_LBA_STATUS_BYTES = 16 << 10
_MAX_EXTENTS = 1 << 16
_MAX_RUN = 0xFFFF_FFFF


class Outcome(NamedTuple):
    """How a command ended: bytes moved, and SCSI status, with sense data for CHECK CONDITION."""

    transferred: int = 0
    status: ScsiStatus = ScsiStatus.GOOD
    sense: Sense | None = None


def failed(sense: Sense) -> Outcome:
    """The outcome that `sense` explains."""
    return Outcome(0, ScsiStatus.CHECK_CONDITION, sense)


class Lun:
    """One logical unit: what `target` makes of commands, carried out on its disk; any thread, several at once."""

    def __init__(self, target: Target | OpticalDrive, limits: Limits | None = None) -> None:
        self.target = target
        self.limits = limits
        self.statistics = Statistics()
        #: The threads that carry its commands out, from when it is attached to a controller.
        self.quick: Lane
        self.slow: Lane
        #: Set once the unit is being taken away: nothing new is to begin.
        self.gone = False

    @property
    def disk(self) -> Disk | None:
        """The disk, or the disc that is in the drive now."""
        return self.target.disc if isinstance(self.target, OpticalDrive) else self.target.disk

    @property
    def fast(self) -> FastDisk | None:
        """What C may reach the disk with; nothing while reads and writes may have to wait, or be refused."""
        if isinstance(self.target, OpticalDrive) or not self.target.plain or self.limits is not None:
            return None
        return self.target.disk.fast

    def inspect(self) -> dict[str, Any]:
        """Return the disk, its limits, counters and latencies."""
        limits = self.limits.inspect() if self.limits is not None else None
        return {**self.target.inspect(), "limits": limits, **self.statistics.inspect()}

    def plan(self, cdb: bytes, buffer: Sequence[memoryview], length: int, data_in: bool) -> plans.Plan:
        """What to do for a command, without doing it.

        `buffer` is the initiator's data buffer, `length` bytes in all and writable if `data_in`.
        """
        plan = self.target.plan(cdb, length, data_in)
        if isinstance(plan, plans.Parameters):
            plan = plan.parse(b"".join(first(buffer, plan.length)))
        if isinstance(plan, plans.Reply) and plan.data and length and not data_in:
            return plans.Fail(INVALID_FIELD_IN_CDB)
        return plan

    def carry_out(self, plan: plans.Plan, disk: Disk | None, buffer: Sequence[memoryview], length: int) -> Outcome:
        """Do what `plan` says on `disk`, for which it was made. What goes wrong there becomes sense data."""
        try:
            return _carry_out(plan, disk, buffer, length)
        except OSError as error:
            return failed(from_os_error(error, not isinstance(plan, plans.Read | plans.Verify)))
        except DiskError:
            return failed(READ_ERROR if isinstance(plan, plans.Read | plans.Verify) else WRITE_ERROR)

    def count(self, plan: plans.Plan, outcome: Outcome, latency_ns: int) -> None:
        """Note how a command went."""
        if outcome.status:
            self.statistics.count(None, latency_ns, errors=1)
            return
        match plan:
            case plans.Read(_, size):
                self.statistics.count(READ, latency_ns, reads=1, bytes_read=size)
            case plans.Write(_, size, _):
                self.statistics.count(WRITE, latency_ns, writes=1, bytes_written=size)
            case plans.Fill():
                self.statistics.count(WRITE, latency_ns, writes=1)
            case plans.Flush():
                self.statistics.count(FLUSH, latency_ns, flushes=1)
            case plans.Unmap(ranges, _):
                self.statistics.count(None, latency_ns, discards=len(ranges))
            case _:
                self.statistics.count(None, latency_ns)


def _carry_out(plan: plans.Plan, disk: Disk | None, buffer: Sequence[memoryview], length: int) -> Outcome:
    match plan:
        case plans.Reply(data):
            return Outcome(fill(buffer, data))
        case plans.Fail(sense):
            return failed(sense)
        case plans.Conflict():
            return Outcome(0, ScsiStatus.RESERVATION_CONFLICT)
    assert disk is not None, "a plan for a drive without a disc"
    match plan:
        case plans.Read(offset, size):
            disk.read(offset, buffer if size == length else first(buffer, size))
            return Outcome(size)
        case plans.Write(offset, size, fua):
            disk.write(offset, buffer if size == length else first(buffer, size))
            if fua:
                disk.flush()
            return Outcome(size)
        case plans.Flush():
            disk.flush()
        case plans.Verify(offset, size):
            disk.read(offset, [memoryview(bytearray(size))])
        case plans.Unmap(ranges, fua):
            for offset, size in ranges:
                disk.trim(offset, size)
            if fua:
                disk.flush()
            return Outcome(length)
        case plans.Fill():
            _fill(disk, plan)
            if plan.fua:
                disk.flush()
            return Outcome(length)
        case plans.LbaStatus(offset, room):
            return Outcome(fill(buffer, lba_status(disk, offset, room)))
        case plans.Parameters():
            raise AssertionError("parameters lead to parameters")
    return Outcome()


def makes_hole(plan: plans.Plan) -> bool:
    """Whether a plan asks for zeros that need not be stored."""
    return isinstance(plan, plans.Fill) and plan.discard and not any(plan.block)


def _fill(disk: Disk, plan: plans.Fill) -> None:
    if makes_hole(plan):
        disk.write_zeros(plan.offset, plan.length)
        return
    pattern = memoryview(plan.block * (min(plan.length, _FILL_CHUNK) // len(plan.block)))
    offset, end = plan.offset, plan.offset + plan.length
    while offset < end:
        step = min(len(pattern), end - offset)
        disk.write(offset, [pattern[:step]])
        offset += step


def lba_status(disk: Disk, offset: int, room: int) -> bytes:
    """GET LBA STATUS parameter data of up to `room` bytes: runs of blocks from `offset` on, stored or not."""
    block = disk.sector_size
    runs: list[list[int]] = []  # first block, blocks, provisioning status: 0 mapped, 1 deallocated
    limit = min(room - 8, MAX_LBA_STATUS_BYTES) // 16
    at = offset // block
    for extent in islice(disk.extents(offset, disk.size - offset), _MAX_EXTENTS if limit > 0 else 0):
        end, status = extent.offset + extent.length, int(extent.kind == ZERO)
        # A block that is stored in part is stored.
        until = end // block if status else -(-end // block)
        while at < until:
            if runs and runs[-1][2] == status and runs[-1][1] < _MAX_RUN:
                runs[-1][1] += (step := min(until - at, _MAX_RUN - runs[-1][1]))
            elif len(runs) == limit:
                break
            else:
                runs.append([at, step := min(until - at, _MAX_RUN), status])
            at += step
        if at < until:
            break
    body = b"".join(struct.pack(">QIB3x", *run) for run in runs)
    return (struct.pack(">I4x", 4 + len(body)) + body)[:room]


def first(views: Sequence[memoryview], length: int) -> list[memoryview]:
    """The first `length` bytes of `views`."""
    taken: list[memoryview] = []
    for view in views:
        if length <= 0:
            break
        taken.append(view[:length])
        length -= len(view)
    return taken


def fill(views: Sequence[memoryview], data: bytes) -> int:
    """Copy as much of `data` into `views` as fits; return how much that is."""
    done = 0
    for view in views:
        size = min(len(view), len(data) - done)
        view[:size] = data[done : done + size]
        done += size
    return done
