"""A hard disk's mind: what an ATA command means for it, with no I/O. ATA/ATAPI-8."""

from __future__ import annotations

import struct

from devices.legacy.ide import identify
from devices.legacy.ide.ata import (
    ABRT,
    DIAGNOSTIC_PASSED,
    FLUSH,
    IDNF,
    IN,
    LBA,
    MODES,
    NONE,
    OUT,
    READY,
    SECTOR,
    TRIM,
    UNC,
    VERIFY,
    CommandError,
    Drive,
    Transfer,
)
from devices.saved import check_version, saved_bool, saved_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from devices.legacy.ide.ata import Job
    from devices.storage.backend import Disk

_SMART_MID, _SMART_HIGH = 0x4F, 0xC2
_SMART_READ_DATA, _SMART_READ_THRESHOLDS, _SMART_AUTOSAVE = 0xD0, 0xD1, 0xD2
_SMART_ENABLE, _SMART_DISABLE, _SMART_STATUS = 0xD8, 0xD9, 0xDA
_PIO_DEFAULT = 0x00
_MAX_CYLINDERS, _MAX_HEADS, _MAX_PER_TRACK = 16383, 16, 63

# How a READ or WRITE command moves data: a sector at a time, blocks of SET MULTIPLE MODE, DMA.
_SINGLE, _MULTIPLE, _DMA = range(3)
#: READ and WRITE commands: direction, 48-bit, how, and whether data must reach stable storage (FUA).
_TRANSFERS = {
    0x20: (IN, False, _SINGLE, False),
    0x21: (IN, False, _SINGLE, False),
    0x24: (IN, True, _SINGLE, False),
    0x25: (IN, True, _DMA, False),
    0x29: (IN, True, _MULTIPLE, False),
    0x30: (OUT, False, _SINGLE, False),
    0x31: (OUT, False, _SINGLE, False),
    0x34: (OUT, True, _SINGLE, False),
    0x35: (OUT, True, _DMA, False),
    0x39: (OUT, True, _MULTIPLE, False),
    0x3D: (OUT, True, _DMA, True),
    0xC4: (IN, False, _MULTIPLE, False),
    0xC5: (OUT, False, _MULTIPLE, False),
    0xC8: (IN, False, _DMA, False),
    0xC9: (IN, False, _DMA, False),
    0xCA: (OUT, False, _DMA, False),
    0xCB: (OUT, False, _DMA, False),
    0xCE: (OUT, True, _MULTIPLE, True),
}


