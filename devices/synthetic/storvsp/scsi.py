"""A SCSI disk's mind: what a command means for a disk, with no I/O. SPC-4 and SBC-3.

`Target.plan` turns a CDB into a plan (`devices.storage.plans`); whoever holds the disk and the data buffer carries
it out.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from devices.storage.cdb import CDB_LENGTHS, Op
from devices.storage.plans import Fail, Fill, Flush, Parameters, Read, Reply, Unmap, Verify, Write
from devices.storage.sense import (
    INVALID_FIELD_IN_CDB,
    INVALID_FIELD_IN_PARAMETERS,
    INVALID_OPCODE,
    LBA_OUT_OF_RANGE,
    NO_SENSE,
    PARAMETER_LIST_LENGTH,
    SAVING_NOT_SUPPORTED,
    WRITE_PROTECTED,
)
from devices.synthetic.storvsp import inquiry

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.storage.backend import Disk
    from devices.storage.plans import Plan


_READ_CAPACITY_16 = 0x10
_CACHING_PAGE = 0x08
_ALL_PAGES = 0x3F


class Target:
    """One logical unit of direct-access type in front of a disk's properties.

    `identity` names the unit in VPD pages: sixteen bytes, kept over restarts and moves.
    """

    def __init__(self, disk: Disk, identity: bytes) -> None:
        self.identity = identity
        self._readonly = disk.readonly
        self._physical = disk.physical_sector_size
        self._zeroes = disk.trim_zeroes
        self._block = disk.sector_size
        self._blocks = disk.size // disk.sector_size
        self._max_blocks = inquiry.MAX_TRANSFER_BYTES // disk.sector_size
        self._commands: dict[int, Callable[[bytes, int, bool], Plan]] = {
            Op.TEST_UNIT_READY: lambda cdb, length, data_in: Reply(),
            Op.REQUEST_SENSE: self._request_sense,
            Op.READ_6: self._read_write_6,
            Op.WRITE_6: self._read_write_6,
            Op.INQUIRY: self._inquiry,
            Op.MODE_SENSE_6: self._mode_sense_6,
            Op.START_STOP_UNIT: self._start_stop,
            Op.READ_CAPACITY_10: self._read_capacity_10,
            Op.READ_10: self._read_write_10,
            Op.WRITE_10: self._read_write_10,
            Op.VERIFY_10: self._verify_10,
            Op.SYNCHRONIZE_CACHE_10: self._synchronize_10,
            Op.WRITE_SAME_10: self._write_same_10,
            Op.UNMAP: self._unmap,
            Op.MODE_SENSE_10: self._mode_sense_10,
            Op.READ_16: self._read_write_16,
            Op.WRITE_16: self._read_write_16,
            Op.VERIFY_16: self._verify_16,
            Op.SYNCHRONIZE_CACHE_16: self._synchronize_16,
            Op.WRITE_SAME_16: self._write_same_16,
            Op.SERVICE_ACTION_IN_16: self._service_action_in,
            Op.READ_12: self._read_write_12,
            Op.WRITE_12: self._read_write_12,
        }

    def plan(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        """What to do for a command.

        `cdb` is as long as the initiator said, `length` the size of its data buffer, and `data_in` whether
        that buffer is for us to fill.
        """
        if not cdb:
            return Fail(INVALID_OPCODE)
        command = self._commands.get(cdb[0])
        if command is None:
            return Fail(INVALID_OPCODE)
        if len(cdb) < CDB_LENGTHS[cdb[0] >> 5]:
            return Fail(INVALID_FIELD_IN_CDB)
        return command(cdb, length, data_in)

    # Data transfer. The CDBs differ in where address and length stand, so each form unpacks and one judges.

    def _read_write_6(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        word, blocks = struct.unpack_from(">IB", cdb)
        return self._transfer(cdb[0] == Op.WRITE_6, 0, word & 0x1F_FFFF, blocks or 256, length, data_in)

    def _read_write_10(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        op, flags, lba, blocks = struct.unpack_from(">BBIxH", cdb)
        return self._transfer(op == Op.WRITE_10, flags, lba, blocks, length, data_in)

    def _read_write_12(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        op, flags, lba, blocks = struct.unpack_from(">BBII", cdb)
        return self._transfer(op == Op.WRITE_12, flags, lba, blocks, length, data_in)

    def _read_write_16(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        op, flags, lba, blocks = struct.unpack_from(">BBQI", cdb)
        return self._transfer(op == Op.WRITE_16, flags, lba, blocks, length, data_in)

    def _transfer(self, write: bool, flags: int, lba: int, blocks: int, length: int, data_in: bool) -> Plan:
        if write and self._readonly:
            return Fail(WRITE_PROTECTED)
        refusal = self._check(lba, blocks)
        if refusal is not None:
            return refusal
        size = blocks * self._block
        # Flags: RDPROTECT or WRPROTECT 7:5 (no protection information here), DPO 4, FUA 3.
        if flags & 0xE0 or blocks > self._max_blocks or size > length or (size and data_in == write):
            return Fail(INVALID_FIELD_IN_CDB)
        if write:
            return Write(lba * self._block, size, bool(flags & 0x08))
        return Read(lba * self._block, size)

    def _check(self, lba: int, blocks: int) -> Fail | None:
        if lba >= self._blocks or lba + blocks > self._blocks:
            return Fail(LBA_OUT_OF_RANGE.at(max(lba, self._blocks)))
        return None

    def _verify_10(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        _, flags, lba, blocks = struct.unpack_from(">BBIxH", cdb)
        return self._verify(flags, lba, blocks)

    def _verify_16(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        _, flags, lba, blocks = struct.unpack_from(">BBQI", cdb)
        return self._verify(flags, lba, blocks)

    def _verify(self, flags: int, lba: int, blocks: int) -> Plan:
        # Flags: VRPROTECT 7:5, BYTCHK 2:1; comparing with the initiator's data is not offered.
        if flags & 0xE6 or blocks > self._max_blocks:
            return Fail(INVALID_FIELD_IN_CDB)
        return self._check(lba, blocks) or Verify(lba * self._block, blocks * self._block)

    def _synchronize_10(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        lba, blocks = struct.unpack_from(">2xIxH", cdb)
        return self._check(lba, blocks) or Flush()

    def _synchronize_16(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        lba, blocks = struct.unpack_from(">2xQI", cdb)
        return self._check(lba, blocks) or Flush()

    def _write_same_10(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        flags, lba, blocks = struct.unpack_from(">xBIxH", cdb)
        # Bit 0 is reserved here: only the 16-byte form has NDOB.
        return Fail(INVALID_FIELD_IN_CDB) if flags & 0x01 else self._write_same(flags, lba, blocks, length, data_in)

    def _write_same_16(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        flags, lba, blocks = struct.unpack_from(">xBQI", cdb)
        return self._write_same(flags, lba, blocks, length, data_in)

    def _write_same(self, flags: int, lba: int, blocks: int, length: int, data_in: bool) -> Plan:
        if self._readonly:
            return Fail(WRITE_PROTECTED)
        # Flags: WRPROTECT 7:5, ANCHOR 4, UNMAP 3, NDOB 0 (no data-out buffer). VPD page B0 (WSNZ) rules 0 blocks out.
        if flags & 0xF6 or not 0 < blocks <= inquiry.MAX_WRITE_SAME_BYTES // self._block:
            return Fail(INVALID_FIELD_IN_CDB)
        refusal = self._check(lba, blocks)
        if refusal is not None:
            return refusal
        offset, size, discard = lba * self._block, blocks * self._block, bool(flags & 0x08)
        if flags & 0x01:
            return Fill(offset, size, bytes(self._block), discard)
        if length < self._block or data_in:
            return Fail(INVALID_FIELD_IN_CDB)
        return Parameters(self._block, lambda block: Fill(offset, size, block, discard))

    def _unmap(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        if self._readonly:
            return Fail(WRITE_PROTECTED)
        anchor, size = struct.unpack_from(">xB5xH", cdb)
        if anchor & 1 or size > length or (size and data_in):
            return Fail(INVALID_FIELD_IN_CDB)
        if size == 0:
            return Reply()
        if size < 8:
            return Fail(PARAMETER_LIST_LENGTH)
        return Parameters(size, self._unmap_list)

    def _unmap_list(self, data: bytes) -> Plan:
        (described,) = struct.unpack_from(">2xH", data)
        count = min(described, len(data) - 8) // 16
        if count > inquiry.MAX_UNMAP_DESCRIPTORS:
            return Fail(INVALID_FIELD_IN_PARAMETERS)
        ranges: list[tuple[int, int]] = []
        total = 0
        for index in range(count):
            lba, blocks = struct.unpack_from(">QI4x", data, 8 + index * 16)
            refusal = self._check(lba, blocks)
            if refusal is not None:
                return refusal
            total += blocks
            if blocks:
                ranges.append((lba * self._block, blocks * self._block))
        if total > inquiry.MAX_UNMAP_BYTES // self._block:
            return Fail(INVALID_FIELD_IN_PARAMETERS)
        return Unmap(ranges)

    # What the disk says of itself.

    def _inquiry(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        flags, page, allocation = struct.unpack_from(">xBBH", cdb)
        if flags & 1:
            data = inquiry.vpd_page(page, self.identity, self._block, self._physical, not self._readonly, self._zeroes)
            return Fail(INVALID_FIELD_IN_CDB) if data is None else Reply(data[:allocation])
        # CMDDT, bit 1, is obsolete; a page code needs EVPD.
        return Fail(INVALID_FIELD_IN_CDB) if flags or page else Reply(inquiry.STANDARD[:allocation])

    def _request_sense(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        if cdb[1] & 1:  # DESC: descriptor format
            return Fail(INVALID_FIELD_IN_CDB)
        return Reply(NO_SENSE.encode()[: cdb[4]])

    def _start_stop(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        # LOEJ, bit 1: there is nothing to eject. Power conditions, bits 7:4, and START change nothing here.
        return Fail(INVALID_FIELD_IN_CDB) if cdb[4] & 0x02 else Reply()

    def _read_capacity_10(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        return Reply(struct.pack(">II", min(self._blocks - 1, 0xFFFF_FFFF), self._block))

    def _service_action_in(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        if cdb[1] & 0x1F != _READ_CAPACITY_16:
            return Fail(INVALID_FIELD_IN_CDB)
        (allocation,) = struct.unpack_from(">I", cdb, 10)
        exponent = (self._physical // self._block).bit_length() - 1
        # LBPME: thinly provisioned; LBPRZ: unmapped blocks read as zeros.
        thin = 0 if self._readonly else 0x80 | (0x40 if self._zeroes else 0)
        return Reply(struct.pack(">QIBBB17x", self._blocks - 1, self._block, 0, exponent, thin)[:allocation])

    def _mode_sense_6(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        pages = self._mode_pages(cdb)
        if isinstance(pages, Fail):
            return pages
        header = struct.pack(">BBBx", 3 + len(pages), 0, self._device_specific())
        return Reply((header + pages)[: cdb[4]])

    def _mode_sense_10(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        pages = self._mode_pages(cdb)
        if isinstance(pages, Fail):
            return pages
        (allocation,) = struct.unpack_from(">H", cdb, 7)
        header = struct.pack(">HBB4x", 6 + len(pages), 0, self._device_specific())
        return Reply((header + pages)[:allocation])

    def _device_specific(self) -> int:
        # WP, and DPOFUA: the FUA bit of writes is honoured.
        return 0x10 | (0x80 if self._readonly else 0)

    def _mode_pages(self, cdb: bytes) -> bytes | Fail:
        control, page, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        if control == 3:
            return Fail(SAVING_NOT_SUPPORTED)
        if page not in (_CACHING_PAGE, _ALL_PAGES) or (subpage and not (page == _ALL_PAGES and subpage == 0xFF)):
            return Fail(INVALID_FIELD_IN_CDB)
        # Caching page: WCE set and not changeable.
        return struct.pack(">BBB17x", _CACHING_PAGE, 18, 0 if control == 1 else 0x04)
