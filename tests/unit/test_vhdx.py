"""VHDX images as disks: what they hold, what takes room, what their structures say."""

from __future__ import annotations

import errno
import random
import threading
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devices.storage.backend import DATA, PARENT, ZERO, DiskError, Extent
from devices.storage.file import HostFile
from devices.storage.images import open_image
from devices.storage.vhdx.create import create
from devices.storage.vhdx.disk import VhdxDisk
from devices.storage.vhdx.format import Layout, guid, guid_text
from devices.storage.vhdx.metadata import locator_changes
from pyvmm.core._hot import crc32c
from tests.fakes.crash import CrashFile, Medium
from tests.fakes.disks import check_disk

if TYPE_CHECKING:
    from devices.storage.chain import Layer

MIB = 1 << 20


def made(path: Path, size: int = 8 * MIB, parent: Layer | None = None, **options: object) -> VhdxDisk:
    options.setdefault("block_size", MIB)
    if parent is not None:
        options["kind"] = "differencing"
    return create(HostFile.create(str(path)), size, parent=parent, **options)  # type: ignore[arg-type]


def opened(path: Path, readonly: bool = False) -> VhdxDisk:
    disk = open_image(str(path), readonly)
    assert isinstance(disk, VhdxDisk)
    return disk


def content(disk: VhdxDisk, offset: int = 0, length: int | None = None) -> bytes:
    data = bytearray(b"\xee" * (disk.size - offset if length is None else length))
    disk.read(offset, [memoryview(data)])
    return bytes(data)


def write(disk: VhdxDisk, offset: int, data: bytes) -> None:
    disk.write(offset, [memoryview(data)])


