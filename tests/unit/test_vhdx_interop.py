"""Other programs read the VHDX images that we write, byte for byte, and we those of others.

They are QEMU's tools, libvhdi with its Python module, and dissect.hypervisor. Chains are judged by the last: QEMU knows
no VHDX with a parent. Nor does it know sectors of 4096 bytes.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devices.storage.file import HostFile
from devices.storage.images import check_image, open_image
from devices.storage.merge import merge, open_to_merge
from devices.storage.vhdx.create import create
from devices.storage.vhdx.disk import VhdxDisk
from devices.storage.vhdx.format import LOG_ENTRY
from devices.storage.vhdx.header import Headers, Regions
from devices.storage.vhdx.log import is_dirty

if TYPE_CHECKING:
    from devices.storage.backend import Disk

MIB = 1 << 20
SIZE = 9 * MIB + 4096

_READ_BY_DISSECT = """
import pathlib, sys
from dissect.hypervisor.disk.vhdx import VHDX
disk = VHDX(pathlib.Path(sys.argv[1]))
disk.seek(int(sys.argv[2]))
sys.stdout.buffer.write(disk.read(disk.size - int(sys.argv[2])))
"""

#: The system's Python, which has Debian's module of libvhdi.
_READ_BY_LIBVHDI = """
import sys
import pyvhdi
file = pyvhdi.file()
file.open(sys.argv[1])
sys.stdout.buffer.write(file.read_buffer_at_offset(file.get_media_size(), 0))
"""


def run(*words: str, status: int = 0) -> bytes:
    done = subprocess.run(words, capture_output=True, check=False)
    assert done.returncode == status, f"{words}: {done.stderr.decode()}{done.stdout.decode()}"
    return done.stdout


def by_qemu(path: Path) -> bytes:
    run("qemu-img", "check", "-f", "vhdx", str(path))
    run("qemu-img", "convert", "-f", "vhdx", "-O", "raw", str(path), f"{path}.raw")
    return Path(f"{path}.raw").read_bytes()


def by_libvhdi(path: Path) -> bytes:
    return run("/usr/bin/python3", "-c", _READ_BY_LIBVHDI, str(path))


def by_dissect(path: Path, offset: int = 0) -> bytes:
    """In a process of its own, since it leaves files open."""
    return run(sys.executable, "-W", "ignore", "-c", _READ_BY_DISSECT, str(path), str(offset))


def by_us(path: Path, readonly: bool = True) -> bytes:
    disk = open_image(str(path), readonly)
    try:
        data = bytearray(b"\xee" * disk.size)
        disk.read(0, [memoryview(data)])
        return bytes(data)
    finally:
        disk.close()


def made(path: Path, parent: Path | None = None, size: int = SIZE, **options: object) -> VhdxDisk:
    base = None
    if parent is not None:
        base = open_image(str(parent), readonly=True)
        options["kind"] = "differencing"
    return create(HostFile.create(str(path)), size, parent=base, **options)  # type: ignore[arg-type]


def fill(disk: Disk, seed: int, spans: int = 16) -> None:
    """Write, zero and trim at random."""
    rng = random.Random(seed)
    for number in range(spans):
        offset = rng.randrange(disk.size // 4096) * 4096
        length = min(rng.choice((4096, 65536, 3 * MIB)), disk.size - offset)
        if number % 4 == 3:
            disk.write_zeros(offset, length)
        else:
            disk.write(offset, [memoryview(rng.randbytes(length))])


@pytest.mark.parametrize("block", [1, 2, 32, 256])
@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_others_read_what_we_write(tmp_path: Path, kind: str, block: int) -> None:
    path = tmp_path / "disk.vhdx"
    disk = made(path, kind=kind, block_size=block * MIB)
    fill(disk, block)
    disk.close()
    ours = by_us(path)
    assert any(ours) and len(ours) == SIZE
    assert by_qemu(path) == ours
    assert by_libvhdi(path) == ours
    assert by_dissect(path) == ours


def test_others_read_sectors_of_4096_bytes(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    disk = made(path, sector_size=4096)
    fill(disk, 4096)
    disk.close()
    assert by_libvhdi(path) == by_dissect(path) == by_us(path)


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_others_read_what_we_resized(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk.vhdx"
    disk = made(path, kind=kind, block_size=MIB)
    fill(disk, 1)
    for size in (5 * MIB + 512, SIZE, 12 * MIB):
        disk.resize(size)
        fill(disk, size, 4)
    disk.close()
    ours = by_us(path)
    assert len(ours) == 12 * MIB
    assert by_qemu(path) == by_libvhdi(path) == by_dissect(path) == ours


def test_others_read_a_table_that_moved(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    disk = made(path, block_size=MIB)
    fill(disk, 2)
    disk.resize(130 << 30)
    disk.write((130 << 30) - 4096, [memoryview(b"end!" * 1024)])
    disk.close()
    run("qemu-img", "check", "-f", "vhdx", str(path))
    seen = run("qemu-io", "-r", "-f", "vhdx", "-c", f"read -vP 0x65 {(130 << 30) - 4096} 1", str(path))
    assert b"read 1/1 bytes" in seen and b"failed" not in seen
    assert by_dissect(path, (130 << 30) - 4096) == b"end!" * 1024


def test_a_chain_reads_the_same_to_dissect(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    paths = [tmp_path / name for name in ("a.vhdx", "sub/b.vhdx", "c.vhdx")]
    for number, path in enumerate(paths):
        disk = made(path, paths[number - 1] if number else None, block_size=MIB << number)
        fill(disk, number, 8)
        disk.close()
        assert by_dissect(path) == by_us(path)


def test_a_merged_parent_and_its_kept_child_read_the_same_to_others(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.vhdx", "b.vhdx", "c.vhdx")]
    for number, path in enumerate(paths):
        disk = made(path, paths[number - 1] if number else None)
        fill(disk, number, 8)
        disk.close()
    ours = by_us(paths[2])
    for _ in range(2):  # a second merge has a parent locator to move that the first one wrote
        child, base = open_to_merge(str(paths[2]), into=str(paths[0]))
        merge(child, base)
        child.close()
        assert by_us(paths[2]) == by_dissect(paths[2]) == ours
        assert by_us(paths[0]) == by_qemu(paths[0]) == by_libvhdi(paths[0]) == by_dissect(paths[0]) == ours


@pytest.mark.parametrize("options", ["", "subformat=fixed", "block_size=1M,log_size=2M", "block_size=256M"])
def test_we_read_and_write_what_qemu_img_makes(tmp_path: Path, options: str) -> None:
    source, path = tmp_path / "source.raw", tmp_path / "disk.vhdx"
    data = random.Random(1).randbytes(3 * MIB) + bytes(3 * MIB) + b"end." * 128
    source.write_bytes(data)
    words = ["-o", options] if options else []
    run("qemu-img", "convert", "-f", "raw", "-O", "vhdx", *words, str(source), str(path))
    assert by_us(path) == data
    assert check_image(str(path)) == []
    disk = open_image(str(path))
    disk.write(4 * MIB, [memoryview(b"ours" * 1024)])
    disk.close()
    data = data[: 4 * MIB] + b"ours" * 1024 + data[4 * MIB + 4096 :]
    assert by_qemu(path) == by_us(path) == data


def test_qemu_goes_on_with_what_we_began_and_we_with_that(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    disk = made(path, block_size=MIB)
    fill(disk, 3)
    disk.close()
    data = bytearray(by_us(path))
    run("qemu-io", "-f", "vhdx", "-c", "write -P 7 0 5M", "-c", "write -P 8 8M 64k", str(path))
    data[: 5 * MIB] = b"\7" * 5 * MIB
    data[8 * MIB : 8 * MIB + 65536] = b"\10" * 65536
    assert check_image(str(path)) == []
    again = open_image(str(path))
    again.write_zeros(MIB, 2 * MIB)
    again.close()
    data[MIB : 3 * MIB] = bytes(2 * MIB)
    assert by_us(path) == by_qemu(path) == data


def test_we_replay_the_log_of_a_qemu_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    run("qemu-img", "create", "-f", "vhdx", "-o", "block_size=1M", str(path), "16M")
    run("qemu-io", "-f", "vhdx", "-c", "write -P 1 0 64k", str(path))
    file = HostFile(str(path))
    before = Headers(file).current
    table = Regions(file, before.log_offset, before.log_length).bat.offset
    entries = file.read_bytes(table, 4096)
    file.write_bytes(before.log_offset, bytes(MIB))
    file.close()
    run("qemu-io", "-f", "vhdx", "-c", "write -P 2 5M 64k", str(path))
    # QEMU brings each change to its place at once. As if it had been killed before: the log is named, the table is old.
    file = HostFile(str(path))
    now = Headers(file).current
    signature, *_, log_guid, _, _ = LOG_ENTRY.unpack(file.read_bytes(now.log_offset, LOG_ENTRY.size))
    assert signature == b"loge"
    assert file.read_bytes(table, 4096) != entries
    Headers(file).update(log_guid=log_guid)
    file.write_bytes(table, entries)
    file.close()
    expected = b"\1" * 65536 + bytes(5 * MIB - 65536) + b"\2" * 65536 + bytes(11 * MIB - 65536)
    assert by_us(path) == expected  # a reader sees through the log, and leaves it alone
    assert is_left_dirty(path)
    assert [finding.severity for finding in check_image(str(path))] == ["warning"]
    assert by_us(path, readonly=False) == expected
    assert not is_left_dirty(path)
    assert by_qemu(path) == expected


def test_qemu_replays_the_log_of_ours_that_was_killed(tmp_path: Path) -> None:
    path, left = tmp_path / "disk.vhdx", tmp_path / "left.vhdx"
    disk = made(path, block_size=MIB)
    for seed in range(5):
        fill(disk, seed, 4)
        disk.flush()
    shutil.copy(path, left)
    disk.close()
    assert is_left_dirty(left)
    erase_table(left)
    run("qemu-img", "check", "-f", "vhdx", "-r", "all", str(left))
    assert by_qemu(left) == by_us(path)


def erase_table(path: Path) -> None:
    """Lose the first sector of the BAT, which is all that it uses."""
    file = HostFile(str(path))
    header = Headers(file).current
    offset = Regions(file, header.log_offset, header.log_length).bat.offset
    file.write_bytes(offset, bytes(4096))
    file.close()


def is_left_dirty(path: Path) -> bool:
    file = HostFile(str(path), readonly=True)
    try:
        return is_dirty(Headers(file).current)
    finally:
        file.close()
