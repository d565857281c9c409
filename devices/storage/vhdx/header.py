"""The header section of a VHDX file: identifier, the two headers, the two region tables. MS-VHDX 2.2."""

from __future__ import annotations

from devices.storage.vhdx.format import (
    CREATOR_SIZE,
    FILE_SIGNATURE,
    HEADER,
    HEADER_OFFSETS,
    HEADER_SIZE,
    MAX_FILE,
    MAX_REGIONS,
    MIB,
    NO_GUID,
    REGION_BAT,
    REGION_ENTRY,
    REGION_METADATA,
    REGION_TABLE,
    REGION_TABLE_OFFSETS,
    REGION_TABLE_SIZE,
    Damage,
    guid_text,
    is_sealed,
    seal,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.storage.file import HostFile

_MAX_SEQUENCE = (1 << 64) - (1 << 32)
_REGION_NAMES = {REGION_BAT: "BAT", REGION_METADATA: "metadata"}


class Header:
    """One of the two headers: what changes with each use of the file, and where the log is. MS-VHDX 2.2.2."""

    __slots__ = ("data_write", "file_write", "log_guid", "log_length", "log_offset", "sequence")

    def __init__(
        self, sequence: int, file_write: bytes, data_write: bytes, log_guid: bytes, log_length: int, log_offset: int
    ) -> None:
        self.sequence = sequence
        #: FileWriteGuid and DataWriteGuid: new ones in each session that changes the file, or what the disk holds.
        self.file_write = file_write
        self.data_write = data_write
        #: Names the entries that count in the log; all zeros if none do.
        self.log_guid = log_guid
        self.log_length = log_length
        self.log_offset = log_offset

    @classmethod
    def parse(cls, data: bytes) -> Header:
        """A header as it is in the file; raises Damage."""
        fields = HEADER.unpack_from(data)
        signature, _, sequence, file_write, data_write, log_guid, log_version, version, log_length, log_offset = fields
        if signature != b"head":
            raise Damage("no header signature")
        if not is_sealed(data):
            raise Damage("wrong header checksum")
        if version != 1 or (log_version and log_guid != NO_GUID):
            raise Damage(f"version {version} of the format, or {log_version} of its log, is not known")
        if sequence > _MAX_SEQUENCE:
            raise Damage(f"sequence number {sequence} leaves none for later headers")
        if log_offset % MIB or log_length % MIB or log_offset < MIB or not log_length:
            raise Damage(f"a log of {log_length} bytes cannot be at {log_offset:#x}")
        if log_offset > MAX_FILE:
            raise Damage(f"the log at {log_offset:#x} is beyond any VHDX file")
        return cls(sequence, file_write, data_write, log_guid, log_length, log_offset)

    def pack(self) -> bytes:
        data = bytearray(HEADER_SIZE)
        fields = (self.file_write, self.data_write, self.log_guid, 0, 1, self.log_length, self.log_offset)
        HEADER.pack_into(data, 0, b"head", 0, self.sequence, *fields)
        return seal(data)


class Headers:
    """Both headers of `file`, of which `current` counts. Raises Damage if neither can be it."""

    def __init__(self, file: HostFile) -> None:
        self._file = file
        #: What is wrong with the first and the second header; None for a good one.
        self.damage: list[Damage | None] = [None, None]
        found: list[tuple[int, int, Header]] = []
        contents = []
        for index, offset in enumerate(HEADER_OFFSETS):
            data = file.read_bytes(offset, HEADER_SIZE)
            contents.append(data)
            try:
                header = Header.parse(data)
                found.append((header.sequence, -index, header))
            except Damage as damage:
                self.damage[index] = Damage(f"header {index + 1} at {offset:#x}: {damage}")
        if not found:
            raise Damage(f"both headers are bad: {self.damage[0]}; {self.damage[1]}")
        # Disk2vhd writes the same header twice, which does no harm.
        if len(found) == 2 and found[0][0] == found[1][0] and contents[0] != contents[1]:
            raise Damage(f"both headers, at {HEADER_OFFSETS[0]:#x} and {HEADER_OFFSETS[1]:#x}, have the same number")
        _, index, self.current = max(found)
        self._index = -index

    def update(
        self, file_write: bytes | None = None, data_write: bytes | None = None, log_guid: bytes | None = None
    ) -> None:
        """Change the header on stable storage, first one copy, then the other. MS-VHDX 2.2.2.1."""
        now = self.current
        fields = (
            now.file_write if file_write is None else file_write,
            now.data_write if data_write is None else data_write,
            now.log_guid if log_guid is None else log_guid,
        )
        for _ in range(2):
            header = Header(self.current.sequence + 1, *fields, now.log_length, now.log_offset)
            index = 1 - self._index
            self._file.write_bytes(HEADER_OFFSETS[index], header.pack())
            self._file.flush()
            self.current, self._index = header, index
        self.damage = [None, None]


class Region:
    """A part of the file with a purpose of its own. MS-VHDX 2.2.3.2."""

    __slots__ = ("guid", "length", "offset", "required")

    def __init__(self, guid: bytes, offset: int, length: int, required: bool) -> None:
        self.guid = guid
        self.offset = offset
        self.length = length
        self.required = required

    @property
    def name(self) -> str:
        return _REGION_NAMES.get(self.guid) or guid_text(self.guid)


class Regions:
    """What the region table says, after the first good copy. Raises Damage if there is none, or it can't be used."""

    def __init__(self, file: HostFile, log_offset: int, log_length: int) -> None:
        self.damage: list[Damage | None] = [None, None]
        found: list[Region] | None = None
        for index, offset in enumerate(REGION_TABLE_OFFSETS):
            data = file.read_bytes(offset, REGION_TABLE_SIZE)
            try:
                regions = _parse_regions(data)
                if found is None:
                    found, content = regions, data
                elif data != content:
                    raise Damage("differs from the other copy")
            except Damage as damage:
                self.damage[index] = Damage(f"region table {index + 1} at {offset:#x}: {damage}")
        if found is None:
            raise Damage(f"both region tables are bad: {self.damage[0]}; {self.damage[1]}")
        self.all = found
        taken = [(log_offset, log_length, "the log")]
        size = file.size()
        for region in sorted(self.all, key=lambda region: region.offset):
            where = f"region {region.name} at {region.offset:#x}"
            if region.guid not in _REGION_NAMES and region.required:
                raise Damage(f"{where} is required, but not known")
            if region.offset % MIB or region.length % MIB or region.offset < MIB or not region.length:
                raise Damage(f"{where} cannot be there with {region.length} bytes")
            if region.offset + region.length > size:
                raise Damage(f"{where} with {region.length} bytes is beyond the end of the file")
            for offset, length, name in taken:
                if region.offset < offset + length and offset < region.offset + region.length:
                    raise Damage(f"{where} overlaps {name}")
            taken = [taken[0], (region.offset, region.length, f"region {region.name}")]
        self.bat = self._find(REGION_BAT)
        self.metadata = self._find(REGION_METADATA)

    def _find(self, guid: bytes) -> Region:
        for region in self.all:
            if region.guid == guid:
                return region
        raise Damage(f"the region table has no {_REGION_NAMES[guid]} region")

    def ranges(self) -> list[tuple[int, int]]:
        """Offset and length of each region."""
        return [(region.offset, region.length) for region in self.all]


def _parse_regions(data: bytes) -> list[Region]:
    signature, _, count = REGION_TABLE.unpack_from(data)
    if signature != b"regi":
        raise Damage("no signature")
    if not is_sealed(data):
        raise Damage("wrong checksum")
    if count > MAX_REGIONS:
        raise Damage(f"{count} entries are more than {MAX_REGIONS}")
    regions = []
    for index in range(count):
        guid, offset, length, required = REGION_ENTRY.unpack_from(data, REGION_TABLE.size + index * REGION_ENTRY.size)
        regions.append(Region(guid, offset, length, bool(required & 1)))
    if len({region.guid for region in regions}) < count:
        raise Damage("two entries for one region")
    return regions


def pack_regions(regions: list[Region]) -> bytes:
    """A region table as it is in the file."""
    data = bytearray(REGION_TABLE_SIZE)
    REGION_TABLE.pack_into(data, 0, b"regi", 0, len(regions))
    for index, region in enumerate(regions):
        at = REGION_TABLE.size + index * REGION_ENTRY.size
        REGION_ENTRY.pack_into(data, at, region.guid, region.offset, region.length, region.required)
    return seal(data)


def check_identifier(file: HostFile) -> None:
    """Raises Damage unless `file` begins as every VHDX file does. MS-VHDX 2.2.1."""
    if file.size() < MIB:
        raise Damage(f"{file.size()} bytes are too few; the file was cut short, or is no VHDX image")
    if file.read_bytes(0, len(FILE_SIGNATURE)) != FILE_SIGNATURE:
        raise Damage("no file identifier at 0x0; is it a VHDX image?")


def read_creator(file: HostFile) -> str:
    """What the file says of the program that made it, whatever that may be. MS-VHDX 2.2.1."""
    raw = file.read_bytes(len(FILE_SIGNATURE), CREATOR_SIZE)
    return raw.decode("utf-16-le", "replace").split("\0")[0]
