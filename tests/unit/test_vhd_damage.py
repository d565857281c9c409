"""Damaged VHD images: each is refused with what is damaged, or repaired; none brings anything else about."""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from devices.storage.backend import DiskError
from devices.storage.images import check_image, open_image
from tests.fakes.vhd_images import ID, SECTOR, dynamic, footer, header, sealed
from tests.fuzz import vhd

MIB = 1 << 20
BLOCK = 65536
STORED = {0: b"0" * SECTOR, 129: b"1" * SECTOR, 1000: b"2" * SECTOR}
IMAGE = dynamic(MIB, BLOCK, STORED)
FIXED = bytes(MIB) + footer(MIB, 2)
HEADER, TABLE = slice(512, 1536), 1536

Mutation = Callable[[bytes], bytes]


def replaced(at: int, data: bytes) -> Mutation:
    return lambda raw: raw[:at] + data + raw[at + len(data) :]


def entry(block: int, value: int) -> Mutation:
    return replaced(TABLE + 4 * block, struct.pack(">I", value))


def with_header(raw: bytes, at: int, data: bytes) -> bytes:
    """With a field of the header changed, and its checksum right."""
    changed = raw[HEADER][:at] + data + raw[HEADER][at + len(data) :]
    return raw[:512] + sealed(changed, 36) + raw[1536:]


def with_footers(raw: bytes, at: int, data: bytes) -> bytes:
    changed = sealed(raw[:at] + data + raw[at + len(data) : 512], 64)
    return changed + raw[512:-512] + changed


def with_size(raw: bytes, size: int) -> bytes:
    return with_footers(with_footers(raw, 48, struct.pack(">Q", size)), 28, b"win ")


DAMAGES: dict[str, tuple[Mutation, str]] = {
    "nothing": (lambda raw: b"", "no VHD footer at the end of the file, no VHD footer at its start"),
    "one byte": (lambda raw: raw[:1], "is it a VHD image"),
    "only the first footer": (lambda raw: raw[:512], "no dynamic disk header"),
    "both footers damaged": (
        lambda raw: b"?" + raw[1:-100] + b"?" + raw[-99:],
        "footer with a wrong checksum at the end of the file, no VHD footer at its start",
    ),
    "cut in the header": (lambda raw: raw[:1000], "no dynamic disk header"),
    "cut in the table": (lambda raw: raw[:1590], "allocation table lies beyond the end"),
    "cut in the blocks": (lambda raw: raw[: -BLOCK - 1000], "1 of 3 blocks lie beyond its end"),
    "cut short by a sector too many": (lambda raw: raw[:-1024], "1 of 3 blocks lie beyond its end"),
    "header checksum": (replaced(600, b"!"), "dynamic disk header with a wrong checksum"),
    "header gone": (replaced(512, bytes(8)), "no dynamic disk header"),
    "header version": (lambda raw: with_header(raw, 24, b"\0\2\0\0"), "unknown version 0x00020000"),
    "table of no entries": (lambda raw: with_header(raw, 28, bytes(4)), "allocation table of 0 entries for 16 blocks"),
    "table too short": (lambda raw: with_header(raw, 28, b"\0\0\0\x0f"), "table of 15 entries for 16 blocks"),
    "table absurd": (lambda raw: with_header(raw, 28, b"\xff" * 4), "allocation table of 4294967295 entries"),
    "table beyond the file": (
        lambda raw: with_header(raw, 16, b"\0\0\1" + bytes(5)),
        "lies beyond the end of the file",
    ),
    "table nowhere": (lambda raw: with_header(raw, 16, b"\xff" * 8), "lies beyond the end of the file"),
    "table on the header": (lambda raw: with_header(raw, 16, struct.pack(">Q", 1024)), "overlap"),
    "table on the footer": (lambda raw: with_header(raw, 16, bytes(8)), "overlap"),
    "blocks of no bytes": (lambda raw: with_header(raw, 32, bytes(4)), "block size of 0 bytes"),
    "blocks of an odd size": (lambda raw: with_header(raw, 32, struct.pack(">I", 65000)), "block size of 65000 bytes"),
    "blocks of 2 GiB": (lambda raw: with_header(raw, 32, struct.pack(">I", 1 << 31)), "block size of 2147483648 bytes"),
    "footer version": (lambda raw: with_footers(raw, 12, b"\0\2\0\0"), "unknown version 0x00020000"),
    "footer type": (lambda raw: with_footers(raw, 60, b"\0\0\0\5"), "unknown disk type 5"),
    "header beyond the file": (lambda raw: with_footers(raw, 16, b"\0\1" + bytes(6)), "is outside the file"),
    "header on the footer": (lambda raw: with_footers(raw, 16, bytes(8)), "is outside the file"),
    "size of nothing": (lambda raw: with_footers(raw, 48, bytes(8)), "disk size of 0 bytes"),
    "size that is odd": (lambda raw: with_footers(raw, 48, struct.pack(">Q", MIB - 1)), "must be a multiple of 512"),
    "size absurd": (lambda raw: with_size(raw, (1 << 64) - 512), "disk size of 18446744073709551104 bytes"),
    "size just too large": (lambda raw: with_size(raw, (2040 << 30) + 512), "at most 2040 GiB"),
    "block beyond the file": (entry(5, 1 << 20), "1 of 4 blocks lie beyond its end"),
    "block at the last sector there is": (entry(5, 0xFFFF_FFFE), "1 of 4 blocks lie beyond its end"),
    "block on the footer": (entry(5, 0), "a block overlaps the copy of the footer"),
    "block on the header": (entry(5, 1), "a block overlaps the header"),
    "block on the table": (entry(5, 3), "a block overlaps the allocation table"),
    "one place for two blocks": (lambda raw: raw[:TABLE] + raw[TABLE + 4 * 7 :][:4] * 2 + raw[TABLE + 8 :], "overlap"),
    "blocks that overlap": (lambda raw: entry(5, struct.unpack_from(">I", raw, TABLE)[0] - 1)(raw), "blocks overlap"),
}


