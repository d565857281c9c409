"""A SCSI disk's mind: what a command means for a disk, with no I/O. SPC-4 and SBC-3.

`Target.plan` turns a CDB into a plan (`devices.storage.plans`); whoever holds the disk and the data buffer carries
it out.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

from devices.saved import check_version, saved_bool, saved_bytes
from devices.storage.cdb import CDB_LENGTHS, Op
from devices.storage.plans import Conflict, Fail, Fill, Flush, LbaStatus, Parameters, Read, Reply, Unmap, Verify, Write
from devices.storage.reservations import Reservations
from devices.storage.sense import (
    CAPACITY_CHANGED,
    INVALID_FIELD_IN_CDB,
    INVALID_FIELD_IN_PARAMETERS,
    INVALID_OPCODE,
    LBA_OUT_OF_RANGE,
    NO_SENSE,
    PARAMETER_LIST_LENGTH,
    WRITE_PROTECTED,
    Sense,
)
from devices.synthetic.storvsp import inquiry, supported
from devices.synthetic.storvsp.modes import ModePages

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from devices.storage.backend import Disk
    from devices.storage.plans import Plan


_READ_CAPACITY_16, _GET_LBA_STATUS = 0x10, 0x12
_REPORT_SUPPORTED_OPERATION_CODES = 0x0C
#: Commands that a pending unit attention does not hold up. SPC-4 section 5.14.
_IN_SPITE_OF_ATTENTION = (Op.INQUIRY, Op.REPORT_LUNS, Op.REQUEST_SENSE)


class Target:
    """One logical unit of direct-access type in front of a disk's properties, as the initiator `nexus` sees it.

    `identity` names the unit in VPD pages: sixteen bytes, kept over restarts and moves. Units in front of one disk
    share its `reservations`. Any thread.
    """

    def __init__(
        self, disk: Disk, identity: bytes, nexus: bytes = bytes(8), reservations: Reservations | None = None
    ) -> None:
        self.disk = disk
        self.identity = identity
        self.modes = ModePages(disk.readonly)
        self.reservations = reservations or Reservations()
        self.reservations.join(nexus, self.attend, lambda: self.on_change())
        self._nexus = nexus
        #: Called when `plain` may have changed; any thread.
        self.on_change: Callable[[], None] = lambda: None
        self._attentions: list[Sense] = []
        self._lock = threading.Lock()
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
            Op.MODE_SELECT_6: self._mode_select_6,
            Op.MODE_SENSE_6: lambda cdb, length, data_in: self._mode_sense(cdb, cdb[4], False),
            Op.START_STOP_UNIT: self._start_stop,
            Op.READ_CAPACITY_10: self._read_capacity_10,
            Op.READ_10: self._read_write_10,
            Op.WRITE_10: self._read_write_10,
            Op.VERIFY_10: self._verify_10,
            Op.SYNCHRONIZE_CACHE_10: self._synchronize_10,
            Op.WRITE_SAME_10: self._write_same_10,
            Op.UNMAP: self._unmap,
            Op.MODE_SELECT_10: self._mode_select_10,
            Op.MODE_SENSE_10: lambda cdb, length, data_in: self._mode_sense(cdb, cdb[7] << 8 | cdb[8], True),
            Op.PERSISTENT_RESERVE_IN: lambda cdb, length, data_in: self.reservations.plan_in(cdb),
            Op.PERSISTENT_RESERVE_OUT: self._reserve_out,
            Op.READ_16: self._read_write_16,
            Op.WRITE_16: self._read_write_16,
            Op.VERIFY_16: self._verify_16,
            Op.SYNCHRONIZE_CACHE_16: self._synchronize_16,
            Op.WRITE_SAME_16: self._write_same_16,
            Op.SERVICE_ACTION_IN_16: self._service_action_in,
            Op.MAINTENANCE_IN: self._maintenance_in,
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
        if self._attentions and cdb[0] not in _IN_SPITE_OF_ATTENTION:
            sense = self._next_attention()
            if sense is not None:
                return Fail(sense)
        if self.reservations.conflict(self._nexus, cdb):
            return Conflict()
        return command(cdb, length, data_in)

    @property
    def plain(self) -> bool:
        """Whether commands mean what they say: nothing that was set, or is still to be told, changes their answer."""
        return not self._attentions and self.modes.write_cache and not self.reservations.held

    def attend(self, sense: Sense) -> None:
        """Have the initiator learn of something with its next command."""
        with self._lock:
            if sense not in self._attentions:
                self._attentions.append(sense)
        self.on_change()

    def _next_attention(self) -> Sense | None:
        with self._lock:
            if not self._attentions:
                return None
            sense = self._attentions.pop(0)
        self.on_change()
        return sense

    def resized(self, size: int) -> None:
        """The disk has `size` bytes now; the initiator learns of it."""
        self._blocks = size // self._block
        self.attend(CAPACITY_CHANGED)

    def save(self) -> dict[str, Any]:
        """Return what the initiator has set, and has still to learn."""
        with self._lock:
            attentions = [[sense.key, sense.asc, sense.ascq] for sense in self._attentions]
        return {
            "version": 1,
            "identity": self.identity,
            "write_cache": self.modes.write_cache,
            "attentions": attentions,
            "reservations": self.reservations.save(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; raises ValueError if it doesn't fit."""
        check_version(state, 1)
        self.identity = saved_bytes(state, "identity", 16, 16)
        self.modes.write_cache = saved_bool(state, "write_cache")
        try:
            self._attentions = [Sense(int(key), int(asc), int(ascq)) for key, asc, ascq in state["attentions"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"saved unit attentions are damaged: {error}") from error
        self.reservations.restore(state["reservations"])
        self.on_change()

    def reset(self) -> None:
        """The unit is as after power-on; reservations stay."""
        with self._lock:
            self.modes.write_cache = True
            self._attentions.clear()

    def inspect(self) -> dict[str, Any]:
        """Return the disk and what the initiator has set, as plain JSON data."""
        return {
            "disk": self.disk.inspect(),
            "write_cache": self.modes.write_cache,
            "reservations": self.reservations.inspect(),
        }

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
            return Write(lba * self._block, size, bool(flags & 0x08) or self._write_through)
        return Read(lba * self._block, size)

    @property
    def _write_through(self) -> bool:
        return not self.modes.write_cache

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
            return Fill(offset, size, bytes(self._block), discard, self._write_through)
        if length < self._block or data_in:
            return Fail(INVALID_FIELD_IN_CDB)
        return Parameters(self._block, lambda block: Fill(offset, size, block, discard, self._write_through))

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
        return Unmap(ranges, self._write_through)

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
        return Reply((self._next_attention() or NO_SENSE).encode()[: cdb[4]])

    def _start_stop(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        # LOEJ, bit 1: there is nothing to eject. Power conditions, bits 7:4, and START change nothing here.
        return Fail(INVALID_FIELD_IN_CDB) if cdb[4] & 0x02 else Reply()

    def _read_capacity_10(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        return Reply(struct.pack(">II", min(self._blocks - 1, 0xFFFF_FFFF), self._block))

    def _service_action_in(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        lba, allocation = struct.unpack_from(">2xQI", cdb)
        action = cdb[1] & 0x1F
        if action == _GET_LBA_STATUS:
            return self._check(lba, 0) or LbaStatus(lba * self._block, min(allocation, length))
        if action != _READ_CAPACITY_16:
            return Fail(INVALID_FIELD_IN_CDB)
        exponent = (self._physical // self._block).bit_length() - 1
        # LBPME: thinly provisioned; LBPRZ: unmapped blocks read as zeros.
        thin = 0 if self._readonly else 0x80 | (0x40 if self._zeroes else 0)
        return Reply(struct.pack(">QIBBB17x", self._blocks - 1, self._block, 0, exponent, thin)[:allocation])

    def _maintenance_in(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        if cdb[1] & 0x1F != _REPORT_SUPPORTED_OPERATION_CODES:
            return Fail(INVALID_FIELD_IN_CDB)
        return supported.report(cdb)

    # What the initiator may set.

    def _mode_sense(self, cdb: bytes, allocation: int, ten: bool) -> Plan:
        data = self.modes.sense(cdb, ten)
        return data if isinstance(data, Fail) else Reply(data[:allocation])

    def _mode_select_6(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        return self._mode_select(cdb, cdb[4], length, data_in, False)

    def _mode_select_10(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        return self._mode_select(cdb, cdb[7] << 8 | cdb[8], length, data_in, True)

    def _mode_select(self, cdb: bytes, size: int, length: int, data_in: bool, ten: bool) -> Plan:
        # PF, bit 4: pages as the standard has them; SP, bit 0: nothing is saved.
        if cdb[1] & 0x11 != 0x10 or size > length or (size and data_in):
            return Fail(INVALID_FIELD_IN_CDB)
        if size == 0:
            return Reply()
        return Parameters(size, lambda data: self._take_modes(data, ten))

    def _take_modes(self, data: bytes, ten: bool) -> Plan:
        with self._lock:
            before = self.modes.write_cache
            refusal = self.modes.select(data, ten)
        self.on_change()
        # What is still in the cache is to be written now that there shall be none.
        return refusal or (Flush() if before and not self.modes.write_cache else Reply())

    def _reserve_out(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        return self.reservations.plan_out(self._nexus, cdb, length, data_in)
