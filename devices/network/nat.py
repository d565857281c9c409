"""Addresses, names and the way to other networks for a NAT switch: dnsmasq and nftables on its host interface."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.network.definition import SwitchDefinition


class Nat:
    """What a NAT switch has beside an internal one. All methods on one thread; they raise PlaneError.

    `interface` is the host's on the switch; it has the addresses of `definition` already.
    """

    def __init__(self, definition: SwitchDefinition, interface: str) -> None:
        self._definition = definition
        self._interface = interface

    def start(self) -> None:
        """Begin to serve. What an earlier life left, which may have ended by SIGKILL, is removed first."""
        raise NotImplementedError

    def stop(self) -> None:
        """Remove all that `start` made. Harmless the second time."""
        raise NotImplementedError

    def fileno(self) -> int:
        """A descriptor that is readable when `check` should be called, the same from `start` to `stop`."""
        raise NotImplementedError

    def check(self) -> str | None:
        """See to dnsmasq, if it has ended; return one line for the log, if there is something to say."""
        raise NotImplementedError

    def plug(self, vm: str, mac: str) -> str | None:
        """Reserve an address for a NIC, the same whenever possible, and lead what is forwarded to `vm` to its first.

        Returns the address, or None if all are taken.
        """
        raise NotImplementedError

    def unplug(self, mac: str) -> None:
        """Forward nothing to that NIC any more; its address stays reserved as long as there are others."""
        raise NotImplementedError

    def leases(self) -> Sequence[tuple[str, str]]:
        """The MAC and address of each lease, for `AddressBook.set_leases`."""
        raise NotImplementedError
