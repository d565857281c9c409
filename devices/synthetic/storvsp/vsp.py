"""A SCSI controller on VMBus: the storage protocol's state machine around the logical units.

Order of the handshake and the answer to each thing out of place: storvsc_channel_init in Linux 6.1's
drivers/scsi/storvsc_drv.c, and OpenVMM's vm/devices/storage/storvsp. Each channel has a worker of its own,
which carries a command out before it takes the next, so nothing is in flight while the workers are paused.
"""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING

from devices.storage.cdb import Op, op_name
from devices.storage.sense import INVALID_FIELD_IN_CDB, LUN_NOT_SUPPORTED, Sense
from devices.synthetic.storvsp import inquiry, protocol
from devices.synthetic.storvsp.lun import Lun, Outcome, fill, first
from devices.synthetic.storvsp.protocol import NtStatus, Operation, ScsiRequest, SrbStatus
from devices.vmbus.packets import (
    COMPLETION_REQUESTED,
    PACKET_GPA_DIRECT,
    PACKET_INBAND,
    ChannelViolation,
    completion,
    gpa_direct_ranges,
    inband,
)
from devices.vmbus.vsp import Vsp

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from devices.storage.backend import Disk
    from devices.vmbus.channel import Channel
    from pyvmm.core._hot import Packet

