"""Single ports of the PC board: system control port A (0x92) and the reset register (0xcf9).

Port B (0x61) is KVM's, with the timer that it gates.

IBM PS/2 Hardware Interface Technical Reference; the reset register is that of Intel's PIIX3 (RC).
"""

from __future__ import annotations

from devices.legacy.ports import BytePorts
from devices.saved import check_version, saved_int
from pyvmm.core.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from devices.legacy.i8042 import I8042
    from devices.legacy.ports import PortRange

_FAST_RESET, _A20 = 0x01, 0x02
_RESET_CPU = 0x04


class SystemPorts(Device):
    """Ports 0x92 and 0xcf9. `on_reset` is called on the VP's thread when the guest asks for a reset."""

    name = "system-ports"

    def __init__(self, keyboard_controller: I8042, on_reset: Callable[[], None]) -> None:
        self._controller = keyboard_controller
        self._on_reset = on_reset
        self._port_a = 0
        self._reset_control = 0

    def ports(self) -> list[PortRange]:
        """The I/O ports to register."""
        return [
            (0x92, 1, BytePorts(self._read_a, self._write_a), "system control port A"),
            (0xCF9, 1, BytePorts(self._read_reset, self._write_reset), "reset register"),
        ]

    def _read_a(self, offset: int) -> int:
        return 0xFF if offset else self._port_a | (_A20 if self._controller.a20 else 0)

    def _write_a(self, offset: int, value: int) -> None:
        if offset:
            return
        self._controller.a20 = bool(value & _A20)
        rising = value & ~self._port_a & _FAST_RESET
        self._port_a = value & _FAST_RESET
        if rising:
            self._on_reset()

    def _read_reset(self, offset: int) -> int:
        return 0xFF if offset else self._reset_control

    def _write_reset(self, offset: int, value: int) -> None:
        if offset:
            return
        self._reset_control = value & 0x0A  # bit 1: hard reset; bit 3: with power cycle
        if value & _RESET_CPU:
            self._on_reset()

    def reset(self) -> None:
        self._port_a = 0
        self._reset_control = 0

    def save(self) -> dict[str, Any]:
        return {
            "version": 1,
            "port_a": self._port_a,
            "reset_control": self._reset_control,
        }

    def restore(self, state: dict[str, Any]) -> None:
        check_version(state, 1)
        port_a = saved_int(state, "port_a", 0, 1)
        self._reset_control = saved_int(state, "reset_control", 0, 0x0F)
        self._port_a = port_a

    def inspect(self) -> dict[str, Any]:
        return {"reset_control": self._reset_control}
