"""The disks of a SCSI controller, and the data that goes between them and the guest."""

from __future__ import annotations

import errno
import os
import struct
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.storage.images import open_image
from devices.synthetic.storvsp.vsp import StorVsp
from pyvmm.core.memory import PAGE_SIZE, GuestMemory
from tests.fakes.data_paths import data_path as data_path
from tests.fakes.disks import MemoryDisk
from tests.fakes.scsi import read10, write10
from tests.fakes.storvsp_rig import (
    BLOCKS,
    ENUMERATE,
    INQUIRY,
    REPORT_LUNS,
    RESET_ADAPTER,
    RESET_BUS,
    RESET_LUN,
    SIZE,
    TEST_UNIT_READY,
    WIN6,
    WIN10,
    Rig,
    luns,
)

# LUNs ---------------------------------------------------------------------------------------------------


def test_two_disks_on_one_controller_are_two_disks() -> None:
    rig = Rig({0: MemoryDisk(SIZE, name="first"), 63: MemoryDisk(2 * SIZE, name="second")})
    guest = rig.ready()
    assert luns(guest) == luns(guest, lun=5) == [0, 63]
    guest.write(write10(0, 1), b"1" * 512, lun=0)
    guest.write(write10(0, 1), b"2" * 512, lun=63)
    assert guest.read(read10(0, 1), 512, lun=0).data == b"1" * 512
    assert guest.read(read10(0, 1), 512, lun=63).data == b"2" * 512
    serials = {guest.read(bytes((0x12, 1, 0x80, 0, 255, 0)), 255, lun=lun).data for lun in (0, 63)}
    assert len(serials) == 2


def test_scan_of_empty_places_finds_nothing() -> None:
    guest = Rig({3: MemoryDisk(SIZE)}).ready()
    for where in ({"lun": 0}, {"lun": 9}, {"target": 1}, {"path": 7}, {"lun": 3, "target": 1}):
        answer = guest.read(INQUIRY, 36, **where)
        assert answer.srb_status == 1 and answer.transferred == 36
        assert answer.data[0] == 0x7F
        assert (b"Msft" in answer.data) == (where.get("lun", 0) == 0)
        assert luns(guest, **where) == ([] if "target" in where or "path" in where else [3])
    vpd = guest.read(bytes((0x12, 1, 0, 0, 36, 0)), 36)
    assert vpd.code == (5, 0x24, 0)


def test_command_to_an_absent_lun_has_linux_remove_it() -> None:
    result = Rig().ready().command(TEST_UNIT_READY, lun=1)
    assert result.srb_status & 0x3F == 0x20
    assert result.scsi_status == 2 and result.code == (5, 0x25, 0)
    assert result.nt_status == 0xC00000C0


def test_report_luns_knows_its_fields() -> None:
    guest = Rig().ready()
    well_known = guest.read(struct.pack(">BBB3xI2x", 0xA0, 0, 1, 64), 64)
    assert well_known.data[:8] == bytes(8)
    cut = guest.read(struct.pack(">BBB3xI2x", 0xA0, 0, 2, 8), 64)
    assert cut.transferred == 8 and cut.data[:4] == b"\0\0\0\x08"
    assert guest.read(struct.pack(">BBB3xI2x", 0xA0, 0, 3, 64), 64).code == (5, 0x24, 0)
    assert guest.read(REPORT_LUNS[:6], 64).code == (5, 0x24, 0)


def test_added_disk_is_announced_and_works() -> None:
    rig = Rig()
    guest = rig.ready()
    rig.vsp.add_disk(5, MemoryDisk(SIZE))
    guest.pump()
    assert guest.notices == [ENUMERATE]
    assert luns(guest) == [0, 5]
    assert guest.write(write10(1, 1), b"n" * 512, lun=5).srb_status == 1


