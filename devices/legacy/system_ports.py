"""Single ports of the PC board: system control ports A (0x92) and B (0x61), and the reset register (0xcf9).

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
_REFRESH, _TIMER2 = 0x10, 0x20
_RESET_CPU = 0x04


class SystemPorts(Device):
    """Ports 0x61, 0x92 and 0xcf9. `on_reset` is called on the VP's thread when the guest asks for a reset.

    Timer 2's output (bit 5 of 0x61) only changes from read to read: where KVM's timer does not serve this port
    itself (KVM_PIT_SPEAKER_DUMMY), loops that wait for it end, and a guest that measures with it sees nonsense
    and rejects it, rather than a wrong frequency.
    """

    name = "system-ports"

    def __init__(self, keyboard_controller: I8042, on_reset: Callable[[], None]) -> None:
        self._controller = keyboard_controller
        self._on_reset = on_reset
        self._speaker = 0
        self._reads = 0
        self._port_a = 0
        self._reset_control = 0

    def ports(self) -> list[PortRange]:
        """The I/O ports to register."""
        return [
            (0x61, 1, BytePorts(self._read_b, self._write_b), "system control port B"),
            (0x92, 1, BytePorts(self._read_a, self._write_a), "system control port A"),
            (0xCF9, 1, BytePorts(self._read_reset, self._write_reset), "reset register"),
        ]

    def _read_b(self, offset: int) -> int:
        if offset:
            return 0xFF
        self._reads = (self._reads + 1) & 3
        return self._speaker | (_REFRESH if self._reads & 1 else 0) | (_TIMER2 if self._reads & 2 else 0)

    def _write_b(self, offset: int, value: int) -> None:
        if not offset:
            self._speaker = value & 0x0F

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
        self._speaker = 0
        self._reads = 0
        self._port_a = 0
        self._reset_control = 0

    def save(self) -> dict[str, Any]:
        return {
            "version": 1,
            "speaker": self._speaker,
            "reads": self._reads,
            "port_a": self._port_a,
            "reset_control": self._reset_control,
        }

    def restore(self, state: dict[str, Any]) -> None:
        check_version(state, 1)
        speaker, reads = saved_int(state, "speaker", 0, 0x0F), saved_int(state, "reads", 0, 3)
        port_a = saved_int(state, "port_a", 0, 1)
        self._reset_control = saved_int(state, "reset_control", 0, 0x0F)
        self._speaker, self._reads, self._port_a = speaker, reads, port_a

    def inspect(self) -> dict[str, Any]:
        return {"speaker": bool(self._speaker & 2), "reset_control": self._reset_control}
