"""A disk behind a SCSI logical unit: carries out the plans of `scsi.Target` on a `Disk`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from devices.storage import plans
from devices.storage.sense import INVALID_FIELD_IN_CDB, Sense, from_os_error
from devices.synthetic.storvsp import scsi

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from devices.storage.backend import Disk

_FILL_CHUNK = 1 << 20


class Outcome(NamedTuple):
    """How a command ended: bytes moved, and sense data if it ended with CHECK CONDITION."""

    transferred: int = 0
    sense: Sense | None = None


class Counters:
    """What one queue did to one logical unit; only that queue's thread counts."""

    NAMES = ("commands", "reads", "writes", "bytes_read", "bytes_written", "flushes", "discards", "errors")
    __slots__ = NAMES

    def __init__(self) -> None:
        self.commands = self.reads = self.writes = self.bytes_read = self.bytes_written = 0
        self.flushes = self.discards = self.errors = 0


class Lun:
    """One logical unit, served by `queues` queues; `execute` may run on several threads at once."""

    def __init__(self, disk: Disk, identity: bytes, queues: int = 1) -> None:
        self.disk = disk
        self.target = scsi.Target(disk, identity)
        self.counters = [Counters() for _ in range(queues)]

    def inspect(self) -> dict[str, Any]:
        """Return the disk and the counters, summed over the queues."""
        totals = {name: sum(getattr(counters, name) for counters in self.counters) for name in Counters.NAMES}
        return {"disk": self.disk.inspect(), **totals}

    def execute(self, cdb: bytes, buffer: Sequence[memoryview], length: int, data_in: bool, count: Counters) -> Outcome:
        """Carry out one command to its end.

        `buffer` is the initiator's data buffer, `length` bytes in all and writable if `data_in`. Errors of
        the medium become sense data.
        """
        count.commands += 1
        plan = self.target.plan(cdb, length, data_in)
        if isinstance(plan, plans.Parameters):
            plan = plan.parse(b"".join(first(buffer, plan.length)))
        try:
            outcome = self._carry_out(plan, buffer, length, data_in, count)
        except OSError as error:
            outcome = Outcome(0, from_os_error(error, not isinstance(plan, plans.Read | plans.Verify)))
        if outcome.sense is not None:
            count.errors += 1
        return outcome

    def _carry_out(
        self, plan: plans.Plan, buffer: Sequence[memoryview], length: int, data_in: bool, count: Counters
    ) -> Outcome:
        disk = self.disk
        match plan:
            case plans.Read(offset, size):
                disk.read(offset, buffer if size == length else first(buffer, size))
                count.reads += 1
                count.bytes_read += size
                return Outcome(size)
            case plans.Write(offset, size, fua):
                disk.write(offset, buffer if size == length else first(buffer, size))
                count.writes += 1
                count.bytes_written += size
                if fua:
                    disk.flush()
                return Outcome(size)
            case plans.Reply(data):
                if data and length and not data_in:
                    return Outcome(0, INVALID_FIELD_IN_CDB)
                return Outcome(fill(buffer, data))
            case plans.Fail(sense):
                return Outcome(0, sense)
            case plans.Flush():
                disk.flush()
                count.flushes += 1
            case plans.Verify(offset, size):
                disk.read(offset, [memoryview(bytearray(size))])
            case plans.Unmap(ranges):
                for offset, size in ranges:
                    disk.trim(offset, size)
                    count.discards += 1
                return Outcome(length)
            case plans.Fill():
                self._fill(plan)
                count.writes += 1
                return Outcome(length)
            case plans.Parameters():
                raise AssertionError("parameters lead to parameters")
        return Outcome()

    def _fill(self, plan: plans.Fill) -> None:
        if plan.discard and self.disk.trim_zeroes and not any(plan.block):
            self.disk.trim(plan.offset, plan.length)
            return
        pattern = memoryview(plan.block * (min(plan.length, _FILL_CHUNK) // len(plan.block)))
        offset, end = plan.offset, plan.offset + plan.length
        while offset < end:
            step = min(len(pattern), end - offset)
            self.disk.write(offset, [pattern[:step]])
            offset += step


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
