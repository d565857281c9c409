"""Which commands a disk knows, for REPORT SUPPORTED OPERATION CODES. SPC-4 section 6.35."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from devices.storage.cdb import CDB_LENGTHS, Op
from devices.storage.plans import Fail, Reply
from devices.storage.sense import INVALID_FIELD_IN_CDB

if TYPE_CHECKING:
    from devices.storage.plans import Plan

_LBA4, _LBA8, _BYTE, _WORD, _LONG = "ffffffff", "ffffffffffffffff", "ff", "ffff", "ffffffff"

#: CDB usage data behind the operation code, by operation code and, where it has them, service action: the bits of each
#: byte that are looked at.
_USAGE: dict[tuple[Op, int | None], str] = {
    (Op.TEST_UNIT_READY, None): "0000000000",
    (Op.REQUEST_SENSE, None): "000000" + _BYTE + "00",
    (Op.READ_6, None): "1f" + _WORD + _BYTE + "00",
    (Op.WRITE_6, None): "1f" + _WORD + _BYTE + "00",
    (Op.INQUIRY, None): "01" + _BYTE + _WORD + "00",
    (Op.MODE_SELECT_6, None): "100000" + _BYTE + "00",
    (Op.MODE_SENSE_6, None): "08" + _WORD + _BYTE + "00",
    (Op.START_STOP_UNIT, None): "000000f300",
    (Op.READ_CAPACITY_10, None): "00" * 9,
    (Op.READ_10, None): "18" + _LBA4 + "00" + _WORD + "00",
    (Op.WRITE_10, None): "18" + _LBA4 + "00" + _WORD + "00",
    (Op.VERIFY_10, None): "10" + _LBA4 + "00" + _WORD + "00",
    (Op.SYNCHRONIZE_CACHE_10, None): "00" + _LBA4 + "00" + _WORD + "00",
    (Op.WRITE_SAME_10, None): "08" + _LBA4 + "00" + _WORD + "00",
    (Op.UNMAP, None): "000000000000" + _WORD + "00",
    (Op.MODE_SELECT_10, None): "10" + "00" * 5 + _WORD + "00",
    (Op.MODE_SENSE_10, None): "08" + _WORD + "000000" + _WORD + "00",
    **{(Op.PERSISTENT_RESERVE_IN, action): f"{action:02x}" + "00" * 5 + _WORD + "00" for action in range(4)},
    **{(Op.PERSISTENT_RESERVE_OUT, action): f"{action:02x}" + _BYTE + "0000" + _LONG + "00" for action in range(7)},
    (Op.READ_16, None): "18" + _LBA8 + _LONG + "0000",
    (Op.WRITE_16, None): "18" + _LBA8 + _LONG + "0000",
    (Op.VERIFY_16, None): "10" + _LBA8 + _LONG + "0000",
    (Op.SYNCHRONIZE_CACHE_16, None): "00" + _LBA8 + _LONG + "0000",
    (Op.WRITE_SAME_16, None): "09" + _LBA8 + _LONG + "0000",
    (Op.SERVICE_ACTION_IN_16, 0x10): "10" + "00" * 8 + _LONG + "0000",
    (Op.SERVICE_ACTION_IN_16, 0x12): "12" + _LBA8 + _LONG + "0000",
    (Op.REPORT_LUNS, None): "00" + _BYTE + "000000" + _LONG + "0000",
    (Op.MAINTENANCE_IN, 0x0C): "0c" + "87" + _BYTE + _WORD + _LONG + "0000",
    (Op.READ_12, None): "18" + _LBA4 + _LONG + "0000",
    (Op.WRITE_12, None): "18" + _LBA4 + _LONG + "0000",
}
_WITH_ACTIONS = frozenset(op for op, action in _USAGE if action is not None)
#: SUPPORT field: not supported, and supported as the standard says.
_NOT_SUPPORTED, _SUPPORTED = 1, 3


def report(cdb: bytes) -> Plan:
    """Answer REPORT SUPPORTED OPERATION CODES; command timeouts are never told."""
    options, op, action, allocation = struct.unpack_from(">2xBBHI", cdb)
    options &= 7
    if options == 0:
        body = b"".join(_descriptor(*key) for key in _USAGE)
        return Reply((struct.pack(">I", len(body)) + body)[:allocation])
    # 1: the operation code alone, 2: with its service action, 3: as the one at hand has it.
    has_actions = op in _WITH_ACTIONS
    if options > 3 or (options == 1 and has_actions) or (options == 2 and not has_actions and _known(op)):
        return Fail(INVALID_FIELD_IN_CDB)
    usage = _USAGE.get((op, action if has_actions else None))
    if usage is None or (options == 3 and not has_actions and action):
        return Reply(struct.pack(">BBH", 0, _NOT_SUPPORTED, 0)[:allocation])
    data = bytes((op,)) + bytes.fromhex(usage)
    return Reply((struct.pack(">BBH", 0, _SUPPORTED, len(data)) + data)[:allocation])


def _known(op: int) -> bool:
    return any(op == known for known, _ in _USAGE)


def _descriptor(op: Op, action: int | None) -> bytes:
    flags = 0 if action is None else 1  # SERVACTV
    return struct.pack(">BxHxBH", op, action or 0, flags, CDB_LENGTHS[op >> 5])