def test_removed_disk_is_announced_handed_back_and_gone() -> None:
    rig = Rig({0: MemoryDisk(SIZE), 1: MemoryDisk(SIZE)})
    guest, disk = rig.ready(), rig.disk(1)
    assert rig.vsp.remove_disk(1) is disk
    guest.pump()
    assert guest.notices == [ENUMERATE]
    assert guest.command(TEST_UNIT_READY, lun=1).srb_status & 0x3F == 0x20
    assert luns(guest) == [0]
    with pytest.raises(ValueError, match="no disk at LUN 1"):
        rig.vsp.remove_disk(1)


def test_removal_waits_for_the_command_under_way() -> None:
    rig = Rig()
    guest, disk = rig.ready(), rig.disk()
    disk.gate.clear()
    removed = threading.Event()

    def remove() -> None:
        gone = rig.vsp.remove_disk(0)
        assert gone is disk
        disk.close()
        removed.set()

    results: list[int] = []
    reader = threading.Thread(target=lambda: results.append(guest.read(read10(0, 1), 512).srb_status))
    reader.start()
    assert disk.reached.wait(10)
    remover = threading.Thread(target=remove)
    remover.start()
    assert not removed.wait(0.05)
    disk.gate.set()
    assert removed.wait(10)
    reader.join(10)
    remover.join(10)
    assert results == [1]


def test_resized_disk_is_announced_and_told_in_the_form_that_linux_looks_for() -> None:
    rig = Rig()
    guest = rig.ready()
    rig.vsp.resize_disk(0, 2 * SIZE)
    guest.pump()
    assert guest.notices == [ENUMERATE]
    told = guest.command(TEST_UNIT_READY)
    assert told.code == (6, 0x2A, 0x09) and told.srb_status == 0x82 and told.nt_status == 0xC0000120
    assert guest.command(TEST_UNIT_READY).srb_status == 1
    assert guest.write(write10(2 * BLOCKS - 1, 1), b"n" * 512).srb_status == 1
    assert rig.disk().data[-512:] == b"n" * 512
    with pytest.raises(ValueError, match="can only grow"):
        rig.vsp.resize_disk(0, SIZE)
    with pytest.raises(ValueError, match="no disk at LUN 7"):
        rig.vsp.resize_disk(7, SIZE)


def test_reservation_conflict_has_its_status_and_no_sense_data() -> None:
    rig = Rig()
    guest = rig.ready()
    reservations = rig.target().reservations
    other = {"version": 1, "generation": 1, "keys": [[b"stranger", 1]], "holder": b"stranger", "type": 3}
    reservations.restore(other)
    refused = guest.write(write10(0, 1), bytes(512))
    assert (refused.scsi_status, refused.srb_status, refused.transferred) == (0x18, 0x04, 0)
    assert guest.command(TEST_UNIT_READY).srb_status == 1
    assert rig.vsp.inspect()["luns"]["0"]["errors"] == 1


def test_transfers_of_a_mebibyte_are_offered_and_done() -> None:
    disk = MemoryDisk(4 << 20)
    rig = Rig({0: disk})
    rig.memory = GuestMemory(4 << 20)
    rig.bus.memory = rig.end.memory = rig.memory
    guest = rig.guest
    guest.pages = list(range(100, 358))
    _, properties = guest.initialize()
    (transfer,) = struct.unpack_from("<I", properties, 12)
    assert transfer == 1 << 20
    data = bytes(range(256)) * 4096
    assert guest.write(write10(5, 2048), data, offset=512).transferred == transfer
    assert guest.read(read10(5, 2048), transfer, offset=1024).data == data
    assert disk.data[2560 : 2560 + transfer] == data


@pytest.mark.parametrize(("version", "state"), [(WIN6, "ready"), (WIN10, "handshake")])
def test_nothing_is_announced_to_a_guest_that_cannot_take_it(version: int, state: str) -> None:
    rig = Rig()
    if state == "ready":
        rig.ready(versions=[version])
    rig.vsp.add_disk(1, MemoryDisk(SIZE))
    rig.vsp.remove_disk(1)
    assert rig.end.device.sent == []


