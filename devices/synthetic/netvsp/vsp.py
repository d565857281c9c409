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
from devices.saved import check_version, saved_bool, saved_bytes
from devices.synthetic.netvsp import protocol, rndis
from devices.synthetic.netvsp.adapter import Adapter
from devices.synthetic.netvsp.agreement import HEADER_SIZE, Agreement
from devices.synthetic.netvsp.buffers import Buffers
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
    inband,
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


def subchannels_for(vp_count: int) -> int:
    """Sub-channels worth offering to a VM of `vp_count` VPs."""
    return min(vp_count, MAX_CHANNELS) - 1


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
        self._channels: dict[int, Channel] = {}
        self._queue: NetQueue | None = None  # of the primary channel
        self._saved_buffers: dict[str, Any] | None = None
        self._on_bus = False
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
            self._on_bus = True
            self._device = NetDevice(bus.memory.hot)
            self._buffers = Buffers(self._device, lambda gpadl_id: bus.gpadl(self, gpadl_id))
            self._adapter = Adapter(self.mac, 1 + self.max_subchannels, self._device)
            trace = (lambda text: bus.tracer.line("netvsp", f"{self.name}.0 {text}")) if bus.tracer.netvsp else None
            self._control = Control(self._adapter, self._begin, trace)
            self._use_port()

    def detached(self) -> None:
        """The NIC is off its bus: leave the port alone."""
        with self._lock:
            self._on_bus = False
            self._device.set_port(-1)

    # The network --------------------------------------------------------------------------------------

    def connect(self, port: Port | None) -> Port | None:
        """Use `port` from now on; see `Nic.connect`."""
        with self._lock:
            before, self._port = self._port, port
            self._port_offloads = 0
            if self._on_bus:
                self._use_port(replugged=True)
        return before

    def set_link(self, up: bool) -> None:
        """Plug the cable in or pull it."""
        with self._lock:
            self._plugged = up
            if self._on_bus:
                self._change_link()

    def _use_port(self, replugged: bool = False) -> None:
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
        return HEADER_SIZE + (self._port.mtu if self._port is not None else MAX_MTU)

    def _limit_frames(self) -> None:
        agreed = self._agreed.frame_size or protocol.DEFAULT_FRAME_SIZE
        self._device.set_frame_size(min(agreed, self._largest_frame()))

    def _change_link(self, replugged: bool = False) -> None:
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
        self._agreed = Agreement()
        self._buffers.drop_receive()
        self._buffers.drop_send()
        self._device.message_size = protocol.message_size(0)
        self._control.halt()
        self._tell_port()

    def reattach(self, channel: Channel) -> None:
        """A channel is open again after a restore, and with the primary the guest's buffers are there."""
        with self._lock:
            saved, self._saved_buffers = self._saved_buffers, None
            if channel.subchannel_index == 0 and saved is not None:
                try:
                    self._buffers.restore(saved, self._agreed.section_size)
                except (KeyError, TypeError, ValueError) as error:
                    channel.fail(f"saved state: {error}")
                    return
        self._attach(channel)

    def gpadl_released(self, gpadl_id: int) -> None:
        """The guest takes a buffer back."""
        with self._lock:
            self._buffers.release(gpadl_id)

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
                self._buffers.drop_receive()
            case Message.REVOKE_SEND_BUFFER:
                self._buffers.drop_send()
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
        size = self._agreed.section_size
        if self._buffers.receive is not None or not self._agreed.frame_size:
            raise ChannelViolation("receive buffer out of place")
        return protocol.receive_buffer_complete(size, self._buffers.lend_receive(gpadl_id, buffer_id, size))

    def _send_buffer(self, gpadl_id: int) -> bytes:
        if self._buffers.send is not None:
            raise ChannelViolation("send buffer for the second time")
        return protocol.send_buffer_complete(self._buffers.lend_send(gpadl_id) > 0)

    @property
    def _ready(self) -> bool:
        """Whether the handshake is over, and RNDIS messages may be exchanged."""
        return self._agreed.ndis is not None and self._agreed.frame_size > 0 and self._buffers.receive is not None

    def _sub_channels(self, operation: int, count: int) -> bytes:
        agreed = self._agreed
        if operation != protocol.SUB_CHANNEL_ALLOCATE or agreed.subchannels or not self._ready:
            return protocol.sub_channel_complete(Status.FAILURE, 0)
        agreed.subchannels = min(count, self.max_subchannels)
        return protocol.sub_channel_complete(Status.SUCCESS, agreed.subchannels)

    # RNDIS --------------------------------------------------------------------------------------------

    def _rndis(self, channel: Channel, packet: Packet, fields: tuple[int, ...]) -> None:
        kind, section, size = fields
        if kind != protocol.CONTROL:
            raise ChannelViolation(f"RNDIS packet of channel type {kind}")
        if not self._ready:
            raise ChannelViolation("RNDIS message before the handshake is over")
        status, answers = Status.SUCCESS, []
        try:
            answers = self._control.handle(self._buffers.gather(self.bus.memory, packet, section, size))
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

    def _begin(self) -> None:
        agreed = self._agreed
        self._adapter.begin(agreed.ndis or (0, 0), agreed.frame_size, agreed.capabilities)
        self._link.begin()

    # Life cycle ---------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the guest; the port and the cable stay."""
        with self._lock:
            self._forget()

    def save(self) -> dict[str, Any]:
        """Return what was agreed, what the guest has set, and which sections of its receive buffer it holds."""
        with self._lock:
            return {
                "version": 1,
                "mac": self.mac,
                "agreement": self._agreed.save(),
                "buffers": self._buffers.save(),
                "adapter": self._adapter.save(),
                "operational": self._control.operational,
                "link_shown": self._link.shown,
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
        agreed = Agreement.restored(state["agreement"], self.max_subchannels)
        with self._lock:
            self._agreed = agreed
            self._device.message_size = protocol.message_size(agreed.version)
            self._begin()
            self._adapter.restore(state["adapter"])
            self._control.operational = saved_bool(state, "operational")
            self._link.shown = saved_bool(state, "link_shown")
            self._saved_buffers = state["buffers"]
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
                **self._device.statistics(),
            }
