"""The interface of the two data planes: what carries the frames of one switch between its ports."""

from __future__ import annotations

from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.network.definition import SwitchDefinition
    from devices.network.settings import PortSettings, PortStatistics


class Learned(NamedTuple):
    """Where an address was seen last; `vlan` 0 is the one without a number, `port` None the host or uplink."""

    vlan: int
    mac: str
    port: int | None


class PlaneError(Exception):
    """The host refuses or lacks something; the message is one line that says what, and what to do."""


class DataPlane:
    """Carries the frames of one switch. The service of that switch calls all this from one thread.

    Ports are known by the numbers that the service gives them. Methods raise PlaneError.
    """

    #: ``kernel`` or ``process``.
    name: str
    #: The host's interface on the switch, `definition.host_interface`, if it has one. The service sets its addresses.
    host_interface: str | None = None

    def __init__(self, definition: SwitchDefinition) -> None:
        self.definition = definition

    def open(self) -> None:
        """Make the switch without ports, with its host interface, which is up, or its uplink.

        What an earlier life left, which may have ended by SIGKILL, is removed first.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Remove all that was made. Harmless the second time."""
        raise NotImplementedError

    def add_port(self, number: int, settings: PortSettings) -> int:
        """Make a port; return the NIC's end, a file descriptor as `devices.network.port` has it."""
        raise NotImplementedError

    def change_port(self, number: int, settings: PortSettings) -> None:
        """Set the port as told. Frames that would not pass any more are dropped from when this returns."""
        raise NotImplementedError

    def set_offloads(self, number: int, offloads: int) -> None:
        """Give the port's NIC only what it takes."""
        raise NotImplementedError

    def remove_port(self, number: int) -> None:
        """Forget a port, whose NIC's end is closed or will be."""
        raise NotImplementedError

    def mirror(self, number: int, path: str | None) -> None:
        """Write all frames of a port, both ways, to a new pcap file, or stop that."""
        raise NotImplementedError

    def statistics(self, number: int) -> PortStatistics:
        """What the port has counted."""
        raise NotImplementedError

    def learned(self) -> Sequence[Learned]:
        """The addresses in the switch's table."""
        raise NotImplementedError
