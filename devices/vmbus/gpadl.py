"""GPADLs: lists of guest pages that a guest lends to the host under an id of its choice.

Layout of the list: per range u32 byte count, u32 byte offset, then one u64 guest page number per page touched.
Facts: Linux 6.1 drivers/hv/channel.c (create_gpadl_header), openvmm vmbus_server channels.rs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from pyvmm.core.memory import PAGE_SIZE, GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

#: Bounds for one connection. A single GPADL is bounded by its 16-bit length: 8190 pages.
MAX_GPADLS = 4096
MAX_TOTAL_PAGES = 1 << 18

_RANGE = struct.Struct("<II")


class GpadlError(ValueError):
    """A GPADL that the guest may not create or use like this."""


@dataclass(frozen=True)
class GpadlRange:
    """`length` bytes that begin `offset` bytes into the first of `pages` (guest page numbers)."""

    length: int
    offset: int
    pages: tuple[int, ...]


@dataclass
class Gpadl:
    """One GPADL. `ranges` is empty until all of its list has arrived."""

    id: int
    channel_id: int
    length: int
    range_count: int
    data: bytearray = field(default_factory=bytearray)
    ranges: tuple[GpadlRange, ...] = ()
    #: The guest wants it back; it stays as long as an open channel's ring lies in it.
    tearing_down: bool = False

    @property
    def complete(self) -> bool:
        """Whether all of the list has arrived."""
        return bool(self.ranges)

    def ring_pages(self, downstream: int) -> tuple[Sequence[int], Sequence[int]]:
        """Return the page numbers of the guest-to-host and of the host-to-guest ring; raises GpadlError."""
        if len(self.ranges) != 1:
            raise GpadlError(f"a ring of {len(self.ranges)} ranges")
        (pages,) = self.ranges
        if pages.offset or pages.length % PAGE_SIZE:
            raise GpadlError("a ring that is not made of whole pages")
        if not 2 <= downstream <= len(pages.pages) - 2:
            raise GpadlError(f"rings of {downstream} and {len(pages.pages) - downstream} pages")
        if len(set(pages.pages)) != len(pages.pages):
            raise GpadlError("a ring that names one page twice")
        return pages.pages[:downstream], pages.pages[downstream:]


class GpadlTable:
    """All GPADLs of a connection."""

    def __init__(self, memory: GuestMemory) -> None:
        self._gpadls: dict[int, Gpadl] = {}
        self._pages = 0
        self._ram = [(gpa // PAGE_SIZE, (gpa + size) // PAGE_SIZE) for gpa, size in memory.ram_ranges()]
        #: Pages of the rings in use, by channel id.
        self._rings: dict[int, frozenset[int]] = {}

    def get(self, gpadl_id: int) -> Gpadl | None:
        """Return a GPADL, complete or not."""
        return self._gpadls.get(gpadl_id)

    def of_channel(self, channel_id: int) -> list[Gpadl]:
        """Return the GPADLs that were made for a channel."""
        return [gpadl for gpadl in self._gpadls.values() if gpadl.channel_id == channel_id]

    def begin(self, gpadl: Gpadl) -> None:
        """Take up a GPADL whose list is still to come; raises GpadlError. Its id must be new."""
        if gpadl.length % 8 or not gpadl.range_count or gpadl.length < 16 * gpadl.range_count:
            raise GpadlError(f"{gpadl.range_count} ranges in {gpadl.length} bytes")
        if len(self._gpadls) >= MAX_GPADLS or self._pages + gpadl.length // 8 > MAX_TOTAL_PAGES:
            raise GpadlError(f"more than {MAX_GPADLS} GPADLs or {MAX_TOTAL_PAGES} pages")
        self._gpadls[gpadl.id] = gpadl
        self._pages += gpadl.length // 8

    def extend(self, gpadl: Gpadl, data: bytes) -> bool:
        """Add a part of the list; return whether it is complete now. Raises GpadlError, and forgets the GPADL.

        Guests may pad their messages, so that only what is still missing counts.
        """
        missing = gpadl.length - len(gpadl.data)
        gpadl.data += data[: min(len(data) & ~7, missing)]
        if len(gpadl.data) < gpadl.length:
            return False
        try:
            gpadl.ranges = tuple(self._parse(bytes(gpadl.data), gpadl.range_count))
            rings = [ring for ring in self._rings.values() if ring]
            for part in gpadl.ranges:
                if not all(ring.isdisjoint(part.pages) for ring in rings):
                    raise GpadlError("overlaps the ring of an open channel")
        except GpadlError:
            gpadl.ranges = ()
            self.remove(gpadl)
            raise
        gpadl.data = bytearray()
        return True

    def _parse(self, data: bytes, count: int) -> list[GpadlRange]:
        ranges = []
        offset = 0
        for number in range(count):
            if offset + _RANGE.size > len(data):
                raise GpadlError(f"the list ends before range {number}")
            length, start = _RANGE.unpack_from(data, offset)
            offset += _RANGE.size
            pages = (start + length + PAGE_SIZE - 1) // PAGE_SIZE
            if not length or start >= PAGE_SIZE or offset + 8 * pages > len(data):
                raise GpadlError(f"a range of {length} bytes at page offset {start} does not fit the list")
            numbers = struct.unpack_from(f"<{pages}Q", data, offset)
            offset += 8 * pages
            for page in numbers:
                if not any(first <= page < end for first, end in self._ram):
                    raise GpadlError(f"page {page:#x} is not in guest RAM")
            ranges.append(GpadlRange(length, start, numbers))
        return ranges

    def use_as_ring(self, gpadl: Gpadl, downstream: int) -> tuple[Sequence[int], Sequence[int]]:
        """Make a GPADL the rings of its channel: return the pages of both. Raises GpadlError.

        No other GPADL may hold a page of a ring in use: the host would let the guest aim its own transfers there.
        """
        incoming, outgoing = gpadl.ring_pages(downstream)
        ring = frozenset((*incoming, *outgoing))
        for other in self._gpadls.values():
            if other is not gpadl and not all(ring.isdisjoint(part.pages) for part in other.ranges):
                raise GpadlError(f"the ring overlaps GPADL {other.id:#x}")
        self._rings[gpadl.channel_id] = ring
        return incoming, outgoing

    def is_ring(self, gpadl: Gpadl) -> bool:
        """Whether the rings of an open channel lie in a GPADL; any thread."""
        ring = self._rings.get(gpadl.channel_id, frozenset())
        return any(not ring.isdisjoint(part.pages) for part in gpadl.ranges)

    def release_ring(self, channel_id: int) -> None:
        """The channel's rings are no longer in use."""
        self._rings.pop(channel_id, None)

    def remove(self, gpadl: Gpadl) -> None:
        """Forget a GPADL."""
        del self._gpadls[gpadl.id]
        self._pages -= gpadl.length // 8

    def clear(self) -> None:
        """Forget everything."""
        self._gpadls.clear()
        self._rings.clear()
        self._pages = 0

    def save(self) -> list[dict[str, Any]]:
        """Return plain data."""
        return [
            {
                "id": gpadl.id,
                "channel_id": gpadl.channel_id,
                "length": gpadl.length,
                "range_count": gpadl.range_count,
                "data": bytes(gpadl.data),
                "ranges": [[part.length, part.offset, list(part.pages)] for part in gpadl.ranges],
                "tearing_down": gpadl.tearing_down,
            }
            for gpadl in self._gpadls.values()
        ]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Take over what `save` returned; raises GpadlError where pages lie outside this VM's RAM."""
        self.clear()
        for entry in state:
            gpadl = Gpadl(entry["id"], entry["channel_id"], entry["length"], entry["range_count"])
            self.begin(gpadl)
            if entry["ranges"]:
                packed = b"".join(
                    _RANGE.pack(length, offset) + struct.pack(f"<{len(pages)}Q", *pages)
                    for length, offset, pages in entry["ranges"]
                )
                gpadl.ranges = tuple(self._parse(packed, len(entry["ranges"])))
            else:
                gpadl.data = bytearray(entry["data"])
            gpadl.tearing_down = entry["tearing_down"]

    def inspect(self) -> dict[str, int]:
        """Return counts."""
        return {"count": len(self._gpadls), "pages": self._pages}
