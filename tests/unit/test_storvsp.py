from __future__ import annotations

import errno
import io
import json
import os
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.storage.images import open_image
from devices.synthetic.storvsp.scsi import Target
from devices.synthetic.storvsp.vsp import StorVsp, subchannels_for
from devices.vmbus.packets import PACKET_COMPLETION, PACKET_GPA_DIRECT, PACKET_INBAND
from pyvmm.core.memory import PAGE_SIZE, GuestMemory
from pyvmm.core.trace import Tracer
from tests.fakes.data_paths import data_path as data_path
from tests.fakes.disks import MemoryDisk
from tests.fakes.storvsc import (
    OLD_BODY,
    READ_TYPE,
    WRITE_TYPE,
    InlineLane,
    Loopback,
    LoopbackBus,
    StorVsc,
    gpa_range,
)

if TYPE_CHECKING:
    from devices.vmbus.bus import VmBus

WIN6, WIN7, WIN8, WIN8_1, WIN10 = 0x0200, 0x0402, 0x0501, 0x0600, 0x0602
SIZE = 1 << 20
BLOCKS = SIZE // 512

BEGIN, END, VERSION, PROPERTIES, FCHBA, CREATE = 7, 8, 9, 10, 12, 13
EXECUTE, RESET_LUN, RESET_ADAPTER, RESET_BUS, ENUMERATE = 3, 4, 5, 6, 11
REVISION_MISMATCH, INVALID_STATE, INVALID_REQUEST, INVALID_PARAMETER = 0xC0000059, 0xC0000184, 0xC0000010, 0xC000000D

TEST_UNIT_READY = bytes(6)
INQUIRY = bytes((0x12, 0, 0, 0, 36, 0))
REPORT_LUNS = struct.pack(">BBB3xI2x", 0xA0, 0, 0, 1024)

# Runs of neighbouring pages, single pages, and pages in falling order.
PAGES = [16, 17, 18, 40, 39, 38, 60, 62, 64, *range(100, 230)]


