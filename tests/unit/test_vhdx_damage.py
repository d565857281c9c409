"""Damaged VHDX images are refused with one line that names what is damaged, or repaired; nothing worse happens."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from devices.storage.backend import DiskError
from devices.storage.file import HostFile
from devices.storage.images import check_image, open_image
from devices.storage.vhdx.create import create
from devices.storage.vhdx.disk import VhdxDisk
from devices.storage.vhdx.format import ITEM_DISK_ID, LOG_ENTRY, REGION_BAT, guid, new_guid, seal
from devices.storage.vhdx.header import Headers, Region, Regions, pack_regions
from devices.storage.vhdx.journal import LogWriter
from devices.storage.vhdx.metadata import pack_locator

MIB = 1 << 20
SIZE = 8 * MIB
#: Where `create` puts things, and where the fields of the metadata items are.
HEADERS, TABLES, LOG, METADATA, BAT, DATA = (0x10000, 0x20000), (0x30000, 0x40000), MIB, 2 * MIB, 3 * MIB, 4 * MIB
ITEMS = METADATA + 0x10000
BLOCK_SIZE, FLAGS, DISK_SIZE, SECTOR, PHYSICAL, LOCATOR = (
    ITEMS,
    ITEMS + 4,
    ITEMS + 8,
    ITEMS + 32,
    ITEMS + 40,
    ITEMS + 48,
)

Damage = Callable[[HostFile], None]


def poke(offset: int, data: bytes) -> Damage:
    return lambda file: file.write_bytes(offset, data)


def number(offset: int, value: int, size: int = 4) -> Damage:
    return poke(offset, value.to_bytes(size, "little"))


def sealed(start: int, length: int, offset: int, data: bytes) -> Damage:
    """Change a structure with a checksum, and correct that."""

    def act(file: HostFile) -> None:
        content = bytearray(file.read_bytes(start, length))
        content[offset : offset + len(data)] = data
        file.write_bytes(start, seal(content))

    return act


def header(**fields: int | bytes) -> Damage:
    """Change the header that counts."""

    def act(file: HostFile) -> None:
        headers = Headers(file)
        for name, value in fields.items():
            setattr(headers.current, name, value)
        headers.update()

    return act


def regions(*extra: Region, **changes: int | bytes) -> Damage:
    """Change fields of the BAT region in both region tables, and add regions."""

    def act(file: HostFile) -> None:
        found = Regions(file, LOG, MIB)
        for name, value in changes.items():
            setattr(found.bat, name, value)
        for offset in TABLES:
            file.write_bytes(offset, pack_regions([*found.all, *extra]))

    return act


def entry(index: int, value: int) -> Damage:
    return number(BAT + index * 8, value, 8)


def both(*acts: Damage) -> Damage:
    def act(file: HostFile) -> None:
        for one in acts:
            one(file)

    return act


def logged(
    *sectors: tuple[int, bytes], size: int | None = None, spoil: Damage | None = None, before: int = 0
) -> Damage:
    """Leave an entry in the log, which the header names."""

    def act(file: HostFile) -> None:
        headers = Headers(file)
        writer = LogWriter(file, headers.current, new_guid())
        for _ in range(before):
            writer.append([], file.size())
        writer.append(list(sectors), file.size() if size is None else size)
        headers.update(log_guid=writer.guid)
        if spoil is not None:
            spoil(file)

    return act


def descriptor(index: int, data: bytes, offset: int = 0) -> Damage:
    """Change a descriptor of the log's first entry, which has one sector of data."""
    return sealed(LOG, 8192, LOG_ENTRY.size + index * 32 + offset, data)


