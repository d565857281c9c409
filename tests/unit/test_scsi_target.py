"""What SCSI commands do to a disk, and how they fail."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from devices.storage import sense
from devices.storage.cdb import Op
from devices.synthetic.storvsp import inquiry
from tests.fakes.disks import MemoryDisk
from tests.fakes.scsi import BLOCKS, EXAMPLES, FORMS, HOSTILE_CDBS, SIZE, Initiator, code, rw6, rw10, rw16, unmap

if TYPE_CHECKING:
    pass

# Data ---------------------------------------------------------------------------------------------------


def test_random_commands_keep_the_disk_equal_to_a_model() -> None:
    spans = st.integers(0, 250).flatmap(lambda lba: st.tuples(st.just(lba), st.integers(1, 250 - lba + 1)))

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.initiator = Initiator()
            self.model = bytearray(SIZE)

        @rule(span=spans, form=st.sampled_from(FORMS), fill=st.binary(min_size=1, max_size=5))
        def write(self, span: tuple[int, int], form: tuple[Any, int, int], fill: bytes) -> None:
            size = span[1] * 512
            data = (fill * size)[:size]
            assert self.initiator.put(form[0](form[2], *span), data) == size
            self.model[span[0] * 512 : span[0] * 512 + size] = data

        @rule(span=spans, form=st.sampled_from(FORMS))
        def read(self, span: tuple[int, int], form: tuple[Any, int, int]) -> None:
            size = span[1] * 512
            found = self.initiator.get(form[0](form[1], *span), size)
            assert found == self.model[span[0] * 512 : span[0] * 512 + size]

        @rule(ranges=st.lists(spans, max_size=4))
        def unmap(self, ranges: list[tuple[int, int]]) -> None:
            cdb, data = unmap(*ranges)
            self.initiator.put(cdb, data)
            for lba, blocks in ranges:
                self.model[lba * 512 : (lba + blocks) * 512] = bytes(blocks * 512)

        @rule(span=spans, block=st.sampled_from([bytes(512), b"pattern!" * 64]), flags=st.sampled_from([0, 8, 1, 9]))
        def write_same(self, span: tuple[int, int], block: bytes, flags: int) -> None:
            self.initiator.put(rw16(Op.WRITE_SAME_16, *span, flags), b"" if flags & 1 else block)
            written = bytes(512) if flags & 1 else block
            self.model[span[0] * 512 : (span[0] + span[1]) * 512] = written * span[1]

    run_state_machine_as_test(Machine, settings=settings(max_examples=30, deadline=None))


def test_read_6_and_write_6_of_length_0_mean_256_blocks() -> None:
    initiator = Initiator()
    assert initiator.put(rw6(Op.WRITE_6, 5, 0), b"x" * 131072) == 131072
    assert initiator.get(rw6(Op.READ_6, 5, 0), 131072) == b"x" * 131072


@pytest.mark.parametrize(("form", "read", "write"), FORMS)
def test_access_beyond_the_last_block_names_the_first_bad_lba(form: Any, read: int, write: int) -> None:
    initiator = Initiator()
    for op, data_in in ((read, True), (write, False)):
        for lba, blocks, bad in ((BLOCKS, 1, BLOCKS), (BLOCKS - 1, 2, BLOCKS), (BLOCKS + 7, 1, BLOCKS + 7)):
            found = initiator.fails(form(op, lba, blocks), 1024, data_in)
            assert code(found) == (5, 0x21, 0) and found.lba == bad


def test_16_byte_addresses_do_not_wrap() -> None:
    for lba, blocks in ((2**64 - 1, 2), (2**64 - 1, 2**32 - 1), (0, 2**32 - 1)):
        assert code(Initiator().fails(rw16(Op.READ_16, lba, blocks), 512)) == (5, 0x21, 0)


def test_last_block_can_be_used_and_no_blocks_is_no_error() -> None:
    initiator = Initiator()
    initiator.put(rw10(Op.WRITE_10, BLOCKS - 1, 1), b"z" * 512)
    assert initiator.disk.data[-512:] == b"z" * 512
    assert initiator.get(rw10(Op.READ_10, 3, 0), 0) == b""


def test_buffer_too_small_or_in_the_wrong_direction_is_refused() -> None:
    initiator = Initiator()
    assert code(initiator.fails(rw10(Op.READ_10, 0, 2), 512)) == (5, 0x24, 0)
    assert code(initiator.fails(rw10(Op.READ_10, 0, 1), 512, data_in=False)) == (5, 0x24, 0)
    assert code(initiator.fails(rw10(Op.WRITE_10, 0, 1), 512, data_in=True)) == (5, 0x24, 0)
    assert code(initiator.fails(bytes((Op.INQUIRY, 0, 0, 0, 36, 0)), 36, data_in=False)) == (5, 0x24, 0)


def test_protection_information_and_oversized_transfers_are_refused() -> None:
    initiator = Initiator(MemoryDisk(4 << 20))
    assert code(initiator.fails(rw10(Op.READ_10, 0, 1, flags=0x20), 512)) == (5, 0x24, 0)
    blocks = inquiry.MAX_TRANSFER_BYTES // 512 + 1
    assert code(initiator.fails(rw16(Op.READ_16, 0, blocks), blocks * 512)) == (5, 0x24, 0)


def test_only_a_write_with_fua_flushes() -> None:
    initiator = Initiator()
    initiator.put(rw10(Op.WRITE_10, 0, 1), bytes(512))
    assert initiator.disk.flushes == 0
    initiator.put(rw16(Op.WRITE_16, 0, 1, flags=0x08), bytes(512))
    assert initiator.disk.flushes == 1


def test_synchronize_cache_flushes() -> None:
    initiator = Initiator()
    initiator.put(rw10(Op.SYNCHRONIZE_CACHE_10, 0, 0))
    initiator.put(rw16(Op.SYNCHRONIZE_CACHE_16, 0, 0))
    assert initiator.disk.flushes == 2


def test_verify_reads_the_medium_and_does_not_compare() -> None:
    initiator = Initiator()
    assert initiator.put(rw10(Op.VERIFY_10, 0, 8)) == 0
    assert initiator.put(rw16(Op.VERIFY_16, 0, 8)) == 0
    assert code(initiator.fails(rw10(Op.VERIFY_10, 0, 8, flags=0x02), 4096, data_in=False)) == (5, 0x24, 0)
    initiator.disk.fail = OSError(errno.EIO, "bad sector")
    assert code(initiator.fails(rw10(Op.VERIFY_10, 0, 8))) == (3, 0x11, 0)


def test_unmap_limits_and_malformed_lists_are_refused() -> None:
    initiator = Initiator()
    too_many = unmap(*[(0, 1)] * (inquiry.MAX_UNMAP_DESCRIPTORS + 1))
    assert initiator.run(too_many[0], bytearray(too_many[1]), False).sense == sense.INVALID_FIELD_IN_PARAMETERS
    beyond = unmap((BLOCKS - 1, 2))
    outcome = initiator.run(beyond[0], bytearray(beyond[1]), False)
    assert outcome.sense is not None and code(outcome.sense) == (5, 0x21, 0)
    cdb, data = unmap((0, 1))
    assert initiator.run(cdb, bytearray(data[:-1]), False).sense == sense.INVALID_FIELD_IN_CDB
    short = bytes((Op.UNMAP, 0, 0, 0, 0, 0, 0, 0, 7, 0))
    assert initiator.run(short, bytearray(8), False).sense == sense.PARAMETER_LIST_LENGTH
    assert initiator.put(bytes((Op.UNMAP,)) + bytes(9)) == 0


def test_unmap_list_that_claims_more_than_it_holds_is_cut() -> None:
    initiator = Initiator()
    initiator.disk.data[:] = b"\xff" * SIZE
    cdb, data = unmap((1, 1))
    initiator.put(cdb, struct.pack(">HH", 0xFFFF, 0xFFFF) + data[4:])
    assert initiator.disk.data[512:1024] == bytes(512)
    assert initiator.disk.data[:512] + initiator.disk.data[1024:] == b"\xff" * (SIZE - 512)


def test_unmap_of_more_than_the_limit_is_refused() -> None:
    class Huge(MemoryDisk):
        def __init__(self) -> None:
            super().__init__(0)
            self.size = 16 << 40

        def trim(self, offset: int, length: int) -> None:
            raise AssertionError("nothing is to be discarded")

    initiator = Initiator(Huge())
    half = inquiry.MAX_UNMAP_BYTES // 512 // 2
    cdb, data = unmap((0, half), (half, half), (2 * half, 1))
    assert initiator.run(cdb, bytearray(data), False).sense == sense.INVALID_FIELD_IN_PARAMETERS


def test_write_same_of_nothing_or_too_much_is_refused() -> None:
    initiator = Initiator(MemoryDisk(1 << 20))
    for blocks in (0, inquiry.MAX_WRITE_SAME_BYTES // 512 + 1):
        assert code(initiator.fails(rw16(Op.WRITE_SAME_16, 0, blocks), 512, data_in=False)) == (5, 0x24, 0)
    assert code(initiator.fails(rw10(Op.WRITE_SAME_10, 0, 1), 511, data_in=False)) == (5, 0x24, 0)
    assert code(initiator.fails(rw10(Op.WRITE_SAME_10, 0, 1, flags=1), 512, data_in=False)) == (5, 0x24, 0)


# Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "on_read", "on_write"),
    [
        (errno.EIO, (3, 0x11, 0), (3, 0x0C, 0)),
        (errno.ENOSPC, (3, 0x11, 0), (7, 0x27, 7)),
        (errno.EDQUOT, (3, 0x11, 0), (7, 0x27, 7)),
    ],
)
def test_host_errors_become_sense_data(number: int, on_read: object, on_write: object) -> None:
    initiator = Initiator()
    initiator.disk.fail = OSError(number, "as told")
    assert code(initiator.fails(rw10(Op.READ_10, 0, 1), 512)) == on_read
    assert code(initiator.fails(rw10(Op.WRITE_10, 0, 1), 512, data_in=False)) == on_write
    assert code(initiator.fails(rw16(Op.WRITE_SAME_16, 0, 1), 512, data_in=False)) == on_write
    assert code(initiator.fails(rw10(Op.SYNCHRONIZE_CACHE_10, 0, 0))) == on_write
    assert initiator.lun.inspect()["errors"] == 4
    initiator.disk.fail = None
    initiator.get(rw10(Op.READ_10, 0, 1))


def test_readonly_disk_refuses_everything_that_writes() -> None:
    initiator = Initiator(MemoryDisk(SIZE, readonly=True))
    commands = [form(write, 0, 1) for form, _, write in FORMS]
    commands += [rw10(Op.WRITE_SAME_10, 0, 1), rw16(Op.WRITE_SAME_16, 0, 1), unmap((0, 1))[0]]
    for cdb in commands:
        assert code(initiator.fails(cdb, 512, data_in=False)) == (7, 0x27, 0)
    assert initiator.get(rw10(Op.READ_10, 0, 1)) == bytes(512)
    assert initiator.get(bytes((Op.MODE_SENSE_6, 0, 0x3F, 0, 4, 0)))[2] & 0x80
    assert initiator.get(rw16(Op.SERVICE_ACTION_IN_16, 0, 0, 0x10)[:10] + b"\0\0\0\x20\0\0")[14] == 0


@pytest.mark.parametrize("op", [0x1E, 0x04, 0x4D, 0x7F, 0xA4, 0xC0, 0xFF])
def test_unknown_commands_are_refused(op: int) -> None:
    assert code(Initiator().fails(bytes((op,)) + bytes(15))) == (5, 0x20, 0)


def test_cdb_shorter_than_its_group_is_refused() -> None:
    initiator = Initiator()
    for op in initiator.target._commands:
        if op != Op.TEST_UNIT_READY:  # nothing to decode
            assert code(initiator.fails(bytes((op, 0, 0, 0, 0)), 512)) == (5, 0x24, 0)
    assert code(initiator.fails(b"")) == (5, 0x20, 0)


@settings(deadline=None, max_examples=EXAMPLES)
@given(cdb=HOSTILE_CDBS, data=st.binary(max_size=1024), data_in=st.booleans(), readonly=st.booleans())
def test_any_command_ends_orderly(cdb: bytes, data: bytes, data_in: bool, readonly: bool) -> None:
    initiator = Initiator(MemoryDisk(65536, readonly=readonly))
    before = bytes(initiator.disk.data)
    buffer = bytearray(data)
    outcome = initiator.run(cdb, buffer, data_in)
    assert 0 <= outcome.transferred <= len(data)
    assert len(initiator.disk.data) == 65536
    if not data_in:
        assert buffer == data
    if readonly:
        assert initiator.disk.data == before


def test_sense_data_has_the_fixed_format() -> None:
    data = sense.LBA_OUT_OF_RANGE.at(0x12345678).encode()
    assert data == bytes.fromhex("f0 00 05 12345678 0a 00000000 21 00 00000000")
    assert sense.LBA_OUT_OF_RANGE.at(1 << 32).encode()[:7] == bytes.fromhex("70 00 05 00000000")
