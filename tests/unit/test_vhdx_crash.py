"""VHDX images survive power cuts and kills at any step."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from devices.storage.vhdx.create import create
from devices.storage.vhdx.disk import VhdxDisk
from tests.fakes.crash import CrashFile, Medium
from tests.fakes.crash_check import check_crashes

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 1 << 20
#: The borders of blocks of 1 MiB, of a page of the bitmap (16 MiB), and the end of the disk.
SIZE = 18 * MIB - 1024
WINDOWS = [(0, 8192), (MIB - 4096, 8192), (16 * MIB - 2048, 4096), (SIZE - 4096, 4096)]
SIZES = [SIZE, 16 * MIB + 1024, 20 * MIB]


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_a_disk_holds_what_was_flushed(kind: str) -> None:
    def make(file: CrashFile) -> VhdxDisk:
        return create(file, SIZE, kind=kind, block_size=MIB)

    check_crashes(make, VhdxDisk, WINDOWS, SIZES, shrinks=True)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_differencing_disk_holds_what_was_flushed(depth: int) -> None:
    parents = [CrashFile(Medium(), f"parent{level}.vhdx") for level in range(depth)]
    for level, file in enumerate(parents):
        size = SIZE - level * 2048  # a child may be larger than its parent
        above = open_chain(parents[:level]) if level else None
        disk = create(file, size, kind="differencing" if above else "dynamic", block_size=MIB, parent=above)
        for offset, length in WINDOWS:
            if offset + length <= size and (offset // MIB + level) % 2 == 0:
                disk.write(offset + 1024 * level, [memoryview(b"%d" % level * 2048)])
        disk.close()

    def make(file: CrashFile) -> VhdxDisk:
        return create(file, SIZE, kind="differencing", block_size=MIB, parent=open_chain(parents))

    def reopen(file: CrashFile) -> VhdxDisk:
        disk = VhdxDisk(file)
        disk.parent = open_chain(parents)
        assert disk.link is not None
        assert disk.link.mismatch(disk.parent) == ""
        return disk

    check_crashes(make, reopen, WINDOWS, SIZES, shrinks=True)


def open_chain(files: list[CrashFile]) -> VhdxDisk:
    """The disk in the last file over those in the others; all readonly, and open afresh each time."""
    disk = None
    for file in files:
        above = VhdxDisk(CrashFile(file.medium, file.path, readonly=True))
        above.parent = disk
        disk = above
    assert disk is not None
    return disk


def test_storage_is_not_used_again_before_the_table_on_the_medium_forgets_it() -> None:
    file = CrashFile(Medium())
    disk = create(file, SIZE, block_size=MIB)
    disk.write(0, [memoryview(b"old!" * 1024)])
    disk.flush()
    disk.trim(0, MIB)
    disk.write(MIB, [memoryview(b"new!" * 1024)])
    for seed in range(200):
        after = VhdxDisk(CrashFile(file.medium.crash(Random(seed))))
        data = bytearray(4096)
        after.read(0, [memoryview(data)])
        assert data.replace(b"old!", b"").strip(b"\0") == b""
        after.close()
    disk.flush()
    before = file.medium.size
    disk.write(2 * MIB, [memoryview(b"more" * 1024)])
    assert file.medium.size == before  # and it is used again then
    disk.close()


def test_storage_is_zeroed_before_it_is_used_again_after_a_crash() -> None:
    """The machine died when a block had storage and data, but not yet in the table; another block gets that storage."""
    for seed in range(40):
        rng = Random(seed)
        file = CrashFile(Medium())
        disk = create(file, SIZE, block_size=MIB)
        disk.flush()
        disk.write(0, [memoryview(b"lost" * 1024)])
        file = CrashFile(file.medium.crash(rng))
        disk = VhdxDisk(file)
        disk.write(MIB, [memoryview(b"new!" * 128)])
        disk.flush()
        disk = VhdxDisk(CrashFile(file.medium.crash(rng)))
        data = bytearray(4096)
        disk.read(MIB, [memoryview(data)])
        assert data == b"new!" * 128 + bytes(4096 - 512)
        disk.close()


def test_changes_that_need_many_entries_of_the_log_are_consistent_in_between() -> None:
    """A sector in each of 250 pages of the bitmaps, so that the second entry of the log ends within the BAT."""
    size, places = 10_000 * MIB, range(0, 10_000 * MIB, 40 * MIB)
    base = CrashFile(Medium(), "base.vhdx")
    create(base, size, block_size=32 * MIB).close()
    rng = Random(1)
    left: list[Medium] = []

    class File(CrashFile):
        def write(self, offset: int, views: Sequence[memoryview]) -> None:
            super().write(offset, views)
            # With an entry of the log just written, and now and then else.
            left.extend(self.medium.crash(rng) for _ in range(8 if MIB <= offset < 2 * MIB else rng.random() < 0.02))

    file = File(Medium())
    disk = create(file, size, kind="differencing", block_size=2 * MIB, parent=open_chain([base]))
    disk.flush()
    for generation in (b"1", b"2"):
        for place in places:
            disk.write(place, [memoryview(generation * 512)])
        disk.trim(0, 40 * MIB)
        disk.flush()
    assert len(left) > 40
    for medium in left:
        after = VhdxDisk(CrashFile(medium))
        after.parent = open_chain([base])
        data = bytearray(512)
        for place in places:
            after.read(place, [memoryview(data)])
            assert bytes(data) in (bytes(512), b"1" * 512, b"2" * 512)
        assert after.check_table(1) == []
        after.close()
    disk.close()


def test_no_data_changes_before_the_version_of_the_disk_does() -> None:
    """Or else children would not see that their parent is another one."""
    changed = 0
    for seed in range(100):
        rng = Random(seed)
        file = CrashFile(Medium())
        disk = create(file, SIZE, kind="fixed", block_size=MIB)
        version = disk.data_write
        left: list[Medium] = []
        file.on_change = lambda file=file, rng=rng, left=left: left.append(file.medium.crash(rng))  # type: ignore[misc]
        disk.write(0, [memoryview(b"new!" * 128)])
        for medium in left:
            after = VhdxDisk(CrashFile(medium, readonly=True))
            data = bytearray(512)
            after.read(0, [memoryview(data)])
            if data != bytes(512):
                changed += 1
                assert after.data_write != version
            after.close()
    assert changed
