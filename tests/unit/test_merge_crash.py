"""A merge that a power cut or a kill ends at any step loses nothing, and can be done again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from devices.storage import copy
from devices.storage.chain import Layer
from devices.storage.merge import layers, merge
from devices.storage.vhd.create import create as create_vhd
from devices.storage.vhd.disk import open_vhd
from devices.storage.vhdx.create import create as create_vhdx
from devices.storage.vhdx.disk import VhdxDisk
from tests.fakes.crash import CrashFile, Medium

MIB = 1 << 20
SIZE = 5 * MIB + 1024
SECTOR = 512
#: Where there is data: the borders of blocks and the disk's end.
POINTS = [0, 1024, MIB - 512, MIB, 2 * MIB + 4096, 4 * MIB, 5 * MIB, SIZE - 512]


def create(form: str, file: CrashFile, parent: Layer | None = None) -> Layer:
    make = create_vhd if form == "vhd" else create_vhdx
    kind = "differencing" if parent is not None else "dynamic"
    return make(file, SIZE, kind=kind, block_size=MIB, parent=parent)


def open_chain(form: str, media: list[Medium], paths: list[str], writable: bool = False) -> Layer:
    """The first of the images over the others, each knowing the next for its parent."""
    above: Layer | None = None
    first: Layer | None = None
    for medium, path in zip(media, paths, strict=True):
        file = CrashFile(medium, path, readonly=not writable)
        layer: Layer = open_vhd(file) if form == "vhd" else VhdxDisk(file)
        if above is not None:
            assert above.link is not None and above.link.mismatch(layer) == ""
            above.parent = layer
        first, above = first or layer, layer
    assert first is not None
    return first


def content(disk: Layer) -> list[bytes]:
    found = []
    for point in POINTS:
        buffer = bytearray(SECTOR)
        disk.read(point, [memoryview(buffer)])
        found.append(bytes(buffer))
    return found


@pytest.mark.parametrize("form", ["vhd", "vhdx"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_merge_may_end_at_any_step(
    form: str, depth: int, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(copy, "_THREADS", 1)  # a medium is for one thread
    rng = random.Random(seed)
    paths = [str(tmp_path / f"{level}.{form}") for level in range(depth + 1)]
    media = [Medium() for _ in paths]
    for level in range(depth, -1, -1):
        (tmp_path / f"{level}.{form}").touch()  # for its time, which a VHD keeps of its parent
        below = open_chain(form, media[level + 1 :], paths[level + 1 :]) if level < depth else None
        layer = create(form, CrashFile(media[level], paths[level]), below)
        for point in rng.sample(POINTS, 5):
            layer.write(point, [memoryview(rng.randbytes(SECTOR))])
        layer.write_zeros(rng.randrange(4) * MIB, MIB)
        layer.close()
    wanted = content(open_chain(form, media, paths))
    child = open_chain(form, media, paths, writable=True)
    base = layers(child)[-1]
    steps = 0

    def cut() -> None:
        nonlocal steps
        steps += 1
        after = [medium.crash(rng) for medium in media]
        assert content(open_chain(form, after, paths)) == wanted
        again = open_chain(form, after, paths, writable=True)
        merge(again, layers(again)[-1])
        again.close()
        assert content(open_chain(form, after[-1:], paths[-1:])) == wanted

    for disk in layers(child):
        assert isinstance(disk, Layer) and isinstance(disk.file, CrashFile)
        disk.file.on_change = cut
    merge(child, base)
    assert steps > 5
    # All of it is durable now, whatever becomes of the child, and the child still reads as it did.
    after = [medium.crash(rng) for medium in media]
    assert content(open_chain(form, after[-1:], paths[-1:])) == wanted
    assert content(open_chain(form, after, paths)) == wanted
    child.close()
