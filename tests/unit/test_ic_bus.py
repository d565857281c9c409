"""The integration components behind a real bus: rings, threads, a guest that knows VMBus by itself."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

import pytest

from devices.synthetic.ic.heartbeat import Heartbeat
from devices.synthetic.ic.shutdown import Shutdown, ShutdownResult
from devices.synthetic.ic.timesync import TimeSync
from devices.vmbus.bus import VmBus
from pyvmm.core.memory import GuestMemory
from tests.fakes.ic_guest import Message
from tests.fakes.vmbus_guest import V0_13, V2_4, V5_3, FakeGuest, FakePorts, GuestChannel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devices.synthetic.ic.component import IntegrationComponent


class Vm:
    """A bus with the three components, and a connected guest."""

    def __init__(self, memory: GuestMemory | None = None) -> None:
        self.errors: list[BaseException] = []
        self.memory = memory or GuestMemory(16 << 20)
        self.ports = FakePorts()
        self.bus = VmBus(self.memory, self.ports, self.errors.append)
        self.shutdown = Shutdown(self.bus.clock)
        self.heartbeat = Heartbeat(self.bus.clock, self.shutdown)
        self.timesync = TimeSync(self.bus.clock, lambda: 4711, self.shutdown)
        self.components: list[IntegrationComponent] = [self.shutdown, self.heartbeat, self.timesync]
        for component in self.components:
            self.bus.add_device(component)
        self.guest = FakeGuest(self.ports, self.memory)

    def open_all(self, version: int) -> dict[str, GuestChannel]:
        offers = {offer.instance_id: offer for offer in self.guest.connect(version)}
        return {component.name: self.guest.open(offers[component.instance_id]) for component in self.components}


@pytest.fixture
def vm() -> Iterator[Vm]:
    machine = Vm()
    yield machine
    machine.bus.stop()
    assert machine.errors == []


def receive(channel: GuestChannel) -> tuple[Message, int]:
    """Take one message; return it with the packet's transaction id."""
    (packet,) = channel.receive(1)
    assert packet[0] == 6
    return Message(packet[4]), packet[2]


def answer(channel: GuestChannel, message: Message, request_id: int, body: bytes, status: int = 0) -> None:
    header = struct.pack(
        "<HHHHHHIBBH", *message.framework, message.type, *message.version, len(body), status, message.transaction, 5, 0
    )
    channel.send((6, 0, request_id, b"", struct.pack("<II", 1, len(header) + len(body)) + header + body))


def negotiate(channel: GuestChannel, version: tuple[int, int]) -> None:
    offer, request_id = receive(channel)
    assert version in offer.offered()[1]
    # Linux sends the request back whole, with a smaller size in its header; the rest is left over.
    body = struct.pack("<HHIHHHH", 1, 1, 0, 3, 0, *version)
    answer(channel, offer, request_id, body)


@pytest.mark.parametrize("version", [V0_13, V2_4, V5_3])
def test_a_guest_of_any_age_is_served(vm: Vm, version: int) -> None:
    channels = vm.open_all(version)
    negotiate(channels["heartbeat"], (3, 0))
    beat, request_id = receive(channels["heartbeat"])
    answer(channels["heartbeat"], beat, request_id, struct.pack("<Q", 1) + beat.body[8:])
    negotiate(channels["timesync"], (4, 0))
    sync, _ = receive(channels["timesync"])
    assert (sync.body[16], struct.unpack_from("<Q", sync.body, 8)[0]) == (1, 4711)

    negotiate(channels["shutdown"], (3, 2))
    results: list[ShutdownResult] = []
    while vm.shutdown.versions is None:
        vm.shutdown.worker_for(0).run(lambda: None)
    thread = threading.Thread(target=lambda: results.append(vm.shutdown.request(timeout_s=10)))
    thread.start()
    request, request_id = receive(channels["shutdown"])
    answer(channels["shutdown"], request, request_id, request.body)
    thread.join(10)
    assert results == [("accepted", 0)]
    assert vm.heartbeat.status == "ok"  # served by the same thread, before


def test_a_pause_is_followed_by_a_sync(vm: Vm) -> None:
    channel = vm.open_all(V5_3)["timesync"]
    negotiate(channel, (4, 0))
    sync, request_id = receive(channel)
    answer(channel, sync, request_id, sync.body)
    vm.bus.pause()
    vm.bus.resume()
    assert receive(channel)[0].body[16] == 1


def test_a_broken_message_costs_the_guest_that_channel_only(vm: Vm) -> None:
    channels = vm.open_all(V5_3)
    receive(channels["heartbeat"])
    channels["heartbeat"].send((6, 0, 0, b"", b"\xff" * 40))
    assert vm.guest.expect(2) == struct.pack("<I", channels["heartbeat"].offer.channel_id)  # rescinded
    negotiate(channels["timesync"], (4, 0))
    assert receive(channels["timesync"])[0].type == 4
    assert vm.heartbeat.status == "no-contact"


def test_reset_forgets_the_guest_and_a_new_one_is_served(vm: Vm) -> None:
    for _ in range(2):
        channel = vm.open_all(V5_3)["timesync"]
        negotiate(channel, (1, 0))
        assert receive(channel)[0].body[24] == 1
        vm.bus.pause()
        vm.bus.reset()
        vm.bus.resume()
        assert vm.timesync.versions is None


def test_saved_components_go_on_in_a_new_process(vm: Vm) -> None:
    channels = vm.open_all(V5_3)
    negotiate(channels["heartbeat"], (3, 0))
    beat, request_id = receive(channels["heartbeat"])
    negotiate(channels["timesync"], (4, 0))
    receive(channels["timesync"])
    vm.bus.pause()
    saved = vm.bus.save()

    other = Vm(vm.memory)
    other.bus.pause()
    other.bus.restore(saved)
    other.bus.resume()
    vm.guest.ports = other.ports
    assert receive(channels["timesync"])[0].body[16] == 1
    answer(channels["heartbeat"], beat, request_id, struct.pack("<Q", 1) + beat.body[8:])
    while other.heartbeat.status != "ok":
        other.shutdown.worker_for(0).run(lambda: None)
    other.bus.stop()
    assert other.errors == []