class HardDisk(Drive):
    """An ATA disk in front of `disk`, whose sectors have 512 bytes."""

    def __init__(self, disk: Disk, slave: bool) -> None:
        super().__init__(slave, disk.identity.hex()[:20])
        self.disk = disk
        shape = disk.geometry
        if shape.cylinders > _MAX_CYLINDERS or shape.heads > _MAX_HEADS or shape.sectors > _MAX_PER_TRACK:
            self.geometry = (_MAX_CYLINDERS, _MAX_HEADS, _MAX_PER_TRACK)
        else:
            self.geometry = (shape.cylinders, shape.heads, shape.sectors)
        self.power_on()

    @property
    def medium(self) -> Disk | None:
        return self.disk

    def power_on(self) -> None:
        self.translation = self.geometry
        self.multiple = identify.DEFAULT_MULTIPLE
        self.mode = _PIO_DEFAULT
        self.write_cache = True
        self.smart = True
        self.standby = False
        self.reset()

    def reset(self) -> None:
        registers = self.registers
        registers.put(count=1, low=1, mid=0, high=0)
        registers.device = 0
        registers.error = DIAGNOSTIC_PASSED
        registers.status = READY

    def execute(self, code: int) -> Transfer | None:
        if code in _TRANSFERS:
            return self._transfer(*_TRANSFERS[code])
        if code & 0xF0 == 0x10 or code & 0xF0 == 0x70:  # RECALIBRATE, SEEK
            return None
        command = _COMMANDS.get(code)
        if command is None:
            raise CommandError(ABRT)
        return command(self)

    # Sectors.

    def _range(self, wide: bool) -> tuple[int, int]:
        """The sectors that a command names, as offset and length in bytes."""
        registers = self.registers
        if wide:
            lba, count = registers.lba_48, registers.count_16 or 0x10000
        else:
            count = registers.count or 0x100
            lba = registers.lba_28 if registers.device & LBA else self._from_chs()
        if (lba + count) * SECTOR > self.disk.size:
            raise CommandError(IDNF)
        return lba * SECTOR, count * SECTOR

    def _from_chs(self) -> int:
        _, heads, per_track = self.translation
        address = self.registers.lba_28
        cylinder, head, sector = address >> 8 & 0xFFFF, address >> 24, address & 0xFF
        if head >= heads or not 1 <= sector <= per_track:
            raise CommandError(IDNF)
        return (cylinder * heads + head) * per_track + sector - 1

    def _transfer(self, direction: int, wide: bool, how: int, fua: bool) -> Transfer:
        if (how == _MULTIPLE and not self.multiple) or (direction == OUT and self.disk.readonly):
            raise CommandError(ABRT)
        offset, length = self._range(wide)
        self.standby = False
        return Transfer(
            direction,
            length,
            offset=offset,
            block=self.multiple * SECTOR if how == _MULTIPLE else SECTOR,
            dma=how == _DMA,
            sync=direction == OUT and (fua or not self.write_cache),
        )

    def _verify(self) -> Transfer:
        return self._verify_range(False)

    def _verify_ext(self) -> Transfer:
        return self._verify_range(True)

    def _verify_range(self, wide: bool) -> Transfer:
        offset, length = self._range(wide)
        self.standby = False
        return Transfer(NONE, length, offset=offset, work=VERIFY)

    def _flush(self) -> Transfer | None:
        return None if self.disk.readonly else Transfer(NONE, work=FLUSH)

    def _data_set_management(self) -> Transfer:
        count = self.registers.count_16
        if self.disk.readonly or self.registers.features != 1 or not 0 < count <= identify.MAX_TRIM_BLOCKS:
            raise CommandError(ABRT)
        return Transfer(OUT, count * SECTOR, dma=True, work=TRIM)

    def trim_ranges(self, data: bytes) -> list[tuple[int, int]]:
        ranges = []
        for (entry,) in struct.iter_unpack("<Q", data):
            lba, count = entry & 0xFFFF_FFFF_FFFF, entry >> 48
            if (lba + count) * SECTOR > self.disk.size:
                raise CommandError(IDNF)
            if count:
                ranges.append((lba * SECTOR, count * SECTOR))
        return ranges

    # What the disk says of itself, and settings.

    def _identify(self) -> Transfer:
        return Transfer(IN, data=identify.disk(self))

    def _initialize_parameters(self) -> None:
        heads, per_track = (self.registers.device & 0xF) + 1, self.registers.count
        if not per_track:
            raise CommandError(ABRT)
        cylinders = min(self.disk.size // SECTOR // (heads * per_track), 0xFFFF)
        self.translation = (cylinders, heads, per_track)

    def medium_error(self, job: Job) -> int:
        return UNC if job.direction == IN or job.work == VERIFY else ABRT

    def _set_multiple(self) -> None:
        count = self.registers.count
        if count > identify.MAX_MULTIPLE or count & count - 1:
            raise CommandError(ABRT)
        self.multiple = count

    def _set_features(self) -> None:
        feature, value = self.registers.features, self.registers.count
        if feature in (0x02, 0x82):
            self.write_cache = feature == 0x02
        elif feature == 0x03 and value in MODES:
            self.mode = value
        elif feature not in (0x55, 0xAA, 0x66, 0xCC):  # look-ahead; whether settings outlive a software reset
            raise CommandError(ABRT)

    def _smart(self) -> Transfer | None:
        registers = self.registers
        feature = registers.features
        if (registers.lba_28 >> 8) & 0xFFFF != _SMART_HIGH << 8 | _SMART_MID:
            raise CommandError(ABRT)
        if feature == _SMART_ENABLE:
            self.smart = True
        elif not self.smart:
            raise CommandError(ABRT)
        elif feature == _SMART_DISABLE:
            self.smart = False
        elif feature == _SMART_STATUS:
            registers.put(mid=_SMART_MID, high=_SMART_HIGH)  # no threshold exceeded
        elif feature in (_SMART_READ_DATA, _SMART_READ_THRESHOLDS):
            return Transfer(IN, data=_smart_data())
        elif feature != _SMART_AUTOSAVE:
            raise CommandError(ABRT)
        return None

    def _read_native_max(self) -> None:
        if not self.registers.device & LBA:
            raise CommandError(ABRT)
        self.registers.put_lba(min(self.disk.size // SECTOR - 1, 0x0FFF_FFFF), wide=False)

    def _read_native_max_ext(self) -> None:
        self.registers.put_lba(self.disk.size // SECTOR - 1, wide=True)

    def _stand_by(self) -> Transfer | None:
        self.standby = True
        return self._flush()

    def _idle(self) -> None:
        self.standby = False

    def _check_power(self) -> None:
        self.registers.put(count=0x00 if self.standby else 0xFF)

    def save(self) -> dict[str, Any]:
        return {
            "version": 1,
            "kind": "disk",
            "size": self.disk.size,
            "serial": self.serial,
            "heads": self.translation[1],
            "per_track": self.translation[2],
            "multiple": self.multiple,
            "mode": self.mode,
            "write_cache": self.write_cache,
            "smart": self.smart,
            "standby": self.standby,
        }

    def restore(self, state: dict[str, Any]) -> None:
        check_version(state, 1)
        if state.get("kind") != "disk" or state.get("size") != self.disk.size:
            raise ValueError("an IDE disk differs in kind or size from that of the saved state")
        serial = state.get("serial")
        if type(serial) is not str or len(serial) > 20:
            raise ValueError("saved state: the serial number is none")
        heads, per_track = saved_int(state, "heads", 1, 16), saved_int(state, "per_track", 1, 255)
        multiple, mode = saved_int(state, "multiple", 0, identify.MAX_MULTIPLE), saved_int(state, "mode", 0, 0x42)
        self.write_cache, self.smart = saved_bool(state, "write_cache"), saved_bool(state, "smart")
        self.standby = saved_bool(state, "standby")
        self.serial, self.multiple, self.mode = serial, multiple, mode
        self.translation = (min(self.disk.size // SECTOR // (heads * per_track), 0xFFFF), heads, per_track)

    def inspect(self) -> dict[str, Any]:
        return {
            "kind": "disk",
            "disk": self.disk.inspect(),
            "mode": f"{self.mode:#04x}",
            "multiple": self.multiple,
            "write_cache": self.write_cache,
            **self.counters,
        }


def _smart_data() -> bytes:
    """SMART data without attributes: no self-tests, and nothing in the future."""
    data = bytearray(512)
    data[0] = 1
    data[511] = -sum(data) & 0xFF
    return bytes(data)


_COMMANDS = {
    0x06: HardDisk._data_set_management,
    0x27: HardDisk._read_native_max_ext,
    0x40: HardDisk._verify,
    0x41: HardDisk._verify,
    0x42: HardDisk._verify_ext,
    0x91: HardDisk._initialize_parameters,
    0x94: HardDisk._stand_by,
    0x95: HardDisk._idle,
    0x96: HardDisk._stand_by,
    0x97: HardDisk._idle,
    0x98: HardDisk._check_power,
    0x99: HardDisk._stand_by,
    0xB0: HardDisk._smart,
    0xC6: HardDisk._set_multiple,
    0xE0: HardDisk._stand_by,
    0xE1: HardDisk._idle,
    0xE2: HardDisk._stand_by,
    0xE3: HardDisk._idle,
    0xE5: HardDisk._check_power,
    0xE6: HardDisk._stand_by,
    0xE7: HardDisk._flush,
    0xEA: HardDisk._flush,
    0xEC: HardDisk._identify,
    0xEF: HardDisk._set_features,
    0xF8: HardDisk._read_native_max,
}
