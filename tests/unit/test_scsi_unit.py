"""What a SCSI disk tells of itself, and what its initiator may set."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from devices.storage import sense
from devices.storage.backend import DATA, ZERO, Extent
from devices.storage.cdb import CDB_LENGTHS, Op
from devices.synthetic.storvsp import inquiry
from devices.synthetic.storvsp.lun import Outcome
from tests.fakes.disks import MemoryDisk
from tests.fakes.scsi import BLOCKS, SIZE, Initiator, code, rw10, rw16, unmap, vpd

if TYPE_CHECKING:
    from collections.abc import Iterator


# What the unit says of itself ---------------------------------------------------------------------------


def test_standard_inquiry_names_a_hyper_v_disk() -> None:
    data = Initiator().get(bytes((Op.INQUIRY, 0, 0, 0, 96, 0)))
    assert len(data) == 36 and data[0] == 0 and data[4] == len(data) - 5
    assert data[8:36] == b"Msft    Virtual Disk    1.0 "
    assert Initiator().get(bytes((Op.INQUIRY, 0, 0, 0, 5, 0))) == data[:5]
    assert Initiator().get(bytes((Op.INQUIRY, 0, 0, 0, 96, 0)), 20) == data[:20]
    assert code(Initiator().fails(bytes((Op.INQUIRY, 0, 0x80, 0, 96, 0)), 96)) == (5, 0x24, 0)


def test_every_listed_vpd_page_exists_and_others_do_not() -> None:
    initiator = Initiator()
    listed = initiator.get(vpd(0))[4:]
    assert list(listed) == sorted(listed) == [0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2]
    for page in range(256):
        if page in listed:
            data = initiator.get(vpd(page))
            assert data[0] == 0 and data[1] == page
            assert int.from_bytes(data[2:4], "big") == len(data) - 4
        else:
            assert code(initiator.fails(vpd(page), 255)) == (5, 0x24, 0)


def test_identification_follows_the_identity() -> None:
    identity = bytes(range(0x10, 0x20))
    data = Initiator(identity=identity).get(vpd(0x83))[4:]
    naa, t10 = data[:20], data[20:]
    assert naa[:4] == bytes((1, 3, 0, 16))
    # NAA 6, company id 00-22-48, then the first 100 bits of the identity.
    assert naa[4:].hex() == "6002248" + identity.hex()[:25]
    assert t10[:4] == bytes((2, 1, 0, 40)) and t10[4:] == b"Msft    " + identity.hex().encode()
    assert Initiator(identity=identity).get(vpd(0x80))[4:] == identity.hex().encode()
    assert Initiator(identity=bytes(16)).get(vpd(0x83))[4:] != data


def test_block_limits_and_provisioning_offer_unmap() -> None:
    limits = Initiator().get(vpd(0xB0))
    assert len(limits) == 64
    max_unmap, descriptors, granularity, alignment, max_same = struct.unpack_from(">IIIIQ", limits, 20)
    assert max_unmap * 512 == inquiry.MAX_UNMAP_BYTES and descriptors == inquiry.MAX_UNMAP_DESCRIPTORS
    assert granularity == 8 and alignment == 0x80000000
    assert max_same * 512 == inquiry.MAX_WRITE_SAME_BYTES
    assert struct.unpack_from(">I", limits, 8)[0] * 512 == inquiry.MAX_TRANSFER_BYTES
    assert Initiator().get(vpd(0xB1))[4:6] == b"\0\x01"
    assert Initiator().get(vpd(0xB2))[5:7] == b"\xe4\x02"


def test_capacity_is_told_in_both_sizes() -> None:
    initiator = Initiator()
    assert initiator.get(rw10(Op.READ_CAPACITY_10, 0, 0)) == struct.pack(">II", BLOCKS - 1, 512)
    data = initiator.get(struct.pack(">BB8xI2x", Op.SERVICE_ACTION_IN_16, 0x10, 32))
    assert len(data) == 32
    assert struct.unpack_from(">QI", data) == (BLOCKS - 1, 512)
    assert data[13] == 3 and data[14] == 0xC0
    assert code(initiator.fails(struct.pack(">BB8xI2x", Op.SERVICE_ACTION_IN_16, 0x13, 32), 32)) == (5, 0x24, 0)


def test_capacity_beyond_2_tib_needs_the_long_form() -> None:
    disk = MemoryDisk(0)
    disk.size = 4 << 40
    initiator = Initiator(disk)
    assert initiator.get(rw10(Op.READ_CAPACITY_10, 0, 0))[:4] == b"\xff" * 4
    data = initiator.get(struct.pack(">BB8xI2x", Op.SERVICE_ACTION_IN_16, 0x10, 32))
    assert struct.unpack_from(">Q", data)[0] == (4 << 40) // 512 - 1


def test_mode_sense_shows_the_write_cache() -> None:
    initiator = Initiator()
    short = initiator.get(bytes((Op.MODE_SENSE_6, 0, 0x08, 0, 255, 0)))
    assert short[0] == len(short) - 1 and short[2] == 0x10 and short[3] == 0
    assert short[4:7] == bytes((8, 18, 4)) and len(short) == 4 + 20
    long = initiator.get(bytes((Op.MODE_SENSE_10, 0, 0x3F, 0, 0, 0, 0, 0, 255, 0)))
    assert int.from_bytes(long[:2], "big") == len(long) - 2 and long[8:28] == short[4:]
    assert long[28:] == bytes((0x0A, 10, 0x02, 0x10)) + bytes(8)  # the control page: any order of commands
    assert initiator.get(bytes((Op.MODE_SENSE_6, 0, 0x08, 0, 4, 0))) == short[:4]
    changeable = initiator.get(bytes((Op.MODE_SENSE_6, 0, 0x48, 0, 255, 0)))
    assert changeable[4:] == bytes((8, 18, 4)) + bytes(17)
    assert code(initiator.fails(bytes((Op.MODE_SENSE_6, 0, 0xC8, 0, 255, 0)), 255)) == (5, 0x39, 0)
    assert code(initiator.fails(bytes((Op.MODE_SENSE_6, 0, 0x1C, 0, 255, 0)), 255)) == (5, 0x24, 0)


def test_commands_without_effect_succeed() -> None:
    initiator = Initiator()
    assert initiator.get(bytes(6), 0) == b""
    assert initiator.get(bytes((Op.START_STOP_UNIT, 0, 0, 0, 1, 0)), 0) == b""
    assert code(initiator.fails(bytes((Op.START_STOP_UNIT, 0, 0, 0, 2, 0)))) == (5, 0x24, 0)
    assert initiator.get(bytes((Op.REQUEST_SENSE, 0, 0, 0, 252, 0))) == sense.NO_SENSE.encode()
    assert len(sense.NO_SENSE.encode()) == sense.SENSE_SIZE


def test_4096_byte_sectors_are_counted_in_everything() -> None:
    disk = MemoryDisk(SIZE)
    disk.sector_size = 4096
    initiator = Initiator(disk)
    assert initiator.get(rw10(Op.READ_CAPACITY_10, 0, 0)) == struct.pack(">II", SIZE // 4096 - 1, 4096)
    initiator.put(rw10(Op.WRITE_10, 3, 1), b"q" * 4096)
    assert disk.data[3 * 4096 : 4 * 4096] == b"q" * 4096
    assert code(initiator.fails(rw10(Op.READ_10, SIZE // 4096, 1), 4096)) == (5, 0x21, 0)


def test_counters_count() -> None:
    initiator = Initiator()
    initiator.put(rw10(Op.WRITE_10, 0, 2), bytes(1024))
    initiator.get(rw10(Op.READ_10, 0, 1))
    initiator.put(rw10(Op.SYNCHRONIZE_CACHE_10, 0, 0))
    initiator.put(*unmap((0, 8)))
    found = initiator.lun.inspect()
    assert found.pop("disk")["size"] == SIZE
    assert found.pop("reservations")["holder"] is None and found.pop("write_cache") is True
    assert found == {
        "commands": 4, "reads": 1, "writes": 1, "bytes_read": 512, "bytes_written": 1024,
        "flushes": 1, "discards": 1, "errors": 0, "limits": None,
        "latency_us": {"read": {"1": 1}, "write": {"1": 1}, "flush": {"1": 1}},
    }  # fmt: skip


# What the initiator may set, and what it has to learn ---------------------------------------------------


def mode_select(page: bytes, header: bytes = bytes(4), flags: int = 0x10) -> tuple[bytes, bytes]:
    data = header + page
    return bytes((Op.MODE_SELECT_6, flags, 0, 0, len(data), 0)), data


def caching_page(initiator: Initiator) -> bytes:
    return initiator.get(bytes((Op.MODE_SENSE_6, 0, 0x08, 0, 255, 0)))[4:]


def test_write_cache_can_be_turned_off_and_then_every_write_flushes() -> None:
    initiator = Initiator()
    off = bytes((8, 18, 0)) + bytes(17)
    initiator.put(*mode_select(off))
    assert caching_page(initiator) == off
    assert initiator.disk.flushes == 1  # of what the cache held
    initiator.put(rw10(Op.WRITE_10, 0, 1), bytes(512))
    initiator.put(rw16(Op.WRITE_SAME_16, 0, 8), bytes(512))
    initiator.put(*unmap((0, 8)))
    assert initiator.disk.flushes == 4
    ten = bytes((Op.MODE_SELECT_10, 0x10, 0, 0, 0, 0, 0, 0, 28, 0))
    initiator.put(ten, bytes(8) + bytes((8, 18, 4)) + bytes(17))
    initiator.put(rw10(Op.WRITE_10, 0, 1), bytes(512))
    assert initiator.disk.flushes == 4 and caching_page(initiator)[2] == 4


@pytest.mark.parametrize(
    ("page", "header", "flags", "says"),
    [
        (bytes((8, 18, 4)) + bytes(17), bytes(4), 0x11, (5, 0x24, 0)),  # to be saved
        (bytes((8, 18, 4)) + bytes(17), bytes(4), 0, (5, 0x24, 0)),
        (bytes((8, 18, 5)) + bytes(17), bytes(4), 0x10, (5, 0x26, 0)),  # RCD: no read cache
        (bytes((8, 18, 4)) + bytes(16), bytes(4), 0x10, (5, 0x1A, 0)),
        (bytes((8, 10, 4)) + bytes(17), bytes(4), 0x10, (5, 0x26, 0)),
        (bytes((10, 10, 6, 0x10)) + bytes(8), bytes(4), 0x10, (5, 0x26, 0)),  # D_SENSE
        (bytes((0x1C, 10)) + bytes(10), bytes(4), 0x10, (5, 0x26, 0)),
        (b"", bytes((0, 0, 0, 8)), 0x10, (5, 0x26, 0)),
        (b"", bytes(3), 0x10, (5, 0x1A, 0)),
        (b"\x08", bytes(4), 0x10, (5, 0x1A, 0)),
    ],
)
def test_other_modes_cannot_be_set(page: bytes, header: bytes, flags: int, says: object) -> None:
    initiator = Initiator()
    cdb, data = mode_select(page, header, flags)
    outcome = initiator.run(cdb, bytearray(data), False)
    assert outcome.sense is not None and code(outcome.sense) == says
    assert caching_page(initiator)[2] == 4


def test_unit_attention_is_told_once_and_not_in_place_of_an_inquiry() -> None:
    initiator = Initiator()
    initiator.disk.resize(2 * SIZE)
    initiator.target.resized(2 * SIZE)
    assert initiator.get(bytes((Op.INQUIRY, 0, 0, 0, 36, 0)))[8:12] == b"Msft"
    assert code(initiator.fails(bytes(6))) == (6, 0x2A, 0x09)
    assert initiator.get(bytes(6), 0) == b""
    assert initiator.get(rw10(Op.READ_CAPACITY_10, 0, 0)) == struct.pack(">II", 2 * BLOCKS - 1, 512)
    initiator.put(rw10(Op.WRITE_10, 2 * BLOCKS - 1, 1), b"n" * 512)
    assert initiator.disk.data[-512:] == b"n" * 512


def test_request_sense_takes_the_unit_attention() -> None:
    initiator = Initiator()
    initiator.target.resized(SIZE)
    initiator.target.resized(SIZE)
    assert initiator.get(bytes((Op.REQUEST_SENSE, 0, 0, 0, 252, 0))) == sense.CAPACITY_CHANGED.encode()
    assert initiator.get(bytes((Op.REQUEST_SENSE, 0, 0, 0, 252, 0))) == sense.NO_SENSE.encode()


# Which blocks are stored --------------------------------------------------------------------------------


def lba_status(initiator: Initiator, lba: int, room: int = 4096) -> list[tuple[int, int, int]]:
    data = initiator.get(struct.pack(">BBQI2x", Op.SERVICE_ACTION_IN_16, 0x12, lba, room), room)
    (size,) = struct.unpack_from(">I", data)
    assert size == len(data) - 4 and size % 16 == 4
    return [struct.unpack_from(">QIB", data, at) for at in range(8, len(data), 16)]


def test_lba_status_tells_runs_of_stored_and_discarded_blocks() -> None:
    initiator = Initiator()
    initiator.put(rw10(Op.WRITE_10, 8, 16), b"x" * 8192)
    assert lba_status(initiator, 0) == [(0, 8, 1), (8, 16, 0), (24, BLOCKS - 24, 1)]
    assert lba_status(initiator, 10) == [(10, 14, 0), (24, BLOCKS - 24, 1)]
    assert lba_status(initiator, 10, 24) == [(10, 14, 0)]
    initiator.put(*unmap((8, 16)))
    assert lba_status(initiator, BLOCKS - 1) == [(BLOCKS - 1, 1, 1)]
    assert code(initiator.fails(struct.pack(">BBQI2x", Op.SERVICE_ACTION_IN_16, 0x12, BLOCKS, 64), 64)) == (5, 0x21, 0)


def test_block_that_is_stored_in_part_is_told_as_stored() -> None:
    disk = MemoryDisk(SIZE)
    disk.sector_size = 4096
    disk.layer_extents = lambda offset, length: iter(  # type: ignore[method-assign]
        [Extent(0, 1024, ZERO), Extent(1024, 512, DATA), Extent(1536, SIZE - 1536, ZERO)]
    )
    assert lba_status(Initiator(disk), 0) == [(0, 1, 0), (1, SIZE // 4096 - 1, 1)]


def test_lba_status_is_bounded_however_fragmented_the_disk() -> None:
    disk = MemoryDisk(4 << 20)
    for at in range(0, 4 << 20, 1024):
        disk.data[at] = 1
    room = 1 << 20
    found = lba_status(Initiator(disk), 0, room)
    assert len(found) == 1024 and found[-1] == (1023, 1, 1)


def test_lba_status_looks_at_a_bounded_number_of_extents() -> None:
    disk = MemoryDisk(0)
    disk.size = 1 << 40

    def many(offset: int, length: int) -> Iterator[Extent]:
        for number in range(1 << 17):
            assert number <= 1 << 16, "an answer must not take this long"
            yield Extent(number * 512, 512, DATA)

    disk.layer_extents = many  # type: ignore[method-assign]
    assert lba_status(Initiator(disk), 0) == [(0, 1 << 16, 0)]


def test_run_longer_than_its_field_is_told_in_pieces() -> None:
    disk = MemoryDisk(0)
    disk.size = 16 << 40
    disk.layer_extents = lambda offset, length: iter([Extent(0, 16 << 40, DATA)])  # type: ignore[method-assign]
    assert lba_status(Initiator(disk), 0)[0] == (0, 0xFFFFFFFF, 0)
    assert sum(run[1] for run in lba_status(Initiator(disk), 0)) == (16 << 40) // 512


# Which commands there are -------------------------------------------------------------------------------


def supported(initiator: Initiator, options: int, op: int = 0, action: int = 0) -> Outcome | bytes:
    cdb = struct.pack(">BBBBHI2x", Op.MAINTENANCE_IN, 0x0C, options, op, action, 4096)
    data = bytearray(4096)
    outcome = initiator.run(cdb, data, True)
    return bytes(data[: outcome.transferred]) if outcome.sense is None else outcome


def test_every_command_that_is_carried_out_is_reported_and_no_other() -> None:
    initiator = Initiator()
    data = supported(initiator, 0)
    assert isinstance(data, bytes) and int.from_bytes(data[:4], "big") == len(data) - 4
    listed = {struct.unpack_from(">BxH", data, at) for at in range(4, len(data), 8)}
    for op in range(256):
        for action in range(32):
            cdb = bytes((op, action, *bytes(14)))
            refusal = initiator.run(cdb, bytearray(0), True).sense
            known = refusal is None or code(refusal) != (5, 0x20, 0)
            if op == Op.REPORT_LUNS:
                known = True  # the controller's
            assert known == any(op == found for found, _ in listed), hex(op)
    for op, action in listed:
        usage = supported(initiator, 3, op, action)
        assert isinstance(usage, bytes) and usage[1] == 3
        assert int.from_bytes(usage[2:4], "big") == len(usage) - 4 == CDB_LENGTHS[op >> 5]
        assert usage[4] == op


def test_single_commands_are_reported_with_their_service_actions() -> None:
    initiator = Initiator()
    usage = supported(initiator, 1, Op.WRITE_SAME_16)
    assert isinstance(usage, bytes) and usage[1] == 3 and usage[5] == 0x09
    assert supported(initiator, 1, 0x7F) == b"\0\1\0\0"
    assert supported(initiator, 2, Op.SERVICE_ACTION_IN_16, 0x13) == b"\0\1\0\0"
    for options, op in ((1, Op.PERSISTENT_RESERVE_OUT), (2, Op.READ_10), (4, Op.READ_10)):
        outcome = supported(initiator, options, op)
        assert isinstance(outcome, Outcome) and outcome.sense is not None and code(outcome.sense) == (5, 0x24, 0)
