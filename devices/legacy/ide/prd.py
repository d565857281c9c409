"""Physical region descriptors: where in guest memory a bus-master transfer goes.

Source: Programming Interface for Bus Master IDE Controller, revision 1.0 (SFF-8038i), section 2.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.core.memory import GuestMemory

_DESCRIPTOR = struct.Struct("<II")
#: A table may not cross a boundary of 64 KiB, and so has at most this many descriptors.
_TABLE_BYTES = 64 << 10
_REGION_BYTES = 64 << 10
_LAST = 1 << 31


def regions(memory: GuestMemory, table: int, length: int, to_guest: bool) -> tuple[list[memoryview], bool]:
    """Views of the first `length` bytes of the regions in the table at GPA `table`, and whether there is more.

    The views hold less than `length` if the table is too short. Raises GuestMemoryError for a table or a region that is
    not in RAM.
    """
    views: list[memoryview] = []
    end = (table | _TABLE_BYTES - 1) + 1
    while table < end:
        address, control = _DESCRIPTOR.unpack(memory.view(table, _DESCRIPTOR.size))
        table += _DESCRIPTOR.size
        size = (control & 0xFFFE) or _REGION_BYTES
        last = bool(control & _LAST)
        if size > length:
            views.append(memory.view(address & ~1, length, write=to_guest))
            return views, True
        views.append(memory.view(address & ~1, size, write=to_guest))
        length -= size
        if last or not length:
            return views, not last
    return views, False


def part(views: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """`length` bytes of `views` from `start` on."""
    taken: list[memoryview] = []
    for view in views:
        if start >= len(view):
            start -= len(view)
            continue
        taken.append(view[start : start + length])
        length -= len(taken[-1])
        start = 0
        if not length:
            break
    return taken
