"""The layout of a VHDX file: where things are, how they are packed, what their numbers mean. MS-VHDX chapter 2."""

from __future__ import annotations

import os
import struct

from pyvmm.core._hot import crc32c

MIB = 1 << 20
#: Largest virtual disk (2.6.2.2), and largest file that any such disk can need.
MAX_DISK = 64 << 40
MAX_FILE = 128 << 40
MIN_BLOCK, MAX_BLOCK = MIB, 256 * MIB
SECTOR_SIZES = (512, 4096)

# Header section (2.2): the first MiB of the file.
FILE_SIGNATURE = b"vhdxfile"
CREATOR_SIZE = 512
HEADER_OFFSETS = (64 << 10, 128 << 10)
HEADER_SIZE = 4096
REGION_TABLE_OFFSETS = (192 << 10, 256 << 10)
REGION_TABLE_SIZE = 64 << 10
MAX_REGIONS = 2047

#: Signature, checksum, sequence number, FileWriteGuid, DataWriteGuid, LogGuid, versions of log and file, LogLength,
#: LogOffset.
HEADER = struct.Struct("<4sIQ16s16s16sHHIQ")
#: Signature, checksum, entry count.
REGION_TABLE = struct.Struct("<4sII4x")
#: Identifier, offset in the file, length, required.
REGION_ENTRY = struct.Struct("<16sQII")

# Log (2.3): entries of whole sectors of 4096 bytes.
LOG_SECTOR = 4096
#: Signature, checksum, entry length, tail, sequence number, descriptor count, LogGuid, FlushedFileOffset,
#: LastFileOffset.
LOG_ENTRY = struct.Struct("<4sIIIQI4x16sQQ")
#: Signature, trailing bytes, leading bytes or length of zeros, offset in the file, sequence number.
LOG_DESCRIPTOR = struct.Struct("<4s4sQQQ")

# Block allocation table (2.5): 64-bit entries, state in bits 0 to 2, offset in the file in MiB from bit 20 on.
ABSENT, UNDEFINED, ZEROED, UNMAPPED, PRESENT, PARTIAL = 0, 1, 2, 3, 6, 7
STATE_MASK = 7
OFFSET_MASK = ~(MIB - 1)
#: Sectors that a sector bitmap, which fills one MiB, is for.
CHUNK_SECTORS = 1 << 23

# Metadata (2.6).
METADATA_SIGNATURE = b"metadata"
METADATA_TABLE_SIZE = 64 << 10
MAX_METADATA = 2047
MAX_METADATA_ITEM = MIB
#: Signature, entry count.
METADATA_TABLE = struct.Struct("<8s2xH20x")
#: Identifier, offset in the region, length, flags.
METADATA_ENTRY = struct.Struct("<16sIII4x")
IS_VIRTUAL_DISK, IS_REQUIRED = 2, 4
LEAVE_ALLOCATED, HAS_PARENT = 1, 2
#: Type, number of keys.
LOCATOR = struct.Struct("<16s2xH")
#: Offsets of key and value in the item, lengths of both.
LOCATOR_ENTRY = struct.Struct("<IIHH")


class Damage(Exception):
    """What is wrong with an image, and where in it; whoever knows the file's name makes a DiskError of it."""


def guid(text: str) -> bytes:
    """The sixteen bytes of a GUID as text, in braces or not: three little-endian numbers, then bytes in order."""
    digits = text.strip("{}").split("-")
    if [len(part) for part in digits] != [8, 4, 4, 4, 12]:
        raise ValueError(f"no GUID: {text!r}")
    first, second, third, *rest = (bytes.fromhex(part) for part in digits)
    return first[::-1] + second[::-1] + third[::-1] + b"".join(rest)


def guid_text(data: bytes) -> str:
    """A GUID as people and parent locators have it, without braces."""
    fields = (data[3::-1], data[5:3:-1], data[7:5:-1], data[8:10], data[10:16])
    return "-".join(field.hex() for field in fields)


def new_guid() -> bytes:
    """A random GUID (RFC 4122 version 4)."""
    data = bytearray(os.urandom(16))
    data[7] = data[7] & 0x0F | 0x40
    data[8] = data[8] & 0x3F | 0x80
    return bytes(data)


NO_GUID = bytes(16)
REGION_BAT = guid("2dc27766-f623-4200-9d64-115e9bfd4a08")
REGION_METADATA = guid("8b7ca206-4790-4b9a-b8fe-575f050f886e")
ITEM_FILE_PARAMETERS = guid("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
ITEM_DISK_SIZE = guid("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
ITEM_DISK_ID = guid("beca12ab-b2e6-4523-93ef-c309e000c746")
ITEM_LOGICAL_SECTOR = guid("8141bf1d-a96f-4709-ba47-f233a8faab5f")
ITEM_PHYSICAL_SECTOR = guid("cda348c7-445d-4471-9cc9-e9885251c556")
ITEM_PARENT_LOCATOR = guid("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
LOCATOR_VHDX = guid("b04aefb7-d19e-4a81-b789-25b8e9445913")


def seal(data: bytearray) -> bytes:
    """Fill in the checksum, CRC-32C over the whole structure with zeros in its place, at bytes 4 to 8."""
    data[4:8] = bytes(4)
    data[4:8] = crc32c(data).to_bytes(4, "little")
    return bytes(data)


def is_sealed(data: bytes) -> bool:
    """Whether the checksum at bytes 4 to 8 is right."""
    checksum = crc32c(data[8:], crc32c(bytes(4), crc32c(data[:4])))
    return data[4:8] == checksum.to_bytes(4, "little")


class Layout:
    """Where the table's entries are for a disk: sizes in bytes. MS-VHDX 2.5."""

    __slots__ = ("block_size", "blocks", "chunk_blocks", "chunks", "entries", "sector_size", "size")

    def __init__(self, size: int, block_size: int, sector_size: int, has_parent: bool) -> None:
        self.size = size
        self.block_size = block_size
        self.sector_size = sector_size
        #: Blocks whose sectors one sector bitmap is for; the specification's chunk ratio.
        self.chunk_blocks = CHUNK_SECTORS * sector_size // block_size
        self.blocks = -(-size // block_size)
        self.chunks = -(-self.blocks // self.chunk_blocks)
        if has_parent:
            self.entries = self.chunks * (self.chunk_blocks + 1)
        else:
            self.entries = self.blocks + (self.blocks - 1) // self.chunk_blocks

    def block_entry(self, block: int) -> int:
        """Index of a block's entry in the table."""
        return block + block // self.chunk_blocks

    def bitmap_entry(self, chunk: int) -> int:
        """Index of the entry of a chunk's sector bitmap."""
        return chunk * (self.chunk_blocks + 1) + self.chunk_blocks
