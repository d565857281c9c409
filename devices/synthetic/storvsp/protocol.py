"""The storage protocol on its VMBus channel: what the packets hold.

Facts: drivers/scsi/storvsc_drv.c of Linux 6.1 and vm/devices/storage/storvsp_protocol of OpenVMM. A packet
is a header (operation, flags, NT status) and a body. Everything is little-endian.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from devices.storage.sense import SENSE_SIZE

if TYPE_CHECKING:
    from devices.storage.sense import ScsiStatus, Sense

#: The channel type of a SCSI controller.
INTERFACE_TYPE = "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"


class Operation(IntEnum):
    """What a packet asks for."""

    COMPLETE_IO = 1
    REMOVE_DEVICE = 2
    EXECUTE_SRB = 3
    RESET_LUN = 4
    RESET_ADAPTER = 5
    RESET_BUS = 6
    BEGIN_INITIALIZATION = 7
    END_INITIALIZATION = 8
    QUERY_PROTOCOL_VERSION = 9
    QUERY_PROPERTIES = 10
    ENUMERATE_BUS = 11
    FCHBA_DATA = 12
    CREATE_SUB_CHANNELS = 13


class NtStatus(IntEnum):
    """The header's status, of a packet as a whole."""

    SUCCESS = 0
    DEVICE_BUSY = 0x8000_0011
    INVALID_PARAMETER = 0xC000_000D
    INVALID_DEVICE_REQUEST = 0xC000_0010
    REVISION_MISMATCH = 0xC000_0059
    DEVICE_DOES_NOT_EXIST = 0xC000_00C0
    CANCELLED = 0xC000_0120
    INVALID_DEVICE_STATE = 0xC000_0184
    IO_DEVICE_ERROR = 0xC000_0185


class SrbStatus(IntEnum):
    """How a SCSI request ended; the flag `SRB_AUTOSENSE_VALID` may be added."""

    SUCCESS = 0x01
    ABORTED = 0x02
    ERROR = 0x04
    BUSY = 0x05
    INVALID_REQUEST = 0x06
    INVALID_LUN = 0x20


SRB_AUTOSENSE_VALID = 0x80

#: Protocol versions (major << 8 | minor) and the Windows they came with: Vista, 7, 8, 8.1, 10.
WIN6, WIN7, WIN8, WIN8_1, WIN10 = 0x0200, 0x0402, 0x0501, 0x0600, 0x0602
VERSIONS = (WIN6, WIN7, WIN8, WIN8_1, WIN10)

#: Channel property flag: sub-channels may be asked for.
MULTI_CHANNEL = 0x1

HEADER = struct.Struct("<III")
#: length, SRB status, SCSI status, port, path, target, LUN, CDB length, sense length, data direction,
#: properties, data length, CDB or sense data.
SRB = struct.Struct("<HBB4BBBBBI20s")
#: Windows 8 added queue tag and action, SRB flags, timeout and sort key, none of which matters to us.
SRB_SIZE_MAX = 0x34
CDB_SIZE_MAX = 16
LUN_OFFSET = 7
_DATA_OUT = 0

VERSION = struct.Struct("<HH")
#: reserved, sub-channel limit, reserved, flags, largest transfer in bytes, reserved.
PROPERTIES = struct.Struct("<IHHIIQ")
SUB_CHANNELS = struct.Struct("<H")


class ScsiRequest(NamedTuple):
    """The body of EXECUTE_SRB, as far as the host heeds it."""

    path: int
    target: int
    lun: int
    cdb: bytes
    data_in: bool
    data_length: int


def parse_scsi_request(body: bytes) -> ScsiRequest:
    """Decode the body of EXECUTE_SRB; raises ValueError if it is too short or its CDB length out of range."""
    if len(body) < SRB.size:
        raise ValueError(f"SCSI request of {len(body)} bytes, shorter than {SRB.size}")
    _, _, _, _, path, target, lun, cdb_length, _, direction, _, data_length, cdb = SRB.unpack_from(body)
    if not 0 < cdb_length <= CDB_SIZE_MAX:
        raise ValueError(f"SCSI request with a CDB of {cdb_length} bytes")
    # Linux says 2 for a command without data; OpenVMM takes whatever is not "out" for "in".
    return ScsiRequest(path, target, lun, cdb[:cdb_length], direction != _DATA_OUT, data_length)


def completion(status: int, request_size: int, body: bytes = b"") -> bytes:
    """COMPLETE_IO for a request whose body had `request_size` bytes.

    Windows insists on an answer as long as its request, and Linux on one of the largest size, which it
    always sends.
    """
    return HEADER.pack(Operation.COMPLETE_IO, 0, status) + body.ljust(min(request_size, SRB_SIZE_MAX), b"\0")


def scsi_completion(
    srb: SrbStatus, scsi: ScsiStatus, sense: Sense | None, transferred: int, request_size: int
) -> bytes:
    """COMPLETE_IO for EXECUTE_SRB."""
    flags, sense_data = (SRB_AUTOSENSE_VALID, sense.encode()) if sense is not None else (0, b"")
    size = min(request_size, SRB_SIZE_MAX)
    body = SRB.pack(size, srb | flags, scsi, 0, 0, 0, 0, CDB_SIZE_MAX, SENSE_SIZE, 0, 0, transferred, sense_data)
    return completion(_NT_STATUS[srb], request_size, body)


_NT_STATUS = {
    SrbStatus.SUCCESS: NtStatus.SUCCESS,
    SrbStatus.ABORTED: NtStatus.CANCELLED,
    SrbStatus.ERROR: NtStatus.IO_DEVICE_ERROR,
    SrbStatus.BUSY: NtStatus.DEVICE_BUSY,
    SrbStatus.INVALID_REQUEST: NtStatus.IO_DEVICE_ERROR,
    SrbStatus.INVALID_LUN: NtStatus.DEVICE_DOES_NOT_EXIST,
}


def channel_properties(subchannels: int | None, max_transfer: int) -> bytes:
    """The answer to QUERY_PROPERTIES; `subchannels` is None if the version knows of none."""
    flags = 0 if subchannels is None else MULTI_CHANNEL
    return PROPERTIES.pack(0, subchannels or 0, 0, flags, max_transfer, 0)


def enumerate_bus(version: int) -> bytes:
    """The host's notice that LUNs came or went."""
    size = SRB_SIZE_MAX if version >= WIN8 else SRB.size
    return HEADER.pack(Operation.ENUMERATE_BUS, 0, NtStatus.SUCCESS) + bytes(size)


def operation_name(operation: int) -> str:
    """The operation's name, or its number if there is none."""
    try:
        return Operation(operation).name
    except ValueError:
        return f"operation {operation:#x}"
