"""A SCSI controller on VMBus: the storage protocol's state machine around the logical units.

Order of the handshake and the answer to each thing out of place: storvsc_channel_init in Linux 6.1's
drivers/scsi/storvsc_drv.c, and OpenVMM's vm/devices/storage/storvsp. Each channel has a worker of its own, which takes
packets and hands commands on to `Commands`.
"""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING

from devices.storage.mmc import OpticalDrive
from devices.synthetic.storvsp import inquiry, protocol
from devices.synthetic.storvsp.commands import Commands
from devices.synthetic.storvsp.lane import Lane
from devices.synthetic.storvsp.lun import Lun
from devices.synthetic.storvsp.protocol import NtStatus, Operation
from devices.synthetic.storvsp.scsi import Target
from devices.synthetic.storvsp.statistics import FLUSH, READ, WRITE
from devices.vmbus.packets import (
    COMPLETION_REQUESTED,
    PACKET_GPA_DIRECT,
    PACKET_INBAND,
    ChannelViolation,
    completion,
    inband,
)
from devices.vmbus.vsp import Vsp
from pyvmm.core._hot import StorageQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from devices.storage.backend import Disk
    from devices.synthetic.storvsp.qos import Limits
    from devices.vmbus.bus import VmBus
    from devices.vmbus.channel import Channel
    from pyvmm.core._hot import Packet
    from pyvmm.core.worker import Worker

#: A channel costs a thread and two rings; a guest with more VPs lets several share one.
MAX_CHANNELS = 16

#: Instance ids are version 5 UUIDs of the controller's name in this name space of ours.
_NAMESPACE = uuid.UUID("4f1d7a53-20c4-5e0b-9c0e-6d2b8e6f5a10")

# States of the handshake: what is waited for.
_BEGIN, _VERSION, _PROPERTIES, _END, _READY = "begin", "query_version", "query_properties", "end", "ready"
_STATES = (_BEGIN, _VERSION, _PROPERTIES, _END, _READY)


def subchannels_for(vp_count: int) -> int:
    """Sub-channels worth offering to a VM of `vp_count` VPs."""
    return min(vp_count, MAX_CHANNELS) - 1


