"""The storage protocol: its handshake, sub-channels, hostile guests, and a controller's life."""

from __future__ import annotations

import io
import json
import struct
import threading
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.synthetic.storvsp.vsp import StorVsp, subchannels_for
from devices.vmbus.packets import PACKET_COMPLETION, PACKET_GPA_DIRECT, PACKET_INBAND
from pyvmm.core.memory import PAGE_SIZE
from pyvmm.core.trace import Tracer
from tests.fakes.data_paths import data_path as data_path
from tests.fakes.disks import MemoryDisk
from tests.fakes.scsi import read10, write10
from tests.fakes.storvsc import OLD_BODY, READ_TYPE, WRITE_TYPE, Loopback, StorVsc, gpa_range
from tests.fakes.storvsp_rig import (
    BEGIN,
    CREATE,
    END,
    ENUMERATE,
    EXECUTE,
    FCHBA,
    INVALID_PARAMETER,
    INVALID_REQUEST,
    INVALID_STATE,
    PAGES,
    PROPERTIES,
    RESET_BUS,
    REVISION_MISMATCH,
    SIZE,
    TEST_UNIT_READY,
    VERSION,
    WIN6,
    WIN7,
    WIN8,
    WIN8_1,
    WIN10,
    Rig,
)

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
