"""A bus with simple devices on it, for tests of the bus itself."""

from __future__ import annotations

import io
import threading
from uuid import UUID

from devices.vmbus.bus import VmBus
from devices.vmbus.channel import Channel
from devices.vmbus.packets import COMPLETION_REQUESTED, ChannelViolation, completion, inband
from devices.vmbus.vsp import OpenRefused, PipeVsp, Vsp
from pyvmm.core.memory import GuestMemory
from pyvmm.core.trace import GuestLog, Tracer
from tests.fakes.vmbus_guest import FakeGuest, FakePorts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.core._hot import Packet

ECHO = UUID("00000000-0000-0000-0000-00000000ec40")


class EchoVsp(Vsp):
    """Sends every packet's payload back: as the completion if one was asked for, else in-band.

    A payload that begins with ``refuse`` breaks the channel, one with ``subs`` and a digit asks for sub-channels.
    """

    interface_id = ECHO
    user_defined = b"echo"
    max_subchannels = 8

    def __init__(self, name: str = "echo0", instance: int = 1) -> None:
        super().__init__(name)
        self.instance_id = UUID(int=instance)
        self.channels: dict[int, Channel] = {}
        self.refuse_open = False
        self.released_gpadls: list[int] = []
        self.log: list[str] = []
        self.threads: set[str] = set()

    def open(self, channel: Channel) -> None:
        if self.refuse_open:
            raise OpenRefused("not today")
        self.log.append(f"open {channel.subchannel_index}")
        self.channels[channel.subchannel_index] = channel

    def close(self, channel: Channel) -> None:
        self.log.append(f"close {channel.subchannel_index}")
        del self.channels[channel.subchannel_index]

    def reattach(self, channel: Channel) -> None:
        self.log.append(f"reattach {channel.subchannel_index}")
        self.channels[channel.subchannel_index] = channel

    def gpadl_released(self, gpadl_id: int) -> None:
        self.released_gpadls.append(gpadl_id)

    def packets(self, channel: Channel, packets: list[Packet]) -> None:
        self.threads.add(threading.current_thread().name)
        replies = []
        for _, flags, transaction_id, _, payload in packets:
            if payload.startswith(b"refuse"):
                raise ChannelViolation("the guest said refuse")
            if payload.startswith(b"subs"):
                self.request_subchannels(int(payload[4:5]))
            reply = completion(transaction_id, payload) if flags & COMPLETION_REQUESTED else inband(payload)
            replies.append(reply)
        assert channel.send(replies) or channel.broken

    def reset(self) -> None:
        self.log.append("reset")

    def pause(self) -> None:
        self.log.append("pause")

    def resume(self) -> None:
        self.log.append("resume")

    def save(self) -> dict[str, Any]:
        return {"version": 1, "name": self.name}

    def restore(self, state: dict[str, Any]) -> None:
        assert state == {"version": 1, "name": self.name}
        self.log.append("restore")


class ShoutVsp(PipeVsp):
    """A message pipe that greets and answers in capitals."""

    interface_id = UUID(int=0x5407)
    instance_id = UUID(int=0x5408)

    def open(self, channel: Channel) -> None:
        super().open(channel)
        assert self.send_message(b"hello")

    def on_message(self, message: bytes) -> None:
        assert self.send_message(message.upper())


class Rig:
    """Memory, ports, a bus with `devices`, and a guest."""

    def __init__(self, *devices: Vsp, vp_count: int = 4, capacity: int = 1 << 30, max_version: int = 0x50003) -> None:
        self.memory = GuestMemory(16 << 20)
        self.ports = FakePorts(vp_count, capacity)
        self.errors: list[BaseException] = []
        self.notes = io.StringIO()
        self.trace = io.StringIO()
        self.bus = VmBus(
            self.memory,
            self.ports,
            self.errors.append,
            tracer=Tracer(["vmbus"], self.trace),
            guest_log=GuestLog(self.notes),
            max_version=max_version,
        )
        self.guest = FakeGuest(self.ports, self.memory)
        for device in devices:
            self.bus.add_device(device)
        self.bus.reset()

    def settle(self) -> None:
        """Return once the bus's thread has served what was posted before."""
        self.bus._worker.run(lambda: None)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *error: object) -> None:
        """End the bus; nothing may have gone wrong on its threads."""
        self.bus.stop()
        assert self.errors == []
