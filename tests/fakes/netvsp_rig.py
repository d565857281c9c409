"""A synthetic NIC on a real bus with real rings, workers and engine, a guest that drives it, and a port."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest

from devices.network.port import MAX_MTU, Port
from devices.synthetic.netvsp.vsp import NetVsp
from devices.vmbus.bus import VmBus
from pyvmm.core.memory import GuestMemory
from pyvmm.core.trace import GuestLog, Tracer
from tests.fakes.board import ManualClock
from tests.fakes.net_rig import PLAIN
from tests.fakes.netvsc import NetVsc
from tests.fakes.vmbus_guest import RESCIND, V5_3, FakeGuest, FakePorts

if TYPE_CHECKING:
    from collections.abc import Iterator

MAC = bytes.fromhex("00155d0a0b0c")
PEER = bytes.fromhex("00155d0a0b0d")
GROUP = bytes.fromhex("01005e000001")
BROADCAST_MAC = b"\xff" * 6
TIMEOUT_S = 20


class FakePort(Port):
    """A port whose network is `network`, a socket."""

    def __init__(self, mtu: int = MAX_MTU, name: str = "switch test") -> None:
        self.network, self.end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.network.settimeout(TIMEOUT_S)
        self.end.setblocking(False)
        super().__init__(self.end.fileno(), name, mtu)
        self.offloads = [0]
        self.closed = False

    def set_offloads(self, offloads: int) -> None:
        assert not self.closed
        self.offloads.append(offloads)

    def close(self) -> None:
        self.closed = True
        self.network.close()
        self.end.close()

    def arrive(self, frame: bytes, vnet: bytes = PLAIN) -> None:
        """A frame comes from the network."""
        self.network.send(vnet + frame)

    def sent(self) -> tuple[bytes, bytes]:
        """Wait for a frame from the NIC: its header, and itself."""
        data = self.network.recv(1 << 17)
        return data[:10], data[10:]


class Rig:
    """One NIC on a bus, and a guest that has opened its primary channel."""

    def __init__(
        self,
        subchannels: int = 0,
        vmbus: int = V5_3,
        connect: bool = True,
        receive_pages: int = 64,
        mtu: int = MAX_MTU,
        trace: Any = None,
        notes: Any = None,
        **how: Any,
    ) -> None:
        self.clock = ManualClock()
        self.memory = GuestMemory(8 << 20)
        self.errors: list[BaseException] = []
        self.buses: list[VmBus] = []
        self._how = {"max_subchannels": subchannels, **how}
        self._streams = trace, notes
        self.port = FakePort(mtu)
        self.vsp = self.plug()
        if connect:
            self.vsp.connect(self.port)
        self.guest = FakeGuest(self.ports, self.memory)
        self.vmbus = vmbus
        (self.offer,) = self.guest.connect(vmbus)
        self.receive_page_count = receive_pages
        self.driver = self.open()

    def plug(self) -> NetVsp:
        """Make a bus with a NIC."""
        trace, notes = self._streams
        self.ports = FakePorts()
        tracer = Tracer(["netvsp"] if trace is not None else [], trace)
        self.buses.append(
            VmBus(self.memory, self.ports, self.errors.append, self.clock, tracer, GuestLog(notes, self.clock))
        )
        vsp = NetVsp(0, MAC, **self._how)
        self.bus.add_device(vsp)
        return vsp

    @property
    def bus(self) -> VmBus:
        return self.buses[-1]

    def open(self, ring_pages: int = 6) -> NetVsc:
        """Open the primary channel with a new driver."""
        channel = self.guest.open(self.offer, out_pages=ring_pages, in_pages=ring_pages)
        return NetVsc(self.guest, channel, self.receive_page_count)

    def advance(self, seconds: float) -> None:
        """Let time pass, and the NIC's timers run out."""
        self.clock.advance(int(seconds * 1e9))
        self.vsp.workers[0].run(lambda: None)

    def settle(self) -> None:
        """Return once the bus's thread has served what was posted before."""
        self.bus._worker.run(lambda: None)

    def broken(self) -> str:
        """Wait for the guest's channel to be given up; return why."""
        rescinded = self.guest.expect(RESCIND)
        assert int.from_bytes(rescinded[:4], "little") == self.offer.channel_id
        reasons = [offer["broken"] for offer in self.bus.inspect()["offers"] if offer["broken"]]
        assert len(reasons) == 1
        return str(reasons[0])

    def stop(self) -> None:
        for bus in self.buses:
            bus.stop()
        assert self.errors == []
        if not self.port.closed:
            self.port.close()


@pytest.fixture
def make() -> Iterator[Any]:
    rigs: list[Rig] = []

    def build(*args: Any, **how: Any) -> Rig:
        rigs.append(Rig(*args, **how))
        return rigs[-1]

    yield build
    for rig in rigs:
        rig.stop()


@pytest.fixture
def make_lying(make: Any) -> Any:
    """Rigs whose guests lie, so that the host may give their channels up."""

    def build(*args: Any, **how: Any) -> Rig:
        rig: Rig = make(*args, **how)
        rig.driver.channel.hostile = True
        return rig

    return build


def frame(to: bytes = PEER, source: bytes = MAC, payload: bytes = b"payload", kind: bytes = b"\x88\xb5") -> bytes:
    """A frame of a protocol that nobody knows."""
    return (to + source + kind + payload).ljust(60, b"\0")
