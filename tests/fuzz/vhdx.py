"""VHDX images with anything wrong in them: refused with a DiskError or an OSError, soon, or used without harm."""

from __future__ import annotations

import os
import random
import resource
import shutil
import struct
import tempfile
import time
from pathlib import Path

from devices.storage.backend import DiskError
from devices.storage.file import HostFile
from devices.storage.images import check_image, open_image
from devices.storage.vhdx.create import create
from devices.storage.vhdx.format import seal
from devices.storage.vhdx.header import Headers
from devices.storage.vhdx.journal import LogWriter
from tests.fuzz.native import FuzzError

_MIB = 1 << 20
#: What one image may take, in seconds and in bytes of memory beyond what was used before; on a busy machine.
_SECONDS, _MEMORY = 20.0, 256 << 20
#: Structures as `create` places them: where they are, and the bytes that their checksum is for (none: 0).
_STRUCTURES = (
    *((0, 0), (0x10000, 4096), (0x20000, 4096), (0x30000, 65536), (0x40000, 65536)),
    *((_MIB, 8192), (2 * _MIB, 0), (2 * _MIB + 65536, 0), (3 * _MIB, 0), (3 * _MIB + 32768, 0)),
)
_NUMBERS = (
    0,
    1,
    2,
    6,
    7,
    8,
    64,
    126,
    512,
    4096,
    65536,
    _MIB,
    2 * _MIB,
    3 * _MIB,
    4 * _MIB,
    5 * _MIB,
    1 << 31,
    (1 << 32) - 1,
)
_LARGE = (1 << 40, 64 << 40, 1 << 46, 1 << 60, 1 << 63, (1 << 64) - 1)


def run(seed: int, seconds: float) -> str:
    """Try images until the time is up; raises FuzzError."""
    with tempfile.TemporaryDirectory(
        prefix="pyvmm-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None
    ) as name:
        folder = Path(name)
        seeds = _seeds(folder)
        end, tried, opened = time.monotonic() + seconds, 0, 0
        while time.monotonic() < end:
            rng = random.Random(seed + tried)
            path = folder / "fuzzed.vhdx"
            shutil.copy(rng.choice(seeds), path)
            _damage(path, rng)
            try:
                opened += _use(path, rng)
            except Exception as error:
                raise FuzzError(f"vhdx, seed {seed + tried}: {type(error).__name__}: {error}") from error
            tried += 1
    return f"{tried} images, {opened} of them good enough to be opened"


def _seeds(folder: Path) -> list[Path]:
    """A dynamic, a fixed and a differencing image, and one with a log to replay."""
    paths = [folder / f"{kind}.vhdx" for kind in ("dynamic", "fixed", "differencing", "dirty")]
    for path in paths:
        kind = path.stem if path.stem != "dirty" else "dynamic"
        parent = open_image(str(paths[0]), readonly=True) if kind == "differencing" else None
        file = HostFile.create(str(path))
        disk = create(file, 4 * _MIB, kind=kind, block_size=_MIB, parent=parent)  # type: ignore[arg-type]
        disk.write(_MIB + 512, [memoryview(b"data" * 1024)])
        disk.write_zeros(2 * _MIB, _MIB)
        disk.close()
    dirty = HostFile(str(paths[3]))
    headers = Headers(dirty)
    log = LogWriter(dirty, headers.current, bytes(range(16)))
    log.append([(3 * _MIB, dirty.read_bytes(3 * _MIB, 4096))], dirty.size())
    headers.update(log_guid=log.guid)
    dirty.close()
    return paths


def _damage(path: Path, rng: random.Random) -> None:
    """Change a few fields, mostly with checksums put right afterwards; or cut or lengthen the file."""
    with path.open("r+b") as file:
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            start, length = rng.choice(_STRUCTURES)
            offset = start + rng.choice((rng.randrange(0, 96, 4), rng.randrange(0, 256), rng.randrange(0, 4096)))
            value = rng.choice((rng.choice(_NUMBERS), rng.choice(_NUMBERS), rng.choice(_LARGE), rng.getrandbits(64)))
            data = struct.pack("<Q", value)[: rng.choice((1, 2, 4, 8))]
            file.seek(offset)
            file.write(data)
            if length and rng.random() < 0.9:
                file.seek(start)
                content = seal(bytearray(file.read(length)))
                file.seek(start)
                file.write(content)
        if rng.random() < 0.1:
            file.truncate(rng.choice((rng.randrange(8 * _MIB), 1 << 33, 1 << 42)))


def _use(path: Path, rng: random.Random) -> bool:
    """Whether it opens. Whatever it is, all that can be done with it ends soon, and with an error of ours if any."""
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    good = False
    for act in (_look, _read, _change, _repair, _read):
        try:
            act(path, rng)
            good = True
        except DiskError as error:
            if not str(error).isprintable() or str(path.parent) not in str(error):
                raise AssertionError(f"no line for people: {error!a}") from error
        except OSError:
            pass
    taken = time.monotonic() - begin
    if taken > _SECONDS:
        raise AssertionError(f"took {taken:.0f} s")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > _MEMORY:
        raise AssertionError(f"took {grown >> 20} MiB of memory")
    return good


def _look(path: Path, _: random.Random) -> None:
    check_image(str(path))
    raise DiskError(f"{path}: looking is not opening")


def _read(path: Path, rng: random.Random) -> None:
    disk = open_image(str(path), readonly=True)
    try:
        data = bytearray(65536)
        for offset in _places(disk.size, rng):
            disk.read(offset, [memoryview(data)[: min(len(data), disk.size - offset)]])
            for _ in zip(range(100), disk.extents(offset, min(64 * _MIB, disk.size - offset)), strict=False):
                pass
    finally:
        disk.close()


def _change(path: Path, rng: random.Random) -> None:
    disk = open_image(str(path))
    try:
        for offset in _places(disk.size, rng):
            length = min(disk.size - offset, 4096)
            disk.write(offset, [memoryview(bytes(4096))[:length]])
            disk.trim(offset, min(disk.size - offset, 4 * _MIB))
        disk.flush()
        disk.resize(disk.size + rng.choice((-4096, 4096, _MIB)))
    finally:
        disk.close()


def _repair(path: Path, _: random.Random) -> None:
    check_image(str(path), repair=True)
    raise DiskError(f"{path}: repairing is not opening")


def _places(size: int, rng: random.Random) -> list[int]:
    return [place - place % 4096 for place in (0, _MIB, size - 1, rng.randrange(size)) if place < size]
