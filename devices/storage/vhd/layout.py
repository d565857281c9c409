"""The structures of a VHD image and the order of bytes in them, which is big-endian."""

from __future__ import annotations

import os
import struct

from devices.storage.backend import Geometry, chs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.storage.vhd.parent import NewLink

SECTOR = 512

FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
KINDS = {FIXED: "fixed", DYNAMIC: "dynamic", DIFFERENCING: "differencing"}

#: The largest disk: with it the last block still begins below sector 2^32 - 1 of the file.
MAX_SIZE = 2040 << 30

#: A table entry of a block without room in the file.
UNUSED = 0xFFFF_FFFF
#: Entries of a table that are read at most: those of the largest disk in blocks of 512 KiB.
MAX_ENTRIES = 1 << 22

DEFAULT_BLOCK = 2 << 20
#: A bitmap has at least one byte; the upper bound keeps one bitmap small enough to be read for one sector.
MIN_BLOCK, MAX_BLOCK = 8 * SECTOR, 256 << 20

HEADER_SIZE = 1024
_NOWHERE = 0xFFFF_FFFF_FFFF_FFFF
_VERSION = 0x0001_0000
#: Seconds from the epoch of Unix to that of VHD, 1 January 2000.
EPOCH = 946_684_800

# cookie, features, version, data offset, timestamp, creator application, its version, its host, original size,
# current size, cylinders, heads, sectors, type, checksum, unique id, saved state
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB")
_FOOTER_CHECKSUM = 64
# cookie, data offset, table offset, version, table entries, block size, checksum, parent's id, parent's timestamp,
# reserved, parent's name
_HEADER = struct.Struct(">8sQQIIII16sII512s")
_HEADER_CHECKSUM = 36
# platform code, room, length, reserved, offset
LOCATOR = struct.Struct(">4sIIIQ")
LOCATORS = 8

#: Creators that count a disk's size by its geometry; all others, Hyper-V first, mean the size in the footer.
_BY_GEOMETRY = (b"vpc ", b"vs  ", b"qemu")
#: We sign as Hyper-V of Windows Server 2012 R2, since readers know that it means the size in the footer.
_CREATOR = b"win ", 0x0006_0003, b"Wi2k"


