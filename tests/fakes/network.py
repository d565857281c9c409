"""A data plane that carries nothing, for tests of what stands around it."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

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
        self.closed = 0

    def open(self) -> None:
        self._check()

    def close(self) -> None:
        self.closed += 1
        for number in list(self.ports):
            self.remove_port(number)

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
