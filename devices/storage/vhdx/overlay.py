"""A VHDX file as it will be once its log is replayed, for readers that must not write."""

from __future__ import annotations

from devices.storage.file import HostFile
from devices.storage.vhdx.format import LOG_SECTOR, Damage
from devices.storage.vhdx.log import active_sequence, changes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devices.storage.vhdx.header import Header

#: Ranges of zeros that are kept in mind; each costs every read a look.
_MAX_ZEROS = 1024


class ReplayedFile(HostFile):
    """`file`, which it takes over, with the changes of its log on top. Raises Damage."""

    def __init__(self, file: HostFile, header: Header) -> None:
        entries = active_sequence(file, header)
        self.path = file.path
        self.readonly = True
        self.is_block = file.is_block
        #: The C fast path would read past the changes.
        self.fd = -1
        self._file = file
        self._sectors: dict[int, bytes] = {}
        self._zeros: list[tuple[int, int]] = []
        for change in changes(file, header, entries):
            if change.data is not None:
                self._sectors[change.offset] = change.data
                continue
            end = change.offset + change.length
            self._zeros.append((change.offset, end))
            if len(self._zeros) > _MAX_ZEROS:
                raise Damage("the log zeroes too much to be left where it is; open the image for writing once")
            for offset in [offset for offset in self._sectors if change.offset <= offset < end]:
                self._sectors[offset] = bytes(LOG_SECTOR)
        self._below = file.size()
        self._size = max([self._below, *(entry.last for entry in entries[-1:])])

    def size(self) -> int:
        return self._size

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        for view in views:
            self._read(offset, view)
            offset += len(view)

    def _read(self, offset: int, view: memoryview) -> None:
        end = offset + len(view)
        inside = max(0, min(end, self._below) - offset) if end <= self._size else len(view)
        if inside:
            self._file.read(offset, [view[:inside]])
        view[inside:] = bytes(len(view) - inside)
        for start, stop in self._zeros:
            first, last = max(start, offset), min(stop, end)
            if first < last:
                view[first - offset : last - offset] = bytes(last - first)
        for start in self._changed(offset, end):
            first, last = max(start, offset), min(start + LOG_SECTOR, end)
            view[first - offset : last - offset] = self._sectors[start][first - start : last - start]

    def _changed(self, offset: int, end: int) -> list[int]:
        offset -= offset % LOG_SECTOR
        if (end - offset) // LOG_SECTOR < len(self._sectors):
            return [start for start in range(offset, end, LOG_SECTOR) if start in self._sectors]
        return [start for start in self._sectors if offset <= start < end]

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        # What the log changes is taken for stored, which is right if not the shortest answer.
        for start, size, stored in self._file.extents(offset, length):
            if stored or not self._changed(start, start + size):
                yield start, size, stored
                continue
            for at in range(start, start + size, 1 << 20):
                end = min(at + (1 << 20), start + size)
                yield at, end - at, bool(self._changed(at, end))

    def key(self) -> tuple[int, int]:
        return self._file.key()

    def close(self) -> None:
        self._file.close()