class Footer:
    """The hard disk footer: the last sector of an image, and the first of one that is not fixed."""

    def __init__(self, raw: bytes) -> None:
        """Take a footer apart; raises ValueError with what is wrong."""
        self._raw = bytes(raw)
        fields = _FOOTER.unpack_from(raw)
        if fields[0] != b"conectix":
            raise ValueError("no VHD footer")
        if fields[14] != checksum(raw, _FOOTER_CHECKSUM):
            raise ValueError("footer with a wrong checksum")
        if fields[2] >> 16 != _VERSION >> 16:
            raise ValueError(f"footer of unknown version {fields[2]:#010x}")
        if fields[13] not in KINDS:
            raise ValueError(f"footer of unknown disk type {fields[13]}")
        self.header_offset: int = fields[3]
        self.timestamp: int = fields[4]
        self.creator: bytes = fields[5]
        self.creator_version: int = fields[6]
        self.creator_host: bytes = fields[7]
        self.original_size: int = fields[8]
        self.current_size: int = fields[9]
        self.geometry = Geometry(*fields[10:13])
        self.kind: int = fields[13]
        self.unique_id: bytes = fields[15]
        self.saved_state = bool(fields[16])

    @classmethod
    def make(cls, kind: int, size: int, unique_id: bytes, timestamp: int) -> Footer:
        """A footer for a new disk of `size` bytes, made `timestamp` seconds after EPOCH."""
        offset = _NOWHERE if kind == FIXED else SECTOR
        shape = chs(size // SECTOR)
        raw = _FOOTER.pack(
            *(b"conectix", 2, _VERSION, offset, timestamp & 0xFFFF_FFFF, *_CREATOR, size, size),
            *(shape.cylinders, shape.heads, shape.sectors, kind, 0, unique_id, 0),
        )
        return cls(_sealed(raw.ljust(SECTOR, b"\0"), _FOOTER_CHECKSUM))

    @property
    def size(self) -> int:
        """Bytes of the disk, by the rule that its creator goes by.

        As in QEMU: Virtual PC and QEMU itself mean the geometry, unless that is at its end; but never more than
        the size in the footer.
        """
        shape = self.geometry
        by_geometry = shape.cylinders * shape.heads * shape.sectors
        if self.creator not in _BY_GEOMETRY or by_geometry >= 65535 * 16 * 255 or not by_geometry:
            return self.current_size
        return min(by_geometry * SECTOR, self.current_size)

    def resized(self, size: int) -> Footer:
        """The same for another size, which from then on counts as the footer tells it."""
        fields = list(_FOOTER.unpack_from(self._raw))
        shape = chs(size // SECTOR)
        fields[5:8] = _CREATOR
        # The first is the size at creation by the specification, for information; libvhdi takes it for the size.
        fields[8:13] = size, size, shape.cylinders, shape.heads, shape.sectors
        return Footer(_sealed(_FOOTER.pack(*fields) + self._raw[_FOOTER.size :], _FOOTER_CHECKSUM))

    def pack(self) -> bytes:
        """The sector."""
        return self._raw


class Header:
    """The dynamic disk header."""

    def __init__(self, raw: bytes) -> None:
        """Take a header apart; raises ValueError with what is wrong."""
        self._raw = bytes(raw)
        fields = _HEADER.unpack_from(raw)
        if fields[0] != b"cxsparse":
            raise ValueError("no dynamic disk header")
        if fields[6] != checksum(raw, _HEADER_CHECKSUM):
            raise ValueError("dynamic disk header with a wrong checksum")
        if fields[3] >> 16 != _VERSION >> 16:
            raise ValueError(f"dynamic disk header of unknown version {fields[3]:#010x}")
        self.table_offset: int = fields[2]
        self.entries: int = fields[4]
        self.block_size: int = fields[5]
        self.parent_id: bytes = fields[7]
        self.parent_timestamp: int = fields[8]
        self.parent_name = fields[10].decode("utf-16-be", "replace").split("\0")[0]
        if not MIN_BLOCK <= self.block_size <= MAX_BLOCK or self.block_size & (self.block_size - 1):
            raise ValueError(f"block size of {self.block_size} bytes")
        if self.entries > MAX_ENTRIES:
            raise ValueError(f"allocation table of {self.entries} entries")

    @classmethod
    def make(cls, table_offset: int, entries: int, block_size: int, link: NewLink | None = None) -> Header:
        """A header for a new disk, which `link` leads to its parent."""
        parent_id, timestamp, name, locators = bytes(16), 0, b"", b""
        if link is not None:
            parent_id, timestamp, locators = link.parent_id, link.parent_timestamp & 0xFFFF_FFFF, link.locators
            name = link.parent_name[:255].encode("utf-16-be")[:510]
        raw = _HEADER.pack(
            *(b"cxsparse", _NOWHERE, table_offset, _VERSION, entries, block_size, 0),
            *(parent_id, timestamp, 0, name),
        )
        return cls(_sealed((raw + locators).ljust(HEADER_SIZE, b"\0"), _HEADER_CHECKSUM))

    @property
    def bitmap_size(self) -> int:
        """Bytes before a block's data that tell which of its sectors are there: a bit each, in whole sectors."""
        return -(-self.block_size // SECTOR // 8 // SECTOR) * SECTOR

    def locators(self) -> list[tuple[bytes, int, int]]:
        """(platform code, offset, length) of what tells where the parent is."""
        found = []
        for index in range(LOCATORS):
            code, _, length, _, offset = LOCATOR.unpack_from(self._raw, _HEADER.size + index * LOCATOR.size)
            if code != bytes(4):
                found.append((code, offset, length))
        return found

    def moved(self, table_offset: int, entries: int) -> Header:
        """The same with another allocation table. Only its first sector is different."""
        fields = list(_HEADER.unpack_from(self._raw))
        fields[2], fields[4] = table_offset, entries
        return Header(_sealed(_HEADER.pack(*fields) + self._raw[_HEADER.size :], _HEADER_CHECKSUM))

    def pack(self) -> bytes:
        """The two sectors."""
        return self._raw


def checksum(raw: bytes, at: int) -> int:
    """The one's complement of the sum of all bytes of a structure, but for its checksum `at` some offset."""
    return ~(sum(raw) - sum(raw[at : at + 4])) & 0xFFFF_FFFF


def _sealed(raw: bytes, at: int) -> bytes:
    return raw[:at] + struct.pack(">I", checksum(raw, at)) + raw[at + 4 :]


def new_id() -> bytes:
    """A random UUID, version 4 of RFC 4122."""
    raw = bytearray(os.urandom(16))
    raw[6], raw[8] = raw[6] & 0x0F | 0x40, raw[8] & 0x3F | 0x80
    return bytes(raw)
