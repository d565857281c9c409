"""A CD and DVD drive's mind: what a command means for it, with no I/O. SPC-3, and MMC-6 as far as reading data goes.

`OpticalDrive.plan` turns a CDB into a plan (`devices.storage.plans`), over SCSI as over ATAPI; whoever holds the data
buffer carries it out on the drive's `disc`.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

from devices.saved import check_version, saved_bool, saved_int
from devices.storage.cdb import CDB_LENGTHS, Op
from devices.storage.plans import Fail, Read, Reply
from devices.storage.sense import (
    ILLEGAL_MODE_FOR_THIS_TRACK,
    INVALID_FIELD_IN_CDB,
    INVALID_OPCODE,
    LBA_OUT_OF_RANGE,
    MEDIUM_MAY_HAVE_CHANGED,
    MEDIUM_REMOVAL_PREVENTED,
    NO_MEDIUM,
    NO_SENSE,
    POWER_ON_OR_RESET,
    SAVING_NOT_SUPPORTED,
    TRAY_OPEN,
    Sense,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from devices.storage.backend import Disk
    from devices.storage.plans import Plan

#: Bytes of a sector's user data.
SECTOR = 2048
#: Physical interfaces of the core feature.
SCSI, ATAPI = 1, 2

_VENDOR, _REVISION = b"Msft    ", b"1.0 "
#: What no CD can hold: 80 minutes of 75 sectors. Larger discs are DVDs.
_CD_SECTORS = 80 * 60 * 75
_PROFILE_CD_ROM, _PROFILE_DVD_ROM = 0x08, 0x10
#: Media events.
_EJECT_REQUEST, _NEW_MEDIUM, _MEDIUM_REMOVAL = 1, 2, 3
_MEDIA_CLASS = 4
#: A data track that may not be copied digitally, with position data: control 4, ADR 1.
_DATA_TRACK = 0x14
_LEAD_OUT = 0xAA
#: Sectors before address 0 of a disc as minutes, seconds and frames count.
_PREGAP = 150
_ERROR_RECOVERY_PAGE, _CAPABILITIES_PAGE, _ALL_PAGES = 0x01, 0x2A, 0x3F
#: Loading mechanism: a tray; eject and lock work.
_MECHANISM = 1 << 5 | 1 << 3 | 1
#: Kilobytes per second of a drive that reads a CD at four times its speed.
_SPEED = 706

#: What a pending unit attention does not hold up. SPC-3 section 5.6.
_IN_SPITE_OF_ATTENTION = frozenset(
    (Op.INQUIRY, Op.REQUEST_SENSE, Op.GET_CONFIGURATION, Op.GET_EVENT_STATUS_NOTIFICATION)
)
_WANTS_DISC = frozenset(
    (
        Op.TEST_UNIT_READY,
        Op.READ_CAPACITY_10,
        Op.READ_10,
        Op.READ_12,
        Op.READ_CD,
        Op.READ_TOC,
        Op.READ_DISC_INFORMATION,
        Op.SEEK_10,
    )
)


class MediumLocked(Exception):
    """The guest has locked the tray, because it uses the disc."""


class OpticalDrive:
    """One drive with a tray, in which `disc` may lie; any thread.

    `identity` names the drive in VPD pages: sixteen bytes. `interface` is SCSI or ATAPI, `product` up to sixteen
    characters. A disc's sectors have 2048 bytes.
    """

    def __init__(
        self, disc: Disk | None, identity: bytes, interface: int = SCSI, product: str = "Virtual DVD-ROM"
    ) -> None:
        self.identity = identity
        self._disc = disc
        self._interface = interface
        self._product = product.encode().ljust(16)
        self._lock = threading.Lock()
        self._open = False
        self._locked = False
        self._attention: list[Sense] = []
        self._event = 0
        self._commands: dict[int, Callable[[bytes, int], Plan]] = {
            Op.TEST_UNIT_READY: lambda cdb, length: Reply(),
            Op.REQUEST_SENSE: self._request_sense,
            Op.INQUIRY: self._inquiry,
            Op.MODE_SENSE_6: self._mode_sense_6,
            Op.START_STOP_UNIT: self._start_stop,
            Op.PREVENT_ALLOW_MEDIUM_REMOVAL: self._prevent_allow,
            Op.READ_CAPACITY_10: self._read_capacity,
            Op.READ_10: self._read_10,
            Op.SEEK_10: self._seek,
            Op.READ_TOC: self._read_toc,
            Op.GET_CONFIGURATION: self._get_configuration,
            Op.GET_EVENT_STATUS_NOTIFICATION: self._get_event_status,
            Op.READ_DISC_INFORMATION: self._read_disc_information,
            Op.MODE_SENSE_10: self._mode_sense_10,
            Op.READ_12: self._read_12,
            Op.SET_CD_SPEED: lambda cdb, length: Reply(),
            Op.MECHANISM_STATUS: self._mechanism_status,
            Op.READ_CD: self._read_cd,
        }

    # The host's side ------------------------------------------------------------------------------------

    @property
    def disc(self) -> Disk | None:
        """The disc in the drive, also while the tray is open."""
        return self._disc

    @property
    def locked(self) -> bool:
        """Whether the guest keeps the disc from being taken out."""
        return self._locked

    def change(self, disc: Disk | None, force: bool = False) -> Disk | None:
        """Put `disc`, or nothing, into the drive and close the tray; return the disc that was in it.

        The caller sees to it that no plan is being carried out. Raises MediumLocked if the guest has locked the tray,
        unless `force`; the guest then hears that somebody would like to eject the disc.
        """
        with self._lock:
            if self._locked and not force:
                self._event = _EJECT_REQUEST
                raise MediumLocked
            old, self._disc = self._disc, disc
            self._locked = False
            self._close_tray()
            return old

    def _close_tray(self) -> None:
        self._open = False
        self._event = _MEDIUM_REMOVAL if self._disc is None else _NEW_MEDIUM
        self._attend(MEDIUM_MAY_HAVE_CHANGED)

    def _attend(self, sense: Sense) -> None:
        if sense not in self._attention:
            self._attention.append(sense)

    def reset(self) -> None:
        """Power on or a reset of the bus: unlocked, with the tray closed."""
        with self._lock:
            self._open = self._locked = False
            self._event = 0
            self._attention = [POWER_ON_OR_RESET]

    def save(self) -> dict[str, Any]:
        """Return the state of tray and lock, and what the guest has still to hear."""
        with self._lock:
            return {
                "version": 1,
                "open": self._open,
                "locked": self._locked,
                "event": self._event,
                "reset": POWER_ON_OR_RESET in self._attention,
                "changed": MEDIUM_MAY_HAVE_CHANGED in self._attention,
                "sectors": self._sectors,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from saved state; raises ValueError if it doesn't fit. Another disc is news to the guest."""
        check_version(state, 1)
        is_open, locked = saved_bool(state, "open"), saved_bool(state, "locked")
        event = saved_int(state, "event", 0, _MEDIUM_REMOVAL)
        was_reset, changed = saved_bool(state, "reset"), saved_bool(state, "changed")
        sectors = saved_int(state, "sectors", 0, 1 << 32)
        with self._lock:
            self._open, self._locked, self._event = is_open, locked, event
            pending = ((POWER_ON_OR_RESET, was_reset), (MEDIUM_MAY_HAVE_CHANGED, changed))
            self._attention = [sense for sense, there in pending if there]
            if sectors != self._sectors:
                self._close_tray()

    def inspect(self) -> dict[str, Any]:
        """Return the disc and the state of the tray."""
        disc = self._disc
        return {
            "disc": disc.inspect() if disc is not None else None,
            "tray_open": self._open,
            "locked": self._locked,
        }

    @property
    def _sectors(self) -> int:
        return min(self._disc.size // SECTOR, 1 << 32) if self._disc is not None else 0

    # The guest's side -----------------------------------------------------------------------------------

    def plan(self, cdb: bytes, length: int, data_in: bool) -> Plan:
        """What to do for a command.

        `cdb` is as long as the initiator said, `length` the size of its data buffer, and `data_in` whether that buffer
        is for us to fill: no command here takes data.
        """
        command = self._commands.get(cdb[0]) if cdb else None
        with self._lock:
            if self._attention and not (cdb and cdb[0] in _IN_SPITE_OF_ATTENTION):
                return Fail(self._attention.pop(0))
            if command is None:
                return Fail(INVALID_OPCODE)
            if len(cdb) < CDB_LENGTHS[cdb[0] >> 5]:
                return Fail(INVALID_FIELD_IN_CDB)
            if cdb[0] in _WANTS_DISC:
                if self._open:
                    return Fail(TRAY_OPEN)
                if self._disc is None:
                    return Fail(NO_MEDIUM)
            plan = command(cdb, length)
        if length and not data_in and (isinstance(plan, Read) or (isinstance(plan, Reply) and plan.data)):
            return Fail(INVALID_FIELD_IN_CDB)
        return plan

    def _read_10(self, cdb: bytes, length: int) -> Plan:
        lba, sectors = struct.unpack_from(">2xIxH", cdb)
        return self._read(lba, sectors, length)

    def _read_12(self, cdb: bytes, length: int) -> Plan:
        lba, sectors = struct.unpack_from(">2xII", cdb)
        return self._read(lba, sectors, length)

    def _read_cd(self, cdb: bytes, length: int) -> Plan:
        lba, high, low, fields = struct.unpack_from(">2xIBHB", cdb)
        if cdb[10] & 7:  # sub-channel data
            return Fail(INVALID_FIELD_IN_CDB)
        # The sector type may be any or mode 1; of a sector only the user data is there to be read.
        if cdb[1] >> 2 & 7 not in (0, 2) or fields not in (0, 0x10):
            return Fail(ILLEGAL_MODE_FOR_THIS_TRACK)
        return self._read(lba, high << 16 | low if fields else 0, length)

    def _read(self, lba: int, sectors: int, length: int) -> Plan:
        if lba + max(sectors, 1) > self._sectors:
            return Fail(LBA_OUT_OF_RANGE.at(max(lba, self._sectors)))
        if sectors * SECTOR > length:
            return Fail(INVALID_FIELD_IN_CDB)
        return Read(lba * SECTOR, sectors * SECTOR)

    def _seek(self, cdb: bytes, length: int) -> Plan:
        (lba,) = struct.unpack_from(">2xI", cdb)
        return Reply() if lba < self._sectors else Fail(LBA_OUT_OF_RANGE.at(lba))

    def _read_capacity(self, cdb: bytes, length: int) -> Plan:
        return Reply(struct.pack(">II", self._sectors - 1, SECTOR))

    def _request_sense(self, cdb: bytes, length: int) -> Plan:
        if cdb[1] & 1:  # DESC: descriptor format
            return Fail(INVALID_FIELD_IN_CDB)
        sense = self._attention.pop(0) if self._attention else NO_SENSE
        return Reply(sense.encode()[: cdb[4]])

    def _inquiry(self, cdb: bytes, length: int) -> Plan:
        flags, page, allocation = struct.unpack_from(">xBBH", cdb)
        if flags & 1:
            body = self._vpd_page(page)
            if body is None:
                return Fail(INVALID_FIELD_IN_CDB)
            return Reply((struct.pack(">BBH", 0x05, page, len(body)) + body)[:allocation])
        if flags or page:
            return Fail(INVALID_FIELD_IN_CDB)
        # A CD or DVD device with a removable medium; SPC-3, response format 2.
        head = struct.pack(">8B", 0x05, 0x80, 5, 2, 31, 0, 0, 0)
        return Reply((head + _VENDOR + self._product + _REVISION)[:allocation])

    def _vpd_page(self, page: int) -> bytes | None:
        serial = self.identity.hex().encode()
        if page == 0x00:
            return bytes((0x00, 0x80, 0x83))
        if page == 0x80:
            return serial
        if page == 0x83:  # one designator: ASCII, T10 vendor identification
            return struct.pack(">BBBB", 2, 1, 0, len(_VENDOR + serial)) + _VENDOR + serial
        return None

    # Tray and disc.

    def _start_stop(self, cdb: bytes, length: int) -> Plan:
        start, load_or_eject, power = cdb[4] & 1, cdb[4] & 2, cdb[4] >> 4
        if power or not load_or_eject:
            return Reply()
        if not start:
            if self._locked:
                return Fail(MEDIUM_REMOVAL_PREVENTED)
            self._open = True
            self._event = _MEDIUM_REMOVAL
        elif self._open:
            self._close_tray()
        return Reply()

    def _prevent_allow(self, cdb: bytes, length: int) -> Plan:
        self._locked = bool(cdb[4] & 1)
        return Reply()

    def _get_event_status(self, cdb: bytes, length: int) -> Plan:
        polled, classes, allocation = struct.unpack_from(">xB2xB2xH", cdb)
        if not polled & 1:  # asynchronous notices are not offered
            return Fail(INVALID_FIELD_IN_CDB)
        supported = 1 << _MEDIA_CLASS
        if not classes & supported:
            return Reply(struct.pack(">HBB", 2, 0x80, supported)[:allocation])
        event, self._event = self._event, 0
        present = 2 if self._disc is not None and not self._open else 0
        return Reply(struct.pack(">HBBBB2x", 6, _MEDIA_CLASS, supported, event, present | self._open)[:allocation])

    def _mechanism_status(self, cdb: bytes, length: int) -> Plan:
        (allocation,) = struct.unpack_from(">8xH", cdb)
        return Reply(struct.pack(">BBBBB3x", 0, self._open << 4, 0, 0, 0)[:allocation])

    def _read_disc_information(self, cdb: bytes, length: int) -> Plan:
        (allocation,) = struct.unpack_from(">7xH", cdb)
        if cdb[1] & 7:
            return Fail(INVALID_FIELD_IN_CDB)
        # Disc and last session complete; track 1, session 1 and nothing else; unrestricted use; a CD-ROM or DVD-ROM.
        data = struct.pack(">HBBBBBB26x", 32, 0x0E, 1, 1, 1, 1, 0x20)
        return Reply(data[:allocation])

    def _read_toc(self, cdb: bytes, length: int) -> Plan:
        flags, form, first, allocation, control = struct.unpack_from(">xBB3xBHB", cdb)
        msf = bool(flags & 2)
        # SFF-8020 had the format in the last byte.
        form = form & 0xF or control >> 6
        if form == 0:
            if first > 1 and first != _LEAD_OUT:
                return Fail(INVALID_FIELD_IN_CDB)
            entries = [] if first == _LEAD_OUT else [(1, 0)]
            entries.append((_LEAD_OUT, self._sectors))
            body = b"".join(struct.pack(">xBBx4s", _DATA_TRACK, *_at(entry, msf)) for entry in entries)
        elif form == 1:  # the first track of the last session
            body = struct.pack(">xBBx4s", _DATA_TRACK, *_at((1, 0), msf))
        elif form == 2:
            body = self._raw_toc()
        else:
            return Fail(INVALID_FIELD_IN_CDB)
        return Reply((struct.pack(">HBB", len(body) + 2, 1, 1) + body)[:allocation])

    def _raw_toc(self) -> bytes:
        """Entries of the lead-in: first track, last track, start of the lead-out, track 1. MMC-6, table 496."""
        lead_out, start = _msf(self._sectors)[1:], _msf(0)[1:]
        points = ((0xA0, bytes((1, 0, 0))), (0xA1, bytes((1, 0, 0))), (0xA2, lead_out), (1, start))
        return b"".join(struct.pack(">BBBB4x3s", 1, _DATA_TRACK, 0, point, where) for point, where in points)

    # What the drive can do.

    def _get_configuration(self, cdb: bytes, length: int) -> Plan:
        request, first, allocation = struct.unpack_from(">xBH3xH", cdb)
        request &= 3
        if request == 3:
            return Fail(INVALID_FIELD_IN_CDB)
        profile = 0
        if self._disc is not None and not self._open:
            profile = _PROFILE_DVD_ROM if self._sectors > _CD_SECTORS else _PROFILE_CD_ROM
        cd, dvd = profile == _PROFILE_CD_ROM, profile == _PROFILE_DVD_ROM
        profiles = struct.pack(">HBxHBx", _PROFILE_DVD_ROM, dvd, _PROFILE_CD_ROM, cd)
        # Number, version, whether it is current and whether it always is, data. MMC-6 section 5.3.
        features = (
            (0x0000, 0, True, True, profiles),
            (0x0001, 2, True, True, struct.pack(">IB3x", self._interface, 1)),
            (0x0003, 0, True, True, struct.pack(">B3x", _MECHANISM)),
            (0x0010, 0, profile != 0, False, struct.pack(">IHBx", SECTOR, 16 if dvd else 1, 0)),
            (0x001E, 2, cd, False, bytes(4)),
            (0x001F, 1, dvd, False, bytes(4)),
            (0x0100, 0, True, True, b""),
            (0x0105, 0, True, True, b""),
        )
        body = b"".join(
            struct.pack(">HBB", number, version << 2 | persistent << 1 | current, len(data)) + data
            for number, version, current, persistent, data in features
            if (number == first if request == 2 else number >= first and (current or request == 0))
        )
        return Reply((struct.pack(">I2xH", 4 + len(body), profile) + body)[:allocation])

    def _mode_sense_6(self, cdb: bytes, length: int) -> Plan:
        pages = self._mode_pages(cdb)
        if isinstance(pages, Fail):
            return pages
        return Reply((struct.pack(">BBBx", 3 + len(pages), self._medium_type, 0) + pages)[: cdb[4]])

    def _mode_sense_10(self, cdb: bytes, length: int) -> Plan:
        pages = self._mode_pages(cdb)
        if isinstance(pages, Fail):
            return pages
        (allocation,) = struct.unpack_from(">7xH", cdb)
        return Reply((struct.pack(">HBB4x", 6 + len(pages), self._medium_type, 0) + pages)[:allocation])

    @property
    def _medium_type(self) -> int:
        """SFF-8020i: a data disc of 120 mm, no disc, or an open tray."""
        return 0x71 if self._open else 0x70 if self._disc is None else 0x01

    def _mode_pages(self, cdb: bytes) -> bytes | Fail:
        control, page, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        if control == 3:
            return Fail(SAVING_NOT_SUPPORTED)
        # Reads CD-R, CD-RW and DVD-ROM; mode 2 forms 1 and 2, multi-session. Nothing of it can be changed.
        capabilities = struct.pack(
            ">BBBBBBHHHH4x", 0x0B, 0, 0x70, 0, _MECHANISM | self._locked << 1, 0, _SPEED, 0, 512, _SPEED
        )
        pages = {_ERROR_RECOVERY_PAGE: bytes(6), _CAPABILITIES_PAGE: bytes(18) if control == 1 else capabilities}
        wanted = pages if page == _ALL_PAGES else (page,)
        if subpage or any(number not in pages for number in wanted):
            return Fail(INVALID_FIELD_IN_CDB)
        return b"".join(bytes((number, len(pages[number]))) + pages[number] for number in wanted)


def _msf(lba: int) -> bytes:
    """A reserved byte, minute, second and frame of a sector; what lies beyond minute 255 reads as that."""
    seconds, frame = divmod(lba + _PREGAP, 75)
    minute, second = divmod(seconds, 60)
    return bytes((0, min(minute, 255), second, frame))


def _at(entry: tuple[int, int], msf: bool) -> tuple[int, bytes]:
    track, lba = entry
    return track, _msf(lba) if msf else min(lba, 0xFFFF_FFFF).to_bytes(4, "big")