UNKNOWN = guid("01234567-89ab-cdef-0123-456789abcdef")
#: Damage, and what is said of it.
REFUSED: dict[str, tuple[Damage, str]] = {
    "empty": (lambda file: file.truncate(0), "0 bytes are too few"),
    "cut in the header": (lambda file: file.truncate(MIB - 1), "too few; the file was cut short"),
    "cut in the log": (lambda file: file.truncate(LOG + 4096), "log at 0x100000 .* beyond the end"),
    "cut in the metadata": (
        lambda file: file.truncate(METADATA + 65536),
        "metadata at 0x200000 .* beyond the end",
    ),
    "cut in the table": (lambda file: file.truncate(BAT), "region BAT at 0x300000 .* beyond the end"),
    "cut in a block": (
        lambda file: file.truncate(DATA + 512),
        "BAT entry 0 at 0x300000, for block 0, .*end",
    ),
    "no identifier": (poke(0, b"conectix"), "no file identifier at 0x0"),
    "both headers": (both(poke(HEADERS[0] + 9, b"x"), poke(HEADERS[1] + 9, b"x")), "both headers are bad: header 1 at"),
    "equal headers": (
        both(*(sealed(at, 4096, 8, struct.pack("<Q", 9)) for at in HEADERS), sealed(HEADERS[0], 4096, 16, b"?")),
        "both headers, .* have the same number",
    ),
    "last sequence number": (
        both(*(sealed(at, 4096, 8, b"\xff" * 8) for at in HEADERS)),
        "sequence number 18446744073709551615 leaves none",
    ),
    "version": (both(*(sealed(at, 4096, 66, b"\2") for at in HEADERS)), "version 2 of the format"),
    "log version": (
        both(header(log_guid=UNKNOWN), *(sealed(at, 4096, 64, b"\1") for at in HEADERS)),
        "or 1 of its log, is not known",
    ),
    "log in the header": (header(log_offset=0), "a log of 1048576 bytes cannot be at 0x0"),
    "no log": (header(log_length=0), "a log of 0 bytes cannot be at 0x100000"),
    "log far away": (header(log_offset=1 << 60), "beyond any VHDX file"),
    "log beyond the end": (header(log_length=0xFFF00000), "log .* beyond the end"),
    "both region tables": (
        both(*(poke(at + 9, b"x") for at in TABLES)),
        "both region tables are bad: .* checksum",
    ),
    "region count": (both(*(sealed(at, 65536, 8, b"\xff\xff") for at in TABLES)), "65535 entries are more than 2047"),
    "unknown region": (regions(Region(UNKNOWN, 8 * MIB, MIB, True)), "region 01234567-.* is required, but not known"),
    "no table": (regions(guid=UNKNOWN, required=False), "has no BAT region"),
    "table at odd place": (regions(offset=BAT + 4096), "region BAT at 0x301000 cannot be there"),
    "table in the header": (regions(offset=0), "region BAT at 0x0 cannot be there"),
    "table over the log": (regions(offset=LOG), "region BAT at 0x100000 overlaps the log"),
    "table over metadata": (regions(offset=METADATA), "overlaps region"),
    "table without length": (regions(length=0), "cannot be there with 0 bytes"),
    "table too small": (number(DISK_SIZE, 1 << 40, 8), "BAT region at 0x300000 .* too small"),
    "metadata signature": (poke(METADATA, b"metadada"), "metadata table at 0x200000: no signature"),
    "metadata count": (number(METADATA + 10, 2048, 2), "2048 entries are more than 2047"),
    "unknown item": (
        both(number(METADATA + 10, 6, 2), poke(METADATA + 32 * 6, UNKNOWN + struct.pack("<IIII", 65536, 1, 4, 0))),
        "item 01234567-.* is required, but not known",
    ),
    "item twice": (poke(METADATA + 32, ITEM_DISK_ID), "two entries for item beca12ab"),
    "item missing": (number(METADATA + 10, 4, 2), "there is no physical sector size"),
    "item too early": (number(METADATA + 32 + 16, 0), "item caa16737.* cannot be at 0x0"),
    "item too late": (number(METADATA + 32 + 16, MIB), "item caa16737.* cannot be at 0x100000"),
    "item too long": (number(METADATA + 32 + 20, 9), "file parameters has 9 bytes instead of 8"),
    "block size": (number(BLOCK_SIZE, 3 * MIB), "blocks of 3145728 bytes: not a power of two"),
    "block size 0": (number(BLOCK_SIZE, 0), "blocks of 0 bytes"),
    "large blocks": (number(BLOCK_SIZE, 512 * MIB), "blocks of 536870912 bytes"),
    "sector size": (number(SECTOR, 1024), "sectors of 1024 bytes"),
    "physical sector size": (number(PHYSICAL, 0), "physically 0: neither 512 nor 4096"),
    "disk size 0": (number(DISK_SIZE, 0, 8), "a disk of 0 bytes"),
    "disk size odd": (number(DISK_SIZE, 513, 8), "a disk of 513 bytes: not whole sectors"),
    "disk too large": (number(DISK_SIZE, (64 << 40) + 512, 8), "up to 64 TiB"),
    "parent, but no locator": (number(FLAGS, 2), "a differencing disk without parent locator"),
    "state": (entry(3, 4), r"BAT entry 3 at 0x300018, for block 3, has a state that is not defined"),
    "partial without parent": (entry(3, 9 << 20 | 7), "has a state that is not defined"),
    "overlapping blocks": (entry(1, DATA | 6), "block 1, points to storage of another block"),
    "block in the log": (entry(1, LOG | 6), "points into the header, the log or a region"),
    "block far away": (entry(1, 1 << 63 | 6), "points beyond the end of the file"),
    "log with nothing whole": (logged((BAT, bytes(4096)), spoil=poke(LOG + 4200, b"x")), "no complete sequence"),
    "file cut after logging": (logged(size=1 << 40), "had 1099511627776 when the log was written; it was cut short"),
    "log changes a header": (
        logged((BAT, bytes(4096)), spoil=descriptor(0, struct.pack("<Q", 0x10000), 16)),
        "log at 0x100000 would change 4096 bytes at 0x10000",
    ),
    "log changes itself": (
        logged((BAT, bytes(4096)), spoil=descriptor(0, struct.pack("<Q", LOG), 16)),
        "would change 4096 bytes at 0x100000",
    ),
    "log changes far away": (
        logged((BAT, bytes(4096)), spoil=descriptor(0, struct.pack("<Q", 1 << 60), 16)),
        "would change 4096 bytes at 0x1000000000000000",
    ),
    "log wants a huge file": (
        logged((BAT, bytes(4096)), spoil=sealed(LOG, 8192, 56, struct.pack("<Q", 1 << 60))),
        "wants a file of",
    ),
}


