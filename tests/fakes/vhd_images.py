"""VHD images as others write them, put together from the specification alone, and easily made wrong."""

from __future__ import annotations

import struct

UNUSED = 0xFFFF_FFFF
SECTOR = 512
ID = bytes(range(16))


def sealed(raw: bytes, at: int) -> bytes:
    """With the checksum at its place: the one's complement of the sum of all other bytes."""
    raw = raw[:at] + bytes(4) + raw[at + 4 :]
    return raw[:at] + struct.pack(">I", ~sum(raw) & 0xFFFF_FFFF) + raw[at + 4 :]


def footer(
    size: int, kind: int = 3, creator: bytes = b"vpc ", shape: tuple[int, int, int] | None = None, **other: int
) -> bytes:
    cylinders, heads, sectors = shape or (size // SECTOR, 1, 1)
    raw = b"conectix" + struct.pack(
        ">IIQI", 2, 0x10000, other.get("data_offset", 512 if kind != 2 else (1 << 64) - 1), 9
    )
    raw += creator + struct.pack(">I4sQQ", 0x50003, b"Wi2k", size, size)
    raw += struct.pack(">HBBII16sB", min(cylinders, 65535), heads, sectors, kind, 0, ID, other.get("saved", 0))
    return sealed(raw.ljust(SECTOR, b"\0"), 64)


def header(entries: int, block_size: int, table: int = 1536, parent: bytes = bytes(16), locators: bytes = b"") -> bytes:
    raw = b"cxsparse" + struct.pack(">QQIIII", (1 << 64) - 1, table, 0x10000, entries, block_size, 0)
    raw += parent + struct.pack(">II", 0, 0) + bytes(512) + locators
    return sealed(raw.ljust(1024, b"\0"), 36)


def dynamic(
    size: int,
    block_size: int,
    stored: dict[int, bytes],
    end: bytes | None = None,
    kind: int = 3,
    parent: bytes = bytes(16),
    locators: bytes = b"",
) -> bytes:
    """An image of blocks that follow one another, each with the sectors of `stored` only, and garbage in the others."""
    entries = -(-size // block_size)
    per_block = block_size // SECTOR
    bitmap_size = -(-per_block // 8 // SECTOR) * SECTOR
    table = [UNUSED] * entries + [0] * (-entries % 128)
    place = 1536 + 4 * len(table)
    blocks = b""
    for block in sorted({sector // per_block for sector in stored}, reverse=True):
        table[block] = (place + len(blocks)) // SECTOR
        bitmap, data = bytearray(bitmap_size), b""
        for sector in range(per_block):
            content = stored.get(block * per_block + sector)
            if content is not None:
                bitmap[sector // 8] |= 0x80 >> sector % 8
            data += content if content is not None else b"\xbb" * SECTOR
        blocks += bytes(bitmap) + data
    last = footer(size, kind)
    start = last + header(entries, block_size, parent=parent, locators=locators)
    return start + struct.pack(f">{len(table)}I", *table) + blocks + (last if end is None else end)
