"""Devices for test programs: QEMU's `isa-debug-exit` and `pc-testdev`.

Sources: QEMU, hw/misc/debugexit.c and hw/misc/pc-testdev.c.
"""

from __future__ import annotations

from devices.saved import check_version, saved_bytes, saved_int
from pyvmm.core.bus import BusHandler
from pyvmm.core.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from devices.legacy.ports import PortRange
    from pyvmm.core.irq import IrqLine

DEBUG_EXIT_PORT = 0xF4
REGISTER_PORT, FLUSH_PORT, BYTE_REGISTER_PORT = 0xE0, 0xE4, 0xE8
LINES_PORT, LINES = 0x2000, 24
BUFFER_ADDRESS, BUFFER_SIZE = 0xFF00_0000, 0x1_0000


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


class _Bytes(BusHandler):
    """Memory that is accessed in any width; what reaches over the end is cut off."""

    def __init__(self, content: bytearray) -> None:
        self.content = content

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.content[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        end = min(offset + size, len(self.content))
        self.content[offset:end] = value.to_bytes(size, "little")[: end - offset]


class _FlushPage(BusHandler):
    def __init__(self, flush: Callable[[int], None]) -> None:
        self._flush = flush

    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 4:
            self._flush(value & ~0xFFF)


class _Lines(BusHandler):
    def __init__(self, lines: list[IrqLine]) -> None:
        self._lines = lines

    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 1:
            self._lines[offset].set(bool(value))


class PcTestdev(Device):
    """A register of 32 bits at two places, a page flush, the interrupt lines, and a buffer of 64 KiB in memory space.

    A write of a guest physical address below 4 GiB to the flush port calls `flush` with its page; `lines` are the 24 of
    the IOAPIC. Ports 0xea and 0xeb, in the register's second place, are the hypercall page's once the guest has
    enabled that (see `enlightenments.hypercall_page`).
    """

    name = "pc-testdev"

    def __init__(self, flush: Callable[[int], None], lines: list[IrqLine]) -> None:
        self._register = _Bytes(bytearray(4))
        self._buffer = _Bytes(bytearray(BUFFER_SIZE))
        self._flush = _FlushPage(flush)
        self._lines = _Lines(lines)

    def ports(self) -> list[PortRange]:
        """The I/O ports to register."""
        return [
            (REGISTER_PORT, 4, self._register, "pc-testdev register"),
            (FLUSH_PORT, 4, self._flush, "pc-testdev page flush"),
            (BYTE_REGISTER_PORT, 4, self._register, "pc-testdev register"),
            (LINES_PORT, LINES, self._lines, "pc-testdev interrupt lines"),
        ]

    def memory(self) -> list[PortRange]:
        """The MMIO ranges to register."""
        return [(BUFFER_ADDRESS, BUFFER_SIZE, self._buffer, "pc-testdev buffer")]

    def reset(self) -> None:
        for memory in (self._register, self._buffer):
            memory.content[:] = bytes(len(memory.content))

    def save(self) -> dict[str, Any]:
        return {
            "version": 1,
            "register": int.from_bytes(self._register.content, "little"),
            "buffer": bytes(self._buffer.content),
        }

    def restore(self, state: dict[str, Any]) -> None:
        check_version(state, 1)
        register = saved_int(state, "register", 0, 0xFFFF_FFFF)
        self._buffer.content[:] = saved_bytes(state, "buffer", BUFFER_SIZE, BUFFER_SIZE)
        self._register.content[:] = register.to_bytes(4, "little")

    def inspect(self) -> dict[str, Any]:
        return {"register": int.from_bytes(self._register.content, "little")}
