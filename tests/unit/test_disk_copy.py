"""Copying, merging and comparing disks, on disks in memory and on raw files."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import threading
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.storage import copy, diff
from devices.storage.backend import DATA, DiskError, Extent
from devices.storage.copy import copy_disk, copy_extents, ignore, in_parallel
from devices.storage.create import create_image, new_image
from devices.storage.diff import compare
from devices.storage.file import HostFile
from devices.storage.images import open_image
from devices.storage.merge import layers, merge
from pyvmm.core._hot import data_runs
from tests.fakes.disks import LayeredDisk, MemoryDisk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devices.storage.backend import Disk

SECTOR = 512


def content(disk: Disk) -> bytes:
    buffer = bytearray(disk.size)
    disk.read(0, [memoryview(buffer)])
    return bytes(buffer)


@st.composite
def chains(draw: st.DrawFn, depth: int) -> list[LayeredDisk]:
    """A disk and its parents, top first, of unlike sizes, written and trimmed here and there."""
    found: list[LayeredDisk] = []
    for level in range(depth):
        sectors = draw(st.integers(1, 48))
        disk = LayeredDisk(sectors * SECTOR, found[0] if found else None, name=f"layer{level}")
        for _ in range(draw(st.integers(0, 6))):
            start = draw(st.integers(0, sectors - 1))
            length = draw(st.integers(1, sectors - start)) * SECTOR
            what = draw(st.sampled_from(["data", "zeros", "trim"]))
            if what == "trim":
                disk.trim(start * SECTOR, length)
            else:
                fill = bytes(length) if what == "zeros" else draw(st.binary(min_size=1, max_size=2)) * length
                disk.write(start * SECTOR, [memoryview(fill[:length])])
        found.insert(0, disk)
    return found


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and blocks so small that disks of some sectors have many."""
    monkeypatch.setattr(copy, "CHUNK", 8 * SECTOR)
    monkeypatch.setattr(copy, "_BLOCK", 2 * SECTOR)


in_small = settings(max_examples=60, deadline=None)


@given(chain=chains(depth=3))
@in_small
def test_a_copy_reads_as_its_source_with_all_parents(chain: list[LayeredDisk]) -> None:
    source = chain[0]
    target = LayeredDisk(source.size, name="copy")
    copy_disk(source, target)
    assert content(target) == content(source)


