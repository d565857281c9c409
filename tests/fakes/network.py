"""A data plane that carries nothing and a NAT that translates nothing, for tests of what stands around them."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from devices.network.nat import Nat
from devices.network.plane import DataPlane, PlaneError
from devices.network.settings import PortSettings, PortStatistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.network.definition import SwitchDefinition
    from devices.network.plane import Learned


class FakePlane(DataPlane):
    """Keeps what it is told. `refusal`, once set, is what every call raises."""

    name = "process"

    def __init__(self, definition: SwitchDefinition) -> None:
        super().__init__(definition)
        self.ports: dict[int, PortSettings] = {}
        #: The switch's ends of the ports.
        self.ends: dict[int, socket.socket] = {}
        self.offloads: dict[int, int] = {}
        self.mirrors: dict[int, str | None] = {}
        self.table: list[Learned] = []
        self.refusal: str | None = None
        self.refusal_to_close: str | None = None
        self.closed = 0

    def open(self) -> None:
        self._check()

    def close(self) -> None:
        self.closed += 1
        for number in list(self.ports):
            self.remove_port(number)
        if self.refusal_to_close is not None:
            raise PlaneError(self.refusal_to_close)

    def add_port(self, number: int, settings: PortSettings) -> int:
        self._check()
        assert number not in self.ports
        self.ports[number] = settings
        self.ends[number], nic = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return nic.detach()

    def change_port(self, number: int, settings: PortSettings) -> None:
        self._check()
        assert number in self.ports
        self.ports[number] = settings

    def set_offloads(self, number: int, offloads: int) -> None:
        self._check()
        self.offloads[number] = offloads

    def remove_port(self, number: int) -> None:
        del self.ports[number]
        self.ends.pop(number).close()

    def mirror(self, number: int, path: str | None) -> None:
        self._check()
        self.mirrors[number] = path

    def statistics(self, number: int) -> PortStatistics:
        assert number in self.ports
        return PortStatistics(received_frames=number, dropped={"vlan": 2})

    def learned(self) -> Sequence[Learned]:
        return self.table

    def _check(self) -> None:
        if self.refusal is not None:
            raise PlaneError(self.refusal)


class FakeNat(Nat):
    """Keeps what it is told. `refusal`, once set, is what `plug` raises."""

    def __init__(self, definition: SwitchDefinition, interface: str) -> None:
        self.nics: dict[str, str] = {}
        self.leased: list[tuple[str, str]] = []
        self.refusal: str | None = None
        #: Makes the service call `check`, whose answers come from `troubles`.
        self.alarm = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.troubles: list[str | None] = []

    def stop(self) -> None:
        os.close(self.alarm)

    def fileno(self) -> int:
        return self.alarm

    def check(self) -> str | None:
        os.eventfd_read(self.alarm)
        told = self.troubles.pop(0)
        if told == "broken":
            raise PlaneError("dnsmasq cannot be started again")
        return told

    def plug(self, vm: str, mac: str) -> str | None:
        if self.refusal is not None:
            raise PlaneError(self.refusal)
        self.nics[mac] = vm
        return "192.168.77.2"

    def unplug(self, mac: str) -> None:
        del self.nics[mac]

    def leases(self) -> Sequence[tuple[str, str]]:
        return self.leased