def image(tmp_path: Path, damage: Damage | None = None) -> Path:
    """An image with a block of data, and something done to it."""
    path = tmp_path / "disk.vhdx"
    disk = create(HostFile.create(str(path)), SIZE, block_size=MIB)
    disk.write(0, [memoryview(b"data" * 1024)])
    disk.close()
    if damage is not None:
        alter(path, damage)
    return path


def alter(path: Path, damage: Damage) -> None:
    file = HostFile(str(path))
    try:
        damage(file)
    finally:
        file.close()


def refusal(path: Path, readonly: bool = False) -> str:
    with pytest.raises(DiskError) as caught:
        open_image(str(path), readonly)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and message.isprintable()
    return message


def read(path: Path, length: int = 4096) -> bytes:
    disk = open_image(str(path), readonly=True)
    data = bytearray(length)
    disk.read(0, [memoryview(data)])
    disk.close()
    return bytes(data)


@pytest.mark.parametrize("what", REFUSED)
def test_damage_is_named(tmp_path: Path, what: str) -> None:
    damage, message = REFUSED[what]
    path = image(tmp_path, damage)
    before = path.read_bytes()
    assert re.search(message, refusal(path, readonly=True))
    findings = check_image(str(path))
    assert any(re.search(message, finding.message) for finding in findings if finding.severity == "error")
    assert path.read_bytes() == before  # looking changes nothing
    assert re.search(message, refusal(path))


REPAIRED: dict[str, tuple[Damage, str]] = {
    "no identifier": (poke(0, b"conectix"), "no file identifier"),
    "first header": (poke(HEADERS[0] + 9, b"x"), "header 1 at 0x10000: wrong header checksum; the other one is good"),
    "second header": (poke(HEADERS[1], b"x"), "header 2 at 0x20000: no header signature; the other one is good"),
    "first region table": (
        poke(TABLES[0] + 9, b"x"),
        "region table 1 at 0x30000: wrong checksum; the",
    ),
    "second region table": (poke(TABLES[1], b"x"), "region table 2 at 0x40000: no signature; the"),
    "log to replay": (logged((BAT + 4096, bytes(4096))), "not closed properly: 1 entry"),
    "torn entry at the end": (
        logged((BAT, bytes(4096)), before=3, spoil=poke(LOG + 3 * 4096 + 70, b"x")),
        "not closed properly: 1 entry",
    ),
    "log with nothing whole": (logged(spoil=poke(LOG + 100, b"x")), "no complete sequence"),
    "room that nothing uses": (
        both(lambda file: file.truncate(9 * MIB), poke(6 * MIB, b"x" * MIB)),
        "1048576 bytes of the file are used by nothing",
    ),
}


