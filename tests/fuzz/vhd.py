"""VHD images with anything in them: all that may come of it are refusals and I/O errors, in bounded time and memory."""

from __future__ import annotations

import struct
import time
import tracemalloc

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from devices.storage.backend import DiskError
from devices.storage.chain import ParentLink
from devices.storage.images import open_layer
from devices.storage.vhd.check import check
from tests.fakes.crash import CrashFile, Medium
from tests.fakes.vhd_images import SECTOR, dynamic, footer, sealed

#: Bytes that one image may take beside what it is read and written with, and seconds.
_MEMORY = 64 << 20
_SECONDS = 10.0

_SIZE = 256 << 10
_numbers = st.one_of(
    st.sampled_from((0, 1, 2, 3, 4, 511, 512, 1536, 4096, 65536, 1 << 31, 0xFFFF_FFFE, 0xFFFF_FFFF, (1 << 64) - 1)),
    st.integers(0, 4096),
    st.integers(0, (1 << 64) - 1),
)
#: (where, width, value) of a number to put over a field, or anywhere.
_fields = st.tuples(
    st.one_of(
        st.sampled_from((12, 16, 24, 28, 40, 48, 56, 58, 60, 64, 84)),
        st.sampled_from((512, 520, 528, 536, 540, 544, 548, 552, 568, 1088, 1092, 1096, 1104, 1112, 1120)),
        st.integers(1536, 1536 + 128),
        st.integers(0, 1 << 13),
    ),
    st.sampled_from((1, 2, 4, 8)),
    _numbers,
)
_images = st.tuples(
    st.sampled_from((2, 3, 3, 4)),
    st.lists(_fields, max_size=5),
    st.booleans(),  # with right checksums
    st.one_of(st.just(0), st.integers(-(1 << 17), 1 << 13)),  # cut or longer
    st.sampled_from((b"vpc ", b"win ")),
)


def _image(kind: int, fields: list[tuple[int, int, int]], seal: bool, change: int, creator: bytes) -> bytes:
    if kind == 2:
        raw = bytearray(bytes(_SIZE) + footer(_SIZE, 2, creator))
        base = len(raw) - SECTOR
    else:
        stored = {sector: bytes([sector % 251]) * SECTOR for sector in (1, 2, 8, 100, 101, 300)}
        names = struct.pack(">4sIIIQ", b"W2ru", 512, 20, 0, 512) + struct.pack(">4sIIIQ", b"MacX", 512, 40, 0, 3072)
        raw = bytearray(dynamic(_SIZE, 16384, stored, kind=kind, locators=names if kind == 4 else b""))
        base = 0
    for place, width, value in fields:
        at = base + place if place < SECTOR else place
        if at + width <= len(raw):
            raw[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "big")
    if seal:
        raw[base : base + SECTOR] = sealed(bytes(raw[base : base + SECTOR]), 64)
        if kind != 2:
            raw[512:1536] = sealed(bytes(raw[512:1536]), 36)
            raw[-SECTOR:] = raw[:SECTOR]
    return bytes(raw[:change] if change < 0 else raw + bytes(change))


def _use(raw: bytes) -> None:
    """Open, check and use an image, alone and as if its parent were missing."""
    for readonly in (True, False):
        medium = Medium()
        medium.write(0, raw)
        medium.flush()
        file = CrashFile(medium, "/nowhere/fuzz.vhd", readonly)
        try:
            disk = open_layer(file, "vhd")
        except DiskError as error:
            message = str(error)
            if "\n" in message or len(message) > 1000 or file.fd >= 0:
                raise AssertionError("refused, but not in one line, or without closing the file") from error
            continue
        link = getattr(disk, "link", None)
        assert link is None or (isinstance(link, ParentLink) and all(path.startswith("/") for path in link.paths))
        buffer = memoryview(bytearray(4096))
        for offset in (0, disk.size // 2 // SECTOR * SECTOR, disk.size - SECTOR):
            length = min(len(buffer), disk.size - offset)
            try:
                disk.read(offset, [buffer[:length]])
                if not readonly:
                    disk.write(offset, [buffer[:length]])
                    disk.trim(offset, length)
            except OSError:
                pass
        assert disk.inspect()["size"] == disk.size
        assert sum(extent.length for extent in disk.extents(0, min(disk.size, 1 << 20))) == min(disk.size, 1 << 20)
        disk.close()
        if not readonly:  # what was good stays so after it has been written
            open_layer(CrashFile(medium, "/nowhere/fuzz.vhd"), "vhd").close()
    for repair in (False, True):
        medium = Medium()
        medium.write(0, raw)
        file = CrashFile(medium, "/nowhere/fuzz.vhd", readonly=not repair)
        try:
            assert all("\n" not in finding.message for finding in check(file, repair))
        except DiskError:
            pass


def run(first_seed: int, seconds: float, examples: int = 500) -> str:
    """Fuzz in rounds of `examples`, each with its own seed, until the time is up; return what was done."""
    slowest = 0.0
    largest = 0

    def one(image: tuple[int, list[tuple[int, int, int]], bool, int, bytes]) -> None:
        nonlocal slowest, largest
        raw = _image(*image)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        started = time.monotonic()
        _use(raw)
        slowest = max(slowest, time.monotonic() - started)
        largest = max(largest, tracemalloc.get_traced_memory()[1] - before)
        assert slowest < _SECONDS and largest < _MEMORY

    chosen = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    started, rounds = time.monotonic(), 0
    tracemalloc.start()
    try:
        while not rounds or time.monotonic() - started < seconds:
            try:
                seed(first_seed + rounds)(chosen(given(image=_images)(one)))()
            except BaseException:
                print(f"vhd: repeat with --seed {first_seed + rounds}")
                raise
            rounds += 1
    finally:
        tracemalloc.stop()
    return (
        f"seeds {first_seed} to {first_seed + rounds - 1}: {rounds * examples} images in "
        f"{time.monotonic() - started:.1f} s, the slowest {slowest * 1000:.0f} ms, the largest {largest >> 10} KiB"
    )
