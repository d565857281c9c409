"""The guest's side of a ring, written from the rules and not from pyvmm's ring.c, so that each checks the other."""

from __future__ import annotations

import struct

from pyvmm.core.memory import PAGE_SIZE, GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.core._hot import Packet

IN, OUT, MASK, PENDING_SEND_SIZE, FEATURES = 0, 4, 8, 12, 64
_DESCRIPTOR = struct.Struct("<HHHHQ")


def pack(packet: Packet) -> bytes:
    """Return a packet's bytes in a ring, without the footer."""
    kind, flags, transaction_id, extra, payload = packet
    body = extra + payload
    body += bytes(-len(body) % 8)
    return _DESCRIPTOR.pack(kind, (16 + len(extra)) // 8, (16 + len(body)) // 8, flags, transaction_id) + body


class GuestRing:
    """A ring on `pages`; use it as writer or as reader. Indices can be set to anything, as hostile guests do."""

    def __init__(self, memory: GuestMemory, pages: Sequence[int]) -> None:
        self.numbers = tuple(pages)
        self._pages = [memory.view(page * PAGE_SIZE, PAGE_SIZE, write=True) for page in pages]
        self.size = (len(pages) - 1) * PAGE_SIZE

    def word(self, offset: int) -> int:
        """A word of the control page."""
        return int.from_bytes(self._pages[0][offset : offset + 4], "little")

    def set_word(self, offset: int, value: int) -> None:
        """Write a word of the control page."""
        self._pages[0][offset : offset + 4] = value.to_bytes(4, "little")

    def init(self) -> None:
        """Empty the ring, as a guest does before it opens the channel."""
        for page in self._pages:
            page[:] = bytes(PAGE_SIZE)
        self.set_word(FEATURES, 1)

    @property
    def used(self) -> int:
        """Bytes in the ring."""
        return (self.word(IN) - self.word(OUT)) % self.size

    @property
    def free(self) -> int:
        """Bytes that can still be written."""
        return self.size - self.used - 8

    def poke(self, offset: int, data: bytes) -> None:
        """Write into the data area, around its end if need be."""
        for index, byte in enumerate(data, offset):
            page, at = divmod(index % self.size, PAGE_SIZE)
            self._pages[1 + page][at] = byte

    def peek(self, offset: int, length: int) -> bytes:
        """Read from the data area, around its end if need be."""
        return bytes(
            self._pages[1 + index % self.size // PAGE_SIZE][index % PAGE_SIZE]
            for index in range(offset, offset + length)
        )

    def write(self, packet: Packet) -> tuple[bool, bool]:
        """Append a packet; return (whether it fit, whether the host must be signalled)."""
        data = pack(packet)
        if len(data) + 8 > self.free:
            return False, False
        start = self.word(IN)
        self.poke(start, data + struct.pack("<II", 0, start))
        self.set_word(IN, (start + len(data) + 8) % self.size)
        return True, not self.word(MASK) and self.word(OUT) == start

    def read(self, limit: int = 1 << 30) -> tuple[list[Packet], bool]:
        """Take packets; return them and whether the host waits for the room made. Checks every footer."""
        packets: list[Packet] = []
        used, taken = self.used, 0
        while taken < used and len(packets) < limit:
            start = (self.word(OUT) + taken) % self.size
            kind, offset8, length8, flags, transaction_id = _DESCRIPTOR.unpack(self.peek(start, 16))
            assert 2 <= offset8 <= length8
            assert length8 * 8 + 8 <= used - taken
            data = self.peek(start, length8 * 8)
            assert self.peek(start + length8 * 8, 8) == struct.pack("<II", 0, start)
            packets.append((kind, flags, transaction_id, data[16 : offset8 * 8], data[offset8 * 8 :]))
            taken += length8 * 8 + 8
        self.set_word(OUT, (self.word(OUT) + taken) % self.size)
        # Only what is free after all that counts: the host may have filled the ring again since we began.
        pending = self.word(PENDING_SEND_SIZE) & ~7
        free = self.free
        return packets, bool(pending) and free - taken < pending <= free
