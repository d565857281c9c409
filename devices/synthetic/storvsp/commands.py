"""The commands of a controller, from the guest's packet to its completion.

What needs the disk is carried out on threads of the unit's two lanes: reads and writes on one, and what may take long
(flushes, discards, fills) on the other, so that it holds up none of the first. Completions come in any order.
All else is answered at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.storage import plans
from devices.storage.cdb import Op, op_name
from devices.storage.sense import CAPACITY_CHANGED, INVALID_FIELD_IN_CDB, LUN_NOT_SUPPORTED, ScsiStatus
from devices.synthetic.storvsp import inquiry, protocol
from devices.synthetic.storvsp.lane import Lane
from devices.synthetic.storvsp.lun import Lun, Outcome, failed, fill, first, makes_hole
from devices.synthetic.storvsp.protocol import NtStatus, ScsiRequest, SrbStatus
from devices.synthetic.storvsp.tasks import Task, Tasks
from devices.vmbus.packets import PACKET_GPA_DIRECT, ChannelViolation, completion, gpa_direct_ranges

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.storage.backend import Disk
    from devices.vmbus.bus import VmBus
    from devices.vmbus.channel import Channel
    from pyvmm.core._hot import Packet

#: LUNs of a controller, all on path 0 and target 0.
LUNS = 64
#: Threads of a unit for reads and writes, and for what may take long: a disk that hangs has none but its own.
QUICK_THREADS = 4
SLOW_THREADS = 3


class Command(Task):
    """One EXECUTE_SRB."""

    __slots__ = ("body_size", "buffer", "disk", "plan", "request", "started", "transaction_id")

    def __init__(
        self,
        channel: Channel,
        lun: Lun | None,
        transaction_id: int,
        body_size: int,
        request: ScsiRequest,
        buffer: list[memoryview],
        started: int,
    ) -> None:
        super().__init__(channel, lun)
        self.transaction_id = transaction_id
        #: Bytes of the request, as which its completion has as many.
        self.body_size = body_size
        self.started = started
        self.request = request
        self.buffer = buffer
        #: Set once it is known what to do.
        self.plan: plans.Plan | None = None
        #: What the plan was made for.
        self.disk: Disk | None = None


class Commands:
    """Carries out the commands for the logical units in `luns`, by number; `name` is the controller's.

    The units are on path 0 and target 0, or on whatever the guest takes for these if `any_target`.
    `execute` and `reset` run on the channel's worker.
    """

    def __init__(self, name: str, make_lane: Callable[[str, int], Lane] = Lane, any_target: bool = False) -> None:
        self.name = name
        self._any_target = any_target
        self.luns: dict[int, Lun] = {}
        self.bus: VmBus
        self._make_lane = make_lane
        self._tasks = Tasks()

    # Logical units ------------------------------------------------------------------------------------

    def attach(self, number: int, lun: Lun) -> None:
        """Add a logical unit; raises ValueError if its number is taken or out of range."""
        if not 0 <= number < LUNS:
            raise ValueError(f"LUN {number} is not in 0-{LUNS - 1}")
        if number in self.luns:
            raise ValueError(f"{self.name} has a disk at LUN {number} already")
        lun.quick = self._make_lane(f"{self.name}.{number}.io", QUICK_THREADS)
        lun.slow = self._make_lane(f"{self.name}.{number}.slow", SLOW_THREADS)
        self.luns[number] = lun

    def detach(self, number: int) -> Lun:
        """Remove a logical unit once no command uses it; raises ValueError if there is none."""
        gone = self.luns.pop(number, None)
        if gone is None:
            raise ValueError(f"{self.name} has no disk at LUN {number}")
        gone.gone = True  # for commands that have found it already
        self._tasks.wait(lambda task: task.lun is gone)
        gone.quick.close()
        gone.slow.close()
        return gone

    def settle(self, disk: Disk) -> None:
        """Return once no command uses `disk`, which has been taken out of its drive."""
        self._tasks.wait(lambda task: isinstance(task, Command) and task.disk is disk)

    # Life ---------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Return once all commands taken are done; limits delay none of them any longer. No new ones may come."""
        self._tasks.wait(lambda task: True)

    def abandon(self, channel: Channel) -> None:
        """Return once nothing of a closed channel is under way."""
        self._tasks.abandon(channel)

    def close(self) -> None:
        """End the threads; no commands may be under way."""
        for lun in self.luns.values():
            lun.quick.close()
            lun.slow.close()

    def in_flight(self) -> int:
        """How many commands are taken and not done."""
        return len(self._tasks)

    # Commands -----------------------------------------------------------------------------------------

    def execute(self, channel: Channel, packet: Packet) -> None:
        """Take a command; its completion follows now or later. Raises ChannelViolation for a malformed one."""
        _, _, transaction_id, _, payload = packet
        body = payload[protocol.HEADER.size :]
        try:
            request = protocol.parse_scsi_request(body)
        except ValueError as error:
            raise ChannelViolation(str(error)) from None
        lun = self.luns.get(request.lun) if self._addressed(request) else None
        buffer = self._buffer(packet, request)
        command = Command(channel, lun, transaction_id, len(body), request, buffer, self.bus.clock.now_ns())
        if request.cdb[0] == Op.REPORT_LUNS:
            self._answer(command, self._report_luns(command))
        elif lun is None:
            absent_inquiry = request.cdb[0] == Op.INQUIRY
            self._answer(command, _absent_inquiry(command) if absent_inquiry else failed(LUN_NOT_SUPPORTED))
        elif not self._tasks.admit(command, lun):
            self._answer(command, Outcome(0, ScsiStatus.TASK_SET_FULL))
        else:
            try:
                self._begin(command, lun)
            except BaseException:
                self._tasks.done(command)
                raise

    def _addressed(self, request: ScsiRequest) -> bool:
        return self._any_target or request.path == request.target == 0

    def _buffer(self, packet: Packet, request: ScsiRequest) -> list[memoryview]:
        buffer: list[memoryview] = []
        size = 0
        if packet[0] == PACKET_GPA_DIRECT:
            ranges = gpa_direct_ranges(packet, inquiry.MAX_TRANSFER_BYTES)
            if len(ranges) != 1:
                raise ChannelViolation(f"SCSI request with {len(ranges)} data ranges")
            view = self.bus.memory.view
            for gpa, length in ranges[0]:
                buffer.append(view(gpa, length, write=request.data_in))
                size += length
        if request.data_length > size:
            raise ChannelViolation(f"SCSI request for {request.data_length} bytes with a buffer of {size}")
        return buffer if request.data_length == size else first(buffer, request.data_length)

    def _begin(self, command: Command, lun: Lun) -> None:
        request = command.request
        if lun.gone:
            self._finish(command, failed(LUN_NOT_SUPPORTED))
            return
        command.disk = lun.disk
        plan = lun.plan(request.cdb, command.buffer, request.data_length, request.data_in)
        while isinstance(plan, plans.Read) and command.disk is not lun.disk:  # the disc was changed meanwhile
            command.disk = lun.disk
            plan = lun.plan(request.cdb, command.buffer, request.data_length, request.data_in)
        command.plan = plan
        if isinstance(plan, plans.Reply | plans.Fail | plans.Conflict):
            self._finish(command, lun.carry_out(plan, None, command.buffer, request.data_length))
            return
        quick = isinstance(plan, plans.Read) or (isinstance(plan, plans.Write) and not plan.fua)
        lane = lun.quick if quick else lun.slow
        command.run = lambda: lane.submit(lambda: self._carry_out(command, lun, plan))
        start = command.started
        if lun.limits is not None and isinstance(plan, plans.Read | plans.Write | plans.Verify | plans.Fill):
            start = lun.limits.take(start, 0 if makes_hole(plan) else plan.length)
        if start > command.started:
            self._tasks.delay(command, lambda action: command.channel.worker.call_at(start, action))
        else:
            command.run()

    def _carry_out(self, command: Command, lun: Lun, plan: plans.Plan) -> None:
        try:
            outcome = lun.carry_out(plan, command.disk, command.buffer, command.request.data_length)
            self._finish(command, outcome)
        except BaseException as error:  # noqa: BLE001 - a bug of ours ends the VM, whichever thread runs into it
            self.bus.failed(error)
            self._tasks.done(command)

    def _finish(self, command: Command, outcome: Outcome) -> None:
        if command.lun is not None and command.plan is not None:
            command.lun.count(command.plan, outcome, self.bus.clock.now_ns() - command.started)
        self._answer(command, outcome)
        self._tasks.done(command)

    def _answer(self, command: Command, outcome: Outcome) -> None:
        srb = _srb_status(outcome)
        if self.bus.tracer.storvsp:
            self._trace(command.channel, _describe(command.request, srb, outcome))
        answer = protocol.scsi_completion(srb, outcome.status, outcome.sense, outcome.transferred, command.body_size)
        command.channel.send((completion(command.transaction_id, answer),))

    def _report_luns(self, command: Command) -> Outcome:
        """Answer for the whole target, whichever LUN is asked. SPC-4 section 6.33."""
        request = command.request
        if len(request.cdb) < 12 or request.cdb[2] > 2 or (command.buffer and not request.data_in):
            return failed(INVALID_FIELD_IN_CDB)
        luns: list[int] = []
        # Select report 1 asks for well-known logical units alone, which we have none of.
        if self._addressed(request) and request.cdb[2] != 1:
            luns = sorted(self.luns)
        data = (
            (8 * len(luns)).to_bytes(4, "big") + bytes(4) + b"".join(lun.to_bytes(2, "big") + bytes(6) for lun in luns)
        )
        return Outcome(fill(command.buffer, data[: int.from_bytes(request.cdb[6:10], "big")]))

    # Resets -------------------------------------------------------------------------------------------

    def reset(self, channel: Channel, transaction_id: int, body: bytes, one_lun: bool) -> None:
        """Answer a reset once every command taken before it is done: nothing is aborted, and nothing lost."""
        lun: Lun | None = None
        if one_lun and len(body) > protocol.LUN_OFFSET:
            lun = self.luns.get(body[protocol.LUN_OFFSET])
        task = Task(channel, None)

        def answer(status: NtStatus = NtStatus.SUCCESS) -> None:
            channel.send((completion(transaction_id, protocol.completion(status, len(body))),))

        def finish() -> None:
            answer()
            self._tasks.done(task)

        task.run = finish
        if not self._tasks.admit_last(task, lun):
            answer(NtStatus.DEVICE_BUSY)

    def _trace(self, channel: Channel, text: str) -> None:
        self.bus.tracer.line("storvsp", f"{self.name}.{channel.subchannel_index} {text}")


