"""Devices for test programs: QEMU's `isa-debug-exit`."""

from __future__ import annotations

from pyvmm.core.bus import BusHandler
from pyvmm.core.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.legacy.ports import PortRange

DEBUG_EXIT_PORT = 0xF4


class DebugExit(Device, BusHandler):
    """A write of any width calls `on_exit` with the exit status ``(value << 1) | 1``, on the VP's thread."""

    name = "isa-debug-exit"

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def ports(self) -> list[PortRange]:
        """The I/O ports to register."""
        return [(DEBUG_EXIT_PORT, 4, self, self.name)]

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._on_exit((value << 1) | 1)
