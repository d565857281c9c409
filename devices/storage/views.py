"""Lists of buffers, as disks and files read and write them: cutting them up and filling them."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

ZEROS = bytes(1 << 20)


class Pieces:
    """Takes a list of buffers apart from the front, without copying."""

    __slots__ = ("_at", "_index", "_views")

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = views
        self._index = 0
        self._at = 0

    def take(self, length: int) -> list[memoryview]:
        """The buffers of the next `length` bytes, which must be there."""
        taken = []
        while length:
            view = self._views[self._index]
            left = len(view) - self._at
            if left > length:
                taken.append(view[self._at : self._at + length])
                self._at += length
                break
            if left:
                taken.append(view[self._at :] if self._at else view)
            length -= left
            self._index += 1
            self._at = 0
        return taken


def total(views: Sequence[memoryview]) -> int:
    """Bytes in all of `views`."""
    return sum(map(len, views))


def fill_zeros(views: Sequence[memoryview]) -> None:
    """Fill all of `views` with zeros."""
    for view in views:
        for at in range(0, len(view), len(ZEROS)):
            piece = view[at : at + len(ZEROS)]
            piece[:] = ZEROS[: len(piece)]