def room(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_the_checksum_is_crc_32c_in_both_ways_of_computing_it() -> None:
    data = bytes(range(256)) * 33 + b"tail"
    assert crc32c(b"123456789") == crc32c(b"123456789", 0, True) == 0xE3069283
    for start in range(9):
        assert crc32c(data[start:]) == crc32c(data[start:], 0, True)
    assert crc32c(data[100:], crc32c(data[:100])) == crc32c(data)


def test_guids_are_as_text_and_as_bytes_in_the_file() -> None:
    text = "2dc27766-f623-4200-9d64-115e9bfd4a08"
    assert guid(text).hex() == "6677c22d23f600429d64115e9bfd4a08"
    assert guid_text(guid("{" + text.upper() + "}")) == text
    for bad in ("", "2dc27766", text + "0", text.replace("2", "x")):
        with pytest.raises(ValueError):
            guid(bad)


def test_bitmap_entries_stand_behind_the_blocks_of_their_chunk() -> None:
    layout = Layout(10 << 30, 256 * MIB, 512, has_parent=False)  # 16 blocks are one chunk
    assert (layout.blocks, layout.chunk_blocks, layout.chunks, layout.entries) == (40, 16, 3, 42)
    assert [layout.block_entry(block) for block in (0, 15, 16, 39)] == [0, 15, 17, 41]
    assert layout.bitmap_entry(0) == 16
    assert Layout(10 << 30, 256 * MIB, 512, has_parent=True).entries == 51
    assert Layout(4 << 30, 32 * MIB, 4096, has_parent=False).chunk_blocks == 1024


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_a_disk_behaves_as_a_run_of_bytes(tmp_path: Path, kind: str) -> None:
    numbers = count()
    check_disk(lambda size: made(tmp_path / f"{next(numbers)}.vhdx", size, kind=kind))


def test_a_differencing_disk_behaves_as_a_run_of_bytes(tmp_path: Path) -> None:
    made(tmp_path / "base.vhdx", 16384).close()
    numbers = count()
    check_disk(lambda size: made(tmp_path / f"{next(numbers)}.vhdx", size, parent=opened(tmp_path / "base.vhdx", True)))


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_what_was_written_is_there_when_opened_again(tmp_path: Path, kind: str, sector: int) -> None:
    path = tmp_path / "disk.vhdx"
    disk = made(path, 5 * MIB + 4096, kind=kind, sector_size=sector)
    model = bytearray(disk.size)
    for offset, length in ((0, 4096), (MIB - 4096, 3 * MIB), (disk.size - 4096, 4096)):
        data = bytes([offset % 251 + 1]) * length
        write(disk, offset, data)
        model[offset : offset + length] = data
    assert content(disk) == model
    identity = disk.identity
    disk.close()
    disk = opened(path)
    assert (disk.size, disk.sector_size, disk.kind, disk.identity) == (len(model), sector, kind, identity)
    assert content(disk) == model
    disk.close()


def test_blocks_take_room_when_written_and_give_it_back_when_trimmed(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    disk = made(path, 64 * MIB)
    empty = room(path)
    write(disk, MIB, b"x" * 4 * MIB)
    disk.flush()
    assert room(path) >= empty + 4 * MIB
    size = path.stat().st_size
    disk.trim(MIB, 4 * MIB)
    disk.flush()
    assert room(path) <= empty + 65536
    assert list(disk.extents(0, disk.size)) == [Extent(0, disk.size, ZERO)]
    write(disk, 32 * MIB, b"y" * 4 * MIB)
    disk.close()
    assert path.stat().st_size == size  # trimmed storage is used again


def test_storage_that_is_used_again_does_not_show_what_it_held(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    disk = made(path)
    write(disk, 0, b"secret" * 1024)
    disk.trim(0, MIB)
    disk.close()
    # A host may not have got around to punching the hole before it lost power.
    with path.open("r+b") as file:
        end = path.stat().st_size
        file.seek(end - MIB)
        file.write(b"secret" * 1024)
    disk = opened(path)
    write(disk, 2 * MIB, bytes(512))
    assert path.stat().st_size == end
    assert content(disk) == bytes(disk.size)
    disk.close()


def test_a_large_disk_is_small_and_opens_fast(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    made(path, 64 << 40, block_size=None).close()
    assert room(path) < MIB
    disk = opened(path)
    write(disk, (64 << 40) - 512, b"z" * 512)
    assert content(disk, (64 << 40) - 1024) == bytes(512) + b"z" * 512
    disk.close()


def test_a_disk_tells_where_its_data_is(tmp_path: Path) -> None:
    base = made(tmp_path / "base.vhdx")
    write(base, 0, b"b" * 2 * MIB)
    base.close()
    disk = made(tmp_path / "disk.vhdx", parent=opened(tmp_path / "base.vhdx", True))
    write(disk, 4096, b"c" * 4096)
    disk.write_zeros(MIB, MIB)
    assert list(disk.layer_extents(0, 3 * MIB)) == [
        Extent(0, 4096, PARENT),
        Extent(4096, 4096, DATA),
        Extent(8192, MIB - 8192, PARENT),
        Extent(MIB, MIB, ZERO),
        Extent(2 * MIB, MIB, PARENT),
    ]
    assert content(disk)[: 2 * MIB] == b"b" * 4096 + b"c" * 4096 + b"b" * (MIB - 8192) + bytes(MIB)
    disk.close()


def test_zeros_hide_what_the_parent_has(tmp_path: Path) -> None:
    base = made(tmp_path / "base.vhdx", 4 * MIB)
    write(base, 0, b"b" * 4 * MIB)
    base.close()
    disk = made(tmp_path / "disk.vhdx", 6 * MIB, parent=opened(tmp_path / "base.vhdx", True))
    before = room(tmp_path / "disk.vhdx")
    disk.trim(512, 3 * MIB)
    disk.close()
    disk = opened(tmp_path / "disk.vhdx")
    assert content(disk) == b"b" * 512 + bytes(3 * MIB) + b"b" * (MIB - 512) + bytes(2 * MIB)
    assert room(tmp_path / "disk.vhdx") < before + 65536
    disk.close()


def test_a_block_written_in_full_needs_no_parent(tmp_path: Path) -> None:
    made(tmp_path / "base.vhdx").close()
    disk = made(tmp_path / "disk.vhdx", parent=opened(tmp_path / "base.vhdx", True))
    for offset in range(0, MIB, 65536):
        write(disk, offset, b"d" * 65536)
    assert disk.table.get(0) & 7 == 6
    write(disk, MIB, b"d" * 512)
    assert disk.table.get(1) & 7 == 7
    disk.close()


def test_the_versions_of_file_and_disk_change_once_with_the_first_write_of_a_session(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    made(path).close()
    disk = opened(path)
    first = disk.headers.current
    disk.flush()
    assert disk.headers.current is first
    write(disk, 0, b"x" * 512)
    second = disk.headers.current
    assert second.file_write != first.file_write and second.data_write != first.data_write
    write(disk, 0, b"y" * 512)
    disk.flush()
    assert disk.headers.current is second
    disk.close()
    disk = opened(path, readonly=True)
    assert disk.data_write == second.data_write
    disk.close()


def test_a_parent_that_was_written_is_not_the_parent_any_more(tmp_path: Path) -> None:
    made(tmp_path / "base.vhdx").close()
    made(tmp_path / "disk.vhdx", parent=opened(tmp_path / "base.vhdx", True)).close()
    base = opened(tmp_path / "base.vhdx")
    write(base, 0, b"x" * 512)
    base.close()
    with pytest.raises(DiskError, match=r"disk\.vhdx: .*base\.vhdx is not the parent .* DataWriteGuid"):
        opened(tmp_path / "disk.vhdx")


def test_a_chain_is_found_where_it_moved_together(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "sub").mkdir(parents=True)
    base = made(here / "base.vhdx")
    write(base, 0, b"b" * 512)
    base.close()
    made(here / "sub" / "mid.vhdx", parent=opened(here / "base.vhdx", True)).close()
    leaf = made(here / "leaf.vhdx", parent=opened(here / "sub" / "mid.vhdx", True))
    write(leaf, 512, b"l" * 512)
    leaf.close()
    here.rename(there)
    leaf = opened(there / "leaf.vhdx")
    assert content(leaf, 0, 1024) == b"b" * 512 + b"l" * 512
    assert leaf.parent is not None and leaf.parent.parent is not None
    assert leaf.parent.parent.path == str(there / "base.vhdx")
    assert leaf.identity == leaf.parent.parent.identity
    leaf.close()


@pytest.mark.parametrize("kind", ["dynamic", "fixed", "differencing"])
def test_a_disk_grows_and_shrinks(tmp_path: Path, kind: str) -> None:
    parent = None
    if kind == "differencing":
        base = made(tmp_path / "base.vhdx", 7 * MIB)
        write(base, 0, b"b" * 7 * MIB)
        base.close()
        parent = opened(tmp_path / "base.vhdx", True)
    path = tmp_path / "disk.vhdx"
    disk = made(path, 6 * MIB + 512, parent=parent, kind=kind)
    write(disk, 0, b"1" * disk.size)
    disk.resize(3 * MIB + 1024)
    assert path.stat().st_size <= 9 * MIB
    disk.resize(9 * MIB)
    model = b"1" * (3 * MIB + 1024) + bytes(6 * MIB - 1024)
    assert disk.size == 9 * MIB and content(disk) == model
    disk.close()
    disk = opened(path)
    assert disk.size == 9 * MIB and content(disk) == model
    for bad in (0, -512, 513, (64 << 40) + 512):
        with pytest.raises(DiskError):
            disk.resize(bad)
    disk.close()


def test_the_table_moves_where_there_is_room_when_the_disk_outgrows_it(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    disk = made(path, 8 * MIB)
    write(disk, 5 * MIB, b"x" * MIB)
    before = disk.regions.bat.offset
    disk.resize(300 << 30)  # 300 Ki entries of 8 bytes, where a region of 1 MiB has room for 128 Ki
    assert disk.regions.bat.offset != before
    write(disk, (300 << 30) - MIB, b"y" * MIB)
    disk.close()
    disk = opened(path)
    assert disk.check_table(1) == []
    assert content(disk, 5 * MIB, MIB) == b"x" * MIB
    assert content(disk, (300 << 30) - MIB) == b"y" * MIB
    disk.close()


def test_threads_write_trim_and_flush_side_by_side(tmp_path: Path) -> None:
    """Each thread has sectors of its own in blocks that all share, and sees in them what it wrote last."""
    made(tmp_path / "base.vhdx", 16 * MIB).close()
    disk = made(tmp_path / "disk.vhdx", 16 * MIB, parent=opened(tmp_path / "base.vhdx", True))
    failures: list[tuple[int, int, object]] = []
    lanes = 4

    def work(lane: int) -> None:
        try:
            for turn in range(60):
                for offset in range(lane * 4096, 8 * MIB, MIB // 2):
                    data = bytes([1 + (turn + offset // 4096) % 255]) * 4096
                    write(disk, offset, data)
                    if content(disk, offset, 4096) != data:
                        failures.append((lane, turn, offset))
                # A block of this thread's own comes and goes.
                own = (8 + lane) * MIB
                write(disk, own, bytes([lane + 1]) * MIB)
                if turn % 3 == 0:
                    disk.flush()
                disk.trim(own, MIB)
                if content(disk, own, MIB) != bytes(MIB):
                    failures.append((lane, turn, own))
        except Exception as error:  # noqa: BLE001
            failures.append((lane, -1, error))

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    before = content(disk)
    disk.close()
    disk = opened(tmp_path / "disk.vhdx")
    assert content(disk) == before
    assert disk.check_table(1) == []
    disk.close()


def test_a_merge_that_was_cut_short_can_be_done_again(tmp_path: Path) -> None:
    base = made(tmp_path / "base.vhdx")
    write(base, 0, b"b" * 2 * MIB)
    base.close()
    made(tmp_path / "other.vhdx", parent=opened(tmp_path / "base.vhdx", True)).close()
    child = made(tmp_path / "child.vhdx", parent=opened(tmp_path / "base.vhdx", True))
    write(child, MIB, b"c" * 2 * MIB)
    child.close()
    expected = b"b" * MIB + b"c" * 2 * MIB + bytes(5 * MIB)
    for _ in range(3):
        child = opened(tmp_path / "child.vhdx")
        assert child.parent is not None
        child.parent.close()
        child.parent = opened(tmp_path / "base.vhdx")
        child.before_merge()
        write(child.parent, 0, b"b" * 512)
        assert content(child) == expected
        child.close()
    with pytest.raises(DiskError, match="is not the parent"):
        opened(tmp_path / "other.vhdx")


def test_a_parent_locator_moves_where_there_is_room_for_a_longer_one(tmp_path: Path) -> None:
    made(tmp_path / "base.vhdx").close()
    path = tmp_path / "child.vhdx"
    made(path, parent=opened(tmp_path / "base.vhdx", True)).close()
    child = opened(path)
    locator = {**(child.metadata.locator or {}), "volume_path": "\\\\?\\Volume{0}\\" + "long" * 2000}
    write(child, 0, b"c" * 512)
    child.journal.commit_bytes(locator_changes(child.file, child.regions.metadata, locator))
    child.close()
    child = opened(path)
    assert child.metadata.locator == locator
    assert child.metadata.size == 8 * MIB
    child.close()


def test_c_code_reaches_the_data_and_writes_once_the_session_has_begun(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    made(path).close()
    disk = opened(path)
    fast = disk.fast
    assert fast is not None and not fast.writable and fast.size == 8 * MIB
    write(disk, 0, b"x" * 512)
    assert fast.writable
    disk.resize(16 * MIB)
    assert disk.fast is fast and fast.size == 16 * MIB
    disk.resize(300 << 30)  # which takes another table
    assert disk.fast is not fast and disk.fast is not None and disk.fast.writable
    disk.close()
    assert disk.fast is None
    disk = opened(path, readonly=True)
    write_less = disk.fast
    assert write_less is not None and not write_less.writable
    disk.close()


def test_a_flush_serves_all_that_waited_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = made(tmp_path / "disk.vhdx")
    write(disk, 0, b"x" * 512)
    flushed, begun, go_on = [], threading.Event(), threading.Event()
    flush = disk.file.flush

    def slow() -> None:
        flushed.append(1)
        begun.set()
        assert go_on.wait(30)
        flush()

    disk.flush()
    monkeypatch.setattr(disk.file, "flush", slow)
    threads = [threading.Thread(target=disk.flush)]
    threads[0].start()
    assert begun.wait(30)
    # These come too late for the first one; one more does for all of them.
    waiting = threading.Barrier(5)

    def late() -> None:
        waiting.wait(30)
        disk.flush()

    threads += [threading.Thread(target=late) for _ in range(4)]
    for thread in threads[1:]:
        thread.start()
    waiting.wait(30)
    write(disk, 512, b"y" * 512)
    go_on.set()
    for thread in threads:
        thread.join()
    assert 2 <= len(flushed) <= 5
    monkeypatch.undo()
    disk.close()


def test_what_is_flushed_after_a_failed_resize_is_durable_or_refused(tmp_path: Path) -> None:
    """Which log counts may be open then, and changes of the table would go to the wrong one."""
    refused = 0
    for steps in range(60):
        file = CrashFile(Medium())
        disk = create(file, 8 * MIB, block_size=MIB)
        for block in range(8):
            write(disk, block * MIB, b"x" * 4096)
        disk.flush()
        file.fail_after(steps, errno.EIO)
        try:
            disk.resize(6 * MIB)
        except OSError:
            pass
        file.fail_after(-1, 0)
        disk.write_zeros(MIB, MIB)
        try:
            disk.flush()
        except OSError:
            refused += 1
            continue
        for seed in range(8):
            after = VhdxDisk(CrashFile(file.medium.crash(random.Random(seed))))
            assert content(after, 0, 4096) == b"x" * 4096
            assert content(after, MIB, 4096) == bytes(4096)
    assert 0 < refused < 50


def test_what_waits_for_a_flush_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devices.storage.vhdx.disk._MAX_PENDING", 10)
    made(tmp_path / "base.vhdx", 1 << 30).close()
    disk = made(tmp_path / "disk.vhdx", 1 << 30, parent=opened(tmp_path / "base.vhdx", True))
    for offset in range(0, 1 << 30, 16 * MIB):  # a page of a bitmap each
        write(disk, offset, b"x" * 512)
        assert len(disk.bitmaps.dirty) <= 10
    for offset in range(0, 1 << 30, 16 * MIB):
        disk.trim(offset, MIB)
        assert len(disk.freed) <= 10
    disk.close()
