"""An initiator for one SCSI logical unit, and the CDBs that it sends."""

from __future__ import annotations

import os
import struct
from typing import Any

from hypothesis import strategies as st

from devices.storage.cdb import Op
from devices.storage.sense import Sense
from devices.synthetic.storvsp.lun import Lun, Outcome
from devices.synthetic.storvsp.scsi import Target
from tests.fakes.disks import MemoryDisk

#: More for a longer run by hand.
EXAMPLES = int(os.environ.get("PYVMM_EXAMPLES", "150"))
SIZE = 1 << 20
BLOCKS = SIZE // 512


class Initiator:
    """Sends commands to one logical unit, with a data buffer in two uneven pieces."""

    def __init__(self, disk: MemoryDisk | None = None, identity: bytes = bytes(range(16))) -> None:
        self.disk = disk or MemoryDisk(SIZE)
        self.target = Target(self.disk, identity)
        self.lun = Lun(self.target)

    def run(self, cdb: bytes, data: bytearray, data_in: bool) -> Outcome:
        cut = min(len(data), 100)
        views = [memoryview(data)[:cut], memoryview(data)[cut:]]
        plan = self.lun.plan(cdb, views, len(data), data_in)
        outcome = self.lun.carry_out(plan, self.disk, views, len(data))
        self.lun.count(plan, outcome, 0)
        assert (outcome.status == 2) == (outcome.sense is not None)
        return outcome

    def get(self, cdb: bytes, size: int = 512) -> bytes:
        """Run a data-in command that must succeed; return what it transferred."""
        data = bytearray(b"\xee" * size)
        outcome = self.run(cdb, data, True)
        assert outcome.sense is None
        assert all(byte == 0xEE for byte in data[outcome.transferred :])
        return bytes(data[: outcome.transferred])

    def put(self, cdb: bytes, data: bytes = b"") -> int:
        """Run a data-out command that must succeed; return how much it took."""
        outcome = self.run(cdb, bytearray(data), False)
        assert outcome.sense is None
        return outcome.transferred

    def fails(self, cdb: bytes, size: int = 0, data_in: bool = True) -> Sense:
        """Run a command that must fail and transfer nothing."""
        data = bytearray(b"\xee" * size)
        outcome = self.run(cdb, data, data_in)
        assert outcome.sense is not None and outcome.transferred == 0
        assert data == b"\xee" * size
        return outcome.sense


def code(found: Sense) -> tuple[int, int, int]:
    return found.key, found.asc, found.ascq


def rw6(op: int, lba: int, blocks: int) -> bytes:
    return struct.pack(">IBx", op << 24 | lba, blocks)


def rw10(op: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIxHx", op, flags, lba, blocks)


def rw12(op: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIIxx", op, flags, lba, blocks)


def rw16(op: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBQIxx", op, flags, lba, blocks)


FORMS: list[tuple[Any, int, int]] = [
    (rw6, Op.READ_6, Op.WRITE_6),
    (rw10, Op.READ_10, Op.WRITE_10),
    (rw12, Op.READ_12, Op.WRITE_12),
    (rw16, Op.READ_16, Op.WRITE_16),
]


def unmap(*ranges: tuple[int, int]) -> tuple[bytes, bytes]:
    body = b"".join(struct.pack(">QI4x", lba, blocks) for lba, blocks in ranges)
    data = struct.pack(">HH4x", len(body) + 6, len(body)) + body
    return struct.pack(">B6xHx", Op.UNMAP, len(data)), data


def vpd(page: int, allocation: int = 255) -> bytes:
    return struct.pack(">BBBHx", Op.INQUIRY, 1, page, allocation)


def read10(lba: int, blocks: int) -> bytes:
    return rw10(Op.READ_10, lba, blocks)


def write10(lba: int, blocks: int, flags: int = 0) -> bytes:
    return rw10(Op.WRITE_10, lba, blocks, flags)


#: Anything, and more often commands that exist, with mostly small numbers in them.
HOSTILE_CDBS = st.binary(max_size=16) | st.builds(
    lambda op, rest: bytes((op, *rest)),
    st.sampled_from(list(Op)),
    st.lists(st.integers(0, 255) | st.sampled_from([0, 1, 8, 16, 24, 255]), min_size=5, max_size=15),
)
