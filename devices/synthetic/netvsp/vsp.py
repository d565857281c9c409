"""A synthetic NIC on VMBus: the network protocol's handshake, and what binds a guest's channels to a port of a network.

Order of the handshake and the answer to each thing out of place: netvsc_connect_vsp and netvsc_init_buf in Linux 6.1's
drivers/net/hyperv/netvsc.c, and OpenVMM's vm/devices/net/netvsp. Frames are moved by `NetDevice` and `NetQueue` in C;
only what else is in the rings comes here.
"""

from __future__ import annotations

import threading
import uuid
from functools import partial
from typing import TYPE_CHECKING

from devices.network.port import MAX_MTU, Nic
from devices.saved import check_version, saved_bool, saved_bytes, saved_int
from devices.synthetic.netvsp import protocol, rndis
from devices.synthetic.netvsp.adapter import Adapter
from devices.synthetic.netvsp.control import Control
from devices.synthetic.netvsp.link import Link
from devices.synthetic.netvsp.protocol import Message, Status
from devices.vmbus.packets import (
    COMPLETION_REQUESTED,
    PACKET_COMPLETION,
    PACKET_GPA_DIRECT,
    PACKET_INBAND,
    ChannelViolation,
    completion,
    gpa_direct_ranges,
    inband,
    page_runs,
)
from devices.vmbus.vsp import Vsp
from pyvmm.core._hot import NetDevice, NetQueue

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from devices.network.port import Port
    from devices.vmbus.bus import VmBus
    from devices.vmbus.channel import Channel
    from pyvmm.core._hot import Packet
    from pyvmm.core.worker import Timer, Worker

#: A channel costs a thread and two rings; a guest with more VPs lets several share one.
MAX_CHANNELS = 8

#: Instance ids are version 5 UUIDs of the NIC's name in this name space of ours.
_NAMESPACE = uuid.UUID("02db20a2-13ad-4319-845f-1766c3ac4e67")

_HEADER_SIZE = 14
Runs = list[tuple[int, int]]


def subchannels_for(vp_count: int) -> int:
    """Sub-channels worth offering to a VM of `vp_count` VPs."""
    return min(vp_count, MAX_CHANNELS) - 1


class Agreement:
    """What a guest and its NIC have agreed on so far."""

    def __init__(self) -> None:
        #: NVSP version; 0 before there is one.
        self.version = 0
        #: The guest's NDIS version.
        self.ndis: tuple[int, int] | None = None
        #: Largest frame and capabilities of the guest: agreed from version 2 on.
        self.frame_size = 0
        self.capabilities = 0
        #: GPADLs of the buffers, and the id that the guest knows the one for receiving by.
        self.receive_gpadl: int | None = None
        self.receive_id = 0
        self.send_gpadl: int | None = None
        #: Sub-channels that the guest has asked for.
        self.subchannels = 0

    @property
    def complete(self) -> bool:
        """Whether RNDIS messages may be exchanged."""
        return self.ndis is not None and self.frame_size > 0 and self.receive_gpadl is not None