#: LUNs of a controller, all on path 0 and target 0.
LUNS = 64
MAX_CHANNELS = 4

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
    `max_version` are refused.
    """

    interface_id = uuid.UUID(protocol.INTERFACE_TYPE)

    def __init__(
        self, index: int, disks: Mapping[int, Disk], max_subchannels: int = 0, max_version: int = protocol.WIN10
    ) -> None:
        super().__init__(f"scsi{index}")
        self.instance_id = uuid.uuid5(_NAMESPACE, self.name)
        self.offer_order = index
        self.max_subchannels = max_subchannels
        self.worker_count = 1 + max_subchannels
        self._max_version = max_version
        self._state = _BEGIN
        self._version = 0
        self._luns: dict[int, Lun] = {}
        self._channels: dict[int, Channel] = {}
        # Guards the handshake's state and the channels.
        self._lock = threading.Lock()
        # Held by each channel's worker while it serves packets.
        self._serving = [threading.Lock() for _ in range(self.worker_count)]
        for lun, disk in disks.items():
            self._attach(lun, disk)

    # Disks ------------------------------------------------------------------------------------------

    def add_disk(self, lun: int, disk: Disk) -> None:
        """Plug `disk` in at `lun` and have the guest look; raises ValueError if the LUN is taken or out of range."""
        self._attach(lun, disk)
        self._announce()

    def remove_disk(self, lun: int) -> Disk:
        """Unplug and return the disk at `lun` once no command uses it; raises ValueError if there is none."""
        gone = self._luns.pop(lun, None)
        if gone is None:
            raise ValueError(f"{self.name} has no disk at LUN {lun}")
        for serving in self._serving:
            with serving:  # commands that may have found it before are over now
                pass
        self._announce()
        return gone.disk

    def _attach(self, lun: int, disk: Disk) -> None:
        if not 0 <= lun < LUNS:
            raise ValueError(f"LUN {lun} is not in 0-{LUNS - 1}")
        if self._luns.setdefault(lun, new := Lun(disk, disk.identity, self.worker_count)) is not new:
            raise ValueError(f"{self.name} has a disk at LUN {lun} already")

    def _announce(self) -> None:
        with self._lock:
            primary = self._channels.get(0)
            # Before the handshake is over the guest has its scan still to come; before Windows 7 it has no such packet.
            if primary is not None and self._state == _READY and self._version >= protocol.WIN7:
                primary.send((inband(protocol.enumerate_bus(self._version)),))

    # Channels ---------------------------------------------------------------------------------------

    def open(self, channel: Channel) -> None:
        """A channel opens; a sub-channel is not served before the handshake on the primary is over."""
        with self._lock:
            self._channels[channel.subchannel_index] = channel
            if channel.subchannel_index and self._state != _READY:
                channel.stop_receiving()

    def close(self, channel: Channel) -> None:
        """A channel is gone; with the primary the handshake starts anew."""
        with self._lock:
            self._channels.pop(channel.subchannel_index, None)
            if channel.subchannel_index == 0:
                self._state, self._version = _BEGIN, 0

    def reattach(self, channel: Channel) -> None:
        """A channel is open again after a restore."""
        self.open(channel)

    def packets(self, channel: Channel, packets: list[Packet]) -> None:
        """Serve packets in order."""
        with self._serving[channel.subchannel_index]:
            for packet in packets:
                kind, flags, transaction_id, _, payload = packet
                if kind not in (PACKET_INBAND, PACKET_GPA_DIRECT) or not flags & COMPLETION_REQUESTED:
                    raise ChannelViolation(f"storage packet of type {kind} with flags {flags:#x} wants no completion")
                if len(payload) < protocol.HEADER.size:
                    raise ChannelViolation(f"storage packet of {len(payload)} bytes")
                operation = int.from_bytes(payload[:4], "little")
                if operation == Operation.EXECUTE_SRB and self._state == _READY:
                    answer = self._execute(channel, packet)
                else:
                    status, body = self._control(channel, operation, payload[protocol.HEADER.size :])
                    answer = protocol.completion(status, len(payload) - protocol.HEADER.size, body)
                    if self.bus.tracer.storvsp:
                        self._trace(channel, f"{protocol.operation_name(operation)} -> {status:#x}")
                channel.send((completion(transaction_id, answer),))

    # The handshake ----------------------------------------------------------------------------------

    def _control(self, channel: Channel, operation: int, body: bytes) -> tuple[int, bytes]:
        """Answer everything but commands: NT status and body of the completion."""
        if operation in (Operation.RESET_LUN, Operation.RESET_ADAPTER, Operation.RESET_BUS):
            # Nothing to abort: commands before this one on the channel are over, and others end by themselves.
            return (NtStatus.SUCCESS if self._state == _READY else NtStatus.INVALID_DEVICE_STATE), b""
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

    # Commands ---------------------------------------------------------------------------------------

    def _execute(self, channel: Channel, packet: Packet) -> bytes:
        kind, _, _, _, payload = packet
        body = payload[protocol.HEADER.size :]
        try:
            request = protocol.parse_scsi_request(body)
        except ValueError as error:
            raise ChannelViolation(str(error)) from None
        buffer: list[memoryview] = []
        size = 0
        if kind == PACKET_GPA_DIRECT:
            ranges = gpa_direct_ranges(packet, inquiry.MAX_TRANSFER_BYTES)
            if len(ranges) != 1:
                raise ChannelViolation(f"SCSI request with {len(ranges)} data ranges")
            view = self.bus.memory.view
            for gpa, length in ranges[0]:
                buffer.append(view(gpa, length, write=request.data_in))
                size += length
        if request.data_length != size:
            if request.data_length > size:
                raise ChannelViolation(f"SCSI request for {request.data_length} bytes with a buffer of {size}")
            buffer = first(buffer, request.data_length)
        lun = self._luns.get(request.lun) if request.path == request.target == 0 else None
        if request.cdb[0] == Op.REPORT_LUNS:
            outcome = self._report_luns(request, buffer)
        elif lun is not None:
            counters = lun.counters[channel.subchannel_index]
            outcome = lun.execute(request.cdb, buffer, request.data_length, request.data_in, counters)
        elif request.cdb[0] == Op.INQUIRY:
            outcome = _absent_inquiry(request, buffer)
        else:
            outcome = Outcome(0, LUN_NOT_SUPPORTED)
        status = _srb_status(outcome.sense)
        if self.bus.tracer.storvsp:
            self._trace(channel, _describe(request, status, outcome))
        return protocol.scsi_completion(status, outcome.sense, outcome.transferred, len(body))

    def _report_luns(self, request: ScsiRequest, buffer: list[memoryview]) -> Outcome:
        """Answer for the whole target, whichever LUN is asked. SPC-4 section 6.33."""
        if len(request.cdb) < 12 or request.cdb[2] > 2 or (buffer and not request.data_in):
            return Outcome(0, INVALID_FIELD_IN_CDB)
        luns: list[int] = []
        # Select report 1 asks for well-known logical units alone, which we have none of.
        if request.path == request.target == 0 and request.cdb[2] != 1:
            luns = sorted(self._luns)
        data = (
            (8 * len(luns)).to_bytes(4, "big") + bytes(4) + b"".join(lun.to_bytes(2, "big") + bytes(6) for lun in luns)
        )
        return Outcome(fill(buffer, data[: int.from_bytes(request.cdb[6:10], "big")]))

    def _trace(self, channel: Channel, text: str) -> None:
        self.bus.tracer.line("storvsp", f"{self.name}.{channel.subchannel_index} {text}")

    # Life cycle -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the handshake; the disks stay."""
        with self._lock:
            self._state, self._version = _BEGIN, 0

    def save(self) -> dict[str, Any]:
        """Return the handshake's state and what the guest knows its disks by."""
        luns = [
            {"lun": lun, "size": unit.disk.size, "identity": unit.target.identity}
            for lun, unit in sorted(self._luns.items())
        ]
        return {"version": 1, "state": self._state, "protocol": self._version, "luns": luns}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the saved handshake, under the saved identities; the disks have to be of the saved sizes."""
        if state.get("version") != 1 or state["state"] not in _STATES:
            raise ValueError(f"{self.name}: saved state of an unknown kind")
        sizes = {lun: unit.disk.size for lun, unit in self._luns.items()}
        if sizes != {saved["lun"]: saved["size"] for saved in state["luns"]}:
            raise ValueError(f"{self.name}: the disks differ in LUN or size from those of the saved state")
        for saved in state["luns"]:
            disk = self._luns[saved["lun"]].disk
            self._luns[saved["lun"]] = Lun(disk, saved["identity"], self.worker_count)
        self._state, self._version = state["state"], state["protocol"]

    def inspect(self) -> dict[str, Any]:
        """Return the handshake, open channels, and each logical unit with its counters."""
        return {
            "state": self._state,
            "protocol": f"{self._version >> 8}.{self._version & 0xFF}" if self._version else None,
            "open_channels": sorted(self._channels),
            "max_subchannels": self.max_subchannels,
            "luns": {str(lun): unit.inspect() for lun, unit in sorted(self._luns.items())},
        }


#: In which states each step of the handshake is in place.
_HANDSHAKE: dict[int, tuple[str, ...]] = {
    Operation.BEGIN_INITIALIZATION: (_BEGIN,),
    Operation.QUERY_PROTOCOL_VERSION: (_VERSION,),
    Operation.QUERY_PROPERTIES: (_PROPERTIES,),
    Operation.CREATE_SUB_CHANNELS: (_END, _READY),
    Operation.END_INITIALIZATION: (_END,),
    Operation.EXECUTE_SRB: (),
}


def _absent_inquiry(request: ScsiRequest, buffer: list[memoryview]) -> Outcome:
    """INQUIRY where no disk is. Linux takes any failed INQUIRY for good, so it must get data that says so."""
    if len(request.cdb) < 6 or request.cdb[1] or request.cdb[2] or (buffer and not request.data_in):
        return Outcome(0, INVALID_FIELD_IN_CDB)
    data = inquiry.ABSENT if request.lun else inquiry.ABSENT_LUN_0
    return Outcome(fill(buffer, data[: int.from_bytes(request.cdb[3:5], "big")]))


def _srb_status(sense: Sense | None) -> SrbStatus:
    if sense is None:
        return SrbStatus.SUCCESS
    if sense == LUN_NOT_SUPPORTED:
        return SrbStatus.INVALID_LUN
    return SrbStatus.INVALID_REQUEST if sense.key == INVALID_FIELD_IN_CDB.key else SrbStatus.ERROR


def _describe(request: ScsiRequest, status: SrbStatus, outcome: Outcome) -> str:
    where = f"{request.path}:{request.target}:{request.lun}"
    way = "in" if request.data_in else "out"
    text = f"{where} {op_name(request.cdb[0])} {request.cdb.hex(' ')} {way} {request.data_length} -> {status.name}"
    if outcome.sense is not None:
        key, asc, ascq, _ = outcome.sense
        return f"{text} sense {key:x}/{asc:02x}/{ascq:02x}"
    return f"{text} {outcome.transferred}"
