from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from devices.storage import file
from devices.storage.backend import DATA, ZERO, DiskError, Extent
from devices.storage.file import HostFile
from devices.storage.images import format_of, open_image
from devices.storage.raw import RawDisk
from tests.fakes.disks import MemoryDisk, check_disk

if TYPE_CHECKING:
    from collections.abc import Iterator


def image(tmp_path: Path, size: int = 1 << 20, name: str = "disk.img") -> str:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(size)
    return str(path)


def opened(path: str, readonly: bool = False, **sizes: int) -> RawDisk:
    return RawDisk(HostFile(path, readonly), **sizes)


def refusal(path: str, readonly: bool = False, **sizes: int) -> str:
    with pytest.raises(DiskError) as caught:
        opened(path, readonly, **sizes)
    message = str(caught.value)
    assert message.startswith(path) and "\n" not in message
    return message


def test_raw_disk_behaves_as_a_run_of_bytes(tmp_path: Path) -> None:
    numbers = count()
    check_disk(lambda size: opened(image(tmp_path, size, f"{next(numbers)}.img")))


def test_the_test_disk_itself_conforms() -> None:
    check_disk(MemoryDisk, examples=10)


def test_short_transfers_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, pwritev = os.preadv, os.pwritev

    def seven(views: list[memoryview]) -> list[memoryview]:
        return [next(view for view in views if len(view))[:7]]

    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, seven(views), offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: pwritev(fd, seven(views), offset))
    numbers = count()
    check_disk(lambda size: opened(image(tmp_path, size, f"{next(numbers)}.img")), examples=3)


def test_more_buffers_than_one_system_call_takes(tmp_path: Path) -> None:
    path = image(tmp_path)
    Path(path).write_bytes(os.urandom(1 << 20))
    disk = opened(path)
    buffer = bytearray(1 << 20)
    views = [memoryview(buffer)[at : at + 256] for at in range(0, 1 << 20, 256)]
    disk.read(0, views)
    assert bytes(buffer) == Path(path).read_bytes()
    buffer.reverse()
    disk.write(0, views)
    assert bytes(buffer) == Path(path).read_bytes()


def test_trim_gives_file_blocks_back(tmp_path: Path) -> None:
    path = image(tmp_path, 4 << 20)
    disk = opened(path)
    disk.write(0, [memoryview(os.urandom(4 << 20))])
    disk.flush()
    before = os.stat(path).st_blocks
    disk.trim(1 << 20, 2 << 20)
    after = os.stat(path)
    assert after.st_blocks <= before - (2 << 20) // 512
    assert after.st_size == 4 << 20


def test_trim_writes_zeros_where_holes_cannot_be_punched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "no holes here")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    numbers = count()
    check_disk(lambda size: opened(image(tmp_path, size, f"{next(numbers)}.img")), examples=3)


def test_image_truncated_while_in_use_is_an_io_error_on_reading(tmp_path: Path) -> None:
    path = image(tmp_path)
    disk = opened(path)
    os.truncate(path, 4096)
    disk.read(0, [memoryview(bytearray(4096))])
    for offset in (0, 8192):
        with pytest.raises(OSError) as caught:
            disk.read(offset, [memoryview(bytearray(8192))])
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, path)


def test_second_writer_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    path = image(tmp_path)
    disk = opened(path)
    assert "in use by another VM" in refusal(path)
    assert "in use by another VM" in refusal(path, readonly=True)
    disk.close()
    opened(path).close()


