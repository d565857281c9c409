"""VHDX images survive power cuts and kills at any step."""

from __future__ import annotations

import pytest

from devices.storage.vhdx.create import create
from devices.storage.vhdx.disk import VhdxDisk
from tests.fakes.crash import CrashFile, Medium
from tests.fakes.crash_check import check_crashes

MIB = 1 << 20
#: The borders of blocks of 1 MiB, of a page of the bitmap (16 MiB), and the end of the disk.
SIZE = 18 * MIB - 1024
WINDOWS = [(0, 8192), (MIB - 4096, 8192), (16 * MIB - 2048, 4096), (SIZE - 4096, 4096)]
SIZES = [SIZE, 16 * MIB + 1024, 20 * MIB]


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_a_disk_holds_what_was_flushed(kind: str) -> None:
    def make(file: CrashFile) -> VhdxDisk:
        return create(file, SIZE, kind=kind, block_size=MIB)

    check_crashes(make, VhdxDisk, WINDOWS, SIZES)


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

    check_crashes(make, reopen, WINDOWS, SIZES)


def open_chain(files: list[CrashFile]) -> VhdxDisk:
    """The disk in the last file over those in the others; all readonly, and open afresh each time."""
    disk = None
    for file in files:
        above = VhdxDisk(CrashFile(file.medium, file.path, readonly=True))
        above.parent = disk
        disk = above
    assert disk is not None
    return disk