@pytest.mark.parametrize("what", REPAIRED)
def test_what_can_be_repaired_is(tmp_path: Path, what: str) -> None:
    damage, message = REPAIRED[what]
    path = image(tmp_path, damage)
    first = check_image(str(path))
    assert [bool(re.search(message, finding.message)) for finding in first] == [True]
    assert not first[0].repaired
    second = check_image(str(path), repair=True)
    assert [(finding.message, finding.repaired) for finding in second] == [(first[0].message, True)]
    assert check_image(str(path)) == []
    assert read(path) == b"data" * 1024


def test_a_good_image_is_left_alone(tmp_path: Path) -> None:
    path = image(tmp_path)
    before = path.read_bytes()
    assert check_image(str(path)) == check_image(str(path), repair=True) == []
    assert path.read_bytes() == before


def test_the_log_is_replayed_from_where_its_last_entry_says(tmp_path: Path) -> None:
    """Of three whole entries in a row the last names itself as the tail: those before are history."""
    path = image(tmp_path)
    file = HostFile(str(path))
    table = file.read_bytes(BAT, 4096)
    headers = Headers(file)
    writer = LogWriter(file, headers.current, new_guid())
    for sector in (b"\1" * 4096, b"\2" * 4096, table):
        writer.append([(BAT, sector)], file.size())
    headers.update(log_guid=writer.guid)
    file.write_bytes(BAT, bytes(4096))
    file.close()
    assert read(path) == b"data" * 1024
    open_image(str(path)).close()
    assert check_image(str(path)) == []
    assert read(path) == b"data" * 1024


def test_the_log_is_replayed_around_its_end(tmp_path: Path) -> None:
    path = image(tmp_path)
    file = HostFile(str(path))
    table = file.read_bytes(BAT, 4096)
    headers = Headers(file)
    writer = LogWriter(file, headers.current, new_guid())
    while writer.offset != MIB - 4096:
        writer.append([], file.size())
    writer.append([(BAT, table), (BAT + 8192, bytes(4096))], file.size())
    assert writer.offset == 8192
    headers.update(log_guid=writer.guid)
    file.write_bytes(BAT, bytes(4096))
    file.close()
    assert read(path) == b"data" * 1024
    assert check_image(str(path), repair=True)[0].repaired
    assert read(path) == b"data" * 1024


def test_zero_descriptors_and_longer_files_are_replayed(tmp_path: Path) -> None:
    """Our log has neither; an entry of two descriptors by another writer."""
    path = image(tmp_path)
    file = HostFile(str(path))
    headers, log_guid = Headers(file), new_guid()
    data = bytearray(4096)
    LOG_ENTRY.pack_into(data, 0, b"loge", 0, 4096, 0, 7, 2, log_guid, file.size(), 9 * MIB)
    struct.pack_into("<4sIQQQ", data, 64, b"zero", 0, 65536, DATA, 7)
    struct.pack_into("<4sIQQQ", data, 96, b"zero", 0, 4096, BAT + 4096, 7)
    file.write_bytes(LOG, seal(data))
    file.write_bytes(BAT + 4096, b"?" * 4096)
    headers.update(log_guid=log_guid)
    size = file.size()
    file.close()
    assert read(path) == bytes(4096)
    assert path.stat().st_size == size
    open_image(str(path)).close()
    assert path.stat().st_size == 9 * MIB
    assert read(path) == bytes(4096)
    with path.open("rb") as raw:
        raw.seek(BAT + 4096)
        assert raw.read(4096) == bytes(4096)


def test_unknown_regions_that_are_not_required_are_kept(tmp_path: Path) -> None:
    extra = Region(UNKNOWN, 5 * MIB, MIB, False)
    path = image(tmp_path, both(lambda file: file.truncate(6 * MIB), poke(5 * MIB, b"keep" * 1024), regions(extra)))
    disk = open_image(str(path))
    for offset in range(0, SIZE, MIB):
        disk.write(offset, [memoryview(b"more" * 1024)])
    disk.resize(140 << 30)
    disk.close()
    disk = open_image(str(path), readonly=True)
    assert isinstance(disk, VhdxDisk)
    assert [region.offset for region in disk.regions.all if region.guid == UNKNOWN] == [5 * MIB]
    assert REGION_BAT in [region.guid for region in disk.regions.all]
    assert disk.file.read_bytes(5 * MIB, 4096) == b"keep" * 1024
    disk.close()