def read10(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBIxHx", 0x28, 0, lba, blocks)


def write10(lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIxHx", 0x2A, flags, lba, blocks)


class Rig:
    """A controller on a stand-in bus, with a guest's driver on its primary channel."""

    def __init__(self, disks: dict[int, Any] | None = None, subchannels: int = 0, body: int = 0x34, **how: Any) -> None:
        self.memory = GuestMemory(1 << 20)
        self.bus = LoopbackBus(self.memory)
        self.vsp = StorVsp(
            0, {0: MemoryDisk(SIZE)} if disks is None else disks, subchannels, make_lane=InlineLane, **how
        )
        self.vsp.attached(cast("VmBus", self.bus), ())
        self.end = Loopback(self.vsp, self.memory)
        self.guest = StorVsc(self.end, PAGES, body)

    def ready(self, **how: Any) -> StorVsc:
        self.guest.initialize(**how)
        return self.guest

    def disk(self, lun: int = 0) -> MemoryDisk:
        return cast("MemoryDisk", self.vsp._commands.luns[lun].disk)

    def target(self, lun: int = 0) -> Target:
        return cast("Target", self.vsp._commands.luns[lun].target)


# The handshake ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [WIN6, WIN7, WIN8, WIN8_1, WIN10])
def test_handshake_of_each_version_leads_to_a_working_disk(version: int) -> None:
    rig = Rig(subchannels=3, body=0x34 if version >= WIN8 else OLD_BODY)
    chosen, properties = rig.guest.initialize([version])
    assert chosen == version
    _, channels, _, flags, transfer, _ = struct.unpack_from("<IHHIIQ", properties)
    assert (channels, flags) == ((3, 1) if version >= WIN8 else (0, 0))
    assert transfer % PAGE_SIZE == 0 and transfer > 0
    assert rig.guest.write(write10(4, 1), b"a" * 512).srb_status == 1
    assert rig.disk().data[2048:2560] == b"a" * 512
    assert rig.vsp.inspect()["protocol"] == f"{version >> 8}.{version & 0xFF}"


def test_linux_gets_the_newest_version_it_asks_for() -> None:
    assert Rig().guest.initialize()[0] == WIN10
    assert Rig(max_version=WIN8_1).guest.initialize()[0] == WIN8_1
    assert Rig(max_version=WIN8).guest.initialize()[0] == WIN8


@pytest.mark.parametrize("version", [0, 0x0001, 0x0100, 0x0500, 0x0601, 0x0603, 0xFFFF])
def test_unknown_version_is_refused_and_another_may_follow(version: int) -> None:
    rig = Rig()
    rig.guest.operation(BEGIN)
    status, body = rig.guest.operation(VERSION, struct.pack("<HH", version, 0))
    assert status == REVISION_MISMATCH and body[:2] == version.to_bytes(2, "little")
    assert rig.guest.operation(VERSION, struct.pack("<HH", WIN8, 0))[0] == 0


def test_every_step_out_of_order_is_refused_and_changes_nothing() -> None:
    rig = Rig(subchannels=1)
    steps = [
        (BEGIN, b""),
        (VERSION, struct.pack("<HH", WIN8, 0)),
        (PROPERTIES, b""),
        (END, b""),
    ]
    for position, (right, body) in enumerate(steps):
        for wrong, _ in steps:
            if wrong != right:
                assert rig.guest.operation(wrong, struct.pack("<HH", WIN8, 0))[0] == INVALID_STATE
        assert rig.guest.operation(EXECUTE)[0] == INVALID_STATE
        assert rig.guest.operation(RESET_BUS)[0] == INVALID_STATE
        if position < 3:
            assert rig.guest.operation(CREATE, b"\1\0")[0] == INVALID_STATE
        assert rig.guest.operation(right, body)[0] == 0
    for again, body in steps:
        assert rig.guest.operation(again, body)[0] == INVALID_STATE
    assert rig.guest.command(TEST_UNIT_READY).srb_status == 1
    assert rig.bus.subchannels == []


@pytest.mark.parametrize("operation", [0, 1, 2, ENUMERATE, FCHBA, 14, 0xFFFFFFFF])
def test_operations_that_are_not_the_guests_are_refused(operation: int) -> None:
    rig = Rig()
    assert rig.guest.operation(operation)[0] == INVALID_REQUEST
    assert rig.ready().operation(operation)[0] == INVALID_REQUEST


def test_closing_the_primary_channel_starts_the_handshake_anew() -> None:
    rig = Rig()
    rig.ready()
    rig.end.close()
    again = StorVsc(Loopback(rig.vsp, rig.memory), PAGES)
    assert again.operation(EXECUTE)[0] == INVALID_STATE
    again.initialize()
    assert again.command(TEST_UNIT_READY).srb_status == 1


@pytest.mark.parametrize("size", [OLD_BODY, 0x34, 0x40, 4])
def test_completion_is_as_long_as_its_request_up_to_the_largest(size: int) -> None:
    rig = Rig(body=size)
    answer = rig.guest.collect(rig.guest.submit(PACKET_INBAND, b"", struct.pack("<III", BEGIN, 1, 0) + bytes(size)))
    assert len(answer) == 12 + min(size, 0x34)


@pytest.mark.parametrize(("vps", "channels"), [(1, 0), (2, 1), (4, 3), (16, 15), (64, 15)])
def test_sub_channels_follow_the_number_of_vps(vps: int, channels: int) -> None:
    assert subchannels_for(vps) == channels


# Sub-channels -------------------------------------------------------------------------------------------


def test_sub_channels_are_created_up_to_the_limit() -> None:
    rig = Rig(subchannels=3)
    guest = rig.ready(subchannels=2)
    assert rig.bus.subchannels == [2]
    assert guest.operation(CREATE, b"\4\0")[0] == INVALID_PARAMETER
    assert rig.bus.subchannels == [2]


def test_sub_channels_need_windows_8() -> None:
    rig = Rig(subchannels=3)
    assert rig.ready(versions=[WIN7]).operation(CREATE, b"\1\0")[0] == INVALID_STATE
    assert rig.bus.subchannels == []


def test_sub_channel_waits_for_the_handshake_and_then_serves() -> None:
    rig = Rig(subchannels=1)
    for step, body in ((BEGIN, b""), (VERSION, struct.pack("<HH", WIN8, 0)), (PROPERTIES, b""), (CREATE, b"\1\0")):
        assert rig.guest.operation(step, body)[0] == 0
    sub = StorVsc(Loopback(rig.vsp, rig.memory, 1), PAGES)
    request = sub.start(read10(0, 1), 512, READ_TYPE)
    with pytest.raises(AssertionError, match="nothing to say"):
        sub.pump()
    assert rig.guest.operation(END)[0] == 0
    assert sub.finish(request).srb_status == 1
    assert sub.operation(BEGIN)[0] == INVALID_STATE
    assert sub.operation(CREATE, b"\1\0")[0] == INVALID_STATE


def test_channels_work_in_parallel() -> None:
    rig = Rig(subchannels=1)
    rig.ready(subchannels=1)
    sub = StorVsc(Loopback(rig.vsp, rig.memory, 1), PAGES)
    rig.disk().gate.clear()
    slow = threading.Thread(target=lambda: sub.read(read10(0, 1), 512))
    slow.start()
    assert rig.disk().reached.wait(10)
    assert rig.guest.command(TEST_UNIT_READY).srb_status == 1
    rig.disk().gate.set()
    slow.join(10)
    assert not slow.is_alive()


# LUNs ---------------------------------------------------------------------------------------------------


def luns(guest: StorVsc, **where: int) -> list[int]:
    result = guest.read(REPORT_LUNS, 1024, **where)
    assert result.srb_status == 1
    (size,) = struct.unpack_from(">I", result.data)
    assert result.transferred == 8 + size
    return [int.from_bytes(result.data[8 + at : 10 + at], "big") for at in range(0, size, 8)]


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


# Hostile guests -----------------------------------------------------------------------------------------


def srb(size: int = 512, direction: int = READ_TYPE, cdb_length: int = 10) -> bytes:
    body = struct.pack("<HBBBBBBBBBBI20s", 0x34, 0, 0, 0, 0, 0, 0, cdb_length, 20, direction, 0, size, read10(0, 1))
    return struct.pack("<III", EXECUTE, 1, 0) + body.ljust(0x34, b"\0")


@pytest.mark.parametrize(
    ("kind", "header", "payload", "flags", "says"),
    [
        (PACKET_INBAND, b"", b"\3\0\0", 1, "3 bytes"),
        (PACKET_INBAND, b"", b"", 1, "0 bytes"),
        (PACKET_INBAND, b"", struct.pack("<III", EXECUTE, 1, 0), 1, "SCSI request of 0 bytes"),
        (PACKET_INBAND, b"", srb()[: 12 + OLD_BODY - 1], 1, "SCSI request of 35 bytes"),
        (PACKET_INBAND, b"", srb(), 1, "512 bytes with a buffer of 0"),
        (PACKET_INBAND, b"", srb(0), 0, "wants no completion"),
        (PACKET_COMPLETION, b"", srb(0), 1, "packet of type 11"),
        (7, bytes(8), srb(0), 1, "packet of type 7"),
        (PACKET_INBAND, b"", srb(0, cdb_length=0), 1, "CDB of 0 bytes"),
        (PACKET_INBAND, b"", srb(0, cdb_length=17), 1, "CDB of 17 bytes"),
        (PACKET_INBAND, b"", srb(0, cdb_length=255), 1, "CDB of 255 bytes"),
        (PACKET_GPA_DIRECT, gpa_range(512, 0, [16]), srb(513), 1, "513 bytes with a buffer of 512"),
        (PACKET_GPA_DIRECT, gpa_range(512, 0, [16]), srb(0xFFFFFFFF), 1, "with a buffer of 512"),
        (PACKET_GPA_DIRECT, gpa_range(512, 0, [16], 0), srb(), 1, "0 ranges"),
        (PACKET_GPA_DIRECT, gpa_range(512, 0, [16]) + struct.pack("<IIQ", 8, 0, 17), srb(), 1, None),
        (PACKET_GPA_DIRECT, gpa_range(512, 0, [16], 2) + struct.pack("<IIQ", 8, 0, 17), srb(), 1, "2 data ranges"),
        (PACKET_GPA_DIRECT, gpa_range(512, 0, [16], 0xFFFFFFFF), srb(), 1, "ranges"),
        (PACKET_GPA_DIRECT, gpa_range(512, 4096, [16, 17]), srb(), 1, "does not fit"),
        (PACKET_GPA_DIRECT, gpa_range(0xFFFFFFFF, 0, [16]), srb(), 1, "does not fit"),
        (PACKET_GPA_DIRECT, gpa_range(8192, 0, [16]), srb(), 1, "does not fit"),
        (PACKET_GPA_DIRECT, gpa_range(8192, 1, [16, 17]), srb(), 1, "does not fit"),
        (PACKET_GPA_DIRECT, gpa_range((1 << 20) + 1, 0, [16] * 257), srb(), 1, "does not fit"),
        (PACKET_GPA_DIRECT, gpa_range(512, 0, [256]), srb(), 1, "no RAM there"),
        (PACKET_GPA_DIRECT, gpa_range(512, 4000, [255, 256]), srb(), 1, "no RAM there"),
        (PACKET_GPA_DIRECT, gpa_range(512, 0, [2**64 - 1]), srb(), 1, "no RAM there"),
        (PACKET_GPA_DIRECT, gpa_range(512, 0, [2**52 - 1]), srb(), 1, "no RAM there"),
        (PACKET_GPA_DIRECT, b"", srb(), 1, "header"),
    ],
)
def test_malformed_request_ends_the_channel_only(
    kind: int, header: bytes, payload: bytes, flags: int, says: str | None
) -> None:
    rig = Rig()
    rig.ready()
    before = bytes(rig.memory.view(0, 1 << 20))
    rig.guest.submit(kind, header, payload, flags)
    if says is None:  # bytes after the range are nobody's
        assert rig.end.broken is None
        return
    assert rig.end.broken is not None and says in rig.end.broken and "\n" not in rig.end.broken
    assert rig.memory.view(0, 1 << 20) == before and rig.disk().data == bytes(SIZE)


@pytest.mark.parametrize(("state", "operation", "body"), [(0, VERSION, b"\2"), (1, CREATE, b"\1")])
def test_control_packet_without_its_body_ends_the_channel(state: int, operation: int, body: bytes) -> None:
    rig = Rig()
    if state:
        rig.ready()
    else:
        rig.guest.operation(BEGIN)
    rig.guest.submit(PACKET_INBAND, b"", struct.pack("<III", operation, 1, 0) + body)
    assert rig.end.broken is not None


def test_guest_cannot_have_rom_written() -> None:
    rig = Rig()
    rig.memory.add_rom(0xFFFF0000, bytes(4096))
    guest = rig.ready()
    guest.pages = [0xFFFF0]
    assert guest.finish(guest.start(write10(0, 1), 512, WRITE_TYPE)).srb_status == 1
    guest.start(read10(0, 1), 512, READ_TYPE)
    assert rig.end.broken is not None and "read-only" in rig.end.broken


@settings(deadline=None, max_examples=200)
@given(
    kind=st.sampled_from([PACKET_INBAND, PACKET_GPA_DIRECT, PACKET_COMPLETION, 0]),
    flags=st.sampled_from([0, 1, 0xFFFF]),
    header=st.one_of(
        st.binary(max_size=64),
        st.builds(gpa_range, st.integers(0, 9000), st.integers(0, 4100), st.lists(st.integers(0, 300), max_size=4)),
    ),
    operation=st.integers(0, 15),
    body=st.binary(max_size=0x40),
    state=st.booleans(),
)
def test_any_packet_is_answered_or_ends_the_channel(
    kind: int, flags: int, header: bytes, operation: int, body: bytes, state: bool
) -> None:
    rig = Rig({0: MemoryDisk(8192)})
    if state:
        rig.ready()
    rig.guest.submit(kind, header, struct.pack("<III", operation, 1, 0) + body, flags)
    answers = rig.end.device.sent
    assert (rig.end.broken is None) == (len(answers) == 1)
    for _, _, _, _, payload in answers:
        assert len(payload) == 12 + min(len(body), 0x34)


# Life cycle ---------------------------------------------------------------------------------------------


def test_identity_and_instance_are_stable() -> None:
    first, second = StorVsp(0, {}), StorVsp(1, {})
    assert str(first.interface_id) == "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"
    assert str(first.instance_id) == "f30db55a-9b54-5285-a011-b3ea45c09c63"
    assert first.instance_id == StorVsp(0, {}, 3).instance_id != second.instance_id
    assert (first.name, second.name) == ("scsi0", "scsi1")


def test_save_and_restore_go_on_where_the_guest_was() -> None:
    rig = Rig()
    rig.ready(versions=[WIN8])
    serial = rig.guest.read(bytes((0x12, 1, 0x80, 0, 255, 0)), 255).data
    rig.guest.write(bytes((0x15, 0x10, 0, 0, 24, 0)), bytes(4) + bytes((8, 18)) + bytes(18))  # no write cache
    rig.guest.write(struct.pack(">BBB2xIx", 0x5F, 0, 0, 24), struct.pack(">QQ8x", 0, 0x1234))
    rig.target().resized(SIZE)
    state = rig.vsp.save()
    moved = Rig({0: MemoryDisk(SIZE, name="elsewhere")})
    moved.end.close()
    moved.vsp.restore(state)
    moved.vsp.reattach(cast("Any", moved.end.device))
    assert moved.guest.command(TEST_UNIT_READY).code == (6, 0x2A, 0x09)
    assert moved.guest.read(bytes((0x1A, 0, 8, 0, 24, 0)), 24).data[6] == 0
    assert moved.guest.read(bytes((0x5E, *bytes(6), 0, 16, 0)), 16).data[-2:] == b"\x12\x34"
    assert moved.guest.read(bytes((0x12, 1, 0x80, 0, 255, 0)), 255).data == serial
    moved.vsp.add_disk(1, MemoryDisk(SIZE))
    moved.guest.pump()
    assert moved.guest.notices == [ENUMERATE]


@pytest.mark.parametrize(
    "disks", [{}, {1: MemoryDisk(SIZE)}, {0: MemoryDisk(2 * SIZE)}, {0: MemoryDisk(SIZE), 1: MemoryDisk(SIZE)}]
)
def test_restore_on_other_disks_is_refused(disks: dict[int, MemoryDisk]) -> None:
    state = Rig().vsp.save()
    with pytest.raises(ValueError, match="disks differ"):
        StorVsp(0, disks).restore(state)
    with pytest.raises(ValueError, match="unknown kind"):
        Rig().vsp.restore({**state, "version": 2})


def test_reset_forgets_the_handshake() -> None:
    rig = Rig()
    rig.ready()
    rig.end.close()
    rig.vsp.reset()
    assert rig.vsp.inspect()["state"] == "begin"


def test_inspect_is_plain_and_complete() -> None:
    rig = Rig(subchannels=1)
    guest = rig.ready(subchannels=1)
    sub = StorVsc(Loopback(rig.vsp, rig.memory, 1), PAGES)
    guest.write(write10(0, 2), bytes(1024))
    sub.read(read10(0, 1), 512)
    found = json.loads(json.dumps(rig.vsp.inspect()))
    assert found["state"] == "ready" and found["open_channels"] == [0, 1]
    unit = found["luns"]["0"]
    assert (unit["writes"], unit["reads"], unit["bytes_written"], unit["bytes_read"]) == (1, 1, 1024, 512)


def test_trace_has_a_line_per_request() -> None:
    rig = Rig()
    stream = io.StringIO()
    rig.bus.tracer = Tracer(["storvsp"], stream)
    guest = rig.ready()
    guest.read(read10(0, 1), 512)
    guest.command(TEST_UNIT_READY, lun=1)
    lines = [line.split("storvsp: ")[1] for line in stream.getvalue().splitlines()]
    assert lines[0] == "scsi0.0 BEGIN_INITIALIZATION -> 0x0"
    assert lines[-2] == "scsi0.0 0:0:0 READ_10 28 00 00 00 00 00 00 00 01 00 in 512 -> SUCCESS 512"
    assert lines[-1].endswith("TEST_UNIT_READY 00 00 00 00 00 00 in 0 -> INVALID_LUN sense 5/25/00")
