"""The metadata region of a VHDX file: what kind of disk it holds, and the way to its parent. MS-VHDX 2.6."""

from __future__ import annotations

from devices.storage.vhdx.format import (
    HAS_PARENT,
    IS_REQUIRED,
    IS_VIRTUAL_DISK,
    ITEM_DISK_ID,
    ITEM_DISK_SIZE,
    ITEM_FILE_PARAMETERS,
    ITEM_LOGICAL_SECTOR,
    ITEM_PARENT_LOCATOR,
    ITEM_PHYSICAL_SECTOR,
    LEAVE_ALLOCATED,
    LOCATOR,
    LOCATOR_ENTRY,
    LOCATOR_VHDX,
    MAX_BLOCK,
    MAX_DISK,
    MAX_METADATA,
    MAX_METADATA_ITEM,
    METADATA_ENTRY,
    METADATA_SIGNATURE,
    METADATA_TABLE,
    METADATA_TABLE_SIZE,
    MIB,
    MIN_BLOCK,
    SECTOR_SIZES,
    Damage,
    Layout,
    guid,
    guid_text,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.storage.file import HostFile
    from devices.storage.vhdx.header import Region

#: Name, size in bytes, and flags of the items that every file has.
_FIXED_ITEMS = {
    ITEM_FILE_PARAMETERS: ("file parameters", 8, IS_REQUIRED),
    ITEM_DISK_SIZE: ("virtual disk size", 8, IS_REQUIRED | IS_VIRTUAL_DISK),
    ITEM_DISK_ID: ("virtual disk identifier", 16, IS_REQUIRED | IS_VIRTUAL_DISK),
    ITEM_LOGICAL_SECTOR: ("logical sector size", 4, IS_REQUIRED | IS_VIRTUAL_DISK),
    ITEM_PHYSICAL_SECTOR: ("physical sector size", 4, IS_REQUIRED | IS_VIRTUAL_DISK),
}


class Metadata:
    """What the metadata items say; sizes are in bytes."""

    __slots__ = ("block_size", "disk_id", "has_parent", "leave_allocated", "locator", "physical", "sector", "size")

    def __init__(
        self,
        size: int,
        block_size: int,
        sector: int,
        physical: int,
        disk_id: bytes,
        leave_allocated: bool = False,
        locator: dict[str, str] | None = None,
    ) -> None:
        self.size = size
        self.block_size = block_size
        self.sector = sector
        self.physical = physical
        self.disk_id = disk_id
        self.leave_allocated = leave_allocated
        #: Keys and values of the parent locator of a differencing disk.
        self.locator = locator
        self.has_parent = locator is not None

    def layout(self) -> Layout:
        return Layout(self.size, self.block_size, self.sector, self.has_parent)

    def check(self) -> None:
        """Raises Damage if there is no such disk."""
        block = self.block_size
        if block & (block - 1) or not MIN_BLOCK <= block <= MAX_BLOCK:
            raise Damage(f"blocks of {block} bytes: not a power of two from 1 MiB to 256 MiB")
        if self.sector not in SECTOR_SIZES or self.physical not in SECTOR_SIZES:
            raise Damage(f"sectors of {self.sector} bytes, physically {self.physical}: neither 512 nor 4096")
        if not self.size or self.size % self.sector or self.size > MAX_DISK:
            raise Damage(f"a disk of {self.size} bytes: not whole sectors of {self.sector}, up to 64 TiB")


def read_metadata(file: HostFile, region: Region) -> tuple[Metadata, int]:
    """What the metadata region says, and where in the file the disk's size is; raises Damage."""
    where = f"metadata table at {region.offset:#x}"
    table = file.read_bytes(region.offset, METADATA_TABLE_SIZE)
    signature, count = METADATA_TABLE.unpack_from(table)
    if signature != METADATA_SIGNATURE:
        raise Damage(f"{where}: no signature")
    if count > MAX_METADATA:
        raise Damage(f"{where}: {count} entries are more than {MAX_METADATA}")
    places: dict[bytes, tuple[int, int]] = {}
    for index in range(count):
        item, offset, length, flags = METADATA_ENTRY.unpack_from(table, METADATA_TABLE.size + index * 32)
        if item not in _FIXED_ITEMS and item != ITEM_PARENT_LOCATOR:
            if flags & IS_REQUIRED:
                raise Damage(f"{where}: item {guid_text(item)} is required, but not known")
            continue
        if item in places:
            raise Damage(f"{where}: two entries for item {guid_text(item)}")
        if offset < METADATA_TABLE_SIZE or length > MAX_METADATA_ITEM or offset + length > region.length:
            raise Damage(f"{where}: item {guid_text(item)} of {length} bytes cannot be at {offset:#x} in the region")
        places[item] = region.offset + offset, length
    values = {}
    for item, (name, length, _) in _FIXED_ITEMS.items():
        if item not in places:
            raise Damage(f"{where}: there is no {name}")
        if places[item][1] != length:
            raise Damage(f"{where}: the {name} has {places[item][1]} bytes instead of {length}")
        values[item] = file.read_bytes(*places[item])
    parameters = values[ITEM_FILE_PARAMETERS]
    flags = int.from_bytes(parameters[4:], "little")
    locator = None
    if flags & HAS_PARENT:
        if ITEM_PARENT_LOCATOR not in places:
            raise Damage(f"{where}: a differencing disk without parent locator")
        try:
            locator = parse_locator(file.read_bytes(*places[ITEM_PARENT_LOCATOR]))
        except Damage as damage:
            raise Damage(f"parent locator at {places[ITEM_PARENT_LOCATOR][0]:#x}: {damage}") from None
    metadata = Metadata(
        size=int.from_bytes(values[ITEM_DISK_SIZE], "little"),
        block_size=int.from_bytes(parameters[:4], "little"),
        sector=int.from_bytes(values[ITEM_LOGICAL_SECTOR], "little"),
        physical=int.from_bytes(values[ITEM_PHYSICAL_SECTOR], "little"),
        disk_id=values[ITEM_DISK_ID],
        leave_allocated=bool(flags & LEAVE_ALLOCATED) and locator is None,  # ignored in a differencing disk, 2.6.2.1
        locator=locator,
    )
    try:
        metadata.check()
    except Damage as damage:
        raise Damage(f"{where}: {damage}") from None
    return metadata, places[ITEM_DISK_SIZE][0]


def pack_metadata(metadata: Metadata) -> bytes:
    """The used beginning of a metadata region."""
    flags = (LEAVE_ALLOCATED if metadata.leave_allocated else 0) | (HAS_PARENT if metadata.has_parent else 0)
    values = {
        ITEM_FILE_PARAMETERS: metadata.block_size.to_bytes(4, "little") + flags.to_bytes(4, "little"),
        ITEM_DISK_SIZE: metadata.size.to_bytes(8, "little"),
        ITEM_DISK_ID: metadata.disk_id,
        ITEM_LOGICAL_SECTOR: metadata.sector.to_bytes(4, "little"),
        ITEM_PHYSICAL_SECTOR: metadata.physical.to_bytes(4, "little"),
    }
    flags_of = {item: flags for item, (_, _, flags) in _FIXED_ITEMS.items()}
    if metadata.locator is not None:
        values[ITEM_PARENT_LOCATOR] = pack_locator(metadata.locator)
        flags_of[ITEM_PARENT_LOCATOR] = IS_REQUIRED
    table = bytearray(METADATA_TABLE_SIZE)
    METADATA_TABLE.pack_into(table, 0, METADATA_SIGNATURE, len(values))
    items = bytearray()
    for index, (item, value) in enumerate(values.items()):
        at = METADATA_TABLE.size + index * METADATA_ENTRY.size
        METADATA_ENTRY.pack_into(table, at, item, METADATA_TABLE_SIZE + len(items), len(value), flags_of[item])
        items += value.ljust(-(-len(value) // 8) * 8, b"\0")
    return bytes(table + items)


def locator_changes(file: HostFile, region: Region, locator: dict[str, str]) -> list[tuple[int, bytes]]:
    """What to write where in the file to give it another parent locator; raises Damage if there is no room for it."""
    table = file.read_bytes(region.offset, METADATA_TABLE_SIZE)
    data = pack_locator(locator)
    _, count = METADATA_TABLE.unpack_from(table)
    end = METADATA_TABLE_SIZE
    for index in range(count):
        at = METADATA_TABLE.size + index * METADATA_ENTRY.size
        item, offset, length, flags = METADATA_ENTRY.unpack_from(table, at)
        end = max(end, offset + length)
        if item == ITEM_PARENT_LOCATOR:
            entry, place, room, how = at, offset, length, flags
    if len(data) > room:
        place = -(-end // 8) * 8
    if place + len(data) > region.length:
        raise Damage("the metadata region has no room for a longer parent locator")
    packed = METADATA_ENTRY.pack(ITEM_PARENT_LOCATOR, place, len(data), how)
    return [(region.offset + entry, packed), (region.offset + place, data)]


def parse_locator(data: bytes) -> dict[str, str]:
    """Keys and values of a parent locator; raises Damage. MS-VHDX 2.6.2.6."""
    if len(data) < LOCATOR.size:
        raise Damage(f"{len(data)} bytes are too few")
    kind, count = LOCATOR.unpack_from(data)
    if kind != LOCATOR_VHDX:
        raise Damage(f"type {guid_text(kind)} is not known")
    if LOCATOR.size + count * LOCATOR_ENTRY.size > len(data):
        raise Damage(f"{count} entries do not fit {len(data)} bytes")
    found: dict[str, str] = {}
    total = 0
    for index in range(count):
        places = LOCATOR_ENTRY.unpack_from(data, LOCATOR.size + index * LOCATOR_ENTRY.size)
        texts = []
        total += sum(places[2:])
        if total > len(data):
            raise Damage(f"its texts overlap: they add up to more than its {len(data)} bytes")
        for offset, length in zip(places[:2], places[2:], strict=True):
            if offset + length > len(data):
                raise Damage(f"{length} bytes at {offset:#x} are beyond its end")
            try:
                texts.append(data[offset : offset + length].decode("utf-16-le"))
            except UnicodeDecodeError:
                raise Damage(f"the {length} bytes at {offset:#x} are no UTF-16 text") from None
        if texts[0] in found:
            raise Damage(f"two values for {texts[0]!r}")
        found[texts[0]] = texts[1]
    return found


def pack_locator(values: dict[str, str]) -> bytes:
    """A parent locator as it is in the file."""
    data = bytearray(LOCATOR.pack(LOCATOR_VHDX, len(values)))
    texts = bytearray()
    start = LOCATOR.size + LOCATOR_ENTRY.size * len(values)
    for key, value in values.items():
        key_bytes, value_bytes = key.encode("utf-16-le"), value.encode("utf-16-le")
        at = start + len(texts)
        data += LOCATOR_ENTRY.pack(at, at + len(key_bytes), len(key_bytes), len(value_bytes))
        texts += key_bytes + value_bytes
    return bytes(data + texts)


def linkages(locator: dict[str, str]) -> list[bytes]:
    """The DataWriteGuids that the parent may have; raises Damage if the locator has none."""
    found = []
    for key in ("parent_linkage", "parent_linkage2"):
        if key in locator:
            try:
                found.append(guid(locator[key]))
            except ValueError:
                raise Damage(f"the parent locator's {key} is no GUID: {locator[key]!r}") from None
    if not found:
        raise Damage("the parent locator has no parent_linkage")
    return found


def region_length(layout: Layout, spare: int = 0) -> int:
    """Bytes of a BAT region for the layout: whole MiB."""
    return -(-(layout.entries * 8 + spare) // MIB) * MIB