class StorVsp(Vsp):
    """Controller `index` of a VM, with `disks` by LUN.

    Disks may be added and removed at any time; the controller does not close them. Protocol versions above
    `max_version` are refused. `make_lane` makes the threads that do the work.
    """

    interface_id = uuid.UUID(protocol.INTERFACE_TYPE)
    #: Whether path and target of a request say nothing, because there is one target only.
    any_target = False

    def __init__(
        self,
        index: int,
        disks: Mapping[int, Disk],
        max_subchannels: int = 0,
        max_version: int = protocol.WIN10,
        make_lane: Callable[[str, int], Lane] = Lane,
    ) -> None:
        super().__init__(self.name_of(index))
        self.instance_id = self.instance_of(index)
        self.offer_order = index
        self.max_subchannels = max_subchannels
        self.worker_count = 1 + max_subchannels
        self._max_version = max_version
        # The guest as an initiator: eight bytes, in the form of a locally assigned NAA name.
        self._nexus = bytes((0x30 | self.instance_id.bytes[0] & 0xF,)) + self.instance_id.bytes[1:8]
        self._state = _BEGIN
        self._version = 0
        self._commands = Commands(self.name, make_lane, self.any_target)
        self._channels: dict[int, Channel] = {}
        self._engines: dict[int, StorageQueue] = {}
        # Guards the handshake's state and the channels.
        self._lock = threading.Lock()
        for lun, disk in disks.items():
            self._attach(lun, self._unit(lun, disk, None))

    @staticmethod
    def name_of(index: int) -> str:
        """The name of a controller."""
        return f"scsi{index}"

    @staticmethod
    def instance_of(index: int) -> uuid.UUID:
        """The instance id of a controller's offer."""
        return uuid.uuid5(_NAMESPACE, f"scsi{index}")

    def attached(self, bus: VmBus, workers: Sequence[Worker]) -> None:
        """The controller is on `bus`."""
        super().attached(bus, workers)
        self._commands.bus = bus

    def detached(self) -> None:
        """The controller is off its bus: end the threads."""
        self._commands.close()

    def _attach(self, number: int, lun: Lun) -> None:
        self._commands.attach(number, lun)
        if isinstance(lun.target, Target):
            lun.target.on_change = lambda: self._tell_engines(number)

    # Disks ------------------------------------------------------------------------------------------

    def add_disk(self, lun: int, disk: Disk, limits: Limits | None = None) -> None:
        """Plug `disk` in at `lun` and have the guest look; raises ValueError if the LUN is taken or out of range."""
        self._attach(lun, self._unit(lun, disk, limits))
        self._tell_engines(lun)
        self._announce()

    def _unit(self, lun: int, disk: Disk, limits: Limits | None) -> Lun:
        if not disk.optical:
            return Lun(Target(disk, disk.identity, self._nexus), limits)
        # The drive stays when its disc goes, so it has a name of its own.
        return Lun(OpticalDrive(disk, uuid.uuid5(self.instance_id, f"drive {lun}").bytes), limits)

    def remove_disk(self, lun: int) -> Disk | None:
        """Unplug the unit at `lun` and return its disk once no command uses it; raises ValueError if there is none.

        A drive may be without one.
        """
        gone = self._commands.detach(lun)
        self._tell_engines(lun)
        with self._lock:
            for engine in self._engines.values():
                engine.take_counters(lun)  # not for the next disk there
        self._announce()
        return gone.disk

    def resize_disk(self, lun: int, size: int) -> None:
        """Make the disk at `lun` larger and have the guest notice.

        Raises ValueError if there is none or it would be smaller, what `Disk.resize` raises, or OSError.
        """
        target = self._target(lun)
        if isinstance(target, OpticalDrive):
            raise ValueError(f"a CD or DVD drive is at LUN {lun}")
        disk = target.disk
        if size < disk.size:
            raise ValueError(f"a running VM's disk can only grow: it has {disk.size} bytes")
        disk.resize(size)
        self._tell_engines(lun)  # what C reaches the disk with may be another now
        target.resized(size)
        self._announce()  # for an idle guest: it sends TEST UNIT READY, and hears of the new capacity

    def change_disc(self, lun: int, disc: Disk | None, force: bool = False) -> Disk | None:
        """Put `disc`, or nothing, into the drive at `lun`; return the disc that was in it once no command uses it.

        Raises ValueError if there is no drive, and `mmc.MediumLocked` if the guest keeps the disc, unless `force`.
        """
        target = self._target(lun)
        if not isinstance(target, OpticalDrive):
            raise ValueError(f"no CD or DVD drive is at LUN {lun}")
        old = target.change(disc, force)
        if old is not None:
            self._commands.settle(old)
        return old

    def _target(self, lun: int) -> Target | OpticalDrive:
        if lun not in self._commands.luns:
            raise ValueError(f"{self.name} has no disk at LUN {lun}")
        return self._commands.luns[lun].target

    def _announce(self) -> None:
        with self._lock:
            primary = self._channels.get(0)
            # Before the handshake is over the guest has its scan still to come; before Windows 7 it has no such packet.
            if primary is not None and self._state == _READY and self._version >= protocol.WIN7:
                primary.send((inband(protocol.enumerate_bus(self._version)),))

    # The fast path ------------------------------------------------------------------------------------

    def _speed_up(self, channel: Channel) -> None:
        """Have C serve the disks that it can reach. Called with the lock held, once the handshake is over."""
        fast = {number: lun.fast for number, lun in self._commands.luns.items() if lun.fast is not None}
        if fast and not self.bus.tracer.storvsp:  # which shows every request
            engine = channel.make_engine(StorageQueue)
            engine.any_target = self.any_target
            for number, disk in fast.items():
                engine.set_disk(number, disk)
            self._engines[channel.subchannel_index] = engine
            channel.use_engine(engine)

    def _tell_engines(self, number: int) -> None:
        """Have the engines serve what is at a LUN now; return once they use nothing else."""
        with self._lock:
            lun = self._commands.luns.get(number)
            for index, channel in self._channels.items():
                if index in self._engines:
                    self._engines[index].set_disk(number, lun.fast if lun is not None else None)
                elif self._state == _READY:
                    self._speed_up(channel)

    def _gather(self, engine: StorageQueue) -> None:
        """Add what a channel's engine has counted to the logical units' own."""
        for number, lun in list(self._commands.luns.items()):
            for kind, counters in zip((READ, WRITE, FLUSH), engine.take_counters(number), strict=True):
                lun.statistics.add(kind, *counters)

    # Channels ---------------------------------------------------------------------------------------

    def open(self, channel: Channel) -> None:
        """A channel opens; a sub-channel is not served before the handshake on the primary is over."""
        with self._lock:
            self._channels[channel.subchannel_index] = channel
            if self._state == _READY:
                self._speed_up(channel)
            elif channel.subchannel_index:
                channel.stop_receiving()

    def close(self, channel: Channel) -> None:
        """A channel is gone; with the primary the handshake starts anew."""
        with self._lock:
            self._channels.pop(channel.subchannel_index, None)
            engine = self._engines.pop(channel.subchannel_index, None)
            if engine is not None:
                self._gather(engine)
            if channel.subchannel_index == 0:
                self._state, self._version = _BEGIN, 0
        self._commands.abandon(channel)

    def reattach(self, channel: Channel) -> None:
        """A channel is open again after a restore."""
        self.open(channel)

    def packets(self, channel: Channel, packets: list[Packet]) -> None:
        """Serve packets in order; commands end in any order."""
        for packet in packets:
            kind, flags, transaction_id, _, payload = packet
            if kind not in (PACKET_INBAND, PACKET_GPA_DIRECT) or not flags & COMPLETION_REQUESTED:
                raise ChannelViolation(f"storage packet of type {kind} with flags {flags:#x} wants no completion")
            if len(payload) < protocol.HEADER.size:
                raise ChannelViolation(f"storage packet of {len(payload)} bytes")
            operation = int.from_bytes(payload[:4], "little")
            body = payload[protocol.HEADER.size :]
            if self._state != _READY or operation not in _READY_OPERATIONS:
                status, answer = self._control(channel, operation, body)
                channel.send((completion(transaction_id, protocol.completion(status, len(body), answer)),))
            elif operation == Operation.EXECUTE_SRB:
                self._commands.execute(channel, packet)
                continue
            else:
                self._drain_engines()
                self._commands.reset(channel, transaction_id, body, operation == Operation.RESET_LUN)
                status = NtStatus.SUCCESS
            if self.bus.tracer.storvsp:
                text = f"{self.name}.{channel.subchannel_index} {protocol.operation_name(operation)} -> {status:#x}"
                self.bus.tracer.line("storvsp", text)

    def _drain_engines(self) -> None:
        for engine in list(self._engines.values()):
            engine.drain()

    # The handshake ----------------------------------------------------------------------------------

    def _control(self, channel: Channel, operation: int, body: bytes) -> tuple[int, bytes]:
        """Answer a step of the handshake, or what is out of place: NT status and body of the completion."""
        if operation not in _HANDSHAKE:
            return NtStatus.INVALID_DEVICE_REQUEST, b""
        with self._lock:
            if channel.subchannel_index or self._state not in _HANDSHAKE[operation]:
                return NtStatus.INVALID_DEVICE_STATE, b""
            if operation == Operation.BEGIN_INITIALIZATION:
                self._state = _VERSION
            elif operation == Operation.QUERY_PROTOCOL_VERSION:
                return self._query_version(body)
            elif operation == Operation.QUERY_PROPERTIES:
                self._state = _END
                limit = self.max_subchannels if self._version >= protocol.WIN8 else None
                return NtStatus.SUCCESS, protocol.channel_properties(limit, inquiry.MAX_TRANSFER_BYTES)
            elif operation == Operation.END_INITIALIZATION:
                self._state = _READY
                for index, other in self._channels.items():
                    self._speed_up(other)
                    if index:
                        other.start_receiving()
        # Not under the lock: the bus may be opening a channel.
        return (self._create_subchannels(body) if operation == Operation.CREATE_SUB_CHANNELS else NtStatus.SUCCESS), b""

    def _query_version(self, body: bytes) -> tuple[int, bytes]:
        if len(body) < protocol.VERSION.size:
            raise ChannelViolation(f"protocol version in {len(body)} bytes")
        version, _ = protocol.VERSION.unpack_from(body)
        echo = protocol.VERSION.pack(version, 0)
        if version not in protocol.VERSIONS or version > self._max_version:
            return NtStatus.REVISION_MISMATCH, echo
        self._state, self._version = _PROPERTIES, version
        return NtStatus.SUCCESS, echo

    def _create_subchannels(self, body: bytes) -> int:
        if len(body) < protocol.SUB_CHANNELS.size:
            raise ChannelViolation(f"sub-channel count in {len(body)} bytes")
        if self._version < protocol.WIN8:
            return NtStatus.INVALID_DEVICE_STATE
        (count,) = protocol.SUB_CHANNELS.unpack_from(body)
        try:
            self.request_subchannels(count)
        except ValueError:
            return NtStatus.INVALID_PARAMETER
        return NtStatus.SUCCESS

    # Life cycle -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the handshake; the disks stay."""
        with self._lock:
            self._state, self._version = _BEGIN, 0
        for unit in self._commands.luns.values():
            unit.target.reset()

    def pause(self) -> None:
        """Return once all commands taken are done."""
        self._commands.drain()

    def save(self) -> dict[str, Any]:
        """Return the handshake's state and what the guest knows its disks by."""
        luns = [
            {"lun": lun, "size": _size(unit), "target": unit.target.save()}
            for lun, unit in sorted(self._commands.luns.items())
        ]
        return {"version": 1, "state": self._state, "protocol": self._version, "luns": luns}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the saved handshake, under the saved identities; the disks have to be of the saved sizes."""
        if state.get("version") != 1 or state["state"] not in _STATES:
            raise ValueError(f"{self.name}: saved state of an unknown kind")
        luns = self._commands.luns
        sizes = {lun: _size(unit) for lun, unit in luns.items()}
        if sizes != {saved["lun"]: saved["size"] for saved in state["luns"]}:
            raise ValueError(f"{self.name}: the disks differ in LUN or size from those of the saved state")
        for saved in state["luns"]:
            luns[saved["lun"]].target.restore(saved["target"])
        self._state, self._version = state["state"], state["protocol"]

    def inspect(self) -> dict[str, Any]:
        """Return the handshake, open channels, and each logical unit with its counters."""
        with self._lock:
            for engine in self._engines.values():
                self._gather(engine)
        return {
            "state": self._state,
            "protocol": f"{self._version >> 8}.{self._version & 0xFF}" if self._version else None,
            "open_channels": sorted(self._channels),
            "max_subchannels": self.max_subchannels,
            "in_flight": self._commands.in_flight(),
            "luns": {str(lun): unit.inspect() for lun, unit in sorted(self._commands.luns.items())},
        }


_READY_OPERATIONS = (Operation.EXECUTE_SRB, Operation.RESET_LUN, Operation.RESET_ADAPTER, Operation.RESET_BUS)
#: In which states each step of the handshake is in place.
_HANDSHAKE: dict[int, tuple[str, ...]] = {
    Operation.BEGIN_INITIALIZATION: (_BEGIN,),
    Operation.QUERY_PROTOCOL_VERSION: (_VERSION,),
    Operation.QUERY_PROPERTIES: (_PROPERTIES,),
    Operation.CREATE_SUB_CHANNELS: (_END, _READY),
    Operation.END_INITIALIZATION: (_END,),
    Operation.EXECUTE_SRB: (),
    Operation.RESET_LUN: (),
    Operation.RESET_ADAPTER: (),
    Operation.RESET_BUS: (),
}


def _size(unit: Lun) -> int | None:
    """What must be the same after a restore: the size of a disk. A drive may have another disc by then."""
    return unit.target.disk.size if isinstance(unit.target, Target) else None
