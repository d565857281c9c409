"""An ATAPI CD drive: the ATA side of it, without I/O. What is in packets is for `devices.storage.mmc` to know.

Sources: ATA/ATAPI-8, PACKET feature set; SFF-8020i for the register contents around packets.
"""

from __future__ import annotations

from devices.legacy.ide import identify
from devices.legacy.ide.ata import (
    ABRT,
    DIAGNOSTIC_PASSED,
    IN,
    MODES,
    OUT,
    PACKET,
    PACKET_SIZE,
    CommandError,
    Drive,
    Transfer,
)
from devices.saved import check_version, saved_int
from devices.storage.cdb import Op
from devices.storage.mmc import ATAPI, OpticalDrive
from devices.storage.plans import Fail, Read, Reply
from devices.storage.sense import READ_ERROR, Sense

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from devices.legacy.ide.ata import Job
    from devices.storage.backend import Disk

_SIGNATURE_MID, _SIGNATURE_HIGH = 0x14, 0xEB
#: The most that a packet asks for: READ 12 of 32-bit many sectors.
_MAX_DATA = 1 << 44
_MAX_BLOCK = 0xFFFE
_SENSE_FIELDS = ("key", "asc", "ascq")


class CdDrive(Drive):
    """A CD drive in which `disc` may lie; `identity` is sixteen bytes that name it."""

    takes_reset = True

    def __init__(self, disc: Disk | None, slave: bool, identity: bytes) -> None:
        super().__init__(slave, identity.hex()[:20])
        self.drive = OpticalDrive(disc, identity, ATAPI, "Virtual CD/ROM")
        self.power_on()

    @property
    def medium(self) -> Disk | None:
        return self.drive.disc

    def power_on(self) -> None:
        self.mode = 0
        self._by_dma = False
        self._block = _MAX_BLOCK
        self._sense: Sense | None = None
        self.drive.reset()
        self.reset()

    def reset(self) -> None:
        self._sign()
        self.registers.device = 0
        self.registers.error = DIAGNOSTIC_PASSED
        self.registers.status = 0

    def _sign(self) -> None:
        self.registers.put(count=1, low=1, mid=_SIGNATURE_MID, high=_SIGNATURE_HIGH)

    def execute(self, code: int) -> Transfer | None:
        registers = self.registers
        if code == 0xA0:  # PACKET
            self._by_dma = bool(registers.features & 1)
            # How much the host wants to move at once; only the last block may be odd.
            limit = registers.current[5] << 8 | registers.current[4]
            self._block = min(limit & ~1, _MAX_BLOCK) or _MAX_BLOCK
            return Transfer(OUT, PACKET_SIZE, block=PACKET_SIZE, work=PACKET, packet=True)
        if code == 0xA1:  # IDENTIFY PACKET DEVICE
            return Transfer(IN, data=identify.cd(self))
        if code == 0xEF and registers.features == 0x03 and registers.count in MODES:  # SET FEATURES, transfer mode
            self.mode = registers.count
            return None
        if code == 0xE5:  # CHECK POWER MODE
            registers.put(count=0xFF)
            return None
        if code in (0xE0, 0xE1, 0xE2, 0xE3, 0xE6):  # other power commands
            return None
        if code in (0xEC, 0x20):  # IDENTIFY DEVICE, READ SECTORS: that there is no disk is told by the signature
            self._sign()
        raise CommandError(ABRT)

    def packet(self, cdb: bytes) -> Transfer | None:
        sense, self._sense = self._sense, None
        if cdb[0] == Op.REQUEST_SENSE and sense is not None:
            return self._answer(sense.encode()[: cdb[4]])
        plan = self.drive.plan(cdb, _MAX_DATA, True)
        if isinstance(plan, Read):
            if not plan.length:
                return None
            return Transfer(IN, plan.length, offset=plan.offset, block=self._block, dma=self._by_dma, packet=True)
        if isinstance(plan, Reply):
            return self._answer(plan.data)
        assert isinstance(plan, Fail)
        raise self._failed(plan.sense)

    def _answer(self, data: bytes) -> Transfer | None:
        if not data:
            return None
        return Transfer(IN, data=data, block=self._block, dma=self._by_dma, packet=True)

    def _failed(self, sense: Sense) -> CommandError:
        self._sense = sense
        return CommandError(sense.key << 4)

    def medium_error(self, job: Job) -> int:
        return self._failed(READ_ERROR).error

    def save(self) -> dict[str, Any]:
        return {
            "version": 1,
            "kind": "cd",
            "mode": self.mode,
            "by_dma": int(self._by_dma),
            "block": self._block,
            "sense": self._sense and dict(zip(_SENSE_FIELDS, self._sense, strict=False)),
            "drive": self.drive.save(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        check_version(state, 1)
        if state.get("kind") != "cd":
            raise ValueError("an IDE disk is not the CD drive of the saved state")
        sense = state.get("sense")
        if sense is not None:
            sense = Sense(*(saved_int(sense, name, 0, 0xFF) for name in _SENSE_FIELDS))
        mode, by_dma = saved_int(state, "mode", 0, 0x42), saved_int(state, "by_dma", 0, 1)
        block = saved_int(state, "block", 2, _MAX_BLOCK)
        self.drive.restore(state["drive"])
        self.mode, self._by_dma, self._block, self._sense = mode, bool(by_dma), block, sense

    def inspect(self) -> dict[str, Any]:
        return {"kind": "cd", **self.drive.inspect(), "mode": f"{self.mode:#04x}", **self.counters}
