"""A CD and DVD drive: what its commands say of disc and tray, and what the guest hears of a change."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.storage import sense
from devices.storage.cdb import Op
from devices.storage.mmc import ATAPI, MediumLocked, OpticalDrive
from devices.storage.plans import Fail, Read, Reply
from tests.fakes.disks import MemoryDisk

SECTORS = 1000
LARGE = 1 << 20
CD, DVD = 0x08, 0x10


def disc(sectors: int = SECTORS) -> MemoryDisk:
    medium = MemoryDisk(0, readonly=True)
    medium.size = sectors * 2048
    medium.sector_size = medium.physical_sector_size = 2048
    medium.optical = True
    return medium


class Initiator:
    """Sends commands of twelve bytes to a drive."""

    def __init__(self, medium: MemoryDisk | None = None, interface: int = ATAPI) -> None:
        self.drive = OpticalDrive(medium, bytes(range(16)), interface)

    def fails(self, *cdb: int) -> sense.Sense:
        plan = self.drive.plan(bytes(cdb).ljust(12, b"\0"), LARGE, True)
        assert isinstance(plan, Fail), plan
        return plan.sense

    def get(self, *cdb: int) -> bytes:
        plan = self.drive.plan(bytes(cdb).ljust(12, b"\0"), LARGE, True)
        assert isinstance(plan, Reply), plan
        return plan.data

    def reads(self, *cdb: int) -> tuple[int, int]:
        plan = self.drive.plan(bytes(cdb).ljust(12, b"\0"), LARGE, True)
        assert isinstance(plan, Read), plan
        return plan.offset, plan.length

    def event(self) -> tuple[int, int]:
        """Media event code and media status."""
        data = self.get(Op.GET_EVENT_STATUS_NOTIFICATION, 1, 0, 0, 0x10, 0, 0, 0, 8)
        assert data[:4] == bytes((0, 6, 4, 0x10))
        return data[4], data[5]

    def profile(self) -> int:
        data = self.get(Op.GET_CONFIGURATION, 0, 0, 0, 0, 0, 0, 1, 0)
        return int.from_bytes(data[6:8], "big")


def test_reads_address_sectors_of_2048_bytes() -> None:
    initiator = Initiator(disc())
    assert initiator.reads(Op.READ_10, 0, 0, 0, 0, 16, 0, 0, 3) == (16 * 2048, 3 * 2048)
    assert initiator.reads(Op.READ_12, 0, 0, 0, 0, 16, 0, 0, 0, 3) == (16 * 2048, 3 * 2048)
    assert initiator.reads(Op.READ_CD, 0, 0, 0, 0, 16, 0, 0, 3, 0x10) == (16 * 2048, 3 * 2048)


@pytest.mark.parametrize(("lba", "count"), [(SECTORS, 1), (SECTORS, 0), (SECTORS - 1, 2), (0xFFFF_FFFF, 1)])
def test_reads_beyond_the_end_are_refused(lba: int, count: int) -> None:
    initiator = Initiator(disc())
    where = lba.to_bytes(4, "big")
    expected = sense.LBA_OUT_OF_RANGE.at(max(lba, SECTORS))
    assert initiator.fails(Op.READ_10, 0, *where, 0, 0, count) == expected
    assert initiator.fails(Op.READ_12, 0, *where, 0, 0, 0, count) == expected


def test_raw_sectors_and_sub_channels_are_not_there_to_be_read() -> None:
    initiator = Initiator(disc())
    assert initiator.fails(Op.READ_CD, 0, 0, 0, 0, 0, 0, 0, 1, 0xF8) == sense.ILLEGAL_MODE_FOR_THIS_TRACK
    assert initiator.fails(Op.READ_CD, 1 << 2, 0, 0, 0, 0, 0, 0, 1, 0x10) == sense.ILLEGAL_MODE_FOR_THIS_TRACK
    assert initiator.fails(Op.READ_CD, 0, 0, 0, 0, 0, 0, 0, 1, 0x10, 1) == sense.INVALID_FIELD_IN_CDB


def test_a_read_needs_a_buffer_that_holds_it() -> None:
    drive = Initiator(disc()).drive
    cdb = bytes((Op.READ_10, 0, 0, 0, 0, 0, 0, 0, 2, 0))
    assert drive.plan(cdb, 4095, True) == Fail(sense.INVALID_FIELD_IN_CDB)
    assert drive.plan(cdb, 4096, False) == Fail(sense.INVALID_FIELD_IN_CDB)
    assert isinstance(drive.plan(cdb, 4096, True), Read)


def test_inquiry_tells_of_a_removable_cd_or_dvd_drive() -> None:
    data = Initiator().get(Op.INQUIRY, 0, 0, 0, 255)
    assert data[:2] == b"\x05\x80"
    assert data[8:] == b"Msft    Virtual DVD-ROM 1.0 "
    assert Initiator().get(Op.INQUIRY, 1, 0x80, 0, 255)[4:] == bytes(range(16)).hex().encode()
    assert Initiator().fails(Op.INQUIRY, 1, 0xB0, 0, 255) == sense.INVALID_FIELD_IN_CDB


def test_capacity_is_the_last_sector() -> None:
    assert Initiator(disc()).get(Op.READ_CAPACITY_10) == struct.pack(">II", SECTORS - 1, 2048)


def test_the_table_of_contents_has_one_data_track() -> None:
    initiator = Initiator(disc())
    track, lead_out = bytes.fromhex("00140100"), bytes.fromhex("0014aa00")
    head = bytes.fromhex("00120101")
    assert initiator.get(Op.READ_TOC, 0, 0, 0, 0, 0, 0, 1, 0) == head + track + bytes(4) + lead_out + struct.pack(
        ">I", SECTORS
    )
    # Sector 1000 and the 150 before sector 0 are 15 seconds and 25 frames.
    assert initiator.get(Op.READ_TOC, 2, 0, 0, 0, 0, 0xAA, 1, 0) == bytes.fromhex("000a0101") + lead_out + bytes(
        (0, 0, 15, 25)
    )
    assert initiator.get(Op.READ_TOC, 0, 1, 0, 0, 0, 0, 1, 0) == bytes.fromhex("000a0101") + track + bytes(4)
    assert initiator.get(Op.READ_TOC, 0, 0, 0, 0, 0, 0, 0, 4) == head
    assert initiator.fails(Op.READ_TOC, 0, 0, 0, 0, 0, 2, 1, 0) == sense.INVALID_FIELD_IN_CDB
    assert initiator.fails(Op.READ_TOC, 0, 5, 0, 0, 0, 0, 1, 0) == sense.INVALID_FIELD_IN_CDB


def test_the_raw_table_of_contents_points_at_the_lead_out() -> None:
    data = Initiator(disc()).get(Op.READ_TOC, 2, 2, 0, 0, 0, 0, 1, 0)
    entries = [data[start : start + 11] for start in range(4, len(data), 11)]
    assert int.from_bytes(data[:2], "big") == len(data) - 2
    assert [entry[3] for entry in entries] == [0xA0, 0xA1, 0xA2, 1]
    assert [tuple(entry[8:]) for entry in entries[2:]] == [(0, 15, 25), (0, 2, 0)]


@pytest.mark.parametrize(("sectors", "profile"), [(None, 0), (SECTORS, CD), (360_000, CD), (360_001, DVD)])
def test_the_profile_is_the_discs(sectors: int | None, profile: int) -> None:
    assert Initiator(None if sectors is None else disc(sectors)).profile() == profile


def test_configuration_lists_features_from_where_it_was_asked() -> None:
    initiator = Initiator(disc())

    def features(request: int, first: int) -> dict[int, tuple[bool, bytes]]:
        data = initiator.get(Op.GET_CONFIGURATION, request, *first.to_bytes(2, "big"), 0, 0, 0, 1, 0)
        assert int.from_bytes(data[:4], "big") == len(data) - 4
        found, at = {}, 8
        while at < len(data):
            number, flags, size = struct.unpack_from(">HBB", data, at)
            found[number] = bool(flags & 1), data[at + 4 : at + 4 + size]
            at += 4 + size
        return found

    assert list(features(0, 0)) == [0, 1, 3, 0x10, 0x1E, 0x1F, 0x100, 0x105]
    assert list(features(1, 0x10)) == [0x10, 0x1E, 0x100, 0x105]
    assert features(2, 1) == {1: (True, bytes((0, 0, 0, 2, 1, 0, 0, 0)))}
    assert features(2, 2) == {}


def test_without_a_disc_nothing_can_be_read() -> None:
    initiator = Initiator()
    for op in (Op.TEST_UNIT_READY, Op.READ_CAPACITY_10, Op.READ_10, Op.READ_TOC):
        assert initiator.fails(op) == sense.NO_MEDIUM
    assert initiator.event() == (0, 0)


def test_a_guest_opens_and_closes_the_tray() -> None:
    initiator = Initiator(disc())
    assert initiator.get(Op.START_STOP_UNIT, 0, 0, 0, 2) == b""
    assert initiator.fails(Op.TEST_UNIT_READY) == sense.TRAY_OPEN
    assert initiator.event() == (3, 1)
    assert initiator.event() == (0, 1)
    assert initiator.get(Op.MECHANISM_STATUS, 0, 0, 0, 0, 0, 0, 0, 0, 8)[1] == 0x10
    assert initiator.get(Op.START_STOP_UNIT, 0, 0, 0, 3) == b""
    assert initiator.event() == (2, 2)
    assert initiator.fails(Op.TEST_UNIT_READY) == sense.MEDIUM_MAY_HAVE_CHANGED
    assert initiator.get(Op.TEST_UNIT_READY) == b""


def test_a_locked_tray_opens_for_nobody() -> None:
    old, new = disc(), disc()
    initiator = Initiator(old)
    initiator.get(Op.PREVENT_ALLOW_MEDIUM_REMOVAL, 0, 0, 0, 1)
    assert initiator.fails(Op.START_STOP_UNIT, 0, 0, 0, 2) == sense.MEDIUM_REMOVAL_PREVENTED
    with pytest.raises(MediumLocked):
        initiator.drive.change(new)
    assert initiator.drive.disc is old
    assert initiator.event() == (1, 2), "the guest hears that somebody wants to eject"
    initiator.get(Op.PREVENT_ALLOW_MEDIUM_REMOVAL, 0, 0, 0, 0)
    assert initiator.drive.change(new) is old


def test_a_changed_disc_is_a_unit_attention_once() -> None:
    initiator = Initiator(disc())
    initiator.drive.change(disc(400_000))
    assert initiator.profile() == DVD, "the configuration is told in spite of it"
    assert initiator.event() == (2, 2)
    assert initiator.fails(Op.READ_10, 0, 0, 0, 0, 0, 0, 0, 1) == sense.MEDIUM_MAY_HAVE_CHANGED
    assert initiator.get(Op.READ_CAPACITY_10) == struct.pack(">II", 399_999, 2048)


def test_force_takes_the_disc_from_a_guest_that_has_it_locked() -> None:
    initiator = Initiator(old := disc())
    initiator.get(Op.PREVENT_ALLOW_MEDIUM_REMOVAL, 0, 0, 0, 1)
    assert initiator.drive.change(None, force=True) is old
    assert initiator.event() == (3, 0)
    assert initiator.fails(Op.TEST_UNIT_READY) == sense.MEDIUM_MAY_HAVE_CHANGED
    assert initiator.fails(Op.TEST_UNIT_READY) == sense.NO_MEDIUM


def test_request_sense_tells_and_takes_a_unit_attention() -> None:
    initiator = Initiator(disc())
    initiator.drive.reset()
    data = initiator.get(Op.REQUEST_SENSE, 0, 0, 0, 18)
    assert (data[2], data[12], data[13]) == (6, 0x29, 0)
    assert initiator.get(Op.REQUEST_SENSE, 0, 0, 0, 18)[2] == 0
    assert initiator.get(Op.TEST_UNIT_READY) == b""


def test_mode_sense_tells_what_the_drive_can_do_and_whether_it_is_locked() -> None:
    initiator = Initiator(disc())
    data = initiator.get(Op.MODE_SENSE_10, 0, 0x2A, 0, 0, 0, 0, 0, 128)
    assert int.from_bytes(data[:2], "big") == len(data) - 2
    assert data[2] == 0x01
    page = data[8:]
    assert page[:2] == bytes((0x2A, 18)) and len(page) == 20
    assert page[6] == 0x29
    initiator.get(Op.PREVENT_ALLOW_MEDIUM_REMOVAL, 0, 0, 0, 1)
    assert initiator.get(Op.MODE_SENSE_6, 0, 0x2A, 0, 128)[4 + 6] == 0x2B
    assert initiator.get(Op.MODE_SENSE_6, 0, 0x3F, 0, 128)[4] == 0x01
    assert initiator.fails(Op.MODE_SENSE_6, 0, 0x08, 0, 128) == sense.INVALID_FIELD_IN_CDB
    assert initiator.fails(Op.MODE_SENSE_6, 0, 0xEA, 0, 128) == sense.SAVING_NOT_SUPPORTED


def test_disc_information_is_of_a_finished_disc() -> None:
    data = Initiator(disc()).get(Op.READ_DISC_INFORMATION, 0, 0, 0, 0, 0, 0, 0, 34)
    assert len(data) == 34 and data[2] == 0x0E


def test_saved_state_goes_on_where_it_was() -> None:
    initiator = Initiator(disc())
    initiator.drive.reset()
    initiator.fails(Op.TEST_UNIT_READY)
    initiator.get(Op.PREVENT_ALLOW_MEDIUM_REMOVAL, 0, 0, 0, 1)
    state = initiator.drive.save()
    other = Initiator(disc())
    other.drive.restore(state)
    assert other.drive.locked
    assert other.get(Op.TEST_UNIT_READY) == b""


def test_another_disc_after_a_restore_is_news() -> None:
    state = Initiator(disc()).drive.save()
    other = Initiator(disc(5))
    other.drive.restore(state)
    assert other.fails(Op.TEST_UNIT_READY) == sense.MEDIUM_MAY_HAVE_CHANGED


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=16),
            st.builds(
                lambda op, rest: bytes((op,)) + rest, st.sampled_from(sorted(Op)), st.binary(min_size=11, max_size=11)
            ),
        ),
        max_size=8,
    ),
    st.integers(0, 1 << 17),
    st.booleans(),
    st.sampled_from([None, 1, SECTORS, 1 << 32]),
)
def test_any_command_has_a_plan_within_disc_and_buffer(
    cdbs: list[bytes], length: int, data_in: bool, sectors: int | None
) -> None:
    medium = None if sectors is None else disc(sectors)
    drive = OpticalDrive(medium, bytes(16))
    drive.reset()
    for cdb in cdbs:
        plan = drive.plan(cdb, length, data_in)
        if isinstance(plan, Read):
            assert medium is not None and plan.offset >= 0 and plan.offset + plan.length <= medium.size
            assert plan.length <= length and (data_in or not plan.length)
        else:
            assert isinstance(plan, Fail | Reply)
    drive.restore(drive.save())
