"""The layer that loses what was not flushed, and the check on formats: it must pass raw images and catch wrong ones."""

from __future__ import annotations

import errno
import random
import struct
from typing import TYPE_CHECKING

import pytest

from devices.storage.backend import Disk, DiskError
from devices.storage.raw import RawDisk
from tests.fakes.crash import CrashFile, Medium
from tests.fakes.crash_check import check_crashes

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZE = 32 * 512


def made(file: CrashFile) -> RawDisk:
    file.truncate(SIZE)
    file.flush()
    return RawDisk(file)


def outcomes(file: CrashFile, offset: int, length: int, tries: int = 300) -> set[bytes]:
    """What the range may hold after a power cut; what lies beyond the end of the file is left out."""
    found = set()
    for seed in range(tries):
        after = CrashFile(file.medium.crash(random.Random(seed)))
        found.add(after.read_bytes(offset, max(0, min(length, after.size() - offset))))
    return found


def test_what_was_flushed_survives_and_nothing_else_is_sure() -> None:
    file = CrashFile(Medium())
    file.write_bytes(0, b"a" * 1024)
    half, nothing = b"a" * 512, bytes(512)
    assert outcomes(file, 0, 1024) == {
        *(b"", nothing, half),
        *(half + half, half + nothing, nothing + half, nothing + nothing),
    }
    file.flush()
    assert outcomes(file, 0, 1024) == {b"a" * 1024}
    file.write_bytes(0, b"b" * 1024)
    half = b"b" * 512
    assert outcomes(file, 0, 1024) == {b"a" * 1024, half + b"a" * 512, b"a" * 512 + half, b"b" * 1024}


def test_writes_tear_between_atoms_only() -> None:
    file = CrashFile(Medium(4096))
    file.truncate(8192)
    file.flush()
    file.write_bytes(1024, b"x" * 4096)
    first, second = bytes(1024) + b"x" * 3072, b"x" * 1024 + bytes(3072)
    nothing = bytes(4096)
    assert outcomes(file, 0, 8192) == {first + second, first + nothing, nothing + second, nothing * 2}


def test_an_atom_is_written_with_all_that_was_in_the_cache() -> None:
    file = CrashFile(Medium())
    file.truncate(512)
    file.flush()
    file.write_bytes(0, b"1")
    file.write_bytes(1, b"2")
    assert outcomes(file, 0, 2) == {b"\0\0", b"1\0", b"12"}


def test_unflushed_writes_are_reordered() -> None:
    file = CrashFile(Medium())
    file.truncate(1024)
    file.flush()
    file.write_bytes(0, b"1")
    file.write_bytes(512, b"2")
    assert {(one[0], one[512]) for one in outcomes(file, 0, 1024)} == {(a, b) for a in (0, 49) for b in (0, 50)}


def test_holes_and_sizes_are_no_more_durable_than_data() -> None:
    file = CrashFile(Medium())
    file.write_bytes(0, b"a" * 1000)
    file.flush()
    file.trim(100, 600)
    zeroed = b"a" * 100 + bytes(600) + b"a" * 300
    assert file.read_bytes(0, 1000) == zeroed
    assert {b"a" * 1000, zeroed} < outcomes(file, 0, 1000)
    file.flush()
    file.truncate(50)
    file.truncate(2000)
    assert file.read_bytes(0, 2000) == b"a" * 50 + bytes(1950)
    assert {len(one) for one in outcomes(file, 0, 2000)} == {50, 1000, 2000}


def test_a_file_cut_short_holds_zeros_where_it_grows_again() -> None:
    file = CrashFile(Medium())
    file.write_bytes(0, b"a" * 100)
    file.flush()
    file.write_bytes(100, b"b" * 1000)
    for seed in range(100):
        after = CrashFile(file.medium.crash(random.Random(seed)))
        size = after.size()
        after.truncate(2000)
        assert after.read_bytes(size, 2000 - size) == bytes(2000 - size)


def test_extents_are_those_of_a_sparse_file() -> None:
    file = CrashFile(Medium())
    file.truncate(10000)
    file.write_bytes(1000, b"x" * 1000)
    assert list(file.extents(0, 10000)) == [(0, 512, False), (512, 1536, True), (2048, 7952, False)]
    assert list(file.extents(700, 100)) == [(700, 100, True)]
    assert list(file.extents(100, 1000)) == [(100, 412, False), (512, 588, True)]


