"""Finding damage in VHDX images, and repairing what can be without loss."""

from __future__ import annotations

from devices.storage.backend import DiskError, Finding
from devices.storage.chain import open_parents
from devices.storage.vhdx.disk import VhdxDisk
from devices.storage.vhdx.format import FILE_SIGNATURE, MIB, NO_GUID, REGION_TABLE_OFFSETS, Damage, new_guid
from devices.storage.vhdx.header import Headers, check_identifier, pack_regions
from devices.storage.vhdx.log import active_sequence, is_dirty
from devices.storage.vhdx.space import Space, used_by

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.storage.file import HostFile

#: Entries of the BAT that are told of one by one.
_MAX_FAULTS = 20


def check(file: HostFile, repair: bool) -> list[Finding]:
    """What is wrong with the image in `file`, and with `repair` put right where that is safe; raises OSError.

    Repaired are: what is there twice and bad once (headers, region tables), the identifier of a file that has all else,
    a log to be replayed, one with nothing complete in it, and room that nothing uses. Not repaired is what cannot be
    known.
    """
    if file.is_block:
        return [Finding("error", "a block device; a VHDX image must be in a file")]
    findings: list[Finding] = []
    try:
        if not _check_headers(file, repair, findings):
            return findings
        disk = VhdxDisk(file, checked=False)
    except Damage as damage:
        return [*findings, Finding("error", str(damage))]
    except DiskError as error:
        return [*findings, Finding("error", str(error.__cause__ or error))]
    try:
        _check_regions(disk, repair, findings)
        faults = disk.check_table(_MAX_FAULTS + 1)
        findings += (Finding("error", disk.table_fault(index, kind)) for index, kind in faults[:_MAX_FAULTS])
        if len(faults) > _MAX_FAULTS:
            findings.append(Finding("error", "more entries of the BAT are wrong"))
        if not faults:
            _check_room(disk, repair, findings)
        try:
            open_parents(disk)
        except DiskError as error:
            findings.append(Finding("error", str(error)))
        return findings
    finally:
        disk.close()


def _check_headers(file: HostFile, repair: bool, findings: list[Finding]) -> bool:
    """Whether the rest can be looked at; raises Damage if it cannot for what is not among `findings`."""
    try:
        check_identifier(file)
    except Damage as damage:
        if file.size() < MIB:
            raise
        Headers(file)  # which raises Damage if this is no VHDX file at all
        if repair:
            file.write_bytes(0, FILE_SIGNATURE)
            file.flush()
        findings.append(Finding("error", str(damage), repaired=repair))
        if not repair:
            return False
    headers = Headers(file)
    for fault in headers.damage:
        if fault is not None:
            findings.append(Finding("warning", f"{fault}; the other one is good", repaired=repair))
    if is_dirty(headers.current) and not _check_log(file, headers, repair, findings):
        return False
    if repair and any(headers.damage):
        headers.update(file_write=new_guid())
    return True


def _check_log(file: HostFile, headers: Headers, repair: bool, findings: list[Finding]) -> bool:
    """Whether the rest can be looked at."""
    header = headers.current
    if header.log_offset + header.log_length > file.size():
        return True  # and opening the image tells
    try:
        count = len(active_sequence(file, header))
    except Damage as damage:
        # What was not logged completely was not written in place either, so nothing is half done.
        if repair:
            headers.update(file_write=new_guid(), log_guid=NO_GUID)
        findings.append(Finding("error", str(damage), repaired=repair))
        return repair
    plural = "entry" if count == 1 else "entries"
    what = f"not closed properly: {count} {plural} of the log to be replayed, as opening it for writing does"
    findings.append(Finding("warning", what, repaired=repair))
    return True


def _check_regions(disk: VhdxDisk, repair: bool, findings: list[Finding]) -> None:
    for offset, fault in zip(REGION_TABLE_OFFSETS, disk.regions.damage, strict=True):
        if fault is None:
            continue
        if repair:
            disk.headers.update(file_write=new_guid())
            disk.file.write_bytes(offset, pack_regions(disk.regions.all))
            disk.file.flush()
        findings.append(Finding("warning", f"{fault}; the other one is good", repaired=repair))


def _check_room(disk: VhdxDisk, repair: bool, findings: list[Finding]) -> None:
    """Room in the file that neither the disk nor a structure uses."""
    space = Space(disk.file, disk.structures() + used_by(disk.table, disk.layout, disk.loaded))
    lost = 0
    for start, length in space.free:
        for _, size, stored in disk.file.extents(start * MIB, length * MIB):
            lost += size if stored else 0
    if lost < MIB:  # the end of a file is not always a whole MiB
        return
    if repair:
        disk.headers.update(file_write=new_guid())
        for start, length in space.free:
            disk.file.trim(start * MIB, length * MIB)
        disk.file.truncate(space.cut())
        disk.file.flush()
    findings.append(Finding("warning", f"{lost} bytes of the file are used by nothing", repaired=repair))
