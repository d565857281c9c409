"""A running switch: its ports on a data plane. No sockets, threads or files of its own."""

from __future__ import annotations

import os
import re
from typing import Any

import msgspec

from devices.network.addresses import AddressBook
from devices.network.errors import SwitchError
from devices.network.settings import PortSettings, check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.network.definition import SwitchDefinition
    from devices.network.nat import Nat
    from devices.network.plane import DataPlane, Learned

MAX_PORTS = 256
MAX_NAME = 64
#: Addresses of one port that `show` lists; with MAC spoofing allowed there may be many more.
MAX_SHOWN = 64

_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")


class _Port:
    def __init__(self, number: int, settings: PortSettings, pid: int) -> None:
        self.number = number
        self.settings = settings
        self.pid = pid
        self.mirror: str | None = None


class Switch:
    """The ports of one switch, known by their numbers. What raises SwitchError or PlaneError has changed nothing."""

    def __init__(self, definition: SwitchDefinition, plane: DataPlane, reason: str, nat: Nat | None = None) -> None:
        self.definition = definition
        self.plane = plane
        self.nat = nat
        #: Why it is this plane.
        self.reason = reason
        self.addresses = AddressBook()
        self._ports: dict[int, _Port] = {}

    @property
    def ports(self) -> int:
        """How many there are."""
        return len(self._ports)

    def plug(self, settings: PortSettings, pid: int) -> tuple[int, int]:
        """Make a port for the NIC of the process `pid`; return its number and the NIC's descriptor."""
        _check(settings)
        for port in self._ports.values():
            other = port.settings
            who = f"{other.vm}'s {other.nic} (process {port.pid})"
            if (other.vm, other.nic) == (settings.vm, settings.nic):
                raise SwitchError(f"switch {self.definition.name}: {who} is plugged in already")
            if other.mac == settings.mac:
                raise SwitchError(
                    f"switch {self.definition.name}: {who} has the address {other.mac}: "
                    "give the VM another name, or its NIC another mac"
                )
        number = next((free for free in range(1, MAX_PORTS + 1) if free not in self._ports), None)
        if number is None:
            raise SwitchError(f"switch {self.definition.name}: all {MAX_PORTS} ports are taken")
        fd = self.plane.add_port(number, settings)
        try:
            if self.nat is not None:
                self.nat.plug(settings.vm, settings.mac)
        except BaseException:
            os.close(fd)
            self.plane.remove_port(number)
            raise
        self._ports[number] = _Port(number, settings, pid)
        self.addresses.know(settings.mac)
        return number, fd

    def unplug(self, number: int) -> None:
        """Forget the port."""
        port = self._ports.pop(number)
        self.addresses.forget(port.settings.mac)
        try:
            if self.nat is not None:
                self.nat.unplug(port.settings.mac)
        finally:
            self.plane.remove_port(number)

    def settings(self, number: int) -> PortSettings:
        """As they are."""
        return self._ports[number].settings

    def change(self, number: int, settings: PortSettings) -> None:
        """Set the port as told. Whose port it is cannot change."""
        port = self._ports[number]
        _check(settings)
        was = port.settings
        if (settings.vm, settings.nic, settings.mac) != (was.vm, was.nic, was.mac):
            raise SwitchError(f"port of {was.vm}'s {was.nic}: VM, NIC and mac stay while it is plugged in")
        if settings == was:
            return
        self.plane.change_port(number, settings)
        port.settings = settings

    def set_offloads(self, number: int, offloads: int) -> None:
        """Give the NIC only what it takes."""
        self.plane.set_offloads(number, offloads)

    def mirror(self, number: int, path: str | None) -> None:
        """Write the port's frames to the new pcap file at the absolute `path`, or stop that."""
        self.plane.mirror(number, path)
        self._ports[number].mirror = path

    def find(self, text: str) -> int:
        """The port of ``VM`` or ``VM:NIC``."""
        ports = [port for port in self._ports.values() if port.settings.vm == text]
        ports = ports or [port for port in self._ports.values() if f"{port.settings.vm}:{port.settings.nic}" == text]
        if not ports:
            raise SwitchError(f"switch {self.definition.name}: {text} has no port there", "missing")
        if len(ports) > 1:
            names = ", ".join(f"{port.settings.vm}:{port.settings.nic}" for port in ports)
            raise SwitchError(f"switch {self.definition.name}: {text} has several ports: choose {names}", "usage")
        return ports[0].number

    def show(self) -> dict[str, Any]:
        """What it is and all its ports, as plain data."""
        self._look_at_leases()
        by_port: dict[int | None, list[Learned]] = {}
        for learned in self.plane.learned():
            by_port.setdefault(learned.port, []).append(learned)
        return {
            "plane": self.plane.name,
            "plane_reason": self.reason,
            "host_interface": self.plane.host_interface,
            "learned_outside": len(by_port.get(None, ())),
            "ports": [self._show(port, by_port.get(port.number, [])) for _, port in sorted(self._ports.items())],
        }

    def show_port(self, number: int) -> dict[str, Any]:
        """One port."""
        self._look_at_leases()
        return self._show(self._ports[number], [each for each in self.plane.learned() if each.port == number])

    def _look_at_leases(self) -> None:
        if self.nat is not None:
            self.addresses.set_leases(self.nat.leases())

    def _show(self, port: _Port, learned: list[Learned]) -> dict[str, Any]:
        return {
            "port": port.number,
            "pid": port.pid,
            **msgspec.to_builtins(port.settings),
            "mirror": port.mirror,
            "addresses": self.addresses.of(port.settings.mac),
            "learned": [{"vlan": each.vlan, "mac": each.mac} for each in learned[:MAX_SHOWN]],
            "learned_count": len(learned),
            "statistics": msgspec.to_builtins(self.plane.statistics(port.number)),
        }


def _check(settings: PortSettings) -> None:
    for what, text in (("VM", settings.vm), ("NIC", settings.nic)):
        if not (0 < len(text) <= MAX_NAME and text.isprintable()):
            raise SwitchError(f"{what} name {text[:MAX_NAME]!r} is not 1 to {MAX_NAME} printable characters", "usage")
    if not _MAC.fullmatch(settings.mac) or settings.mac == "00:00:00:00:00:00":
        raise SwitchError(f"{settings.mac[:MAX_NAME]!r} is no NIC's address, such as 00:15:5d:01:02:03", "usage")
    try:
        check(settings)
    except ValueError as error:
        raise SwitchError(str(error), "usage") from error