@given(chain=chains(depth=2))
@in_small
def test_a_copy_over_old_data_reads_as_its_source(chain: list[LayeredDisk]) -> None:
    source = chain[0]
    target = MemoryDisk(source.size)
    target.data[:] = b"old." * (source.size // 4)
    copy_extents(source, target, source.extents(0, source.size))
    assert target.data == content(source)


def test_zeros_are_neither_read_from_holes_nor_written() -> None:
    class Counting(LayeredDisk):
        touched: list[tuple[str, int, int]]

        def read(self, offset: int, views: Sequence[memoryview]) -> None:
            self.touched.append(("read", offset, sum(map(len, views))))
            super().read(offset, views)

        def write(self, offset: int, views: Sequence[memoryview]) -> None:
            self.touched.append(("write", offset, sum(map(len, views))))
            super().write(offset, views)

    source, target = Counting(64 * SECTOR), Counting(64 * SECTOR)
    source.touched = target.touched = []
    source.write(8 * SECTOR, [memoryview(b"x" * SECTOR + bytes(6 * SECTOR) + b"y" * SECTOR)])
    source.touched.clear()
    copy_disk(source, target)
    assert source.touched == [
        ("read", 8 * SECTOR, 8 * SECTOR),
        ("write", 8 * SECTOR, 2 * SECTOR),
        ("write", 14 * SECTOR, 2 * SECTOR),
    ]


def test_a_copy_needs_room() -> None:
    with pytest.raises(DiskError, match="too small"):
        copy_disk(MemoryDisk(1024), MemoryDisk(512, name="small"))


@pytest.mark.parametrize("failing", ["source", "target"])
def test_an_error_ends_a_copy_and_all_its_threads(failing: str) -> None:
    source, target = LayeredDisk(64 * SECTOR, name="source"), LayeredDisk(64 * SECTOR, name="target")
    source.write(0, [memoryview(b"x" * (64 * SECTOR))])
    (source if failing == "source" else target).fail = error = OSError(errno.EIO, "Input/output error")
    before = threading.active_count()
    with pytest.raises(OSError) as caught:
        copy_disk(source, target)
    assert caught.value is error
    assert threading.active_count() == before


def test_progress_never_falls_and_names_offsets_of_the_disk() -> None:
    source, target = LayeredDisk(64 * SECTOR), LayeredDisk(64 * SECTOR)
    source.write(16 * SECTOR, [memoryview(b"x" * (32 * SECTOR))])
    told: list[int] = []
    copy_disk(source, target, told.append)
    assert told == [16 * SECTOR, 24 * SECTOR, 32 * SECTOR, 40 * SECTOR]


@given(chain=chains(depth=3), into=st.integers(1, 2))
@in_small
def test_the_parent_reads_as_the_child_after_a_merge(chain: list[LayeredDisk], into: int) -> None:
    child, base = chain[0], chain[into]
    assert layers(child) == chain
    wanted = content(child)
    merge(child, base)
    assert content(base)[: child.size] == wanted
    assert content(child) == wanted
    assert base.flushes
    merge(child, base)
    assert content(base)[: child.size] == wanted == content(child)


@given(chain=chains(depth=2), fail_at=st.integers(0, 12))
@in_small
def test_a_merge_that_was_cut_short_can_be_done_again(chain: list[LayeredDisk], fail_at: int) -> None:
    child, base = chain
    wanted = content(child)
    left = fail_at
    write = base.write

    def failing(offset: int, views: Sequence[memoryview]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(offset, views)

    base.write = failing  # type: ignore[method-assign]
    try:
        merge(child, base)
    except OSError:
        pass
    del base.write
    assert content(child) == wanted
    merge(child, base)
    assert content(base)[: child.size] == wanted


def test_a_merge_writes_only_what_the_child_holds() -> None:
    base = LayeredDisk(64 * SECTOR)
    child = LayeredDisk(64 * SECTOR, base)
    child.write(9 * SECTOR, [memoryview(b"x" * SECTOR)])
    merge(child, base)
    assert [index for index, kind in enumerate(base.kinds) if kind == "data"] == [9]


def expected_ranges(first: bytes, second: bytes) -> list[tuple[int, int]]:
    size = max(len(first), len(second))
    first, second = first.ljust(size, b"\0"), second.ljust(size, b"\0")
    found: list[tuple[int, int]] = []
    for at in range(0, size, SECTOR):
        if first[at : at + SECTOR] != second[at : at + SECTOR]:
            if found and sum(found[-1]) == at:
                found[-1] = found[-1][0], found[-1][1] + SECTOR
            else:
                found.append((at, SECTOR))
    return found


@given(first=chains(depth=2), second=chains(depth=1))
@in_small
def test_a_comparison_lists_the_sectors_that_differ(first: list[LayeredDisk], second: list[LayeredDisk]) -> None:
    found = compare(first[0], second[0])
    assert found.ranges == expected_ranges(content(first[0]), content(second[0]))
    assert found.differing == sum(length for _, length in found.ranges)
    assert found.listed


@given(chain=chains(depth=3), other=st.integers(1, 2), swapped=st.booleans())
@in_small
def test_a_child_is_compared_with_its_parents(chain: list[LayeredDisk], other: int, swapped: bool) -> None:
    pair = (chain[other], chain[0]) if swapped else (chain[0], chain[other])
    assert compare(*pair).ranges == expected_ranges(content(pair[0]), content(pair[1]))


def test_comparing_a_child_with_its_parent_reads_only_what_the_child_holds() -> None:
    base = LayeredDisk(64 * SECTOR)
    base.write(0, [memoryview(b"b" * (64 * SECTOR))])
    child = LayeredDisk(64 * SECTOR, base)
    child.write(40 * SECTOR, [memoryview(b"b" * SECTOR + b"c" * SECTOR)])
    told: list[int] = []
    assert compare(child, base, told.append).ranges == [(41 * SECTOR, SECTOR)]
    assert told == [40 * SECTOR]


def test_a_comparison_may_end_at_the_first_difference() -> None:
    first, second = LayeredDisk(4096 * SECTOR), LayeredDisk(4096 * SECTOR)
    first.write(0, [memoryview(b"x" * first.size)])
    told: list[int] = []
    assert compare(first, second, told.append, stop_at_first=True).ranges
    assert len(told) < 64


def test_more_ranges_than_memory_should_hold_are_counted_but_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "MAX_RANGES", 3)
    first, second = LayeredDisk(64 * SECTOR), LayeredDisk(64 * SECTOR)
    for sector in range(0, 64, 2):
        first.write(sector * SECTOR, [memoryview(b"x" * SECTOR)])
    found = compare(first, second)
    assert (len(found.ranges), found.differing, found.listed) == (3, 32 * SECTOR, False)


@given(
    blocks=st.lists(st.sampled_from([b"", b"x", b"\0\0x"]), max_size=12),
    block=st.integers(1, 70),
    cut=st.integers(0, 69),
)
@in_small
def test_data_is_told_from_zeros_in_whole_blocks(blocks: list[bytes], block: int, cut: int) -> None:
    data = b"".join(fill[:block].ljust(block, b"\0") for fill in blocks)
    data = data[: max(0, len(data) - cut % block)]
    expected: list[tuple[int, int]] = []
    for at in range(0, len(data), block):
        piece = data[at : at + block]
        if piece.strip(b"\0"):
            start = expected.pop()[0] if expected and expected[-1][1] == at else at
            expected.append((start, at + len(piece)))
    assert data_runs(data, block) == expected


def test_blocks_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError):
        data_runs(b"x", 0)


