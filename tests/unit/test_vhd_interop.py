"""Other programs read the VHD images that we write, byte for byte, and we those of others.

They are QEMU's qemu-img, libvhdi with its Python module, and dissect.hypervisor. Chains are judged by libvhdi: the
others ignore the parent of a VHD.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from dissect.hypervisor.disk.vhd import VHD

from devices.storage.chain import Layer
from devices.storage.file import HostFile
from devices.storage.images import check_image, open_image
from devices.storage.vhd.create import create

if TYPE_CHECKING:
    from devices.storage.backend import Disk

#: The system's Python, which has Debian's module of libvhdi.
_READ_BY_LIBVHDI = """
import sys
import pyvhdi
files = []
for path in sys.argv[1:]:
    file = pyvhdi.file()
    file.open(path)
    if files:
        files[-1].set_parent(file)
    files.append(file)
sys.stdout.buffer.write(files[0].read_buffer_at_offset(files[0].get_media_size(), 0))
"""
SIZE = (9 << 20) + 512


def run(*words: str) -> bytes:
    done = subprocess.run(words, capture_output=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr.decode()}{done.stdout.decode()}"
    return done.stdout


def by_libvhdi(*paths: str) -> bytes:
    return run("/usr/bin/python3", "-c", _READ_BY_LIBVHDI, *paths)


def by_dissect(path: str) -> bytes:
    with open(path, "rb") as file:
        disk = VHD(file)
        data: bytes = disk.read(disk.size)
        return data


def by_qemu(path: str) -> bytes:
    raw = f"{path}.raw"
    run("qemu-img", "convert", "-f", "vpc", "-O", "raw", path, raw)
    return Path(raw).read_bytes()


def content(disk: Disk) -> bytes:
    data = bytearray(b"\xee" * disk.size)
    disk.read(0, [memoryview(data)])
    return bytes(data)


def fill(disk: Disk, seed: int, spans: int = 12) -> None:
    """Write, zero and trim at random."""
    rng = random.Random(seed)
    for number in range(spans):
        offset = rng.randrange(disk.size // 512) * 512
        length = min(rng.choice((512, 4096, 70_000 // 512 * 512, 3 << 20)), disk.size - offset)
        if number % 4 == 3:
            (disk.write_zeros if number % 8 == 3 else disk.trim)(offset, length)
        else:
            disk.write(offset, [memoryview(rng.randbytes(length))])
    disk.flush()


def created(path: Path, size: int | None = None, kind: str = "dynamic", parent: Path | None = None) -> Disk:
    above = open_image(str(parent), readonly=True) if parent is not None else None
    if above is not None:
        kind, size = "differencing", size or above.size
    assert size is not None and isinstance(above, Layer | None)
    return create(HostFile.create(str(path)), size, kind=kind, parent=above)


def written(disk: Disk, seed: int = 1) -> bytes:
    """Fill and close a disk."""
    fill(disk, seed)
    expected = content(disk)
    disk.close()
    return expected


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
@pytest.mark.parametrize("size", [SIZE, 512, 4 << 20])
def test_all_read_what_we_write(tmp_path: Path, kind: str, size: int) -> None:
    path = str(tmp_path / "disk.vhd")
    expected = written(created(tmp_path / "disk.vhd", size, kind))
    assert by_qemu(path) == expected
    assert by_libvhdi(path) == expected
    assert by_dissect(path) == expected
    assert json.loads(run("qemu-img", "info", "--output=json", "-f", "vpc", path))["virtual-size"] == size
    raw = tmp_path / "disk.img"
    raw.write_bytes(expected)
    assert b"Images are identical" in run("qemu-img", "compare", "-f", "vpc", "-F", "raw", path, str(raw))


def test_libvhdi_agrees_on_the_particulars(tmp_path: Path) -> None:
    written(created(tmp_path / "base.vhd", SIZE))
    written(created(tmp_path / "child.vhd", parent=tmp_path / "base.vhd"))
    base = run("vhdiinfo", str(tmp_path / "base.vhd")).decode()
    child = run("vhdiinfo", str(tmp_path / "child.vhd")).decode()
    disk = open_image(str(tmp_path / "child.vhd"))
    assert disk.parent is not None
    raw = disk.parent.identity.hex()
    name = "-".join((raw[:8], raw[8:12], raw[12:16], raw[16:20], raw[20:]))
    disk.close()
    for text, kind in ((base, "Dynamic"), (child, "Differential")):
        assert f"({SIZE} bytes)" in text and kind in text
    assert name in child and "base.vhd" in child


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_libvhdi_reads_our_chains(tmp_path: Path, depth: int, kind: str) -> None:
    expected = written(created(tmp_path / "0.vhd", SIZE, kind))
    for level in range(1, depth + 1):
        expected = written(created(tmp_path / f"{level}.vhd", parent=tmp_path / f"{level - 1}.vhd"), level + 1)
    paths = [str(tmp_path / f"{level}.vhd") for level in range(depth, -1, -1)]
    assert by_libvhdi(*paths) == expected
    disk = open_image(paths[0])
    assert content(disk) == expected
    disk.close()


def test_grown_disk_is_read_by_all(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.vhd")
    before = written(create(HostFile.create(path), SIZE, block_size=64 << 10))
    disk = open_image(path)
    disk.resize(40 << 20)  # with more entries than there was room for, so the table has to move
    assert content(disk) == before + bytes((40 << 20) - SIZE)
    expected = written(disk, 5)
    assert by_qemu(path) == expected
    assert by_libvhdi(path) == expected


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
@pytest.mark.parametrize("force_size", ["on", "off"])
def test_we_read_what_qemu_writes(tmp_path: Path, kind: str, force_size: str) -> None:
    source = tmp_path / "source.img"
    source.write_bytes(bytes(SIZE))
    written(open_image(str(source)))
    path = str(tmp_path / "disk.vhd")
    options = f"subformat={kind},force_size={force_size}"
    run("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", options, str(source), path)
    assert check_image(path) == []
    expected = by_qemu(path)
    assert (len(expected) == SIZE) == (force_size == "on")
    disk = open_image(path)
    assert content(disk) == expected
    expected = written(disk, 2)
    assert by_qemu(path) == expected
    assert by_libvhdi(path)[: len(expected)] == expected


def test_image_of_a_killed_process_is_read_by_all(tmp_path: Path) -> None:
    """Room for blocks to come lies behind the blocks then, with a footer at its end."""
    disk = created(tmp_path / "disk.vhd", SIZE)
    fill(disk, 1)
    left = str(tmp_path / "left.vhd")
    shutil.copy(tmp_path / "disk.vhd", left)
    expected = content(disk)
    disk.close()
    assert by_qemu(left) == expected
    assert by_libvhdi(left) == expected
    assert by_dissect(left) == expected
    disk = open_image(left)
    assert content(disk) == expected
    disk.close()
    assert Path(left).stat().st_size == (tmp_path / "disk.vhd").stat().st_size