def child(tmp_path: Path) -> Path:
    base = open_image(str(image(tmp_path)))
    base.write(MIB, [memoryview(b"base" * (MIB // 4))])
    base.close()
    parent = open_image(base.path, readonly=True)
    path = tmp_path / "child.vhdx"
    disk = create(HostFile.create(str(path)), SIZE, kind="differencing", block_size=MIB, parent=parent)  # type: ignore[arg-type]
    disk.write(512, [memoryview(b"child" * 512)])
    disk.close()
    return path


def locator(values: dict[str, str]) -> Damage:
    data = pack_locator(values)
    return both(poke(LOCATOR, data), number(METADATA + 32 * 6 + 20, len(data)))


LINK = "{01234567-89ab-cdef-0123-456789abcdef}"
CHILD_REFUSED: dict[str, tuple[Damage, str]] = {
    "locator type": (poke(LOCATOR, b"????"), "parent locator at 0x210030: type .* is not known"),
    "locator count": (number(LOCATOR + 18, 0xFFFF, 2), "65535 entries do not fit"),
    "text beyond": (number(LOCATOR + 20, 1 << 31), "are beyond its end"),
    "text too long": (number(LOCATOR + 28, 0xFFFF, 2), "texts overlap|beyond its end"),
    "no text": (poke(LOCATOR + 20 + 12 * 4, b"\0\xd8" * 40), "are no UTF-16 text|beyond its end|overlap"),
    "no linkage": (locator({"relative_path": ".\\disk.vhdx"}), "parent locator has no parent_linkage"),
    "odd linkage": (
        locator({"parent_linkage": "x", "relative_path": ".\\disk.vhdx"}),
        "linkage is no GUID: 'x'",
    ),
    "no path": (locator({"parent_linkage": LINK}), "parent locator has no path"),
    "other parent": (
        locator({"parent_linkage": LINK, "relative_path": ".\\disk.vhdx"}),
        "not the parent .*Guid",
    ),
    "lost parent": (locator({"parent_linkage": LINK, "relative_path": ".\\gone.vhdx"}), "its parent .* is missing"),
    "itself": (locator({"parent_linkage": LINK, "relative_path": ".\\child.vhdx"}), "comes above it in the same chain"),
    "odd path": (locator({"parent_linkage": LINK, "relative_path": "a\nb\0c"}), "its parent .* is missing"),
    "no bitmap": (entry(8192 // 2, 0), "for block 0, needs a sector bitmap that is not there"),
    "bitmap in the log": (entry(4096, LOG | 6), r"BAT entry 4096 .*for sector bitmap 0, points into"),
}


@pytest.mark.parametrize("what", CHILD_REFUSED)
def test_damage_of_a_differencing_image_is_named(tmp_path: Path, what: str) -> None:
    damage, message = CHILD_REFUSED[what]
    path = child(tmp_path)
    assert check_image(str(path)) == []
    alter(path, damage)
    assert re.search(message, refusal(path, readonly=True))
    assert any(re.search(message, finding.message) for finding in check_image(str(path)))
    assert re.search(message, refusal(path))


def test_bits_that_an_earlier_life_of_a_block_left_do_not_count(tmp_path: Path) -> None:
    path = child(tmp_path)
    disk = open_image(str(path))
    assert isinstance(disk, VhdxDisk)
    bitmap = disk.table.get(4096) >> 20 << 20
    disk.close()
    # Block 1 is not present, whatever the bitmap says of it.
    alter(path, poke(bitmap + 256, b"\xff" * 256))
    disk = open_image(str(path))
    disk.write(MIB + 4096, [memoryview(b"new!" * 128)])
    data = bytearray(MIB)
    disk.read(MIB, [memoryview(data)])
    assert data == b"base" * 1024 + b"new!" * 128 + b"base" * ((MIB - 4096 - 512) // 4)
    disk.close()


def test_entries_beyond_the_disk_do_not_count_when_it_grows(tmp_path: Path) -> None:
    """A session that ended while the disk was made smaller may have left them."""
    leftovers = [entry(index, DATA | 6) for index in (8, 9, 511, 512, 1000, 2000)]
    path = image(tmp_path, both(*leftovers))
    disk = open_image(str(path))
    disk.resize(1000 * MIB + 512)
    for block in (8, 9, 511, 512, 1000):
        data = bytearray(b"?" * 512)
        disk.read(block * MIB, [memoryview(data)])
        assert data == bytes(512)
    disk.close()
    assert check_image(str(path)) == []
    assert read(path) == b"data" * 1024