def raw_image(path: Path, size: int = 4 << 20) -> Path:
    """A raw image of random data, zeros and holes."""
    numbers = random.Random(size)
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size // 4)
        file.write(numbers.randbytes(size // 8) + bytes(size // 8) + numbers.randbytes(4096))
    return path


@pytest.mark.parametrize("size", [4 << 20, (4 << 20) + 512])
def test_a_raw_copy_is_as_sparse_as_its_data_allows(tmp_path: Path, size: int) -> None:
    source = open_image(str(raw_image(tmp_path / "a.img", size)), readonly=True)
    with new_image(str(tmp_path / "b.img"), source.size) as target:
        copy_disk(source, target, share=False)
    source.close()
    made = tmp_path / "b.img"
    assert made.read_bytes() == (tmp_path / "a.img").read_bytes()
    assert made.stat().st_blocks * 512 < size // 4


def test_an_image_that_was_not_finished_leaves_nothing(tmp_path: Path) -> None:
    context = new_image(str(tmp_path / "a.img"), 1 << 20)
    context.__enter__()
    assert len(list(tmp_path.iterdir())) == 1 and not (tmp_path / "a.img").exists()
    error = KeyError()
    assert not context.__exit__(KeyError, error, None)
    assert list(tmp_path.iterdir()) == []


def test_a_replacement_that_was_not_finished_leaves_the_old_image(tmp_path: Path) -> None:
    path = raw_image(tmp_path / "a.img")
    before = path.read_bytes()
    with pytest.raises(KeyError), new_image(str(path), 1 << 20, force=True):
        raise KeyError
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_replacement_keeps_mode_and_links_and_comes_whole(tmp_path: Path) -> None:
    path, link = raw_image(tmp_path / "a.img"), tmp_path / "link.img"
    path.chmod(0o640)
    link.symlink_to(path)
    with new_image(str(link), 1 << 20, force=True) as disk:
        disk.write(0, [memoryview(b"new!" * 128)])
        assert path.stat().st_size == 4 << 20
    assert link.is_symlink() and link.read_bytes() == b"new!" * 128 + bytes((1 << 20) - 512)
    assert path.stat().st_mode & 0o7777 == 0o640
    assert sorted(tmp_path.iterdir()) == [path, link]


def test_a_name_taken_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    with pytest.raises(DiskError, match="somebody else"), new_image(str(path), 1 << 20):
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs" and list(tmp_path.iterdir()) == [path]


def test_an_image_in_use_is_not_replaced(tmp_path: Path) -> None:
    path = raw_image(tmp_path / "a.img")
    reader = HostFile(str(path), readonly=True)
    with pytest.raises(DiskError, match="in use"):
        create_image(str(path), 1 << 20, force=True)
    reader.close()
    create_image(str(path), 1 << 20, force=True)
    assert path.stat().st_size == 1 << 20


def test_a_fixed_image_has_its_room_from_the_start(tmp_path: Path) -> None:
    create_image(str(tmp_path / "fixed.img"), 4 << 20, kind="fixed")
    create_image(str(tmp_path / "sparse.img"), 4 << 20)
    assert (tmp_path / "fixed.img").stat().st_blocks * 512 >= 4 << 20
    assert (tmp_path / "sparse.img").stat().st_blocks == 0


@pytest.fixture
def xfs(tmp_path: Path) -> Path:
    image, mount = tmp_path / "xfs.img", tmp_path / "mnt"
    with image.open("wb") as file:
        file.truncate(320 << 20)
    mount.mkdir()
    for command in (["mkfs.xfs", "-q", str(image)], ["mount", "-o", "loop", str(image), str(mount)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")
    return mount


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_raw_copy_shares_its_data_where_the_file_system_can(xfs: Path) -> None:
    try:
        raw_image(xfs / "a.img", 32 << 20)
        before = os.statvfs(xfs).f_bfree
        source = open_image(str(xfs / "a.img"), readonly=True)
        with new_image(str(xfs / "b.img"), source.size) as target:
            copy_disk(source, target)
        source.close()
        assert (xfs / "b.img").read_bytes() == (xfs / "a.img").read_bytes()
        assert (before - os.statvfs(xfs).f_bfree) * 4096 < 1 << 20
    finally:
        subprocess.run(["umount", str(xfs)], check=True)


def test_a_signal_while_threads_start_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name == "copy-1":
            signal.raise_signal(signal.SIGUSR1)
        start(thread)

    before = signal.signal(signal.SIGUSR1, stop)
    monkeypatch.setattr(threading.Thread, "start", interrupted)

    def work() -> Iterator[Extent]:
        for number in count():
            yield Extent(number << 20, 1 << 20, DATA)

    try:
        with pytest.raises(Stopped):
            in_parallel(work(), lambda extent, buffer: None, ignore)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("copy-")]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_only_what_is_asked_to_be_is_left_unflushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushes.append)
    for form in ("img", "vhd", "vhdx"):
        create_image(str(tmp_path / f"lazy.{form}"), 1 << 20, flush=False)
        assert flushes == []
        create_image(str(tmp_path / f"stored.{form}"), 1 << 20)
        assert flushes
        flushes.clear()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".img"] * 2 + [".vhd"] * 2 + [".vhdx"] * 2


def test_unflushed_image_never_replaces_another_and_goes_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"

    def interrupted() -> None:
        with new_image(str(path), 1 << 20, flush=False):
            assert path.exists()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert not path.exists()
    path.write_bytes(b"old")
    with pytest.raises(DiskError, match="exists already"):
        create_image(str(path), 1 << 20, flush=False)
    with pytest.raises(DiskError, match="leave --force or --no-flush out"):
        create_image(str(path), 1 << 20, force=True, flush=False)
    assert path.read_bytes() == b"old"
