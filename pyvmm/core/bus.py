"""PIO and MMIO buses: which handler answers an address that a VP touched."""

from __future__ import annotations

from bisect import bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class BusHandler:
    """Answers accesses to one registered range. `offset` counts from the start of that range."""

    def read(self, offset: int, size: int) -> int:
        """Return the value of `size` bytes (1, 2, 4 or 8) at `offset`."""
        raise NotImplementedError

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a write of `size` bytes at `offset`."""
        raise NotImplementedError


class Bus:
    """Ranges of one address space. Reads that nobody answers give all ones, writes are dropped."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._bases: list[int] = []
        self._ranges: list[tuple[int, int, BusHandler, str]] = []
        #: Accesses that no range answered, by address (at most `_UNCLAIMED_LIMIT` of them).
        self.unclaimed: dict[int, int] = {}

    _UNCLAIMED_LIMIT = 64

    def register(self, base: int, length: int, handler: BusHandler, name: str) -> None:
        """Give `length` addresses from `base` to `handler`.

        Raises ValueError if the range overlaps one that is registered already.
        """
        index = bisect_right(self._bases, base)
        if length <= 0:
            raise ValueError(f"{self.name} range {name} at {base:#x} is empty")
        if index and self._ranges[index - 1][0] + self._ranges[index - 1][1] > base:
            raise ValueError(f"{self.name} range {name} at {base:#x} overlaps {self._ranges[index - 1][3]}")
        if index < len(self._bases) and base + length > self._bases[index]:
            raise ValueError(f"{self.name} range {name} at {base:#x} overlaps {self._ranges[index][3]}")
        self._bases.insert(index, base)
        self._ranges.insert(index, (base, length, handler, name))

    def _find(self, address: int) -> tuple[int, int, BusHandler, str] | None:
        index = bisect_right(self._bases, address) - 1
        if index >= 0:
            entry = self._ranges[index]
            if address < entry[0] + entry[1]:
                return entry
        unclaimed = self.unclaimed
        if address in unclaimed or len(unclaimed) < self._UNCLAIMED_LIMIT:
            unclaimed[address] = unclaimed.get(address, 0) + 1
        return None

    def read(self, address: int, size: int) -> int:
        """Read `size` bytes at `address`."""
        entry = self._find(address)
        if entry is None:
            return (1 << (8 * size)) - 1
        return entry[2].read(address - entry[0], size) & ((1 << (8 * size)) - 1)

    def write(self, address: int, size: int, value: int) -> None:
        """Write `size` bytes at `address`."""
        entry = self._find(address)
        if entry is not None:
            entry[2].write(address - entry[0], size, value)

    def inspect(self) -> dict[str, Any]:
        """The ranges, lowest first, and what was touched outside them."""
        return {
            "ranges": [{"base": base, "length": length, "name": name} for base, length, _, name in self._ranges],
            "unclaimed": {f"{address:#x}": count for address, count in self.unclaimed.copy().items()},
        }
