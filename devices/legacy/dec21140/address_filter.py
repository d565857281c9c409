"""Which frames the 21140A receives: what a setup frame tells it.

Source: 21140A Hardware Reference Manual, chapter 4 (setup frames).
"""

from __future__ import annotations

import zlib

from devices.legacy.dec21140.registers import HO, HP, IF
from devices.saved import check_version, saved_bytes, saved_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SETUP_SIZE = 192
_PERFECT, _HASH_BYTES, _HASH_BITS_MASK = 16, 64, 0x1FF
#: Where the one perfect address is among hash bits.
_ADDRESS_AT = 156
#: Bits of CSR6 by filtering type (TDES1<28> and TDES1<22>): perfect, hash and one perfect, inverse, hash only.
_MODES = (0, HP, IF, HP | HO)


def _halves(frame: bytes, start: int, count: int) -> bytes:
    """Gather the lower halves of double words; the upper ones mean nothing."""
    return b"".join([frame[at : at + 2] for at in range(start, start + 4 * count, 4)])


def hash_index(address: bytes) -> int:
    """The bit of the hash table that stands for `address`: the low end of its Ethernet CRC."""
    return ~zlib.crc32(address) & _HASH_BITS_MASK


class AddressFilter:
    """The addresses and how they are taken. After a reset it takes none."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all addresses."""
        #: HP, HO and IF of CSR6.
        self.mode = 0
        self._addresses: frozenset[bytes] = frozenset()
        self._hash = bytes(_HASH_BYTES)

    def set_up(self, frame: bytes, filtering_type: int) -> None:
        """Take the SETUP_SIZE bytes of a setup frame."""
        self.mode = _MODES[filtering_type]
        if self.mode & HP:
            self._hash = _halves(frame, 0, _HASH_BYTES // 2)
            self._addresses = frozenset([_halves(frame, _ADDRESS_AT, 3)])
        else:
            self._addresses = frozenset(_halves(frame, 12 * index, 3) for index in range(_PERFECT))

    def takes(self, address: bytes) -> bool:
        """Whether frames to `address` are received."""
        if not self.mode & HP:
            return (address in self._addresses) != bool(self.mode & IF)
        if address[0] & 1 or self.mode & HO:
            index = hash_index(address)
            return bool(self._hash[index >> 3] >> (index & 7) & 1)
        return address in self._addresses

    def save(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {
            "version": 1,
            "mode": _MODES.index(self.mode),
            "addresses": b"".join(sorted(self._addresses)),
            "hash": self._hash,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; raise ValueError if it does not fit."""
        check_version(state, 1)
        mode = saved_int(state, "mode", 0, len(_MODES) - 1)
        addresses = saved_bytes(state, "addresses", 0, 6 * _PERFECT)
        self._hash = saved_bytes(state, "hash", _HASH_BYTES, _HASH_BYTES)
        if len(addresses) % 6:
            raise ValueError("saved state: addresses are not 6 bytes each")
        self.mode = _MODES[mode]
        self._addresses = frozenset(addresses[at : at + 6] for at in range(0, len(addresses), 6))
