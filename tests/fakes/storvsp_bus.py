"""A SCSI controller on a real bus, with real rings and workers, and a guest that drives it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from devices.synthetic.storvsp.vsp import StorVsp
from devices.vmbus.bus import VmBus
from pyvmm.core.memory import GuestMemory
from tests.fakes.disks import MemoryDisk
from tests.fakes.storvsc import StorVsc
from tests.fakes.vmbus_guest import V5_3, FakeGuest, FakePorts, GuestChannel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.core.clock import Clock

PATIENCE = 30.0
BUFFER_PAGES = 130


class Rig:
    """One controller on a bus, and a guest that has opened its primary channel."""

    def __init__(
        self, disks: dict[int, MemoryDisk], subchannels: int = 0, vmbus: int = V5_3, clock: Clock | None = None
    ) -> None:
        self.clock = clock
        self.memory = GuestMemory(4 << 20)
        self.errors: list[BaseException] = []
        self.buses: list[VmBus] = []
        self.vsp = self.plug(disks, subchannels)
        self.guest = FakeGuest(self.ports, self.memory)
        (offer,) = self.guest.connect(vmbus)
        self.driver = self.open(offer)

    def plug(self, disks: dict[int, MemoryDisk], subchannels: int) -> StorVsp:
        """Make a bus with a controller."""
        self.ports = FakePorts()
        self.buses.append(VmBus(self.memory, self.ports, self.errors.append, self.clock))
        vsp = StorVsp(0, disks, subchannels)
        self.bus.add_device(vsp)
        return vsp

    @property
    def bus(self) -> VmBus:
        return self.buses[-1]

    def open(self, offer: Any, vp: int = 0) -> StorVsc:
        return StorVsc(self.guest.open(offer, vp), self.guest.allocate(BUFFER_PAGES))

    def stop(self) -> None:
        for bus in self.buses:
            bus.stop()
        assert self.errors == []


def channel_of(driver: StorVsc) -> GuestChannel:
    return cast("GuestChannel", driver.end)


@pytest.fixture
def make() -> Iterator[Any]:
    rigs: list[Rig] = []

    def build(*args: Any, **how: Any) -> Rig:
        rigs.append(Rig(*args, **how))
        return rigs[-1]

    yield build
    for rig in rigs:
        rig.stop()
