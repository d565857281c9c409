"""Hypercalls as a VP makes them: what all share, and a status for every bad input. TLFS v6.0b."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enlightenments.hypercalls import LAYOUTS
from enlightenments.tlfs import (
    HVCALL_EXT_QUERY_CAPABILITIES,
    HVCALL_FLUSH_LIST,
    HVCALL_FLUSH_LIST_EX,
    HVCALL_FLUSH_SPACE,
    HVCALL_FLUSH_SPACE_EX,
    HVCALL_GET_VP_REGISTERS,
    HVCALL_LONG_SPIN_WAIT,
    HVCALL_SEND_IPI,
    HVCALL_SEND_IPI_EX,
    HVCALL_SET_VP_REGISTERS,
    HVCALL_START_VP,
    HVCALL_VP_INDEX_FROM_APIC_ID,
    INSUFFICIENT_BUFFERS,
    INVALID_ALIGNMENT,
    INVALID_CONNECTION_ID,
    INVALID_HYPERCALL_CODE,
    INVALID_HYPERCALL_INPUT,
    INVALID_PARAMETER,
    INVALID_PARTITION_ID,
    INVALID_VP_INDEX,
    INVALID_VP_STATE,
    SUCCESS,
)
from tests.fakes.partition import SIZE, Vm

POST, SIGNAL = 0x5C, 0x5D
FAST = 1 << 16
BLOCK, OUT = 0x3000, 0x5000
ALL = "full,+tlbflush,+tlbflush-ext,+ipi"
SELF = (1 << 64) - 1
VP_SELF = 0xFFFF_FFFE
CODES = [layout[0] for layout in LAYOUTS]
REP_CODES = [layout[0] for layout in LAYOUTS if layout[2] or layout[3]]


def u32(*values: int) -> bytes:
    return b"".join(value.to_bytes(4, "little") for value in values)


def u64(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)


def reps(count: int, start: int = 0) -> int:
    return count << 32 | start << 48


def done(result: int) -> tuple[int, int]:
    """(status, completed)."""
    return result & 0xFFFF, result >> 32


class Guest(Vm):
    """Two VPs, and a message port at connection 4."""

    def __init__(self, spec: str = ALL) -> None:
        super().__init__(spec)
        self.memory.add_rom(0xFFFF0000, self.block(4, 1, b"from ROM").ljust(0x1000, b"\0"))
        self.taken: list[tuple[int, bytes]] = []
        self.accepts = True
        self.partition.connect_message_port(4, self._port)

    def _port(self, kind: int, payload: bytes) -> bool:
        if self.accepts:
            self.taken.append((kind, payload))
        return self.accepts

    @staticmethod
    def block(connection: int, kind: int, payload: bytes, size: int | None = None) -> bytes:
        header = connection.to_bytes(4, "little") + b"RSVD" + kind.to_bytes(4, "little")
        return header + (len(payload) if size is None else size).to_bytes(4, "little") + payload

    def post(self, connection: int, kind: int, payload: bytes, size: int | None = None, gpa: int = BLOCK) -> int:
        self.memory.write(gpa, self.block(connection, kind, payload, size))
        return self.call(POST, gpa)

    def send(self, control: int, input: bytes, vp: int = 0) -> int:
        """A call with its input in memory."""
        self.memory.write(BLOCK, input)
        return self.call(control, BLOCK, OUT, vp=vp)

    def interrupts(self) -> list[list[int]]:
        return [synic.take_interrupts() for synic in self.partition.synics]


@pytest.fixture
def guest() -> Guest:
    return Guest()


# What all calls share


@pytest.mark.parametrize("code", [0, 1, 0x5B, 0x8002, 0x8010, 0xFFFF])
@pytest.mark.parametrize("high", [0, FAST, 1 << 32, (1 << 64) - (1 << 16)])
def test_an_unknown_code_has_its_status_whatever_else_is_set(guest: Guest, code: int, high: int) -> None:
    assert guest.call(code | high, BLOCK) == INVALID_HYPERCALL_CODE


@pytest.mark.parametrize("code", CODES)
def test_a_call_that_is_not_offered_does_not_exist(code: int) -> None:
    assert Guest("minimal").call(code, BLOCK, OUT) == INVALID_HYPERCALL_CODE


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bit", [27, 30, 31, 44, 47, 60, 63])
def test_reserved_bits_are_refused(guest: Guest, code: int, bit: int) -> None:
    count = reps(1) if code in REP_CODES else 0
    assert guest.call(code | count | 1 << bit, BLOCK, OUT) == INVALID_HYPERCALL_INPUT


@pytest.mark.parametrize("code", [code for code in CODES if code not in REP_CODES])
@pytest.mark.parametrize("bit", [32, 43, 48, 59])
def test_a_simple_call_has_no_repetitions(guest: Guest, code: int, bit: int) -> None:
    assert guest.call(code | 1 << bit, BLOCK, OUT) == INVALID_HYPERCALL_INPUT
    assert guest.taken == []


@pytest.mark.parametrize("code", REP_CODES)
@pytest.mark.parametrize(("count", "start"), [(0, 0), (1, 1), (2, 3), (0, 1), (5, 4095)])
def test_repetitions_begin_before_their_end(guest: Guest, code: int, count: int, start: int) -> None:
    assert guest.call(code | reps(count, start), BLOCK, OUT) == INVALID_HYPERCALL_INPUT


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if not layout[5]])
@pytest.mark.parametrize("bit", [17, 26])
def test_only_calls_with_sets_of_vps_have_more_header(guest: Guest, layout: tuple[int, ...], bit: int) -> None:
    count = reps(1) if layout[0] in REP_CODES else 0
    assert guest.call(layout[0] | count | 1 << bit, BLOCK, OUT) == INVALID_HYPERCALL_INPUT


@pytest.mark.parametrize("gpa", [BLOCK + 1, BLOCK + 4, BLOCK + 7, 0x3F08, 0x3FF8, SIZE, 0xFEE00000, 1 << 40, SELF - 7])
def test_the_input_is_aligned_and_in_one_page_of_memory(guest: Guest, gpa: int) -> None:
    assert guest.call(POST, gpa) == INVALID_ALIGNMENT


@pytest.mark.parametrize("gpa", [OUT + 4, OUT + 0xFF8, SIZE, 0xFFFF0000, SELF - 7])
def test_the_output_is_aligned_and_in_one_page_of_writable_memory(guest: Guest, gpa: int) -> None:
    guest.memory.write(BLOCK, u64(SELF) + u32(0, 0, 0x90003))
    assert guest.call(HVCALL_GET_VP_REGISTERS | reps(1), BLOCK, gpa) == INVALID_ALIGNMENT


def test_a_list_that_leaves_its_page_is_refused(guest: Guest) -> None:
    guest.memory.write(BLOCK, u64(0, 1))  # all VPs
    assert guest.call(HVCALL_FLUSH_LIST | reps(509), BLOCK) == 509 << 32
    assert guest.call(HVCALL_FLUSH_LIST | reps(510), BLOCK) == INVALID_ALIGNMENT
    assert guest.call(HVCALL_GET_VP_REGISTERS | reps(257), BLOCK, OUT) == INVALID_ALIGNMENT


@pytest.mark.parametrize("code", [POST, HVCALL_START_VP, HVCALL_SET_VP_REGISTERS])
def test_what_does_not_fit_into_registers_is_refused(guest: Guest, code: int) -> None:
    count = reps(4) if code in REP_CODES else 0
    assert guest.call(code | FAST | count, BLOCK, OUT, bytes(96)) == INVALID_HYPERCALL_INPUT


@pytest.mark.parametrize("code", [HVCALL_GET_VP_REGISTERS, HVCALL_EXT_QUERY_CAPABILITIES])
def test_registers_hold_no_output(guest: Guest, code: int) -> None:
    count = reps(1) if code in REP_CODES else 0
    assert guest.call(code | FAST | count, BLOCK, OUT, bytes(96)) == INVALID_HYPERCALL_INPUT


def test_xmm_registers_continue_the_general_ones() -> None:
    # Interrupt 0x55 to VP 1, named by a sparse set of one bank, in its fast form: format and banks in RDX, R8, XMM0.
    xmm = u64(1, 0b10).ljust(96, b"\0")
    guest = Guest()
    assert guest.call(HVCALL_SEND_IPI_EX | FAST | 1 << 17, 0x55, 0, xmm) == SUCCESS
    assert guest.interrupts() == [[], [0x55]]
    assert Guest(f"{ALL},-xmm-input").call(HVCALL_SEND_IPI_EX | FAST | 1 << 17, 0x55, 0, xmm) == INVALID_HYPERCALL_INPUT


def test_a_fast_list_takes_all_xmm_registers_and_no_more(guest: Guest) -> None:
    # A header of 24 bytes leaves 88 of 112: 11 entries.
    assert guest.call(HVCALL_FLUSH_LIST | FAST | reps(11), 0, 1, bytes(96)) == 11 << 32
    assert guest.call(HVCALL_FLUSH_LIST | FAST | reps(12), 0, 0, bytes(96)) == INVALID_HYPERCALL_INPUT


# HvPostMessage and HvSignalEvent


@pytest.mark.parametrize("length", [0, 1, 240])
def test_a_message_arrives_with_its_type_and_payload(guest: Guest, length: int) -> None:
    payload = bytes(range(240))[:length]
    assert guest.post(4, 1, payload) == SUCCESS
    assert guest.taken == [(1, payload)]


def test_only_the_payloads_size_is_handed_on(guest: Guest) -> None:
    assert guest.post(4, 1, b"secret after four bytes", size=6) == SUCCESS
    assert guest.taken == [(1, b"secret")]


def test_a_message_may_end_at_the_end_of_a_page_and_lie_in_rom(guest: Guest) -> None:
    assert guest.post(4, 1, bytes(240), gpa=0x3F00) == SUCCESS
    assert guest.call(POST, 0xFFFF0000) == SUCCESS
    assert guest.taken[1] == (1, b"from ROM")


@pytest.mark.parametrize(
    ("kind", "size"), [(0, 0), (0x80000000, 0), (0xFFFFFFFF, 0), (1, 241), (1, 0xFFFFFFFF), (0, 241)]
)
def test_types_and_sizes_out_of_range_are_refused(guest: Guest, kind: int, size: int) -> None:
    assert guest.post(4, kind, b"", size=size) == INVALID_PARAMETER
    assert guest.taken == []


@pytest.mark.parametrize("connection", [0, 1, 5, 0x10004, 0xFFFFFFFF])
def test_an_unknown_connection_has_its_status(guest: Guest, connection: int) -> None:
    assert guest.post(connection, 1, b"") == INVALID_CONNECTION_ID
    assert guest.call(SIGNAL | FAST, connection) == INVALID_CONNECTION_ID


def test_a_port_that_cannot_take_a_message_makes_the_guest_try_again(guest: Guest) -> None:
    guest.accepts = False
    assert guest.post(4, 1, b"later") == INSUFFICIENT_BUFFERS
    guest.accepts = True
    assert guest.post(4, 1, b"later") == SUCCESS


@pytest.mark.parametrize("fast", [True, False])
def test_a_signal_rings_the_eventfd(guest: Guest, fast: bool) -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    guest.partition.connect_event_port(7, bell)
    assert (guest.call(SIGNAL | FAST, 7) if fast else guest.send(SIGNAL, u64(7))) == SUCCESS
    assert guest.call(SIGNAL | FAST, 7 | 1 << 32) == INVALID_PARAMETER  # flag 1
    assert os.eventfd_read(bell) == 1
    os.close(bell)


# Interrupts


@pytest.mark.parametrize(("mask", "hit"), [(0b01, [1, 0]), (0b10, [0, 1]), (0b11, [1, 1]), (0, [0, 0]), (~3, [0, 0])])
def test_an_interrupt_goes_to_all_of_a_mask(guest: Guest, mask: int, hit: list[int]) -> None:
    mask &= SELF
    assert guest.call(HVCALL_SEND_IPI | FAST, 0x77, mask) == SUCCESS
    assert guest.interrupts() == [[0x77] * count for count in hit]
    assert guest.send(HVCALL_SEND_IPI, u64(0x77, mask)) == SUCCESS
    assert guest.interrupts() == [[0x77] * count for count in hit]


@pytest.mark.parametrize("vector", [0, 15, 0x100, 0xFFFFFFFF, 0x40 | 1 << 32])
def test_interrupts_have_vectors_from_16_to_255_and_no_vtl(guest: Guest, vector: int) -> None:
    assert guest.call(HVCALL_SEND_IPI | FAST, vector, 3) == INVALID_PARAMETER
    assert guest.interrupts() == [[], []]


def test_a_set_of_vps_names_banks_and_their_members(guest: Guest) -> None:
    call = HVCALL_SEND_IPI_EX
    assert guest.send(call | 1 << 17, u64(0x60, 0, 1, 0b01)) == SUCCESS
    assert guest.interrupts() == [[0x60], []]
    assert guest.send(call | 2 << 17, u64(0x60, 0, 1 << 63 | 1, 0b10, SELF)) == SUCCESS
    assert guest.interrupts() == [[], [0x60]]
    assert guest.send(call | 1 << 17, u64(0x60, 0, 2, 1)) == SUCCESS  # VP 64, which is not there
    assert guest.send(call, u64(0x60, 0, 0)) == SUCCESS
    assert guest.interrupts() == [[], []]
    assert guest.send(call, u64(0x60, 1, 0)) == SUCCESS
    assert guest.interrupts() == [[0x60], [0x60]]


@pytest.mark.parametrize(("variable", "format", "banks"), [(0, 0, 1), (1, 0, 0), (1, 0, 3), (3, 0, 3)])
def test_a_set_of_vps_has_as_many_banks_as_it_says(guest: Guest, variable: int, format: int, banks: int) -> None:
    block = u64(0x60, format, banks, 3, 3, 3)
    assert guest.send(HVCALL_SEND_IPI_EX | variable << 17, block) == INVALID_HYPERCALL_INPUT


def test_a_set_of_vps_has_a_known_format(guest: Guest) -> None:
    assert guest.send(HVCALL_SEND_IPI_EX, u64(0x60, 2, 0)) == INVALID_PARAMETER


# TLB flushes: what they do to a TLB shows on /dev/kvm only


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 4, 7])
def test_a_space_is_flushed(guest: Guest, flags: int) -> None:
    assert guest.send(HVCALL_FLUSH_SPACE, u64(0x1000, flags, 3)) == SUCCESS
    assert guest.send(HVCALL_FLUSH_SPACE_EX | 1 << 17, u64(0x1000, flags, 0, 1, 3)) == SUCCESS


@pytest.mark.parametrize("flags", [8, 16, 1 << 63])
def test_flushes_know_their_flags(guest: Guest, flags: int) -> None:
    assert guest.send(HVCALL_FLUSH_SPACE, u64(0, flags, 1)) == INVALID_PARAMETER
    assert guest.send(HVCALL_FLUSH_SPACE_EX, u64(0, flags, 1, 0)) == INVALID_PARAMETER


def test_a_flush_by_mask_names_a_vp(guest: Guest) -> None:
    assert guest.send(HVCALL_FLUSH_SPACE, u64(0, 2, 0)) == INVALID_PARAMETER
    assert done(guest.send(HVCALL_FLUSH_LIST | reps(2), u64(0, 0, 0, 0x4000, 0x5000))) == (INVALID_PARAMETER, 0)
    assert guest.send(HVCALL_FLUSH_SPACE, u64(0, 1, 0)) == SUCCESS


def test_a_flushed_space_is_one_that_can_be(guest: Guest) -> None:
    assert guest.send(HVCALL_FLUSH_SPACE, u64(1 << 60, 1, 0)) == INVALID_PARAMETER
    assert guest.send(HVCALL_FLUSH_SPACE_EX, u64(1 << 52, 0, 1, 0)) == INVALID_PARAMETER
    assert guest.send(HVCALL_FLUSH_SPACE, u64(1 << 60, 3, 0)) == SUCCESS  # all spaces: it is not looked at


@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_list_is_flushed_to_its_end(guest: Guest, start: int) -> None:
    entries = u64(0x4000, 0x5003, 0x7000)
    assert done(guest.send(HVCALL_FLUSH_LIST | reps(3, start), u64(0, 0, 3) + entries)) == (SUCCESS, 3)
    call = HVCALL_FLUSH_LIST_EX | 1 << 17 | reps(3, start)
    assert done(guest.send(call, u64(0, 0, 0, 1, 2) + entries)) == (SUCCESS, 3)


def test_a_list_names_global_pages_too_and_ranges_of_large_ones_where_they_are_offered(guest: Guest) -> None:
    assert done(guest.send(HVCALL_FLUSH_LIST | reps(2), u64(0, 4, 3, 0, 0))) == (INVALID_PARAMETER, 0)
    assert done(guest.send(HVCALL_FLUSH_LIST | reps(1), u64(0, 8, 3, 0x4801))) == (SUCCESS, 1)
    plain = Guest("full,+tlbflush")
    assert done(plain.send(HVCALL_FLUSH_LIST | reps(1), u64(0, 8, 3, 0x4801))) == (INVALID_PARAMETER, 0)


# Spin waits and extended calls


@pytest.mark.parametrize("spins", [0, 1, SELF])
def test_a_spin_wait_never_fails(guest: Guest, spins: int) -> None:
    assert guest.call(HVCALL_LONG_SPIN_WAIT | FAST, spins) == SUCCESS
    assert guest.send(HVCALL_LONG_SPIN_WAIT, u64(spins)) == SUCCESS


def test_there_are_no_extended_calls_beyond_the_query(guest: Guest) -> None:
    guest.memory.write(OUT, b"\xff" * 16)
    assert guest.call(HVCALL_EXT_QUERY_CAPABILITIES, 0, OUT) == SUCCESS
    assert guest.memory.read(OUT, 16) == bytes(8) + b"\xff" * 8


# Registers


def get(guest: Guest, *names: int, vp: int = VP_SELF, start: int = 0, caller: int = 0) -> tuple[int, int, list[int]]:
    guest.memory.write(OUT, b"\xee" * 0x1000)
    call = HVCALL_GET_VP_REGISTERS | reps(len(names), start)
    status, completed = done(guest.send(call, u64(SELF) + u32(vp, 0, *names), vp=caller))
    values = guest.memory.read(OUT, 16 * completed)
    return status, completed, [int.from_bytes(values[i : i + 16], "little") for i in range(0, len(values), 16)]


def set_(guest: Guest, *registers: tuple[int, int], vp: int = VP_SELF, caller: int = 0) -> tuple[int, int]:
    elements = b"".join(u32(name, 0, 0, 0) + value.to_bytes(16, "little") for name, value in registers)
    return done(
        guest.send(HVCALL_SET_VP_REGISTERS | reps(len(registers)), u64(SELF) + u32(vp, 0) + elements, vp=caller)
    )


def test_registers_are_msrs_and_leaves_by_another_name(guest: Guest) -> None:
    guest.write(0x40000000, 0x8100)
    status, completed, values = get(guest, 0x90002, 0x90003, 0xA0011, 0xA0002, 0x203)
    assert (status, completed) == (SUCCESS, 5)
    assert values == [0x8100, 0, 1, 0x10000, 0]
    assert get(guest, 0x90003, caller=1)[2] == [1]
    assert get(guest, 0x90003, vp=1)[2] == [1]
    privileges = get(guest, 0x200)[2][0]
    assert privileges >> 32 & 1 << 17  # this very call
    before = get(guest, 0x90004)[2][0]
    assert before < get(guest, 0x90004)[2][0]


def test_registers_are_set_in_order_up_to_the_first_that_cannot(guest: Guest) -> None:
    masked = 1 << 16 | 0x55
    assert set_(guest, (0xA0003, masked), (0xB0001, 123)) == (SUCCESS, 2)
    assert get(guest, 0xA0003, 0xB0001)[2] == [masked, 123]
    assert set_(guest, (0xA0003, 1 << 16), (0x90003, 5), (0xA0004, 1 << 16)) == (INVALID_PARAMETER, 1)
    assert set_(guest, (0xA0003, 5)) == (INVALID_PARAMETER, 0)  # a vector below 16
    assert set_(guest, (0xA0003, 1 << 64)) == (INVALID_PARAMETER, 0)
    assert get(guest, 0xA0003, 0xA0004)[2] == [1 << 16, 1 << 16]


def test_reading_stops_at_the_first_register_that_is_not_there_and_goes_on_where_it_is_told(guest: Guest) -> None:
    assert get(guest, 0x90003, 0xA0011, 0x20010)[:2] == (INVALID_PARAMETER, 2)
    status, completed, values = get(guest, 0x20010, 0xA0011, 0xA0010, start=1)
    assert (status, completed) == (SUCCESS, 3)
    assert values[1:] == [1, 0]
    assert guest.memory.read(OUT, 16) == b"\xee" * 16


def test_only_what_is_offered_has_a_name() -> None:
    guest = Guest("minimal,+vp-registers")
    assert get(guest, 0x90003)[0] == SUCCESS
    for name in (0x90004, 0xA0000, 0xB0000, 0x210):
        assert get(guest, name)[0] == INVALID_PARAMETER


def test_a_vp_sets_its_own_registers_only(guest: Guest) -> None:
    assert set_(guest, (0xA0003, 1 << 16), vp=1) == (INVALID_VP_STATE, 0)
    assert set_(guest, (0xA0003, 1 << 16), vp=1, caller=1) == (SUCCESS, 1)
    assert get(guest, 0x90000, vp=1)[0] == INVALID_VP_STATE  # the other thread's time
    assert get(guest, 0x90000)[0] == SUCCESS


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (u64(SELF - 1) + u32(0, 0), INVALID_PARTITION_ID),
        (u64(0) + u32(0, 0), INVALID_PARTITION_ID),
        (u64(SELF) + u32(2, 0), INVALID_VP_INDEX),
        (u64(SELF) + u32(0xFFFFFFFF, 0), INVALID_VP_INDEX),
        (u64(SELF) + u32(0, 1), INVALID_PARAMETER),
    ],
)
def test_a_guest_knows_only_itself(guest: Guest, header: bytes, status: int) -> None:
    assert done(guest.send(HVCALL_GET_VP_REGISTERS | reps(1), header + u32(0x90003))) == (status, 0)
    assert done(guest.send(HVCALL_SET_VP_REGISTERS | reps(1), header + bytes(32))) == (status, 0)
    assert guest.send(HVCALL_START_VP, header + bytes(224)) == status
    assert guest.started == []


# Starting VPs


def test_a_vp_is_started_with_its_context(guest: Guest) -> None:
    context = bytes(range(224))
    assert guest.send(HVCALL_START_VP, u64(SELF) + u32(1, 0) + context) == SUCCESS
    assert guest.started == [(0, 1, context)]
    assert guest.send(HVCALL_START_VP, u64(SELF) + u32(1, 0) + context) == INVALID_VP_STATE


def test_the_vp_index_is_the_apic_id(guest: Guest) -> None:
    call = HVCALL_VP_INDEX_FROM_APIC_ID
    assert done(guest.send(call | reps(2), u64(SELF, 0) + u32(1, 0))) == (SUCCESS, 2)
    assert guest.memory.read(OUT, 8) == u32(1, 0)
    assert done(guest.send(call | reps(3), u64(SELF, 0) + u32(1, 2, 0))) == (INVALID_PARAMETER, 1)
    assert done(guest.send(call | reps(3, 1), u64(SELF, 0) + u32(9, 1, 0))) == (SUCCESS, 3)
    assert guest.memory.read(OUT + 4, 8) == u32(1, 0)
    assert done(guest.send(call | reps(1), u64(5, 0) + u32(0))) == (INVALID_PARTITION_ID, 0)
    assert done(guest.send(call | reps(1), u64(SELF, 1) + u32(0))) == (INVALID_PARAMETER, 0)


# Anything


SHARED = Guest()
WORD = st.integers(0, SELF)


@given(
    st.one_of(WORD, st.builds(lambda code, rest: code | rest << 16, st.sampled_from(CODES), st.integers(0, 1 << 47)))
)
def test_any_control_word_has_a_status(control: int) -> None:
    SHARED.memory.write(BLOCK, bytes(0x1000))
    status, completed = done(SHARED.call(control, BLOCK, OUT, bytes(96)))
    assert status < 0x100
    assert completed <= control >> 32 & 0xFFF


@given(st.sampled_from(CODES), st.integers(0, 6), st.integers(0, 3), st.binary(max_size=512), WORD, WORD)
def test_any_input_has_a_status(code: int, count: int, variable: int, block: bytes, gpa: int, out: int) -> None:
    SHARED.memory.write(BLOCK, block.ljust(512, b"\0"))
    control = code | variable << 17 | (reps(count) if code in REP_CODES else 0)
    for source, output in ((BLOCK, OUT), (gpa, OUT), (BLOCK, out)):
        for fast in (0, FAST):
            status, completed = done(SHARED.call(control | fast, source, output, bytes(96)))
            assert status < 0x100
            assert completed <= count
