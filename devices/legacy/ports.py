"""Byte-wide I/O ports, as ISA devices have them."""

from __future__ import annotations

from pyvmm.core.bus import BusHandler

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    #: (base, length, handler, name): what `pyvmm.core.bus.Bus.register` takes.
    PortRange = tuple[int, int, BusHandler, str]


class BytePorts(BusHandler):
    """Serves a range byte by byte: a wider access is split, lowest address first, as on the ISA bus."""

    def __init__(self, read: Callable[[int], int], write: Callable[[int, int], None]) -> None:
        self._read = read
        self._write = write

    def read(self, offset: int, size: int) -> int:
        if size == 1:
            return self._read(offset)
        value = 0
        for index in range(size):
            value |= self._read(offset + index) << (8 * index)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        for index in range(size):
            self._write(offset + index, (value >> (8 * index)) & 0xFF)