def test_writer_is_refused_while_another_process_reads(tmp_path: Path) -> None:
    path = image(tmp_path)
    script = (
        "import sys; from devices.storage.images import open_image\n"
        "disk = open_image(sys.argv[1], readonly=True); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert "in use by another VM" in refusal(path)
        opened(path, readonly=True).close()
        other.communicate(b"\n", timeout=30)
    opened(path).close()


def test_readonly_disk_refuses_writes_at_the_file(tmp_path: Path) -> None:
    disk = opened(image(tmp_path), readonly=True)
    with pytest.raises(OSError):
        disk.write(0, [memoryview(bytes(512))])


@pytest.mark.parametrize(("size", "says"), [(0, "empty"), (1000, "not a multiple of the 512-byte sector")])
def test_image_of_impossible_size_is_refused(tmp_path: Path, size: int, says: str) -> None:
    assert says in refusal(image(tmp_path, size))


def test_4096_byte_sectors_need_a_size_to_match(tmp_path: Path) -> None:
    assert "4096-byte sector" in refusal(image(tmp_path, 512), sector_size=4096)
    disk = opened(image(tmp_path), sector_size=4096)
    assert (disk.sector_size, disk.physical_sector_size) == (4096, 4096)
    disk.close()
    assert "sector sizes 512/1000" in refusal(image(tmp_path), physical_sector_size=1000)


def test_sector_size_is_for_raw_images_alone(tmp_path: Path) -> None:
    disk = open_image(image(tmp_path), sector_size=4096)
    assert disk.sector_size == 4096
    disk.close()
    with pytest.raises(DiskError, match="a vhdx image has a sector size of its own"):
        open_image(str(tmp_path / "a.vhdx"), sector_size=4096)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(str(tmp_path / "nothing.img"))
    assert "not a regular file" in refusal(str(tmp_path))
    assert "not a regular file" in refusal("/dev/null")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_image_without_write_permission_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = image(tmp_path)
    os.chmod(path, 0o400)
    assert ",readonly" in refusal(path)
    opened(path, readonly=True).close()


def test_failed_open_leaves_no_file_open(tmp_path: Path) -> None:
    path = image(tmp_path, 1000)
    before = os.listdir("/proc/self/fd")
    refusal(path)
    assert os.listdir("/proc/self/fd") == before


def test_identity_belongs_to_the_path(tmp_path: Path) -> None:
    first, second = image(tmp_path, name="a.img"), image(tmp_path, name="b.img")
    link = tmp_path / "link.img"
    link.symlink_to(first)
    disk = opened(first)
    identity = disk.identity
    disk.close()
    assert len(identity) == 16
    assert opened(str(link)).identity == identity
    assert opened(second).identity != identity


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    made = subprocess.run(["losetup", "-f", "--show", image(tmp_path)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device
    subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.skipif(shutil.which("losetup") is None, reason="no losetup")
def test_block_device_is_a_disk_of_one_user(loop_device: str) -> None:
    disk = opened(loop_device)
    assert disk.size == 1 << 20 and not disk.trim_zeroes
    disk.write(4096, [memoryview(b"block" * 1024)[:4096]])
    disk.flush()
    disk.trim(8192, 4096)
    assert "is using this block device" in refusal(loop_device)
    disk.close()
    disk = opened(loop_device, readonly=True)
    buffer = bytearray(512)
    disk.read(4096, [memoryview(buffer)])
    assert buffer == (b"block" * 1024)[:512]
    disk.close()


def test_storage_loads_nothing_slow() -> None:
    script = "import sys; import devices.storage.images, devices.storage.raw; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    slow = {"ctypes", "dataclasses", "enum", "hashlib", "inspect", "json", "logging", "pathlib", "re", "typing"}
    assert not loaded & slow


def test_lock_structure_is_the_kernels() -> None:
    assert file._FLOCK.size == 32 and file._SPACE_RESV.size == 48


def test_extents_tell_holes_from_data(tmp_path: Path) -> None:
    disk = opened(image(tmp_path, 4 << 20))
    disk.write(1 << 20, [memoryview(b"x" * (1 << 20))])
    expected = [Extent(0, 1 << 20, ZERO), Extent(1 << 20, 1 << 20, DATA), Extent(2 << 20, 2 << 20, ZERO)]
    assert list(disk.extents(0, disk.size)) == expected
    assert list(disk.extents(1 << 19, 1 << 20)) == [Extent(1 << 19, 1 << 19, ZERO), Extent(1 << 20, 1 << 19, DATA)]
    disk.write_zeros(1 << 20, 1 << 20)
    assert list(disk.extents(0, disk.size)) == [Extent(0, 4 << 20, ZERO)]


def test_resized_disk_keeps_its_data_and_reads_zeros_beyond(tmp_path: Path) -> None:
    disk = opened(image(tmp_path, 4096))
    disk.write(0, [memoryview(b"x" * 4096)])
    disk.resize(8192)
    buffer = bytearray(8192)
    disk.read(0, [memoryview(buffer)])
    assert disk.size == 8192 and buffer == b"x" * 4096 + bytes(4096)
    with pytest.raises(DiskError, match="not a multiple"):
        disk.resize(1000)


def test_created_file_never_takes_the_place_of_another(tmp_path: Path) -> None:
    path = str(tmp_path / "new.img")
    HostFile.create(path).close()
    with pytest.raises(DiskError, match="exists already"):
        HostFile.create(path)
    with pytest.raises(DiskError, match="cannot be created"):
        HostFile.create(str(tmp_path / "none" / "new.img"))


def test_format_comes_from_the_name_and_never_from_the_content(tmp_path: Path) -> None:
    assert [format_of(name) for name in ("a.img", "b.RAW", "/dev/sda", "c", "dir.iso/c", "d.ISO")] == ["raw"] * 5 + [
        "iso"
    ]
    with pytest.raises(DiskError, match="unknown format zip"):
        open_image(image(tmp_path), format="zip")


def test_iso_image_is_a_readonly_disc_of_2048_byte_sectors(tmp_path: Path) -> None:
    disc = open_image(image(tmp_path, 5 * 2048 + 512, "cd.iso"))
    assert (disc.optical, disc.readonly, disc.sector_size, disc.size) == (True, True, 2048, 5 * 2048)
    disc.close()
    with pytest.raises(DiskError, match="smaller than one"):
        open_image(image(tmp_path, 1024, "short.iso"))


@pytest.mark.parametrize(
    ("size", "geometry"),
    [  # from the flow chart in the appendix of the VHD 1.0 specification
        (17 * 4 * 100 * 512, (100, 4, 17)),
        (1 << 30, (2080, 16, 63)),
        (65535 * 16 * 255 * 512, (65535, 16, 255)),
        (1 << 40, (65535, 16, 255)),
    ],
)
def test_geometry_follows_the_vhd_specification(tmp_path: Path, size: int, geometry: tuple[int, int, int]) -> None:
    shape = opened(image(tmp_path, size)).geometry
    assert (shape.cylinders, shape.heads, shape.sectors) == geometry


def test_flushes_that_wait_for_another_share_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, go_on, calls = threading.Semaphore(0), threading.Event(), []
    real = os.fdatasync

    class Lock:
        """Tells when somebody comes to it."""

        lock = threading.Lock()

        def __enter__(self) -> None:
            arrived.release()
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    def slow(fd: int) -> None:
        calls.append(fd)
        assert go_on.wait(30)
        real(fd)

    file = HostFile(image(tmp_path))
    monkeypatch.setattr(file._flush, "_lock", Lock())
    monkeypatch.setattr(os, "fdatasync", slow)
    threads = [threading.Thread(target=file.flush) for _ in range(6)]
    for thread in threads:
        thread.start()
        assert arrived.acquire(timeout=30)
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 2
    file.close()


def test_flush_that_failed_is_never_followed_by_one_that_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = image(tmp_path)
    disk = opened(path)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        disk.flush()
    monkeypatch.undo()
    for act in (disk.flush, disk.close):
        with pytest.raises(OSError, match="an earlier flush failed") as caught:
            act()
        assert caught.value.errno == errno.EIO
    disk = opened(path)  # all the same the file is closed, and free for others
    disk.flush()
    disk.close()


def test_flush_that_failed_in_c_counts_as_one_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = opened(image(tmp_path))
    monkeypatch.setattr(disk, "fast", SimpleNamespace(flush_failed=True, close=lambda: None))
    for act in (disk.flush, disk.close):
        with pytest.raises(OSError, match="an earlier flush failed"):
            act()
