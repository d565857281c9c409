"""The base of every device on VMBus (a virtualization service provider).

Threads: `open`, `close`, `reattach` and `gpadl_released` run on the bus's thread, `packets` on the worker of its
channel. A device's worker never waits for the bus's thread, as that waits for it when it closes a channel.
"""

from __future__ import annotations

import struct

from devices.vmbus.packets import (
    COMPLETION_REQUESTED,
    PACKET_COMPLETION,
    PACKET_INBAND,
    ChannelViolation,
    inband,
    parse_pipe_message,
    pipe_message,
)
from pyvmm.core.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from devices.vmbus.bus import VmBus
    from devices.vmbus.channel import Channel
    from pyvmm.core._hot import Packet
    from pyvmm.core.worker import Worker

#: Offer flags (Linux 6.1 include/linux/hyperv.h, VMBUS_CHANNEL_*).
OFFER_ENUMERATE_INTERFACE = 0x1
OFFER_NAMED_PIPE = 0x10
OFFER_TLNPI_PROVIDER = 0x2000

PIPE_TYPE_MESSAGE = 4


class OpenRefused(Exception):
    """Raised by `Vsp.open`: the guest's OpenChannel is answered with a failure, and the message noted."""


class Vsp(Device):
    """One device on the bus: what it offers, and what it does with its channels.

    Subclasses set the offer below and implement `packets`; most also `open` and `close`. The bus resets, pauses,
    saves and restores its devices itself; while it does, no channel is open (`reset`) or served (the others).
    """

    interface_id: UUID
    #: Stable for this device over restarts; unique on one bus.
    instance_id: UUID
    offer_flags: int = 0
    #: Up to 120 bytes, padded with zeros by the bus.
    user_defined: bytes = b""
    #: MMIO space that the guest shall set aside, in MiB.
    mmio_megabytes: int = 0
    #: Devices of one interface are offered in this order, then by instance id.
    offer_order: int = 0
    #: Sub-channels that the guest may ever have.
    max_subchannels: int = 0
    #: Threads that the bus makes for the device; see `worker_for`.
    worker_count: int = 1

    #: Set when the device is put on a bus: guest memory is ``bus.memory``, the tracer ``bus.tracer``.
    bus: VmBus
    workers: Sequence[Worker] = ()

    def __init__(self, name: str) -> None:
        self.name = name

    def attached(self, bus: VmBus, workers: Sequence[Worker]) -> None:
        """The device is on `bus` now, with `worker_count` running workers; no channel is open yet."""
        self.bus = bus
        self.workers = workers

    def detached(self) -> None:
        """The device is off its bus, its channels closed and its workers ended: end what `attached` began."""

    def worker_for(self, subchannel_index: int) -> Worker:
        """Name the worker that serves a channel."""
        return self.workers[subchannel_index % len(self.workers)]

    def open(self, channel: Channel) -> None:
        """The guest opens a channel; raise OpenRefused to say no. Packets follow only after this returns."""

    def close(self, channel: Channel) -> None:
        """The channel is gone: the guest closed it, broke it, or went away.

        `packets` is not running and not called again for it, and sends are dropped. Return only when nothing of
        the device touches guest memory on behalf of the channel any more.
        """

    def packets(self, channel: Channel, packets: list[Packet]) -> None:
        """Serve packets in order. Raise ChannelViolation (or let GuestMemoryError out) to close the channel."""
        raise NotImplementedError

    def gpadl_released(self, gpadl_id: int) -> None:
        """The guest takes a GPADL of the device back; return only when the device no longer touches its pages."""

    def reattach(self, channel: Channel) -> None:
        """A channel that was open when the state was saved is open again; `restore` was called before."""

    def request_subchannels(self, count: int) -> None:
        """Have `count` sub-channels (indices 1 to `count`) offered in total; any thread.

        They vanish when the primary channel closes. Raises ValueError for more than `max_subchannels`.
        """
        if not 0 <= count <= self.max_subchannels:
            raise ValueError(f"{count} sub-channels of at most {self.max_subchannels}")
        self.bus.offer_subchannels(self, count)


class PipeVsp(Vsp):
    """A device with one message-mode pipe channel, such as an integration component.

    Subclasses implement `on_message`; those that speak first override `open` and send after ``super().open()``.
    """

    offer_flags = OFFER_ENUMERATE_INTERFACE | OFFER_NAMED_PIPE
    user_defined = struct.pack("<I", PIPE_TYPE_MESSAGE)

    #: The open channel, if any.
    channel: Channel | None = None

    def on_message(self, message: bytes) -> None:
        """Serve one message (without its pipe header), on the device's worker; may raise ChannelViolation."""
        raise NotImplementedError

    def send_message(self, message: bytes) -> bool:
        """Send one message; any thread. False if there is no open channel or it has no room."""
        channel = self.channel
        return channel is not None and channel.send((inband(pipe_message(message)),))

    def open(self, channel: Channel) -> None:
        """Remember the channel."""
        self.channel = channel

    def close(self, channel: Channel) -> None:
        """Forget the channel."""
        self.channel = None

    def reattach(self, channel: Channel) -> None:
        """Remember the channel again."""
        self.channel = channel

    def packets(self, channel: Channel, packets: list[Packet]) -> None:
        """Unwrap each packet and hand its message on."""
        for kind, flags, transaction_id, _, payload in packets:
            if kind == PACKET_COMPLETION:
                continue
            if kind != PACKET_INBAND:
                raise ChannelViolation(f"packet of type {kind} on a pipe")
            self.on_message(parse_pipe_message(payload))
            if flags & COMPLETION_REQUESTED:
                channel.complete(transaction_id)
