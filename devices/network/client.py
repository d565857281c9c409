"""Ports of switches for VM processes, and questions to the services of switches."""

from __future__ import annotations

from devices.network.port import Port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from devices.network.settings import PortSettings


class SwitchPort(Port):
    """A port of a switch. `on_link` and `on_lost` run on a thread of its own.

    The network forgets the port when `close` is called or the process ends. When the switch's service ends, `on_lost`
    is called, and a new `plug` with `settings` gives another port.
    """

    #: As they are now: also `pyvmm switch port` changes them.
    settings: PortSettings

    def change(self, settings: PortSettings) -> None:
        """Have the port set as told; raises SwitchError, and nothing is changed then."""
        raise NotImplementedError


def plug(switch: str, settings: PortSettings) -> SwitchPort:
    """A new port of `switch`, whose service is started if it doesn't run. Raises SwitchError."""
    raise NotImplementedError


def ask(switch: str, command: str, **arguments: Any) -> dict[str, Any]:
    """What the running service of `switch` answers; raises SwitchError, of kind ``stopped`` if none runs."""
    raise NotImplementedError