class NetVsp(Vsp, Nic):
    """NIC `index` of a VM, with address `mac` of six bytes. Protocol versions above `max_version` are refused.

    It has no network until `connect`; the cable is plugged in as soon as it has one, unless `set_link` says otherwise.
    """

    interface_id = uuid.UUID(protocol.INTERFACE_TYPE)

    def __init__(self, index: int, mac: bytes, max_subchannels: int = 0, max_version: int = protocol.V6_1) -> None:
        super().__init__(self.name_of(index))
        self.mac = mac
        self.instance_id = self.instance_of(index)
        self.offer_order = index
        self.max_subchannels = max_subchannels
        self.worker_count = 1 + max_subchannels
        self._max_version = max_version
        self._agreed = Agreement()
        self._port: Port | None = None
        self._port_offloads = 0
        self._plugged = True
        self._link = Link()
        self._link_timer: Timer | None = None
        self._send_runs: Runs = []
        self._channels: dict[int, Channel] = {}
        self._queue: NetQueue | None = None  # of the primary channel
        self._saved_device: dict[str, object] | None = None
        self._device: NetDevice | None = None
        # Guards all of the above, and changes of the device.
        self._lock = threading.RLock()

    @staticmethod
    def name_of(index: int) -> str:
        """The name of a NIC."""
        return f"nic{index}"

    @staticmethod
    def instance_of(index: int) -> uuid.UUID:
        """The instance id of a NIC's offer."""
        return uuid.uuid5(_NAMESPACE, f"nic{index}")

    def attached(self, bus: VmBus, workers: Sequence[Worker]) -> None:
        """The NIC is on `bus`."""
        super().attached(bus, workers)
        with self._lock:
            self._device = NetDevice(bus.memory.hot)
            self._adapter = Adapter(self.mac, 1 + self.max_subchannels, self._device)
            trace = (lambda text: bus.tracer.line("netvsp", f"{self.name}.0 {text}")) if bus.tracer.netvsp else None
            self._control = Control(self._adapter, self._begin, trace)
            self._use_port()

    def detached(self) -> None:
        """The NIC is off its bus: leave the port alone."""
        with self._lock:
            if self._device is not None:
                self._device.set_port(-1)
                self._device = None

    # The network --------------------------------------------------------------------------------------

    def connect(self, port: Port | None) -> Port | None:
        """Use `port` from now on; see `Nic.connect`."""
        with self._lock:
            before, self._port = self._port, port
            self._port_offloads = 0
            if self._device is not None:
                self._use_port(replugged=True)
        return before

    def set_link(self, up: bool) -> None:
        """Plug the cable in or pull it."""
        with self._lock:
            self._plugged = up
            if self._device is not None:
                self._change_link()

    def _use_port(self, replugged: bool = False) -> None:
        assert self._device is not None
        self._device.set_port(self._port.fd if self._port is not None else -1)
        self._limit_frames()
        self._tell_port()
        self._change_link(replugged)

    def _tell_port(self) -> None:
        """Have the port leave to the guest what that takes."""
        offloads = self._adapter.port_offloads()
        if self._port is not None and offloads != self._port_offloads:
            self._port_offloads = offloads
            self._port.set_offloads(offloads)

    def _largest_frame(self) -> int:
        return _HEADER_SIZE + (self._port.mtu if self._port is not None else MAX_MTU)

    def _limit_frames(self) -> None:
        assert self._device is not None
        agreed = self._agreed.frame_size or protocol.DEFAULT_FRAME_SIZE
        self._device.set_frame_size(min(agreed, self._largest_frame()))

    def _change_link(self, replugged: bool = False) -> None:
        assert self._device is not None
        up = self._plugged and self._port is not None
        self._device.set_link(up)
        self._adapter.link_up = up
        self._link.change(up, replugged)
        self._show_link()

    def _show_link(self) -> None:
        """Tell the guest of its cable, now or when it is due."""
        with self._lock:
            if self._link_timer is not None:
                self._link_timer.cancel()
                self._link_timer = None
            if self._queue is None or not self._control.operational:
                return
            due = self._link.due()
            if due is None:
                return
            now = self.bus.clock.now_ns()
            if now >= due:
                up = self._link.tell(now)
                self._trace(0, f"RNDIS INDICATE_STATUS link {'up' if up else 'down'}")
                kind = rndis.Indication.MEDIA_CONNECT if up else rndis.Indication.MEDIA_DISCONNECT
                self._queue.send_control(rndis.indicate_status(kind))
                due = self._link.due()
            if due is not None:
                self._link_timer = self.workers[0].call_at(due, self._show_link)

    # Channels -----------------------------------------------------------------------------------------

    def open(self, channel: Channel) -> None:
        """A channel opens; once the last sub-channel has, the guest is told how to spread what it sends."""
        self._attach(channel)
        with self._lock:
            if channel.subchannel_index and len(self._channels) == 1 + self._agreed.subchannels:
                self._channels[0].send((inband(protocol.send_indirection_table(len(self._channels))),))

    def _attach(self, channel: Channel) -> None:
        with self._lock:
            assert self._device is not None
            index = channel.subchannel_index
            queue = channel.make_engine(partial(NetQueue, self._device, index))
            self._channels[index] = channel
            if not index:
                self._queue = queue
            channel.use_engine(queue, queue.event)

    def close(self, channel: Channel) -> None:
        """A channel is gone; with the primary all that was agreed."""
        with self._lock:
            self._channels.pop(channel.subchannel_index, None)
            if channel.subchannel_index == 0:
                self._queue = None
                self._forget()

    def _forget(self) -> None:
        assert self._device is not None
        self._agreed = Agreement()
        self._set_receive_buffer(None)
        self._set_send_buffer(None)
        self._device.message_size = protocol.message_size(0)
        self._control.halt()
        self._tell_port()

    def reattach(self, channel: Channel) -> None:
        """A channel is open again after a restore."""
        if channel.subchannel_index == 0:
            error = self._find_buffers()
            if error is not None:
                channel.fail(error)
                return
        self._attach(channel)

    def gpadl_released(self, gpadl_id: int) -> None:
        """The guest takes a buffer back."""
        with self._lock:
            if gpadl_id == self._agreed.receive_gpadl:
                self._set_receive_buffer(None)
            if gpadl_id == self._agreed.send_gpadl:
                self._set_send_buffer(None)

    def packets(self, channel: Channel, packets: list[Packet]) -> None:
        """Serve what the C code leaves."""
        for packet in packets:
            kind, flags, transaction_id, _, payload = packet
            if kind == PACKET_COMPLETION:  # of what wants none
                continue
            if kind not in (PACKET_INBAND, PACKET_GPA_DIRECT):
                raise ChannelViolation(f"network packet of type {kind}")
            try:
                message, fields = protocol.parse(payload, self._agreed.version)
            except ValueError as error:
                raise ChannelViolation(f"NVSP: {error}") from None
            if channel.subchannel_index:
                raise ChannelViolation(f"{message.name} on sub-channel {channel.subchannel_index}")
            with self._lock:
                if message is Message.SEND_RNDIS_PACKET:
                    self._rndis(channel, packet, fields)
                    continue
                answer = self._message(message, fields)
                if flags & COMPLETION_REQUESTED:
                    channel.send((completion(transaction_id, self._padded(answer)),))
                if message is Message.SUB_CHANNEL and self._agreed.subchannels:  # offers come after the answer
                    self.request_subchannels(self._agreed.subchannels)

    def _padded(self, answer: bytes) -> bytes:
        return answer and answer.ljust(protocol.message_size(self._agreed.version), b"\0")

    def _trace(self, index: int, text: str) -> None:
        if self.bus.tracer.netvsp:
            self.bus.tracer.line("netvsp", f"{self.name}.{index} {text}")

    # The handshake ------------------------------------------------------------------------------------

    def _message(self, message: Message, fields: tuple[int, ...]) -> bytes:
        """Carry out a message and return the body of its completion."""
        agreed = self._agreed
        if message is not Message.INIT and not agreed.version:
            raise ChannelViolation(f"{message.name} before INIT")
        answer = b""
        match message:
            case Message.INIT:
                answer = self._init(fields[0])
            case Message.SEND_NDIS_CONFIG:
                self._config(*fields)
            case Message.SEND_NDIS_VERSION:
                if agreed.ndis is not None:
                    raise ChannelViolation("NDIS version for the second time")
                agreed.ndis = (fields[0], fields[1])
            case Message.SEND_RECEIVE_BUFFER:
                answer = self._receive_buffer(*fields)
            case Message.SEND_SEND_BUFFER:
                answer = self._send_buffer(fields[0])
            case Message.REVOKE_RECEIVE_BUFFER:
                self._set_receive_buffer(None)
            case Message.REVOKE_SEND_BUFFER:
                self._set_send_buffer(None)
            case Message.SWITCH_DATA_PATH:
                # There is no virtual function, and the guest was told of none.
                if fields[0] != protocol.DATA_PATH_SYNTHETIC:
                    self.bus.guest_log.warn(self.name, "the guest asks for the data path of a device that isn't there")
            case Message.OID_QUERY_EX:
                answer = protocol.oid_query_ex_complete(rndis.Status.NOT_SUPPORTED)
            case Message.SUB_CHANNEL:
                answer = self._sub_channels(*fields)
        if self.bus.tracer.netvsp:
            told = " ".join(f"{field:#x}" for field in fields)
            self._trace(0, f"{message.name} {told} -> {answer.hex(' ', 4) or 'done'}")
        return answer

    def _init(self, version: int) -> bytes:
        agreed = self._agreed
        if agreed.version:
            raise ChannelViolation("INIT for the second time")
        accepted = version in protocol.VERSIONS and version <= self._max_version
        if accepted:
            assert self._device is not None
            agreed.version = version
            self._device.message_size = protocol.message_size(version)
            if version < protocol.V2:
                self._agree_on_frames(protocol.DEFAULT_FRAME_SIZE)
        return protocol.init_complete(version, accepted)

    def _config(self, frame_size: int, _: int, capabilities: int) -> None:
        if self._agreed.frame_size:
            raise ChannelViolation("NDIS configuration for the second time")
        if self._agreed.version < protocol.V6_1:
            capabilities &= ~protocol.CAPABILITY_RSC
        self._agreed.capabilities = capabilities
        self._agree_on_frames(frame_size)

    def _agree_on_frames(self, wanted: int) -> None:
        """Guests adopt what they can have, from what they are told when they ask for the largest frame."""
        self._agreed.frame_size = min(max(wanted, protocol.DEFAULT_FRAME_SIZE), self._largest_frame())
        self._limit_frames()

    def _receive_buffer(self, gpadl_id: int, buffer_id: int) -> bytes:
        agreed = self._agreed
        if agreed.receive_gpadl is not None or not agreed.frame_size:
            raise ChannelViolation("receive buffer out of place")
        runs = self._runs(gpadl_id)
        sections = self._set_receive_buffer(runs, buffer_id) if runs is not None else 0
        if sections:
            agreed.receive_gpadl, agreed.receive_id = gpadl_id, buffer_id
        return protocol.receive_buffer_complete(self._section_size(), sections)

    def _send_buffer(self, gpadl_id: int) -> bytes:
        if self._agreed.send_gpadl is not None:
            raise ChannelViolation("send buffer for the second time")
        runs = self._runs(gpadl_id)
        sections = self._set_send_buffer(runs) if runs is not None else 0
        if sections:
            self._agreed.send_gpadl = gpadl_id
        return protocol.send_buffer_complete(bool(sections))

    def _sub_channels(self, operation: int, count: int) -> bytes:
        agreed = self._agreed
        if operation != protocol.SUB_CHANNEL_ALLOCATE or agreed.subchannels or not agreed.complete:
            return protocol.sub_channel_complete(Status.FAILURE, 0)
        agreed.subchannels = min(count, self.max_subchannels)
        return protocol.sub_channel_complete(Status.SUCCESS, agreed.subchannels)

    # The buffers --------------------------------------------------------------------------------------

    def _runs(self, gpadl_id: int) -> Runs | None:
        """The memory of a GPADL of this device, if that is one range."""
        gpadl = self.bus.gpadl(self, gpadl_id)
        if gpadl is None or len(gpadl.ranges) != 1:
            return None
        (part,) = gpadl.ranges
        return list(page_runs(part.pages, part.offset, part.length))

    def _section_size(self) -> int:
        return protocol.receive_section_size(max(self._agreed.frame_size, protocol.DEFAULT_FRAME_SIZE))

    def _set_receive_buffer(self, runs: Runs | None, buffer_id: int = 0) -> int:
        """Return how many sections there are; none if the buffer is of no use."""
        assert self._device is not None
        if runs is None:
            self._agreed.receive_gpadl = None
            return self._device.set_receive_buffer(None)
        try:
            return self._device.set_receive_buffer(runs, buffer_id, self._section_size())
        except ValueError:
            return 0

    def _set_send_buffer(self, runs: Runs | None) -> int:
        assert self._device is not None
        self._send_runs = runs or []
        if runs is None:
            self._agreed.send_gpadl = None
            return self._device.set_send_buffer(None)
        try:
            return self._device.set_send_buffer(runs, protocol.SEND_SECTION_SIZE)
        except ValueError:
            self._send_runs = []
            return 0

    def _find_buffers(self) -> str | None:
        """Use the buffers that were in use when the state was saved; return what is wrong with them, if anything."""
        with self._lock:
            assert self._device is not None
            agreed, saved = self._agreed, self._saved_device
            receive_gpadl, send_gpadl = agreed.receive_gpadl, agreed.send_gpadl
            for gpadl_id in (receive_gpadl, send_gpadl):
                if gpadl_id is not None and self._runs(gpadl_id) is None:
                    return f"there is no GPADL {gpadl_id:#x} of a buffer"
            if receive_gpadl is not None:
                self._set_receive_buffer(self._runs(receive_gpadl), agreed.receive_id)
            if send_gpadl is not None:
                self._set_send_buffer(self._runs(send_gpadl))
            self._saved_device = None
            try:
                if saved is not None:
                    self._device.restore(saved)
            except ValueError as error:
                return str(error)
        return None

    # RNDIS --------------------------------------------------------------------------------------------

    def _rndis(self, channel: Channel, packet: Packet, fields: tuple[int, ...]) -> None:
        kind, section, size = fields
        if kind != protocol.CONTROL:
            raise ChannelViolation(f"RNDIS packet of channel type {kind}")
        if not self._agreed.complete:
            raise ChannelViolation("RNDIS message before the handshake is over")
        status, answers = Status.SUCCESS, []
        try:
            answers = self._control.handle(self._gather(packet, section, size))
        except ValueError as error:
            self.bus.guest_log.warn(self.name, str(error))
            status = Status.INVALID_RNDIS_PACKET
        _, flags, transaction_id, _, _ = packet
        if flags & COMPLETION_REQUESTED:
            channel.send((completion(transaction_id, self._padded(protocol.rndis_packet_complete(status))),))
        assert self._queue is not None
        for answer in answers:
            if not self._queue.send_control(answer):
                raise ChannelViolation("the guest gives no sections of its receive buffer back")
        self._tell_port()
        self._show_link()

    def _gather(self, packet: Packet, section: int, size: int) -> bytes:
        """The bytes of a control message; raises ValueError."""
        runs: Runs = []
        if section != protocol.NO_SECTION:
            start = section * protocol.SEND_SECTION_SIZE
            if size > protocol.SEND_SECTION_SIZE or start + size > sum(length for _, length in self._send_runs):
                raise ValueError(f"RNDIS message in section {section} of the send buffer, {size} bytes")
            runs += _slice(self._send_runs, start, size)
        if packet[0] == PACKET_GPA_DIRECT:
            for part in gpa_direct_ranges(packet):
                runs += part
        if sum(length for _, length in runs) > rndis.MAX_MESSAGE:
            raise ValueError(f"RNDIS control message of more than {rndis.MAX_MESSAGE} bytes")
        return b"".join(self.bus.memory.read(gpa, length) for gpa, length in runs)

    def _begin(self) -> None:
        assert self._agreed.ndis is not None
        self._adapter.begin(self._agreed.ndis, self._agreed.frame_size, self._agreed.capabilities)
        self._link.begin()

    # Life cycle ---------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the guest; the port and the cable stay."""
        with self._lock:
            self._forget()

    def save(self) -> dict[str, Any]:
        """Return what was agreed, what the guest has set, and which sections of its receive buffer it holds."""
        with self._lock:
            assert self._device is not None
            agreed = self._agreed
            return {
                "version": 1,
                "mac": self.mac,
                "protocol": agreed.version,
                "ndis": list(agreed.ndis) if agreed.ndis is not None else None,
                "frame_size": agreed.frame_size,
                "capabilities": agreed.capabilities,
                "receive_buffer": [agreed.receive_gpadl, agreed.receive_id],
                "send_buffer": agreed.send_gpadl,
                "subchannels": agreed.subchannels,
                "operational": self._control.operational,
                "adapter": self._adapter.save(),
                "link_shown": self._link.shown,
                "device": self._device.save(),
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with what was agreed; the buffers follow with the channel."""
        try:
            check_version(state, 1)
            self._restore(state)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.name}: the saved state is damaged, or another NIC's: {error}") from error

    def _restore(self, state: dict[str, Any]) -> None:
        mac = saved_bytes(state, "mac", 6, 6)
        if mac != self.mac:
            raise ValueError(f"it is of {mac.hex(':')}")
        agreed = Agreement()
        agreed.version = saved_int(state, "protocol", 0, protocol.V6_1)
        agreed.frame_size = saved_int(state, "frame_size", 0, _HEADER_SIZE + MAX_MTU)
        agreed.capabilities = saved_int(state, "capabilities", 0, (1 << 64) - 1)
        agreed.subchannels = saved_int(state, "subchannels", 0, self.max_subchannels)
        if state["ndis"] is not None:
            major, minor = state["ndis"]
            agreed.ndis = major, minor
        agreed.receive_gpadl, agreed.receive_id = state["receive_buffer"]
        agreed.send_gpadl = state["send_buffer"]
        operational = saved_bool(state, "operational")
        with self._lock:
            assert self._device is not None
            self._agreed = agreed
            self._device.message_size = protocol.message_size(agreed.version)
            self._adapter.begin(agreed.ndis or (0, 0), agreed.frame_size, agreed.capabilities)
            self._adapter.restore(state["adapter"])
            self._control.operational = operational
            self._link.shown = saved_bool(state, "link_shown")
            self._saved_device = state["device"]
            self._limit_frames()
            self._tell_port()

    def inspect(self) -> dict[str, Any]:
        """Return what was agreed, what the guest has set, and the counters."""
        with self._lock:
            agreed = self._agreed
            return {
                "mac": self.mac.hex(":"),
                "protocol": protocol.version_text(agreed.version) if agreed.version else None,
                "ndis": f"{agreed.ndis[0]}.{agreed.ndis[1]}" if agreed.ndis is not None else None,
                "operational": self._control.operational,
                "open_channels": sorted(self._channels),
                "max_subchannels": self.max_subchannels,
                "frame_size": agreed.frame_size or None,
                "link": self._link.up,
                "network": self._port.name if self._port is not None else None,
                **self._adapter.inspect(),
                **(self._device.statistics() if self._device is not None else {}),
            }


def _slice(runs: Runs, start: int, size: int) -> Runs:
    """The part of `runs` that is `size` bytes from `start`, which is inside."""
    found: Runs = []
    for gpa, length in runs:
        if start < length and size:
            step = min(length - start, size)
            found.append((gpa + start, step))
            start, size = 0, size - step
        else:
            start -= min(start, length)
    return found