def damage_of(path: Path) -> str:
    """What a check says that it could not repair."""
    try:
        findings = check_image(str(path), repair=True)
    except DiskError as error:
        return str(error)
    return "; ".join(one.message for one in findings if one.severity == "error" and not one.repaired)


def refused(path: Path, says: str) -> None:
    raw = path.read_bytes()
    for readonly in (True, False):
        with pytest.raises(DiskError, match=re.escape(says)) as caught:
            open_image(str(path), readonly=readonly)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message and len(message) < 500 + len(str(path))
    assert says in damage_of(path)
    assert path.read_bytes() == raw


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_image_is_refused_and_left_alone(tmp_path: Path, damage: str) -> None:
    mutate, says = DAMAGES[damage]
    path = tmp_path / "disk.vhd"
    path.write_bytes(IMAGE)
    assert check_image(str(path)) == []
    path.write_bytes(mutate(IMAGE))
    refused(path, says)


@pytest.mark.parametrize(
    ("mutate", "says"),
    [
        (lambda raw: raw[:-512], "is it a VHD image"),
        (lambda raw: raw[:-1], "is it a VHD image"),
        (lambda raw: raw[1000:], "the file was cut short"),
        (lambda raw: raw[:-200] + b"!" + raw[-199:], "footer with a wrong checksum at the end"),
        (lambda raw: raw[:-512] + footer(2 * MIB, 2), "the file was cut short"),
    ],
)
def test_damaged_fixed_image_is_refused_and_left_alone(tmp_path: Path, mutate: Mutation, says: str) -> None:
    path = tmp_path / "disk.vhd"
    path.write_bytes(mutate(FIXED))
    refused(path, says)


def test_interrupted_resize_of_a_fixed_image_is_undone(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    path.write_bytes(b"x" * MIB + footer(MIB, 2))
    with path.open("r+b") as file:
        file.truncate(5 * MIB)
    readonly = open_image(str(path), readonly=True)
    assert readonly.size == MIB
    readonly.close()
    findings = check_image(str(path), repair=True)
    assert [(one.severity, one.repaired) for one in findings] == [("warning", True)]
    assert path.read_bytes() == b"x" * MIB + footer(MIB, 2)


def locators(*places: tuple[bytes, int, int]) -> bytes:
    return b"".join(struct.pack(">4sIIIQ", code, 512, length, 0, offset) for code, offset, length in places)


@pytest.mark.parametrize(
    "places",
    [
        [],
        [(b"W2ru", 1 << 40, 20)],
        [(b"W2ru", 0, 1 << 31)],
        [(b"W2ku", (1 << 64) - 1, 0xFFFF_FFFF)],
        [(b"\xff" * 4, 512, 100)],
        [(b"W2ru", 512, 101), (b"W2ku", 513, 1000), (b"MacX", 0, 512), (b"Wi2r", 3, 4), (b"Wi2k", 0, 0)],
    ],
)
def test_names_that_make_no_sense_lead_to_no_parent(tmp_path: Path, places: list[tuple[bytes, int, int]]) -> None:
    path = tmp_path / "child.vhd"
    path.write_bytes(dynamic(MIB, BLOCK, STORED, kind=4, parent=ID, locators=locators(*places)))
    refused(path, "is missing, looked for at")


def test_block_on_the_parents_name_is_refused(tmp_path: Path) -> None:
    raw = dynamic(MIB, BLOCK, STORED, kind=4, parent=ID, locators=locators((b"W2ru", 4096, 100)))
    path = tmp_path / "child.vhd"
    path.write_bytes(raw)
    refused(path, "a block overlaps the name of the parent")


def test_images_that_are_each_others_parents_are_refused(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        text = f".\\{other}.vhd".encode("utf-16-le")
        raw = dynamic(MIB, BLOCK, {}, kind=4, parent=ID, locators=locators((b"W2ru", 4096, len(text))))
        (tmp_path / f"{name}.vhd").write_bytes(raw[:-512].ljust(4096, b"\0") + text.ljust(512, b"\0") + raw[-512:])
    refused(tmp_path / "a.vhd", "which thus never ends")


def test_table_of_the_largest_disk_is_examined_at_once(tmp_path: Path) -> None:
    """Every block used, in an order that is as bad as can be, with two in one place."""
    entries = (2040 << 30) // (2 << 20)
    places = [8192 + 4097 * (block * 524_287 % entries) for block in range(entries)]
    places[77] = places[0]
    last = footer(2040 << 30, 3, b"win ")
    path = tmp_path / "disk.vhd"
    path.write_bytes(last + header(entries, 2 << 20) + struct.pack(f">{entries}I", *places))
    with path.open("r+b") as file:
        file.truncate(1 << 41)
    started = time.monotonic()
    with pytest.raises(DiskError, match="blocks overlap"):
        open_image(str(path))
    assert time.monotonic() - started < 20  # a second, on a machine that does nothing else


def test_nothing_in_an_image_brings_about_more_than_a_refusal() -> None:
    assert "seeds 1 to " in vhd.run(1, 1, examples=150)
