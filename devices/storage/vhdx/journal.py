"""Changing the structures of a VHDX file so that a crash at any instant leaves all or nothing of a change."""

from __future__ import annotations

import errno

from devices.storage.vhdx.format import LOG_DESCRIPTOR, LOG_ENTRY, LOG_SECTOR, NO_GUID, new_guid, seal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.storage.file import HostFile
    from devices.storage.vhdx.header import Header, Headers


class Journal:
    """The session of one writer of `file`: its headers and its log. Calls are serialised by the caller; OSError."""

    def __init__(self, file: HostFile, headers: Headers) -> None:
        self._file = file
        self._headers = headers
        self._log: LogWriter | None = None
        self._stopped = False

    @property
    def started(self) -> bool:
        return self._log is not None

    def start(self, data_write: bytes) -> None:
        """Before the first change of a session: name new versions, `data_write` that of the disk, and begin a log."""
        log = LogWriter(self._file, self._headers.current, new_guid())
        # A log that the header names must have an entry (MS-VHDX 2.3.2), so that comes first.
        log.append([], self._file.size())
        self._headers.update(new_guid(), data_write, log.guid)
        self._log = log

    def commit(self, sectors: list[tuple[int, bytes]], size: int, at_once: bool = False) -> None:
        """Make data written before durable, then sectors (offset in the file, content), in this order.

        `size` is what the file's size was before. What fits an entry of the log comes into effect at once. Where that
        is needed (`at_once`), a failure leaves open what is in effect, so nothing more is committed then.
        """
        if self._stopped:
            raise OSError(errno.EIO, "an earlier change of the image failed; close it and open it again")
        assert self._log is not None
        self._stopped = at_once
        assert not at_once or len(sectors) <= LogWriter.MAX_SECTORS
        self._file.flush()
        for first in range(0, len(sectors), LogWriter.MAX_SECTORS):
            if first:
                self._file.flush()  # what the entry before has must be in place
            batch = sectors[first : first + LogWriter.MAX_SECTORS]
            self._log.append(batch, size)
            for offset, content in batch:
                self._file.write_bytes(offset, content)
        self._stopped = False

    def commit_bytes(self, changes: list[tuple[int, bytes]]) -> None:
        """Bring pieces of data to their offsets in the file, all at once."""
        sectors: dict[int, bytearray] = {}
        for offset, data in changes:
            for number in range(offset // LOG_SECTOR, (offset + len(data) - 1) // LOG_SECTOR + 1):
                start = number * LOG_SECTOR
                if start not in sectors:
                    sectors[start] = bytearray(self._file.read_bytes(start, LOG_SECTOR))
                first, last = max(start, offset), min(start + LOG_SECTOR, offset + len(data))
                sectors[start][first - start : last - start] = data[first - offset : last - offset]
        self.commit([(start, bytes(data)) for start, data in sectors.items()], self._file.size(), at_once=True)

    def restart(self, size: int) -> None:
        """Begin a new log, so that no old entry can touch what will have moved, nor ask for more than `size` bytes."""
        assert self._log is not None
        self._stopped = True  # should this fail, it is open which log counts
        self._file.flush()
        log = LogWriter(self._file, self._headers.current, new_guid(), self._log.offset)
        log.append([], size)
        self._headers.update(log_guid=log.guid)
        self._log = log
        self._stopped = False

    def end(self) -> None:
        """After the last commit: leave no log behind."""
        self._file.flush()
        self._headers.update(log_guid=NO_GUID)
        self._log = None


class LogWriter:
    """Appends entries to the log of a file, each of which stands for itself.

    What an entry holds must be in place, on stable storage, before the next one is appended; so an entry's tail is
    always itself, and the last complete one is all that there is to replay.
    """

    #: Sectors in an entry: two of the longest fit the shortest log, so that none overwrites the one before it.
    MAX_SECTORS = 126

    def __init__(self, file: HostFile, header: Header, guid: bytes, offset: int = 0) -> None:
        self._file = file
        self._start = header.log_offset
        self._length = header.log_length
        self.guid = guid
        #: Where the next entry goes, from the log's start.
        self.offset = offset
        self._sequence = 0

    def append(self, sectors: list[tuple[int, bytes]], size: int) -> None:
        """Put an entry on stable storage: offset in the file and content of up to MAX_SECTORS sectors.

        `size` is the file's size on stable storage.
        """
        self._sequence += 1
        number = self._sequence.to_bytes(8, "little")
        length = LOG_SECTOR * (1 + len(sectors))
        data = bytearray(LOG_SECTOR)
        fields = (length, self.offset, self._sequence, len(sectors), self.guid, size, size)
        LOG_ENTRY.pack_into(data, 0, b"loge", 0, *fields)
        for index, (offset, content) in enumerate(sectors):
            at = LOG_ENTRY.size + index * LOG_DESCRIPTOR.size
            leading = int.from_bytes(content[:8], "little")
            LOG_DESCRIPTOR.pack_into(data, at, b"desc", content[-4:], leading, offset, self._sequence)
            data += b"data" + number[4:] + content[8:-4] + number[:4]
        entry = memoryview(seal(data))
        first = min(length, self._length - self.offset)
        self._file.write(self._start + self.offset, [entry[:first]])
        if first < length:
            self._file.write(self._start, [entry[first:]])
        self._file.flush()
        # Only now: should this have failed, the next entry takes the same place and spares the one before.
        self.offset = (self.offset + length) % self._length
