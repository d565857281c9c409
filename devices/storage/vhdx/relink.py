"""Writing the parent locator of a VHDX image anew."""

from __future__ import annotations

from devices.storage.backend import DiskError
from devices.storage.vhdx.format import (
    ITEM_PARENT_LOCATOR,
    LOG_SECTOR,
    METADATA_ENTRY,
    METADATA_TABLE,
    METADATA_TABLE_SIZE,
    guid_text,
    new_guid,
)
from devices.storage.vhdx.journal import LogWriter
from devices.storage.vhdx.metadata import pack_locator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.storage.vhdx.image import VhdxDisk


def follow(child: VhdxDisk, parent: VhdxDisk) -> None:
    """Let the content of `parent` change without `child` losing it. MS-VHDX 2.6.2.6.3 and note 12 of its appendix.

    First the child learns what the DataWriteGuid will be, beside the one that it is, then the parent gets it. Its
    other children do not know it and refuse their parent from then on, for what they differ from is gone.
    """
    following = new_guid()
    locator = dict(child.metadata.locator or {})
    locator["parent_linkage"] = "{" + guid_text(parent.data_write) + "}"
    locator["parent_linkage2"] = "{" + guid_text(following) + "}"
    child.journal.start(child.data_write)  # its own content stays as it is
    _replace(child, locator)
    child.journal.end()
    parent.journal.start(following)


def _replace(child: VhdxDisk, locator: dict[str, str]) -> None:
    """Put the locator where the metadata region has room, and have its entry point there, all at once."""
    region = child.regions.metadata
    table = bytearray(child.file.read_bytes(region.offset, METADATA_TABLE_SIZE))
    data = pack_locator(locator)
    room = len(data) + -len(data) % LOG_SECTOR
    used, entry = [], 0
    for index in range(METADATA_TABLE.unpack_from(table)[1]):
        at = METADATA_TABLE.size + index * METADATA_ENTRY.size
        item, offset, length, flags = METADATA_ENTRY.unpack_from(table, at)
        used.append((offset, offset + length))
        if item == ITEM_PARENT_LOCATOR:
            entry, entry_flags = at, flags
    place = METADATA_TABLE_SIZE
    for start, end in sorted(used):
        if place + room <= start:
            break
        place = max(place, end + -end % LOG_SECTOR)
    if not entry or place + room > region.length or room // LOG_SECTOR >= LogWriter.MAX_SECTORS:
        raise DiskError(f"{child.path}: its metadata has no room for another parent locator; merge it into a new image")
    METADATA_ENTRY.pack_into(table, entry, ITEM_PARENT_LOCATOR, place, len(data), entry_flags)
    first = entry - entry % LOG_SECTOR
    data = data.ljust(room, b"\0")
    sectors = [(region.offset + place + at, data[at : at + LOG_SECTOR]) for at in range(0, room, LOG_SECTOR)]
    sectors.append((region.offset + first, bytes(table[first : first + LOG_SECTOR])))
    child.journal.commit(sectors, child.file.size(), at_once=True)
    child.metadata.locator = locator
