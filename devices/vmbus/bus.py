"""VMBus as a device: the edge around the control plane's state machine.

The state machine runs on the bus's own thread and nowhere else. VPs only put their messages into a short queue; when it
is full, or the guest doesn't take the host's messages, HvPostMessage fails and the guest has to come again.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import deque

from devices.saved import check_version
from devices.vmbus import messages, state
from devices.vmbus.channel import Channel
from devices.vmbus.server import NO_INTERRUPTS, SINT, Actions, Offer, OpenRequest, Server
from devices.vmbus.vsp import OpenRefused
from pyvmm.core._hot import Ring
from pyvmm.core.clock import Clock
from pyvmm.core.device import Device
from pyvmm.core.memory import PAGE_SIZE, GuestMemory
from pyvmm.core.trace import GuestLog, Tracer
from pyvmm.core.worker import Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from devices.vmbus.channel import Engine
    from devices.vmbus.gpadl import Gpadl
    from devices.vmbus.vsp import Vsp
    from enlightenments.ports import Ports

    T = TypeVar("T")

#: The connections that guests post to: the first one, and the one for protocol 5.0 and later.
MESSAGE_CONNECTIONS = (1, 4)
#: The event port of guests that signal by the interrupt page.
SHARED_EVENT_CONNECTION = 2
#: The SynIC message type of every VMBus message.
MESSAGE_TYPE = 1
#: Messages of the guest that wait for the bus's thread.
QUEUE_LENGTH = 16
#: Guests lose an interrupt that comes before they have seen the result of their OpenChannel.
UNSTICK_NS = 100_000_000


class VmBus(Device, Actions):
    """The bus and its devices, which it resets, pauses, saves and inspects along with itself.

    `on_error` gets what a bug lets out on one of the bus's or a device's threads.
    """

    name = "vmbus"

    def __init__(
        self,
        memory: GuestMemory,
        ports: Ports,
        on_error: Callable[[BaseException], None],
        clock: Clock | None = None,
        tracer: Tracer | None = None,
        guest_log: GuestLog | None = None,
        max_version: int = messages.V5_3,
    ) -> None:
        self.memory = memory
        self.ports = ports
        self.clock = clock or Clock()
        self.tracer = tracer or Tracer()
        self.guest_log = guest_log or GuestLog()
        self._on_error = on_error
        self._server = Server(self, memory, ports.vp_count, max_version)
        self._devices: dict[str, Vsp] = {}
        self._channels: dict[int, Channel] = {}
        self._gone: dict[str, threading.Event] = {}
        self._incoming: deque[tuple[int, bytes]] = deque()
        self._outgoing: deque[tuple[bytes, int, int]] = deque()
        self._lock = threading.Lock()
        self._paused = False
        self._interrupt_page: memoryview | None = None
        self._violations = 0
        self._last_violation: str | None = None
        self._worker = Worker("vmbus", on_error, self.clock)
        self._space = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._shared = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._worker.add_event(self._space, self._flush)
        self._worker.add_event(self._shared, self._shared_event)
        self._worker.start()
        ports.set_message_space_event(self._space)
        for connection_id in MESSAGE_CONNECTIONS:
            ports.connect_message_port(connection_id, self._handler(connection_id))

    # Devices ----------------------------------------------------------------------------------------

    def add_device(self, vsp: Vsp) -> None:
        """Put a device on the bus; a connected guest sees it at once. Raises ValueError if it is there already."""
        if vsp.name in self._devices or any(vsp.instance_id == other.instance_id for other in self._devices.values()):
            raise ValueError(f"a VMBus device {vsp.name} or with instance id {vsp.instance_id} exists already")
        workers = [Worker(f"{vsp.name}.{index}", self._on_error, self.clock) for index in range(vsp.worker_count)]
        for worker in workers:
            worker.start()
            if self._paused:
                worker.pause()
        vsp.attached(self, workers)
        vsp.reset()
        self._devices[vsp.name] = vsp
        offer = Offer(
            vsp.name,
            vsp.interface_id,
            vsp.instance_id,
            vsp.offer_order,
            0,
            vsp.offer_flags,
            vsp.mmio_megabytes,
            vsp.user_defined,
        )
        self._run(lambda: self._server.add([offer]))

    def remove_device(self, vsp: Vsp, timeout_s: float = 5.0) -> bool:
        """Take a device off the bus: the guest may finish with it for `timeout_s`, then its channels are closed.

        Returns whether the guest let go in time. Not for the bus's or a device's thread.
        """
        gone = self._gone[vsp.name] = threading.Event()
        self._run(lambda: self._remove(vsp.name))
        released = gone.wait(timeout_s)
        if not released:
            self._run(lambda: self._force_close(vsp.name))
        del self._gone[vsp.name]
        del self._devices[vsp.name]
        self._detach(vsp)
        return released

    def _detach(self, vsp: Vsp) -> None:
        for worker in vsp.workers:
            worker.stop()
        vsp.detached()

    def failed(self, error: BaseException) -> None:
        """A device ran into `error` on a thread of its own; any thread."""
        self._on_error(error)

    def _offers_of(self, name: str) -> list[Offer]:
        return [offer for offer in self._server.offers if offer.device == name]

    def _remove(self, name: str) -> None:
        for offer in self._offers_of(name):
            self._server.remove(offer)

    def _force_close(self, name: str) -> None:
        for offer in self._offers_of(name):
            self._server.force_close(offer)

    def offer_subchannels(self, vsp: Vsp, count: int) -> None:
        """Have the sub-channels 1 to `count` of an open device offered; any thread."""
        self._worker.call_soon(
            lambda: self._server.offer_subchannels(
                next(offer for offer in self._offers_of(vsp.name) if not offer.subchannel_index), count
            )
        )

    def gpadl(self, vsp: Vsp, gpadl_id: int) -> Gpadl | None:
        """Return a GPADL that the guest made for a channel of this device, other than its ring; any thread."""
        gpadls = self._server.gpadls
        gpadl = gpadls.get(gpadl_id)
        if gpadl is None or not gpadl.complete or gpadl.tearing_down or gpadls.is_ring(gpadl):
            return None
        channel = self._channels.get(gpadl.channel_id)
        return gpadl if channel is not None and channel.vsp is vsp else None

    # Messages ---------------------------------------------------------------------------------------

    def _handler(self, connection_id: int) -> Callable[[int, bytes], bool]:
        def handle(message_type: int, payload: bytes) -> bool:
            if message_type != MESSAGE_TYPE:
                self.violation(f"SynIC message of type {message_type}")
                return True
            with self._lock:
                if self._outgoing or len(self._incoming) >= QUEUE_LENGTH:
                    return False
                self._incoming.append((connection_id, payload))
                first = len(self._incoming) == 1
            if first:
                self._worker.call_soon(self._drain)
            return True

        return handle

    def _drain(self) -> None:
        for _ in range(QUEUE_LENGTH):
            with self._lock:
                if self._outgoing or not self._incoming:
                    return
            # The message stays in the queue while it is served, so that the next one doesn't call us again.
            connection_id, payload = self._incoming[0]
            if self.tracer.vmbus:
                self.tracer.line("vmbus", f"guest: {messages.describe(payload)}")
            try:
                self._server.handle(payload, connection_id)
            finally:
                with self._lock:
                    self._incoming.popleft()
        if self._incoming:
            self._worker.call_soon(self._drain)

    def _flush(self) -> None:
        while self._outgoing:
            message, vp, sint = self._outgoing[0]
            if not self.ports.post_message(vp, sint, MESSAGE_TYPE, message):
                return
            self._outgoing.popleft()
        self._drain()

    # What the state machine asks for (Actions) ---------------------------------------------------------

    def send(self, message: bytes, vp: int, sint: int) -> None:
        """Post a message, or queue it behind those that wait."""
        if self.tracer.vmbus:
            self.tracer.line("vmbus", f"host: {messages.describe(message)}")
        if self._outgoing or not self.ports.post_message(vp, sint, MESSAGE_TYPE, message):
            self._outgoing.append((message, vp, sint))

    def violation(self, text: str) -> None:
        """Note what the guest did wrong."""
        self._violations += 1
        self._last_violation = text
        self.guest_log.warn(self.name, text)

    def open_channel(self, offer: Offer, request: OpenRequest) -> str | None:
        """Make the rings and the event port, then ask the device."""
        try:
            rings = self._rings(request)
        except ValueError as error:
            return str(error)
        rings[0].init_incoming()
        rings[1].init_outgoing()
        channel = self._make_channel(offer, request, rings)
        try:
            channel.vsp.open(channel)
        except OpenRefused as error:
            self.ports.disconnect_event_port(event_connection(channel))
            channel.detach()
            channel.dispose()
            return str(error)
        self._channels[channel.id] = channel
        channel.attach()
        self._unstick_later(channel)
        return None

    def _rings(self, request: OpenRequest) -> tuple[Ring, Ring]:
        return Ring(self.memory.hot, request.incoming), Ring(self.memory.hot, request.outgoing)

    def _make_channel(self, offer: Offer, request: OpenRequest, rings: tuple[Ring, Ring]) -> Channel:
        connection = self._server.connection
        assert connection is not None
        vsp = self._devices[offer.device]

        def broken(channel: Channel, reason: str) -> None:
            self._worker.call_soon(lambda: self._break(offer, channel, reason))

        channel = Channel(
            vsp,
            offer.channel_id,
            offer.subchannel_index,
            request.target_vp,
            request.user_data,
            rings,
            vsp.worker_for(offer.subchannel_index),
            self._signal,
            self._aim,
            broken,
            self.clock,
            connection.version < messages.WIN8,
        )
        self.ports.connect_event_port(event_connection(channel), channel.doorbell)
        return channel

    def _break(self, offer: Offer, channel: Channel, reason: str) -> None:
        if self._channels.get(channel.id) is channel:
            self._server.break_channel(offer, reason)

    def _unstick_later(self, channel: Channel) -> None:
        self._worker.call_at(self.clock.now_ns() + UNSTICK_NS, channel.unstick)

    def close_channel(self, offer: Offer) -> None:
        """Stop the signals, then the ring, then the device."""
        channel = self._channels.pop(offer.channel_id, None)
        if channel is None:  # restored, but its rings made no sense
            return
        self.ports.disconnect_event_port(event_connection(channel))
        if self._paused:
            channel.detach()
        else:
            channel.worker.run(channel.detach)
        channel.vsp.close(channel)
        channel.dispose()

    def retarget_channel(self, offer: Offer, vp: int) -> None:
        """Interrupt another VP from now on."""
        self._channels[offer.channel_id].retarget(vp)

    def gpadl_released(self, offer: Offer, gpadl_id: int) -> None:
        """Tell the device, unless it has gone."""
        vsp = self._devices.get(offer.device)
        if vsp is not None:
            vsp.gpadl_released(gpadl_id)

    def offer_gone(self, offer: Offer) -> None:
        """Tell `remove_device` once it was the last one."""
        gone = self._gone.get(offer.device)
        if gone is not None and not self._offers_of(offer.device):
            gone.set()

    # Signals ----------------------------------------------------------------------------------------

    def set_interrupt_page(self, gpa: int | None) -> None:
        """Use the interrupt page (host to guest, then guest to host, half a page each) and its event port, or not."""
        if gpa is None:
            self.ports.disconnect_event_port(SHARED_EVENT_CONNECTION)
            self._interrupt_page = None
        else:
            self._interrupt_page = self.memory.view(gpa, PAGE_SIZE, write=True)
            self.ports.connect_event_port(SHARED_EVENT_CONNECTION, self._shared)

    def _signal(self, channel: Channel) -> None:
        page = self._interrupt_page
        if channel.target_vp == NO_INTERRUPTS:
            return
        if page is None:
            self.ports.signal_event(channel.target_vp, SINT, channel.id)
            return
        with self._lock:
            # The guest clears bits meanwhile; to set one of them again costs it a look at an empty ring.
            page[channel.id // 8] |= 1 << channel.id % 8
        self.ports.signal_event(0, SINT, 0)

    def _aim(self, channel: Channel, engine: Engine) -> None:
        """Have the engine signal the guest itself where that is one event flag."""
        direct = self._interrupt_page is None and channel.target_vp != NO_INTERRUPTS
        engine.set_target(self.ports.synic(channel.target_vp) if direct else None, SINT, channel.id)

    def _shared_event(self) -> None:
        page = self._interrupt_page
        if page is not None:
            # No need to know the bits: after clearing them all, look at all channels. A bit set before that had its
            # packet in the ring before; one set later comes with a signal of its own.
            page[PAGE_SIZE // 2 :] = bytes(PAGE_SIZE // 2)
            for channel in self._channels.values():
                channel.kick()

    # Life -------------------------------------------------------------------------------------------

    def _run(self, action: Callable[[], T]) -> T:
        return action() if self._paused else self._worker.run(action)

    def reset(self) -> None:
        """Forget the guest: channels closed, GPADLs gone, queues empty, devices reset."""
        self._run(self._reset)

    def _reset(self) -> None:
        self._server.disconnect()
        with self._lock:
            self._incoming.clear()
            self._outgoing.clear()
        for vsp in self._devices.values():
            vsp.reset()

    def pause(self) -> None:
        """Stop the control plane, then the rings, the devices, and their threads. Harmless the second time."""
        if self._paused:
            return
        self._worker.pause()
        for channel in self._channels.values():
            channel.suspend()
        for vsp in self._devices.values():
            vsp.pause()
            for worker in vsp.workers:
                worker.pause()
        self._paused = True

    def resume(self) -> None:
        """Start everything again, the control plane last."""
        self._paused = False
        for vsp in self._devices.values():
            for worker in vsp.workers:
                worker.resume()
            vsp.resume()
        for channel in self._channels.values():
            channel.resume()
        self._worker.resume()
        self._worker.call_soon(self._flush)

    def stop(self) -> None:
        """End all threads, for good; the guest doesn't run any more."""
        for connection_id in MESSAGE_CONNECTIONS:
            self.ports.disconnect_message_port(connection_id)
        self._run(self._server.disconnect)
        for vsp in self._devices.values():
            self._detach(vsp)
        self._worker.stop()
        os.close(self._space)
        os.close(self._shared)

    def save(self) -> dict[str, Any]:
        """Return the connection, channels with their waiting packets, queued messages, and the devices' states."""
        return {
            "version": 1,
            "server": state.save_server(self._server),
            "incoming": [list(item) for item in self._incoming],
            "outgoing": [list(item) for item in self._outgoing],
            "pending": [
                [channel.id, [list(packet) for packet in channel.save()]] for channel in self._channels.values()
            ],
            "devices": {name: vsp.save() for name, vsp in self._devices.items()},
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `save` returned: rings are found again where the guest left them."""
        check_version(saved, 1)
        if set(saved["devices"]) != set(self._devices):
            raise ValueError(f"vmbus state has devices {sorted(saved['devices'])}, not {sorted(self._devices)}")
        for name, vsp in self._devices.items():
            vsp.restore(saved["devices"][name])
        try:
            state.restore_server(self._server, saved["server"])
            self._incoming.extend((int(connection), bytes(payload)) for connection, payload in saved["incoming"])
            self._outgoing.extend((bytes(message), int(vp), int(sint)) for message, vp, sint in saved["outgoing"])
            pending = {int(channel): [tuple(packet) for packet in packets] for channel, packets in saved["pending"]}
        except (KeyError, TypeError, struct.error) as error:
            raise ValueError(f"vmbus state is damaged: {error}") from error
        connection = self._server.connection
        if connection is not None and connection.interrupt_page is not None:
            self.set_interrupt_page(connection.interrupt_page)
        for offer in self._server.offers:
            if offer.opened is not None:
                try:
                    rings = self._rings(offer.opened)
                except ValueError as error:
                    self._server.break_channel(offer, str(error))
                    continue
                channel = self._make_channel(offer, offer.opened, rings)
                channel.restore(pending.get(channel.id, []))
                channel.suspend()
                self._channels[channel.id] = channel
                channel.attach()
                channel.vsp.reattach(channel)
                self._unstick_later(channel)

    def inspect(self) -> dict[str, Any]:
        """Return the connection, every offer with its channel, and the devices."""
        connection = self._server.connection
        return {
            "protocol": messages.version_text(connection.version) if connection else None,
            "offers": [
                {
                    "device": offer.device,
                    "subchannel": offer.subchannel_index,
                    "channel_id": offer.channel_id,
                    "state": offer.state,
                    "broken": offer.broken,
                }
                for offer in list(self._server.offers)
            ],
            "channels": [channel.inspect() for channel in list(self._channels.values())],
            "gpadls": self._server.gpadls.inspect(),
            "queued_messages": {"incoming": len(self._incoming), "outgoing": len(self._outgoing)},
            "violations": self._violations,
            "last_violation": self._last_violation,
            "devices": {name: vsp.inspect() for name, vsp in list(self._devices.items())},
        }


def event_connection(channel: Channel) -> int:
    """Return the connection id by which the guest signals a channel."""
    return channel.id | SINT << 12
