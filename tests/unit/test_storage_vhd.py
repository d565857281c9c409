"""VHD images: what they hold, how they are laid out, and what is done about those that were left in the middle."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from itertools import count
from pathlib import Path

import pytest

from devices.storage.backend import DATA, PARENT, ZERO, Disk, DiskError, Extent
from devices.storage.chain import Layer
from devices.storage.file import HostFile
from devices.storage.images import check_image, format_of, open_image, open_layer
from devices.storage.vhd.create import create
from devices.storage.vhd.layout import MAX_SIZE
from tests.fakes.disks import check_disk
from tests.fakes.vhd_images import ID, SECTOR, dynamic, footer

KINDS = ("fixed", "dynamic")
MIB = 1 << 20


def made(path: Path, size: int = 8 * MIB, kind: str = "dynamic", block_size: int | None = None) -> Disk:
    return create(HostFile.create(str(path)), size, kind=kind, block_size=block_size)


def child_of(parent: Path, path: Path, size: int = 0, block_size: int | None = None) -> Disk:
    above = open_image(str(parent), readonly=True)
    assert isinstance(above, Layer)
    file = HostFile.create(str(path))
    return create(file, size or above.size, kind="differencing", block_size=block_size, parent=above)


def content(disk: Disk, offset: int = 0, length: int = 0) -> bytes:
    data = bytearray(b"\xee" * (length or disk.size - offset))
    disk.read(offset, [memoryview(data)])
    return bytes(data)


def put(disk: Disk, offset: int, data: bytes) -> None:
    disk.write(offset, [memoryview(data)])


def refusal(path: Path) -> str:
    with pytest.raises(DiskError) as caught:
        open_image(str(path))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [4096, 16384])
def test_disk_behaves_as_a_run_of_bytes(tmp_path: Path, kind: str, block_size: int) -> None:
    numbers = count()
    check_disk(lambda size: made(tmp_path / f"{next(numbers)}.vhd", size, kind, block_size), examples=15)


def test_differencing_disk_behaves_as_a_run_of_bytes(tmp_path: Path) -> None:
    numbers = count()
    made(tmp_path / "base.vhd", 32768, block_size=4096).close()
    check_disk(lambda size: child_of(tmp_path / "base.vhd", tmp_path / f"{next(numbers)}.vhd", size, 4096), examples=15)


def test_suffix_tells_the_format() -> None:
    assert format_of("/vms/Disk.VHD") == "vhd"


# What is where in the file


def test_new_dynamic_disk_is_laid_out_as_the_specification_says(tmp_path: Path) -> None:
    disk = made(tmp_path / "disk.vhd", 5 * MIB)
    put(disk, 2 * MIB, b"x" * SECTOR)
    disk.close()
    raw = (tmp_path / "disk.vhd").read_bytes()
    assert raw[:512] == raw[-512:] and raw[:8] == b"conectix" and raw[512:520] == b"cxsparse"
    assert int.from_bytes(raw[16:24], "big") == 512 and raw[60:64] == b"\0\0\0\3"
    assert int.from_bytes(raw[40:48], "big") == int.from_bytes(raw[48:56], "big") == 5 * MIB
    table = int.from_bytes(raw[528:536], "big")
    entries = [int.from_bytes(raw[table + at : table + at + 4], "big") for at in range(0, 512, 4)]
    assert entries[0] == entries[2] == 0xFFFF_FFFF and set(entries[3:]) == {0xFFFF_FFFF}
    place = entries[1] * 512
    assert raw[place : place + 512] == b"\xff" * 512
    assert (place + 512) % 4096 == 0 and raw[place + 512 : place + 1024] == b"x" * SECTOR
    assert len(raw) == place + 512 + 2 * MIB + 512


def test_reads_of_blocks_are_one_call_each_into_the_buffers_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = made(tmp_path / "disk.vhd")
    put(disk, 0, os.urandom(4 * MIB))
    calls: list[list[memoryview]] = []
    preadv = os.preadv

    def counted(fd: int, views: list[memoryview], offset: int) -> int:
        calls.append(views)
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", counted)
    buffer = bytearray(2 * MIB)
    views = [memoryview(buffer)[at : at + 65536] for at in range(0, len(buffer), 65536)]
    disk.read(0, views)
    disk.read(4 * MIB, views)  # nothing there
    assert len(calls) == 1 and all(one is other for one, other in zip(calls[0], views, strict=True))
    disk.read(MIB, views)
    assert len(calls) == 3


def test_sectors_that_a_bitmap_leaves_out_are_zeros_until_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    stored = {3: b"3" * SECTOR, 4: b"4" * SECTOR, 130: b"x" * SECTOR}
    path.write_bytes(dynamic(MIB, 65536, stored))
    expected = bytearray(MIB)
    for sector, data in stored.items():
        expected[sector * SECTOR : (sector + 1) * SECTOR] = data
    for _ in range(2):
        disk = open_image(str(path))
        assert content(disk) == expected
        put(disk, 10 * SECTOR, b"y" * SECTOR)
        expected[10 * SECTOR : 11 * SECTOR] = b"y" * SECTOR
        assert content(disk) == expected
        disk.close()
    assert check_image(str(path)) == []


@pytest.mark.parametrize(
    ("creator", "by_geometry"),
    [(b"vpc ", True), (b"vs  ", True), (b"qemu", True)]
    + [(name, False) for name in (b"win ", b"d2v\0", b"qem2", b"vbox", b"tap\0", b"\0\0\0\0")],
)
def test_size_is_counted_as_the_creator_does(tmp_path: Path, creator: bytes, by_geometry: bool) -> None:
    path = tmp_path / "disk.vhd"
    path.write_bytes(bytes(MIB) + footer(MIB, 2, creator, (30, 4, 17)))
    disk = open_image(str(path))
    assert disk.size == (30 * 4 * 17 * 512 if by_geometry else MIB)
    assert (disk.geometry.cylinders, disk.geometry.heads, disk.geometry.sectors) == (30, 4, 17)
    disk.close()


@pytest.mark.parametrize("shape", [(65535, 16, 255), (0, 0, 0), (2000, 16, 63)])
def test_geometry_that_cannot_be_does_not_count(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    path = tmp_path / "disk.vhd"
    path.write_bytes(bytes(MIB) + footer(MIB, 2, b"vpc ", shape))
    disk = open_image(str(path))
    assert disk.size == MIB
    assert (disk.geometry.cylinders, disk.geometry.heads, disk.geometry.sectors) == (30, 4, 17)
    disk.close()


def test_identity_is_the_images_own(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    path.write_bytes(bytes(MIB) + footer(MIB, 2))
    disk = open_image(str(path))
    assert disk.identity == ID
    disk.close()
    one, other = made(tmp_path / "1.vhd"), made(tmp_path / "2.vhd")
    assert one.identity != other.identity
    one.close()
    other.close()


def test_inspect_tells_the_kind_and_the_parents(tmp_path: Path) -> None:
    made(tmp_path / "base.vhd", kind="fixed").close()
    disk = child_of(tmp_path / "base.vhd", tmp_path / "child.vhd")
    put(disk, 0, b"x" * SECTOR)
    found = disk.inspect()
    assert (found["format"], found["kind"], found["block_size"]) == ("vhd", "differencing", 2 * MIB)
    assert (found["blocks"], found["blocks_used"], found["parent_name"]) == (4, 1, ".\\base.vhd")
    assert (found["parent"]["kind"], found["parent"]["readonly"]) == ("fixed", True)
    disk.close()


# Holes


@pytest.mark.parametrize("kind", KINDS)
def test_trimmed_and_zeroed_ranges_give_their_room_back(tmp_path: Path, kind: str) -> None:
    disk = made(tmp_path / "disk.vhd", kind=kind)
    put(disk, 0, os.urandom(8 * MIB))
    disk.flush()
    before = os.stat(disk.path).st_blocks
    disk.trim(MIB, 3 * MIB)
    disk.write_zeros(5 * MIB, 2 * MIB)
    assert os.stat(disk.path).st_blocks <= before - 4 * MIB // 512
    assert content(disk, MIB, 3 * MIB) == bytes(3 * MIB) and content(disk, 5 * MIB, 2 * MIB) == bytes(2 * MIB)
    kinds = [(extent.offset, extent.kind) for extent in disk.extents(0, disk.size)]
    assert kinds == [(0, DATA), (MIB, ZERO), (4 * MIB, DATA), (5 * MIB, ZERO), (7 * MIB, DATA)]
    disk.close()


def test_zeros_where_nothing_is_take_no_room(tmp_path: Path) -> None:
    disk = made(tmp_path / "disk.vhd", 1 << 40)
    size = os.stat(disk.path).st_size
    disk.write_zeros(0, disk.size)
    disk.trim(0, disk.size)
    assert os.stat(disk.path).st_size == size
    assert list(disk.extents(0, disk.size)) == [Extent(0, disk.size, ZERO)]
    disk.close()


def test_zeros_hide_what_a_parent_has_and_trim_does_not_bring_it_back(tmp_path: Path) -> None:
    disk = made(tmp_path / "base.vhd")
    put(disk, 0, b"b" * 4 * MIB)
    disk.close()
    disk = child_of(tmp_path / "base.vhd", tmp_path / "child.vhd")
    assert not disk.trim_zeroes
    put(disk, 0, b"c" * 4096)
    disk.write_zeros(4096, 3 * 4096)
    disk.trim(0, 8 * 4096)
    assert content(disk, 0, 8 * 4096) == bytes(4 * 4096) + b"b" * 4 * 4096
    kinds = [(extent.offset, extent.kind) for extent in disk.layer_extents(0, 4 * MIB)]
    assert kinds == [(0, ZERO), (4 * 4096, PARENT)]
    disk.close()


# Sizes


@pytest.mark.parametrize("kind", KINDS)
def test_disk_grows_and_keeps_what_it_has(tmp_path: Path, kind: str) -> None:
    disk = made(tmp_path / "disk.vhd", 3 * MIB, kind, 8192)
    put(disk, 0, b"x" * 3 * MIB)
    for size in (3 * MIB, 3 * MIB + 512, 40 * MIB):
        disk.resize(size)
        assert disk.size == size
        assert content(disk) == b"x" * 3 * MIB + bytes(size - 3 * MIB)
    put(disk, disk.size - 512, b"e" * 512)
    disk.close()
    disk = open_image(str(tmp_path / "disk.vhd"))
    assert content(disk) == b"x" * 3 * MIB + bytes(37 * MIB - 512) + b"e" * 512
    disk.close()
    assert check_image(disk.path) == []


def test_grown_child_does_not_show_more_of_a_larger_parent(tmp_path: Path) -> None:
    disk = made(tmp_path / "base.vhd")
    put(disk, 0, b"b" * 8 * MIB)
    disk.close()
    disk = child_of(tmp_path / "base.vhd", tmp_path / "child.vhd", 3 * MIB)
    disk.resize(10 * MIB)
    assert content(disk) == b"b" * 3 * MIB + bytes(7 * MIB)
    disk.close()
    alone = open_layer(HostFile(disk.path), "vhd")
    with pytest.raises(DiskError, match="its parent is not open"):
        alone.resize(12 * MIB)
    alone.close()


def test_largest_disk_works_up_to_its_end(tmp_path: Path) -> None:
    disk = made(tmp_path / "disk.vhd", MAX_SIZE)
    put(disk, disk.size - 4096, b"e" * 4096)
    disk.close()
    disk = open_image(str(tmp_path / "disk.vhd"))
    assert content(disk, disk.size - 8192) == bytes(4096) + b"e" * 4096
    with pytest.raises(DiskError, match="at most 2040 GiB"):
        disk.resize(MAX_SIZE + 512)
    disk.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": MAX_SIZE + 512}, "at most 2040 GiB"),
        ({"size": 1000}, "multiple of 512"),
        ({"size": 0}, "multiple of 512"),
        ({"block_size": 3 * MIB}, "power of two"),
        ({"block_size": 2048}, "power of two"),
        ({"size": 1 << 40, "block_size": 4096}, "larger block size"),
        ({"sector_size": 4096}, "512-byte sectors only"),
    ],
)
def test_what_makes_no_vhd_is_refused_when_it_is_made(tmp_path: Path, options: dict[str, int], says: str) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(DiskError, match=says):
        create(HostFile.create(str(tmp_path / "disk.vhd")), **{"size": MIB, **options})  # type: ignore[arg-type]
    assert os.listdir("/proc/self/fd") == before


def test_parent_must_be_a_vhd(tmp_path: Path) -> None:
    raw = tmp_path / "base.img"
    raw.write_bytes(bytes(MIB))
    with pytest.raises(DiskError, match="the parent of a VHD is a VHD too"):
        create(
            HostFile.create(str(tmp_path / "child.vhd")),
            MIB,
            kind="differencing",
            parent=open_image(str(raw), readonly=True),  # type: ignore[arg-type]
        )


def test_shrinking_and_disks_in_saved_state_are_refused(tmp_path: Path) -> None:
    disk = made(tmp_path / "disk.vhd")
    with pytest.raises(DiskError, match="can only grow"):
        disk.resize(MIB)
    disk.close()
    path = tmp_path / "saved.vhd"
    path.write_bytes(bytes(MIB) + footer(MIB, 2, saved=1))
    disk = open_image(str(path))
    with pytest.raises(DiskError, match="saved state"):
        disk.resize(2 * MIB)
    disk.close()


# Chains


def test_child_finds_its_parent_after_both_moved(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "gold").mkdir()
    made(folder / "gold" / "base ü.vhd").close()
    child_of(folder / "gold" / "base ü.vhd", folder / "child.vhd").close()
    shutil.move(folder, tmp_path / "two")
    open_image(str(tmp_path / "two" / "child.vhd")).close()
    shutil.move(tmp_path / "two" / "gold" / "base ü.vhd", tmp_path / "two" / "base ü.vhd")
    disk = open_image(str(tmp_path / "two" / "child.vhd"))
    assert disk.parent is not None and disk.parent.path == str(tmp_path / "two" / "base ü.vhd")
    disk.close()


def test_url_of_a_mac_leads_to_the_parent(tmp_path: Path) -> None:
    (tmp_path / "base disk.vhd").write_bytes(bytes(MIB) + footer(MIB, 2))
    url = f"file://localhost{tmp_path}/base%20disk.vhd".encode()
    locator = b"MacX" + (512).to_bytes(4, "big") + len(url).to_bytes(4, "big") + bytes(4) + (1 << 20).to_bytes(8, "big")
    raw = dynamic(MIB, 65536, {}, kind=4, parent=ID, locators=locator)
    (tmp_path / "child.vhd").write_bytes(raw[:-512].ljust(1 << 20, b"\0") + url.ljust(512, b"\0") + raw[-512:])
    disk = open_image(str(tmp_path / "child.vhd"))
    assert disk.parent is not None and disk.parent.identity == ID
    put(disk, 0, b"x" * MIB)
    disk.close()
    disk = open_image(str(tmp_path / "child.vhd"))  # the name has not been written over
    assert content(disk) == b"x" * MIB
    disk.close()


def test_parent_of_another_id_is_refused(tmp_path: Path) -> None:
    made(tmp_path / "base.vhd").close()
    child_of(tmp_path / "base.vhd", tmp_path / "child.vhd").close()
    (tmp_path / "base.vhd").unlink()
    made(tmp_path / "base.vhd").close()
    assert "is not the parent that it was made from: its id is" in refusal(tmp_path / "child.vhd")
    findings = check_image(str(tmp_path / "child.vhd"))
    assert [finding.severity for finding in findings] == ["error"] and "its id is" in findings[0].message


def test_parent_written_later_is_told(tmp_path: Path) -> None:
    made(tmp_path / "base.vhd").close()
    child_of(tmp_path / "base.vhd", tmp_path / "child.vhd").close()
    assert check_image(str(tmp_path / "child.vhd")) == []
    later = os.stat(tmp_path / "base.vhd").st_mtime + 10
    os.utime(tmp_path / "base.vhd", (later, later))
    findings = check_image(str(tmp_path / "child.vhd"))
    assert [finding.severity for finding in findings] == ["warning"] and "was written after" in findings[0].message


# Threads


def test_flush_covers_what_all_threads_wrote_before_it(tmp_path: Path) -> None:
    """Writers of neighbouring sectors and flushes at once: no bit of a bitmap is lost, and no block given twice."""
    made(tmp_path / "base.vhd", MIB, block_size=8192).close()
    disk = child_of(tmp_path / "base.vhd", tmp_path / "child.vhd", block_size=8192)
    sectors = MIB // SECTOR
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            rng = random.Random(number)
            mine = list(range(number, sectors, 4))
            rng.shuffle(mine)
            for done, sector in enumerate(mine):
                put(disk, sector * SECTOR, sector.to_bytes(2, "big") * 256)
                if done % 50 == 0:
                    disk.flush()
        except BaseException as error:  # noqa: BLE001 - shown by the assertion
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    disk.flush()
    shutil.copy(disk.path, tmp_path / "copy.vhd")  # as a killed process leaves it
    disk.close()
    for name in ("child.vhd", "copy.vhd"):
        disk = open_image(str(tmp_path / name))
        assert content(disk) == b"".join(sector.to_bytes(2, "big") * 256 for sector in range(sectors))
        disk.close()


def test_bitmaps_that_are_not_kept_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devices.storage.vhd.bitmaps._KEPT", 0)
    monkeypatch.setattr("devices.storage.vhd.bitmaps._WAITING", 3 * SECTOR)
    disk = made(tmp_path / "base.vhd", MIB, block_size=8192)
    put(disk, 0, b"b" * MIB)
    disk.close()
    disk = child_of(tmp_path / "base.vhd", tmp_path / "child.vhd", block_size=8192)
    expected = bytearray(b"b" * MIB)
    rng = random.Random(1)
    for _ in range(200):
        offset = rng.randrange(MIB // SECTOR) * SECTOR
        expected[offset : offset + SECTOR] = data = rng.randbytes(SECTOR)
        put(disk, offset, data)
        assert content(disk, offset, SECTOR) == data
    assert content(disk) == expected
    disk.close()
    disk = open_image(str(tmp_path / "child.vhd"))
    assert content(disk) == expected
    disk.close()


def test_lack_of_room_is_an_error_of_the_write_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = made(tmp_path / "disk.vhd", block_size=65536)
    put(disk, 0, b"a" * 65536)
    real = os.pwritev

    def full(fd: int, views: list[memoryview], offset: int) -> int:
        if offset > 70_000:
            raise OSError(errno.ENOSPC, "no space left")
        return real(fd, views, offset)

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="no space left"):
        put(disk, MIB, b"b" * 512)
    monkeypatch.undo()
    put(disk, MIB, b"c" * 512)
    assert content(disk, 0, 65536) == b"a" * 65536 and content(disk, MIB, 1024) == b"c" * 512 + bytes(512)
    disk.close()
    assert check_image(disk.path) == []


# What was not closed


def test_room_for_blocks_to_come_is_cut_off_when_the_image_is_opened_again(tmp_path: Path) -> None:
    disk = made(tmp_path / "disk.vhd")
    put(disk, 0, b"x" * MIB)
    disk.flush()
    left = tmp_path / "left.vhd"
    shutil.copy(disk.path, left)
    disk.close()
    assert os.stat(left).st_size > os.stat(disk.path).st_size + 32 * MIB
    findings = check_image(str(left))
    assert [(one.severity, one.repaired) for one in findings] == [("warning", False)]
    open_image(str(left), readonly=True).close()
    assert os.stat(left).st_size > os.stat(disk.path).st_size
    assert [one.repaired for one in check_image(str(left), repair=True)] == [True]
    assert left.read_bytes() == Path(disk.path).read_bytes()


@pytest.mark.parametrize("which", ["end", "start"])
@pytest.mark.parametrize("repair", ["check", "open"])
def test_one_good_footer_is_enough_and_brings_the_other_back(tmp_path: Path, which: str, repair: str) -> None:
    disk = made(tmp_path / "disk.vhd")
    put(disk, 0, b"x" * MIB)
    disk.close()
    path = tmp_path / "disk.vhd"
    whole = path.read_bytes()
    path.write_bytes(whole[:-512] if which == "end" else b"?" * 512 + whole[512:])
    readonly = open_image(str(path), readonly=True)
    assert content(readonly, 0, MIB) == b"x" * MIB
    readonly.close()
    assert f"footer at the {which} of the file" in check_image(str(path))[0].message
    assert path.read_bytes() != whole
    if repair == "check":
        assert [one.repaired for one in check_image(str(path), repair=True)] == [True]
    else:
        open_image(str(path)).close()
    assert path.read_bytes() == whole


def test_unused_image_is_not_changed_by_opening_it(tmp_path: Path) -> None:
    """Also when its writer left a little room before the footer, as Hyper-V does for alignment."""
    raw = dynamic(MIB, 65536, {5: b"5" * SECTOR})
    for name, image in (("tight", raw), ("loose", raw[:-512] + bytes(4096) + raw[-512:])):
        path = tmp_path / f"{name}.vhd"
        path.write_bytes(image)
        assert check_image(str(path)) == []
        open_image(str(path)).close()
        assert path.read_bytes() == image
        disk = open_image(str(path))
        put(disk, 512 << 10, b"x" * SECTOR)
        disk.close()
        disk = open_image(str(path))
        assert content(disk, 5 * SECTOR, SECTOR) == b"5" * SECTOR and content(disk, 512 << 10, SECTOR) == b"x" * SECTOR
        disk.close()


def test_sector_0_of_a_fixed_disk_cannot_make_it_another(tmp_path: Path) -> None:
    """A guest writes a footer and a header there that name a file of the host as parent."""
    disk = made(tmp_path / "disk.vhd", kind="fixed")
    evil = dynamic(MIB, 65536, {}, kind=4)
    put(disk, 0, evil[: len(evil) // 512 * 512])
    disk.close()
    disk = open_image(str(tmp_path / "disk.vhd"))
    assert disk.inspect()["kind"] == "fixed" and content(disk, 0, 512) == evil[:512]
    disk.close()


def test_block_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "disk.vhd").close()
    file = HostFile(str(tmp_path / "disk.vhd"))
    file.is_block = True
    with pytest.raises(DiskError, match="must be a regular file"):
        open_layer(file, "vhd")


def test_medium_that_cannot_be_read_refuses_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "disk.vhd").close()

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    assert "cannot be read: Input/output error" in refusal(tmp_path / "disk.vhd")
