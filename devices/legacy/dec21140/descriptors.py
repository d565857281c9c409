"""Descriptors of receive and transmit lists, and the way from one to the next.

Source: 21140A Hardware Reference Manual, chapter 4.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.core.memory import GuestMemory

SIZE = 16
OWN = 1 << 31
#: Most descriptors that one frame may take; it would have to be in pieces of 8 bytes.
FRAME_LIMIT = 256

# RDES0.
FILTERING_FAIL, LENGTH_SHIFT, ERROR_SUMMARY, DESCRIPTOR_ERROR = 1 << 30, 16, 1 << 15, 1 << 14
DATA_TYPE_SHIFT, MULTICAST, FIRST, LAST, TOO_LONG, FRAME_TYPE = 12, 1 << 10, 1 << 9, 1 << 8, 1 << 7, 1 << 5
# TDES0; with ERROR_SUMMARY.
JABBER, LOSS_OF_CARRIER, NO_CARRIER = 1 << 14, 1 << 11, 1 << 10
#: What a setup frame leaves.
SETUP_DONE = 0x7FFF_FFFF
# RDES1 and TDES1.
END_OF_RING, CHAINED = 1 << 25, 1 << 24
SIZE_MASK, SIZE2_SHIFT = 0x7FF, 11
# TDES1.
ON_COMPLETION, LAST_SEGMENT, FIRST_SEGMENT = 1 << 31, 1 << 30, 1 << 29
FILTER_TYPE1, SETUP, NO_CRC, NO_PADDING, FILTER_TYPE0 = 1 << 28, 1 << 27, 1 << 26, 1 << 23, 1 << 22

_WORDS = struct.Struct("<IIII")
_WORD = struct.Struct("<I")


class Descriptor:
    """One descriptor as it was read. `buffers` are (address, bytes) of its one or two."""

    __slots__ = ("address", "buffer2", "buffers", "control", "status")

    def __init__(self, memory: GuestMemory, address: int) -> None:
        """Read it; raises GuestMemoryError."""
        self.address = address
        self.status: int
        self.control: int
        self.buffer2: int
        self.status, self.control, buffer1, self.buffer2 = _WORDS.unpack(memory.view(address, SIZE))
        self.buffers = [(buffer1, self.control & SIZE_MASK)]
        if not self.control & CHAINED:
            self.buffers.append((self.buffer2, self.control >> SIZE2_SHIFT & SIZE_MASK))

    def close(self, memory: GuestMemory, status: int) -> None:
        """Give it back to the guest; raises GuestMemoryError."""
        memory.write(self.address, _WORD.pack(status))

    def next(self, base: int, skip: int) -> int:
        """Where the next one is, in a list from `base` with `skip` bytes between neighbours."""
        if self.control & END_OF_RING:
            return base
        if self.control & CHAINED:
            return self.buffer2 & ~3
        return self.address + SIZE + skip & 0xFFFF_FFFC