def test_bad_luns_are_refused() -> None:
    vsp = StorVsp(0, {0: MemoryDisk(SIZE)})
    for lun, says in ((0, "already"), (64, "not in 0-63"), (-1, "not in 0-63")):
        with pytest.raises(ValueError, match=says):
            vsp.add_disk(lun, MemoryDisk(SIZE))


# Data ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.integers(0, BLOCKS - 200), st.integers(1, 200), st.integers(0, PAGE_SIZE - 1), st.binary(min_size=1)
        ),
        max_size=8,
    )
)
def test_random_transfers_over_scattered_pages_match_a_model(work: list[tuple[int, int, int, bytes]]) -> None:
    rig = Rig()
    guest = rig.ready()
    model = bytearray(SIZE)
    for lba, blocks, offset, seed in work:
        data = (seed * (blocks * 512))[: blocks * 512]
        assert guest.write(write10(lba, blocks), data, offset=offset).transferred == len(data)
        model[lba * 512 : lba * 512 + len(data)] = data
        around = max(0, lba - 3)
        found = guest.read(read10(around, blocks), len(data), offset=PAGE_SIZE - 1 - offset)
        assert found.data == model[around * 512 : around * 512 + len(data)]
    assert rig.disk().data == model


def test_transfer_touches_no_byte_outside_its_range() -> None:
    rig = Rig()
    guest = rig.ready()
    guest.poke(b"\xcc" * 5 * PAGE_SIZE)
    rig.disk().data[:] = b"\x11" * SIZE
    assert guest.read(read10(0, 16), 8192, offset=100).srb_status == 1
    assert guest.peek(5 * PAGE_SIZE) == b"\xcc" * 100 + b"\x11" * 8192 + b"\xcc" * (5 * PAGE_SIZE - 8292)


def test_buffer_longer_than_the_command_is_used_in_part() -> None:
    guest = Rig().ready()
    guest.poke(b"\xcc" * 4096)
    result = guest.read(read10(0, 1), 4096)
    assert (result.srb_status, result.transferred) == (1, 512)
    assert result.data == bytes(512) + b"\xcc" * 3584


def test_readonly_disk_is_write_protected() -> None:
    rig = Rig({0: MemoryDisk(SIZE, readonly=True)})
    result = rig.ready().write(write10(0, 1), b"x" * 512)
    assert result.srb_status == 0x84 and result.scsi_status == 2 and result.code == (7, 0x27, 0)
    assert result.nt_status == 0xC0000185
    assert rig.disk().data == bytes(SIZE)


def test_illegal_request_is_an_invalid_request_with_sense() -> None:
    result = Rig().ready().read(read10(BLOCKS, 1), 512)
    assert result.srb_status == 0x86 and result.code == (5, 0x21, 0) and result.transferred == 0


def test_full_host_file_system_tells_the_guest() -> None:
    rig = Rig()
    guest = rig.ready()
    rig.disk().fail = OSError(errno.ENOSPC, "full")
    result = guest.write(write10(0, 1), bytes(512))
    assert result.srb_status == 0x84 and result.code == (7, 0x27, 7)
    rig.disk().fail = None
    assert guest.write(write10(0, 1), bytes(512)).srb_status == 1


def test_image_truncated_underneath_is_a_medium_error(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"d" * SIZE)
    rig = Rig({0: open_image(str(path))})
    guest = rig.ready()
    assert guest.read(read10(BLOCKS - 8, 8), 4096).data == b"d" * 4096
    os.truncate(path, SIZE // 2)
    assert guest.read(read10(BLOCKS - 8, 8), 4096).code == (3, 0x11, 0)
    assert guest.read(read10(BLOCKS // 2 - 4, 8), 4096).code == (3, 0x11, 0)
    assert guest.read(read10(0, 8), 4096).data == b"d" * 4096
    assert rig.vsp.inspect()["luns"]["0"]["errors"] == 2


def test_resets_succeed() -> None:
    guest = Rig().ready()
    for operation in (RESET_LUN, RESET_ADAPTER, RESET_BUS):
        assert guest.operation(operation)[0] == 0
