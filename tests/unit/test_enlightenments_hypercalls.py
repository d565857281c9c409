"""Hypercalls that Python answers: a status for every bad input. TLFS v6.0b, chapters 3 and 11.10."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enlightenments.hypercalls import Hypercalls
from enlightenments.tlfs import (
    INSUFFICIENT_BUFFERS,
    INVALID_ALIGNMENT,
    INVALID_CONNECTION_ID,
    INVALID_HYPERCALL_CODE,
    INVALID_HYPERCALL_INPUT,
    INVALID_PARAMETER,
    SUCCESS,
)
from pyvmm.core.memory import GuestMemory

POST = 0x5C
FAST = 1 << 16
BLOCK = 0x3000
SIZE = 1 << 20


class Guest:
    """RAM, the calls, and a port at connection 4."""

    def __init__(self) -> None:
        self.memory = GuestMemory(SIZE)
        self.memory.add_rom(0xFFFF0000, self.block(4, 1, b"from ROM").ljust(0x1000, b"\0"))
        self.calls = Hypercalls(self.memory, frozenset({POST}))
        self.taken: list[tuple[int, bytes]] = []
        self.accepts = True
        self.calls.message_ports[4] = self._port

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
        return self.calls.call(POST, gpa)


@pytest.fixture
def guest() -> Guest:
    return Guest()


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
    assert guest.calls.call(POST, 0xFFFF0000) == SUCCESS
    assert guest.taken[1] == (1, b"from ROM")


@pytest.mark.parametrize("code", [0, 1, 0x5B, 0x5D, 0x8001, 0xFFFF])
@pytest.mark.parametrize("high", [0, FAST, 1 << 32, (1 << 64) - (1 << 16)])
def test_an_unknown_code_has_its_status_whatever_else_is_set(guest: Guest, code: int, high: int) -> None:
    assert guest.calls.call(code | high, BLOCK) == INVALID_HYPERCALL_CODE


def test_a_call_that_is_not_offered_does_not_exist(guest: Guest) -> None:
    assert Hypercalls(guest.memory, frozenset()).call(POST, BLOCK) == INVALID_HYPERCALL_CODE


@pytest.mark.parametrize("bit", [17, 26, 31, 32, 43, 48, 59, 60, 63])
def test_a_simple_call_has_no_repetitions_and_no_reserved_bits(guest: Guest, bit: int) -> None:
    guest.post(4, 1, b"")
    guest.taken.clear()
    assert guest.calls.call(POST | 1 << bit, BLOCK) == INVALID_HYPERCALL_INPUT
    assert guest.taken == []


def test_a_message_does_not_fit_into_registers(guest: Guest) -> None:
    assert guest.calls.call(POST | FAST, BLOCK) == INVALID_HYPERCALL_INPUT


@pytest.mark.parametrize("gpa", [BLOCK + 1, BLOCK + 4, BLOCK + 7, 0x3F08, 0x3FF8])
def test_the_input_is_aligned_and_in_one_page(guest: Guest, gpa: int) -> None:
    assert guest.calls.call(POST, gpa) == INVALID_ALIGNMENT


@pytest.mark.parametrize("gpa", [SIZE, 0xFEE00000, 1 << 40, (1 << 64) - 0x1000])
def test_the_input_is_in_memory(guest: Guest, gpa: int) -> None:
    assert guest.calls.call(POST, gpa) == INVALID_ALIGNMENT


@pytest.mark.parametrize(
    ("kind", "size"), [(0, 0), (0x80000000, 0), (0xFFFFFFFF, 0), (1, 241), (1, 0xFFFFFFFF), (0, 241)]
)
def test_types_and_sizes_out_of_range_are_refused(guest: Guest, kind: int, size: int) -> None:
    assert guest.post(4, kind, b"", size=size) == INVALID_PARAMETER
    assert guest.taken == []


@pytest.mark.parametrize("connection", [0, 1, 5, 0x10004, 0xFFFFFFFF])
def test_an_unknown_connection_has_its_status(guest: Guest, connection: int) -> None:
    assert guest.post(connection, 1, b"") == INVALID_CONNECTION_ID


def test_a_port_that_cannot_take_a_message_makes_the_guest_try_again(guest: Guest) -> None:
    guest.accepts = False
    assert guest.post(4, 1, b"later") == INSUFFICIENT_BUFFERS
    guest.accepts = True
    assert guest.post(4, 1, b"later") == SUCCESS


SHARED = Guest()


@given(st.integers(0, (1 << 64) - 1), st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, SIZE)))
def test_any_call_has_a_status(control: int, gpa: int) -> None:
    assert SHARED.calls.call(control, gpa) in (INVALID_HYPERCALL_CODE, INVALID_HYPERCALL_INPUT)


@given(st.integers(0, (1 << 64) - 1), st.binary(min_size=256, max_size=256))
def test_any_post_has_a_status(gpa: int, block: bytes) -> None:
    SHARED.memory.write(BLOCK, block)
    for where in (BLOCK, gpa):
        status = SHARED.calls.call(POST, where)
        assert status in (SUCCESS, INVALID_ALIGNMENT, INVALID_PARAMETER, INVALID_CONNECTION_ID)