def _absent_inquiry(command: Command) -> Outcome:
    """INQUIRY where no disk is. Linux takes any failed INQUIRY for good, so it must get data that says so."""
    request = command.request
    if len(request.cdb) < 6 or request.cdb[1] or request.cdb[2] or (command.buffer and not request.data_in):
        return failed(INVALID_FIELD_IN_CDB)
    data = inquiry.ABSENT if request.lun else inquiry.ABSENT_LUN_0
    return Outcome(fill(command.buffer, data[: int.from_bytes(request.cdb[3:5], "big")]))


def _srb_status(outcome: Outcome) -> SrbStatus:
    sense = outcome.sense
    if outcome.status == ScsiStatus.GOOD:
        return SrbStatus.SUCCESS
    if outcome.status == ScsiStatus.TASK_SET_FULL:  # with an error Linux would not look at the SCSI status
        return SrbStatus.BUSY
    if sense is None:
        return SrbStatus.ERROR
    if sense == LUN_NOT_SUPPORTED:
        return SrbStatus.INVALID_LUN
    if sense == CAPACITY_CHANGED:  # from Windows 2016 hosts Linux knows it in this form, and reads the capacity again
        return SrbStatus.ABORTED
    return SrbStatus.INVALID_REQUEST if sense.key == INVALID_FIELD_IN_CDB.key else SrbStatus.ERROR


def _describe(request: ScsiRequest, srb: SrbStatus, outcome: Outcome) -> str:
    where = f"{request.path}:{request.target}:{request.lun}"
    way = "in" if request.data_in else "out"
    text = f"{where} {op_name(request.cdb[0])} {request.cdb.hex(' ')} {way} {request.data_length} -> {srb.name}"
    if outcome.sense is not None:
        key, asc, ascq, _ = outcome.sense
        return f"{text} sense {key:x}/{asc:02x}/{ascq:02x}"
    return f"{text} {outcome.status.name}" if outcome.status else f"{text} {outcome.transferred}"
