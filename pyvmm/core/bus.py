"""PIO and MMIO buses: which handler answers an address that a VP touched."""

from __future__ import annotations

import threading
from bisect import bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    #: Base, length, handler, name.
    _Range = tuple[int, int, "BusHandler", str]


class BusHandler:
    """Answers accesses to one registered range. `offset` counts from the start of that range."""

    def read(self, offset: int, size: int) -> int:
        """Return the value of `size` bytes (1, 2, 4 or 8) at `offset`."""
        raise NotImplementedError

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a write of `size` bytes at `offset`."""
        raise NotImplementedError

    def read_string(self, offset: int, size: int, count: int) -> bytes:
        """Return what `count` reads of `size` bytes give: a string instruction such as INS with a repeat prefix."""
        mask = (1 << (8 * size)) - 1
        return b"".join([(self.read(offset, size) & mask).to_bytes(size, "little") for _ in range(count)])

    def write_string(self, offset: int, size: int, data: bytes) -> None:
        """Take `data` as writes of `size` bytes, which divides its length."""
        for start in range(0, len(data), size):
            self.write(offset, size, int.from_bytes(data[start : start + size], "little"))


class Bus:
    """Ranges of one address space. Reads that nobody answers give all ones, writes are dropped.

    Any VP's thread may access it while another one has ranges come and go.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()  # one range comes or goes at a time
        # Bases and ranges, lowest first; replaced as one, so that an access finds either the old map or the new one.
        self._map: tuple[tuple[int, ...], tuple[_Range, ...]] = ((), ())
        #: Accesses that no range answered, by address (at most `_UNCLAIMED_LIMIT` of them).
        self.unclaimed: dict[int, int] = {}

    _UNCLAIMED_LIMIT = 64

    def register(self, base: int, length: int, handler: BusHandler, name: str) -> None:
        """Give `length` addresses from `base` to `handler`.

        Raises ValueError if the range overlaps one that is registered already.
        """
        if length <= 0:
            raise ValueError(f"{self.name} range {name} at {base:#x} is empty")
        with self._lock:
            bases, ranges = self._map
            index = bisect_right(bases, base)
            if index and ranges[index - 1][0] + ranges[index - 1][1] > base:
                raise ValueError(f"{self.name} range {name} at {base:#x} overlaps {ranges[index - 1][3]}")
            if index < len(bases) and base + length > bases[index]:
                raise ValueError(f"{self.name} range {name} at {base:#x} overlaps {ranges[index][3]}")
            new = (base, length, handler, name)
            self._map = (*bases[:index], base, *bases[index:]), (*ranges[:index], new, *ranges[index:])

    def unregister(self, base: int) -> None:
        """Take the range that begins at `base` away; raises ValueError if there is none."""
        with self._lock:
            bases, ranges = self._map
            index = bases.index(base)
            self._map = bases[:index] + bases[index + 1 :], ranges[:index] + ranges[index + 1 :]

    def _find(self, address: int) -> _Range | None:
        bases, ranges = self._map
        index = bisect_right(bases, address) - 1
        if index >= 0:
            entry = ranges[index]
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

    def read_string(self, address: int, size: int, count: int) -> bytes:
        """Read `size` bytes at `address`, `count` times."""
        entry = self._find(address)
        if entry is None:
            return b"\xff" * (size * count)
        return entry[2].read_string(address - entry[0], size, count)

    def write_string(self, address: int, size: int, data: bytes) -> None:
        """Write all of `data` at `address`, `size` bytes at a time."""
        entry = self._find(address)
        if entry is not None:
            entry[2].write_string(address - entry[0], size, data)

    def inspect(self) -> dict[str, Any]:
        """The ranges, lowest first, and what was touched outside them."""
        return {
            "ranges": [{"base": base, "length": length, "name": name} for base, length, _, name in self._map[1]],
            "unclaimed": {f"{address:#x}": count for address, count in self.unclaimed.copy().items()},
        }
