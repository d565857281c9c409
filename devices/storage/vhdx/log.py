"""Reading the log of a VHDX file, through which changes of BAT, sector bitmaps and metadata go. MS-VHDX 2.3.

An entry holds new contents of 4 KiB sectors of the file. Once it is on stable storage, they are written in
place as well; an image whose session did not end well has them replayed when it is opened.
"""

from __future__ import annotations

from devices.storage.vhdx.format import (
    LOG_DESCRIPTOR,
    LOG_ENTRY,
    LOG_SECTOR,
    MAX_FILE,
    NO_GUID,
    REGION_TABLE_OFFSETS,
    Damage,
    is_sealed,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from devices.storage.file import HostFile
    from devices.storage.vhdx.header import Header

#: Longest log that is replayed: it bounds what one entry can need in memory.
_MAX_REPLAY = 64 << 20
_PIECE = 1 << 20


class Entry:
    """An entry whose checksum and structure are good; `offset` and `tail` count from the log's start."""

    __slots__ = ("descriptors", "flushed", "last", "length", "offset", "run", "sequence", "tail")

    def __init__(self, offset: int, fields: tuple[bytes, int, int, int, int, int, bytes, int, int]) -> None:
        self.offset = offset
        _, _, self.length, self.tail, self.sequence, self.descriptors, _, self.flushed, self.last = fields
        self.run = self


def is_dirty(header: Header) -> bool:
    """Whether the log may hold something to replay."""
    return header.log_guid != NO_GUID


def active_sequence(file: HostFile, header: Header) -> list[Entry]:
    """The entries that are to be replayed, in order; none if nothing was logged yet. Raises Damage.

    MS-VHDX 2.3.2: the run of entries with the highest sequence number at its end that begins with the
    entry that this last one names as its tail.
    """
    if header.log_length > _MAX_REPLAY:
        raise Damage(
            f"the log of {header.log_length >> 20} MiB is longer than the {_MAX_REPLAY >> 20} that pyvmm replays"
        )
    starts, ours = _find_starts(file, header)
    entries: dict[int, Entry] = {}
    for index, start in enumerate(starts):
        # No sector within an entry begins as an entry does, so each reaches up to the next one at most.
        room = (starts[(index + 1) % len(starts)] - start) % header.log_length or header.log_length
        if start in ours and (entry := _read_entry(file, header, start, room)) is not None:
            entries[start] = entry
    for entry in sorted(entries.values(), key=lambda entry: entry.sequence):
        following = entries.get((entry.offset + entry.length) % header.log_length)
        if following is not None and following.sequence == entry.sequence + 1:
            following.run = entry.run
    for head in sorted(entries.values(), key=lambda entry: entry.sequence, reverse=True):
        tail = entries.get(head.tail)
        if tail is not None and tail.run is head.run and tail.sequence <= head.sequence:
            found = [tail]
            while found[-1] is not head:
                found.append(entries[(found[-1].offset + found[-1].length) % header.log_length])
            return found
    if ours:
        raise Damage(f"the log at {header.log_offset:#x} has entries, but no complete sequence of them")
    return []


def _find_starts(file: HostFile, header: Header) -> tuple[list[int], set[int]]:
    """Where in the log sectors begin as an entry does, and which of these name this log's GUID."""
    starts, ours = [], set()
    for offset, length, stored in file.extents(header.log_offset, header.log_length):
        for at in range(offset, offset + length if stored else offset, _PIECE):
            data = file.read_bytes(at, min(_PIECE, offset + length - at))
            skip = -at % LOG_SECTOR  # extents may begin anywhere
            for place in range(skip, len(data) - 63, LOG_SECTOR):
                if data[place : place + 4] == b"loge":
                    starts.append(at + place - header.log_offset)
                    if data[place + 32 : place + 48] == header.log_guid:
                        ours.add(starts[-1])
    return starts, ours


def _read_log(file: HostFile, header: Header, offset: int, length: int) -> bytes:
    first = min(length, header.log_length - offset)
    data = file.read_bytes(header.log_offset + offset, first)
    return data + file.read_bytes(header.log_offset, length - first)


def _read_entry(file: HostFile, header: Header, offset: int, room: int) -> Entry | None:
    """The entry at `offset` of the log, unless something is wrong with it."""
    fields = LOG_ENTRY.unpack(_read_log(file, header, offset, LOG_ENTRY.size))
    entry = Entry(offset, fields)
    if not 0 < entry.length <= room or entry.length % LOG_SECTOR or entry.tail % LOG_SECTOR or not entry.sequence:
        return None
    table_length = _table_length(entry.descriptors)
    if table_length > entry.length:
        return None
    data = _read_log(file, header, offset, entry.length)
    if not is_sealed(data):
        return None
    content = table_length
    for at in range(LOG_ENTRY.size, LOG_ENTRY.size + entry.descriptors * LOG_DESCRIPTOR.size, LOG_DESCRIPTOR.size):
        kind, _, zeros, _, sequence = LOG_DESCRIPTOR.unpack_from(data, at)
        if sequence != entry.sequence or (kind == b"zero" and zeros % LOG_SECTOR) or kind not in (b"zero", b"desc"):
            return None
        if kind == b"desc":
            sector = data[content : content + LOG_SECTOR]
            content += LOG_SECTOR
            number = entry.sequence.to_bytes(8, "little")
            if sector[:8] != b"data" + number[4:] or sector[-4:] != number[:4]:
                return None
    return entry


def _table_length(descriptors: int) -> int:
    """Bytes of an entry before its data sectors."""
    return -(-(LOG_ENTRY.size + descriptors * LOG_DESCRIPTOR.size) // LOG_SECTOR) * LOG_SECTOR


class Change:
    """What an entry does to the file: `data`, a sector's content, or zeros for None."""

    __slots__ = ("data", "length", "offset")

    def __init__(self, offset: int, length: int, data: bytes | None) -> None:
        self.offset = offset
        self.length = length
        self.data = data


def changes(file: HostFile, header: Header, entries: list[Entry]) -> Iterator[Change]:
    """What the entries do to the file, in order. Raises Damage, before the first change, if it cannot be done."""
    if not entries:
        return
    head, size = entries[-1], file.size()
    if size < head.flushed:
        raise Damage(f"the file has {size} bytes, but had {head.flushed} when the log was written; it was cut short")
    if head.last > MAX_FILE:
        raise Damage(f"the log at {header.log_offset:#x} wants a file of {head.last} bytes")
    limit = max(size, head.last)
    for check in (True, False):
        for entry in entries:
            data = _read_log(file, header, entry.offset, entry.length)
            for change in _parse_changes(data, entry.descriptors):
                if not check:
                    yield change
                elif not _may_change(header, change, limit):
                    where = f"{change.length} bytes at {change.offset:#x}"
                    raise Damage(f"the log at {header.log_offset:#x} would change {where}, which is not for it")


def _may_change(header: Header, change: Change, limit: int) -> bool:
    end = change.offset + change.length
    in_log = change.offset < header.log_offset + header.log_length and header.log_offset < end
    return not (change.offset % LOG_SECTOR or change.offset < REGION_TABLE_OFFSETS[0] or end > limit or in_log)


def _parse_changes(data: bytes, descriptors: int) -> Iterator[Change]:
    content = _table_length(descriptors)
    for at in range(LOG_ENTRY.size, LOG_ENTRY.size + descriptors * LOG_DESCRIPTOR.size, LOG_DESCRIPTOR.size):
        kind, trailing, leading, offset, _ = LOG_DESCRIPTOR.unpack_from(data, at)
        if kind == b"zero":
            yield Change(offset, leading, None)
        else:
            middle = data[content + 8 : content + LOG_SECTOR - 4]
            yield Change(offset, LOG_SECTOR, leading.to_bytes(8, "little") + middle + trailing)
            content += LOG_SECTOR


def replay(file: HostFile, header: Header) -> int:
    """Bring what the log holds to its places in the file, durably; return the number of entries. Raises Damage."""
    entries = active_sequence(file, header)
    for change in changes(file, header, entries):
        if change.data is None:
            file.write_zeros(change.offset, change.length)
        else:
            file.write_bytes(change.offset, change.data)
    if entries and file.size() < entries[-1].last:
        file.truncate(entries[-1].last)
    file.flush()
    return len(entries)