def test_operations_fail_when_told_to() -> None:
    file = CrashFile(Medium())
    file.fail_after(1, errno.ENOSPC)
    file.write_bytes(0, b"a" * 512)
    with pytest.raises(OSError) as caught:
        file.write_bytes(512, b"b" * 2048)
    assert caught.value.errno == errno.ENOSPC and file.failed
    file.write_bytes(512, b"c" * 2048)
    with pytest.raises(OSError, match="end of image"):
        file.read_bytes(2048, 1024)
    readonly = CrashFile(file.medium, readonly=True)
    with pytest.raises(OSError):
        readonly.trim(0, 512)
    file.close()
    with pytest.raises(OSError):
        file.read_bytes(0, 1)


def test_raw_images_stand_power_cuts() -> None:
    check_crashes(made, RawDisk, sizes=(SIZE // 2, SIZE, SIZE * 2), examples=100, shrinks=True)


class Forgetful(RawDisk):
    """Acknowledges flushes without doing them."""

    def flush(self) -> None:
        pass


class Torn(RawDisk):
    """Writes the two halves of each sector one after the other, and flushes between."""

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        data = b"".join(views)
        for at in range(0, len(data), 256):
            super().write(offset + at, [memoryview(data)[at : at + 256]])
            super().flush()


class Stale(RawDisk):
    """Trims without zeroing, but says that it zeroes."""

    def trim(self, offset: int, length: int) -> None:
        pass


class Remapping(Disk):
    """A sparse format with one sector of table. Where it is `careful`, data is durable before its entry."""

    careful = True

    def __init__(self, file: CrashFile) -> None:
        self._file = file
        self.path, self.size, self.sector_size, self.trim_zeroes = file.path, SIZE, 512, False
        table = file.read_bytes(0, 512)
        if table[:4] != b"toy!":
            raise DiskError(f"{file.path}: no toy")
        self.table = list(struct.unpack_from("<32H", table, 4))
        self.used = max(self.table)

    @classmethod
    def make(cls, file: CrashFile) -> Remapping:
        file.write_bytes(0, b"toy!".ljust(512, b"\0"))
        file.flush()
        return cls(file)

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        data = b"".join(
            self._file.read_bytes(place * 512, 512) if place else bytes(512)
            for place in self.table[offset // 512 :][: sum(map(len, views)) // 512]
        )
        for view in views:
            view[:], data = data[: len(view)], data[len(view) :]

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        data, table = b"".join(views), list(self.table)
        for at in range(0, len(data), 512):
            index = (offset + at) // 512
            if not table[index]:
                self.used += 1
                table[index] = self.used
            self._file.write_bytes(table[index] * 512, data[at : at + 512])
        if table != self.table:
            if self.careful:
                self._file.flush()
            self._file.write_bytes(0, b"toy!" + struct.pack("<32H", *table).ljust(508, b"\0"))
            self.table = table

    def flush(self) -> None:
        self._file.flush()

    def trim(self, offset: int, length: int) -> None:
        pass

    def close(self) -> None:
        if self._file.fd >= 0:
            self._file.flush()
        self._file.close()


class Hasty(Remapping):
    careful = False


class Fragile(Remapping):
    """Marks itself as open with a header that the next open refuses."""

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        self._file.write_bytes(0, b"open")
        super().write(offset, views)
        self._file.write_bytes(0, b"toy!")


def test_a_sparse_format_with_the_right_order_stands_power_cuts() -> None:
    check_crashes(Remapping.make, Remapping)


@pytest.mark.parametrize("wrong", [Forgetful, Torn, Stale])
def test_wrong_raw_formats_are_caught(wrong: type[RawDisk]) -> None:
    def make(file: CrashFile) -> RawDisk:
        made(file)
        return wrong(file)

    with pytest.raises(AssertionError, match="not one of"):
        check_crashes(make, wrong, examples=500)


@pytest.mark.parametrize(
    ("wrong", "says"), [(Hasty, "not one of|end of image"), (Fragile, "refused after a power cut")]
)
def test_wrong_sparse_formats_are_caught(wrong: type[Remapping], says: str) -> None:
    with pytest.raises((AssertionError, OSError), match=says):
        check_crashes(wrong.make, wrong, examples=500)
