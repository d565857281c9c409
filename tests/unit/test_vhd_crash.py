"""VHD images of every kind, with chains of several depths, under power cuts at every step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devices.storage.chain import Layer
from devices.storage.file import HostFile
from devices.storage.images import open_file
from devices.storage.vhd.create import create
from tests.fakes.crash_check import check_crashes
from tests.fakes.vhd_images import SECTOR, dynamic

if TYPE_CHECKING:
    from devices.storage.backend import Disk
    from tests.fakes.crash import CrashFile

SIZE = 64 << 10
BLOCK = 8192
SIZES = (SIZE, SIZE + 512, SIZE + 3 * BLOCK, SIZE * 40)
WINDOWS = ((0, SIZE + 4 * BLOCK), (SIZE * 40 - BLOCK, BLOCK))


def reopen(file: CrashFile) -> Disk:
    return open_file(file, "vhd")


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_disk_of_its_own_stands_power_cuts(kind: str) -> None:
    check_crashes(lambda file: create(file, SIZE, kind=kind, block_size=BLOCK), reopen, WINDOWS, SIZES, examples=40)


def child(file: HostFile, parent: str) -> Disk:
    above = open_file(HostFile(parent, readonly=True), "vhd")
    assert isinstance(above, Layer)
    return create(file, SIZE, kind="differencing", block_size=BLOCK, parent=above)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("base", ["fixed", "dynamic", "larger", "smaller"])
def test_chain_stands_power_cuts(tmp_path: Path, depth: int, base: str) -> None:
    path = str(tmp_path / "0.vhd")
    size = {"larger": SIZE * 2, "smaller": SIZE // 2}.get(base, SIZE)
    kind = "fixed" if base == "fixed" else "dynamic"
    disk: Disk = create(HostFile.create(path), size, kind=kind, block_size=BLOCK)
    disk.write(0, [memoryview(b"base" * (size // 4))])
    disk.close()
    for level in range(1, depth):
        above, path = path, str(tmp_path / f"{level}.vhd")
        disk = child(HostFile.create(path), above)
        disk.write(level * 1024, [memoryview(bytes([level]) * BLOCK)])
        disk.close()
    check_crashes(lambda file: child(file, path), reopen, WINDOWS, SIZES, examples=10)


def test_image_that_another_wrote_stands_power_cuts() -> None:
    """Blocks that are not aligned, in any order, with some sectors only, and garbage in place of the others."""
    stored = {sector: bytes([sector]) * SECTOR for sector in (*range(3, 9), 20, 31, 32, *range(96, 112), 127)}

    def make(file: CrashFile) -> Disk:
        file.write_bytes(0, dynamic(SIZE, BLOCK, stored))
        file.flush()
        return reopen(file)

    check_crashes(make, reopen, WINDOWS, SIZES, examples=40)


def test_image_whose_resize_was_interrupted_stands_power_cuts() -> None:
    """Its only footer stands where the new end would have been."""

    def make(file: CrashFile) -> Disk:
        disk = create(file, SIZE, kind="fixed", block_size=BLOCK)
        footer = file.read_bytes(SIZE, SECTOR)
        file.write_bytes(SIZE + 2 * BLOCK, footer)
        file.write_zeros(SIZE, 2 * BLOCK)
        file.flush()
        del disk
        return reopen(file)

    check_crashes(make, reopen, WINDOWS, SIZES, examples=40)
