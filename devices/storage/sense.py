"""How a SCSI command ended: its status, and sense data that say why. SPC-4 section 4.5, codes of its annex F; SAM-5."""

from __future__ import annotations

import errno
import struct
from enum import IntEnum
from typing import NamedTuple

#: Bytes of fixed-format sense data as we send it.
SENSE_SIZE = 18


class ScsiStatus(IntEnum):
    """SAM-5 section 5.3.1."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02
    RESERVATION_CONFLICT = 0x18
    TASK_SET_FULL = 0x28


class Sense(NamedTuple):
    """Sense key, additional sense code and qualifier, and the LBA concerned if there is one."""

    key: int
    asc: int
    ascq: int
    lba: int | None = None

    def at(self, lba: int) -> Sense:
        """The same, about `lba`."""
        return self._replace(lba=lba)

    def encode(self) -> bytes:
        """Fixed-format sense data of a current error; an LBA above 32 bits does not fit and is left out."""
        code, information = 0x70, 0
        if self.lba is not None and self.lba <= 0xFFFF_FFFF:
            code, information = 0xF0, self.lba
        return struct.pack(">BBBIB4xBB4x", code, 0, self.key, information, SENSE_SIZE - 8, self.asc, self.ascq)


NO_SENSE = Sense(0x0, 0x00, 0x00)
NO_MEDIUM = Sense(0x2, 0x3A, 0x01)
TRAY_OPEN = Sense(0x2, 0x3A, 0x02)
WRITE_ERROR = Sense(0x3, 0x0C, 0x00)
READ_ERROR = Sense(0x3, 0x11, 0x00)
PARAMETER_LIST_LENGTH = Sense(0x5, 0x1A, 0x00)
INVALID_OPCODE = Sense(0x5, 0x20, 0x00)
LBA_OUT_OF_RANGE = Sense(0x5, 0x21, 0x00)
INVALID_FIELD_IN_CDB = Sense(0x5, 0x24, 0x00)
LUN_NOT_SUPPORTED = Sense(0x5, 0x25, 0x00)
INVALID_FIELD_IN_PARAMETERS = Sense(0x5, 0x26, 0x00)
INVALID_RELEASE = Sense(0x5, 0x26, 0x04)
SAVING_NOT_SUPPORTED = Sense(0x5, 0x39, 0x00)
MEDIUM_REMOVAL_PREVENTED = Sense(0x5, 0x53, 0x02)
ILLEGAL_MODE_FOR_THIS_TRACK = Sense(0x5, 0x64, 0x00)
MEDIUM_MAY_HAVE_CHANGED = Sense(0x6, 0x28, 0x00)
POWER_ON_OR_RESET = Sense(0x6, 0x29, 0x00)
RESERVATIONS_PREEMPTED = Sense(0x6, 0x2A, 0x03)
RESERVATIONS_RELEASED = Sense(0x6, 0x2A, 0x04)
REGISTRATIONS_PREEMPTED = Sense(0x6, 0x2A, 0x05)
CAPACITY_CHANGED = Sense(0x6, 0x2A, 0x09)
WRITE_PROTECTED = Sense(0x7, 0x27, 0x00)
#: What a thin-provisioned disk says when its storage is full; Linux turns it into ENOSPC.
SPACE_ALLOCATION_FAILED = Sense(0x7, 0x27, 0x07)


def from_os_error(error: OSError, writing: bool) -> Sense:
    """The sense data for what the host's kernel said about reaching the medium."""
    if writing and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SPACE_ALLOCATION_FAILED
    return WRITE_ERROR if writing else READ_ERROR
