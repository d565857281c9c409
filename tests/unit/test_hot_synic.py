"""The SynIC: its MSRs, message slots, queues and event flags. TLFS v6.0b, chapter 11."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.core import _hot
from tests.fakes.synic_guest import (
    AUTO_EOI,
    EOM,
    EVENT_PAGE,
    MASKED,
    MESSAGE_PAGE,
    POLLING,
    RAM_SIZE,
    SCONTROL,
    SIEFP,
    SIMP,
    SINT0,
    STIMER0_CONFIG,
    SVERSION,
    VECTOR,
    SynicGuest,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

QUEUE = 32


@pytest.fixture
def guest() -> SynicGuest:
    return SynicGuest()


@pytest.fixture
def space(guest: SynicGuest) -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    guest.synic.set_space_event(fd)
    yield fd
    os.close(fd)


def rung(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


# MSRs


def test_power_on_values(guest: SynicGuest) -> None:
    assert [guest.read(msr) for msr in (SCONTROL, SVERSION, SIEFP, SIMP, EOM)] == [0, 1, 0, 0, 0]
    assert [guest.read(SINT0 + sint) for sint in range(16)] == [MASKED] * 16
    assert [guest.read(STIMER0_CONFIG + reg) for reg in range(8)] == [0] * 8


def test_what_is_written_is_read_back(guest: SynicGuest) -> None:
    values = {SCONTROL: 1, SIEFP: EVENT_PAGE | 1, SIMP: MESSAGE_PAGE | 1, SINT0: MASKED, SINT0 + 15: 0x2FF | AUTO_EOI}
    for msr, value in values.items():
        assert guest.write(msr, value)
    assert {msr: guest.read(msr) for msr in values} == values


@pytest.mark.parametrize(
    "msr", [0x4000007F, 0x40000085, 0x4000008F, 0x400000A0, 0x400000AF, 0x400000B8, 0x1B, 0xFFFFFFFF]
)
def test_msrs_of_others_fault(guest: SynicGuest, msr: int) -> None:
    assert guest.read(msr) is None
    assert not guest.write(msr, 0)


def test_the_version_cannot_be_written(guest: SynicGuest) -> None:
    assert not guest.write(SVERSION, 1)


@pytest.mark.parametrize("vector", [0, 15])
def test_an_open_sint_needs_a_valid_vector(guest: SynicGuest, vector: int) -> None:
    assert not guest.write(SINT0 + 2, vector)
    assert guest.read(SINT0 + 2) == MASKED
    assert guest.write(SINT0 + 2, vector | MASKED)
    assert guest.write(SINT0 + 2, 16)


@pytest.mark.parametrize("msr", [SIMP, SIEFP])
@pytest.mark.parametrize("gpa", [RAM_SIZE, 0x100000, (1 << 64) - 0x1000, 1 << 40])
def test_a_page_outside_writable_ram_faults_and_changes_nothing(guest: SynicGuest, msr: int, gpa: int) -> None:
    assert guest.write(msr, MESSAGE_PAGE | 1)
    assert not guest.write(msr, gpa | 1)
    assert guest.read(msr) == MESSAGE_PAGE | 1
    assert guest.rom == b"R" * 0x1000
    assert guest.write(msr, gpa), "an address that is not enabled is only a value"


@pytest.mark.parametrize("msr", [SIMP, SIEFP])
def test_a_page_is_all_zero_when_it_is_enabled_or_moved(guest: SynicGuest, msr: int) -> None:
    guest.ram[:] = b"\xff" * RAM_SIZE
    assert guest.write(msr, 0x4000)
    assert guest.ram[0x4000:0x5000] == b"\xff" * 0x1000, "not enabled yet"
    assert guest.write(msr, 0x4000 | 1)
    assert guest.ram[0x4000:0x5000] == bytes(0x1000)
    guest.ram[0x4000] = 7
    assert guest.write(msr, 0x4000 | 1)
    assert guest.ram[0x4000] == 7, "the same value again moves nothing"
    assert guest.write(msr, 0x5000 | 1)
    assert guest.ram[0x5000:0x6000] == bytes(0x1000)
    assert guest.ram[0x3FFF] == guest.ram[0x6000] == 0xFF
    assert guest.write(msr, 0x5000)
    guest.ram[0x5000] = 9
    assert guest.write(msr, 0x5000 | 1)
    assert guest.ram[0x5000] == 0


# Messages


def test_a_message_fills_the_slot_and_interrupts(guest: SynicGuest) -> None:
    guest.enable(2)
    assert guest.synic.post(2, 1, b"payload")
    assert guest.slot(2).type == 0, "only the VP's own thread writes slots"
    guest.scan()
    slot = guest.slot(2)
    assert (slot.type, slot.pending, slot.sender, slot.payload) == (1, False, 0, b"payload")
    assert guest.interrupts() == [VECTOR + 2]
    assert [guest.slot(other).type for other in range(16) if other != 2] == [0] * 15


@pytest.mark.parametrize("sint", [0, 15])
def test_every_sint_has_its_own_slot(guest: SynicGuest, sint: int) -> None:
    guest.enable(sint)
    guest.synic.post(sint, 0x7FFFFFFF, bytes(range(240)))
    guest.scan()
    assert guest.slot(sint).payload == bytes(range(240))
    assert guest.slot(sint).type == 0x7FFFFFFF


def test_a_taken_slot_makes_the_next_message_wait_and_says_so(guest: SynicGuest) -> None:
    guest.enable(2)
    for text in (b"one", b"two", b"three"):
        assert guest.synic.post(2, 1, text)
    guest.scan()
    assert (guest.slot(2).payload, guest.slot(2).pending) == (b"one", True)
    assert guest.interrupts() == [VECTOR + 2]
    guest.scan()
    assert guest.slot(2).payload == b"one"
    assert guest.clear_slot(2)
    guest.write(EOM, 0)
    assert (guest.slot(2).payload, guest.slot(2).pending) == (b"two", True)
    assert guest.interrupts() == [VECTOR + 2]
    assert guest.clear_slot(2)
    guest.write(EOM, 0)
    assert (guest.slot(2).payload, guest.slot(2).pending) == (b"three", False)
    assert guest.synic.inspect()["messages_delivered"] == 3


def test_sints_do_not_wait_for_each_other(guest: SynicGuest) -> None:
    guest.enable(2, 3)
    guest.synic.post(2, 1, b"a")
    guest.synic.post(2, 1, b"b")
    guest.synic.post(3, 1, b"c")
    guest.scan()
    assert (guest.slot(2).payload, guest.slot(3).payload) == (b"a", b"c")


def test_a_slot_that_the_guest_fills_with_garbage_only_harms_the_guest(guest: SynicGuest) -> None:
    guest.enable(2)
    start = MESSAGE_PAGE + 2 * 256
    guest.ram[start : start + 256] = b"\xff" * 256
    guest.synic.post(2, 1, b"late")
    guest.scan()
    assert guest.slot(2).type == 0xFFFFFFFF
    guest.clear_slot(2)
    guest.write(EOM, 0)
    assert (guest.slot(2).type, guest.slot(2).pending, guest.slot(2).payload) == (1, False, b"late")


def test_a_full_queue_refuses_and_tells_once_there_is_room(guest: SynicGuest, space: int) -> None:
    guest.enable(2)
    accepted = 0
    while guest.synic.post(2, 1, accepted.to_bytes(4, "little")):
        accepted += 1
    assert accepted == QUEUE
    assert not guest.synic.post(2, 1, b"one too many")
    assert rung(space) == 0
    guest.scan()  # the first one goes to the slot
    assert rung(space) == 1
    assert guest.synic.post(2, 1, accepted.to_bytes(4, "little"))
    taken = []
    while slot := guest.take(2):
        taken.append(int.from_bytes(slot.payload, "little"))
    assert taken == list(range(QUEUE + 1))
    assert rung(space) == 0, "nobody was turned away since"


def test_a_full_queue_of_one_sint_leaves_room_for_another(guest: SynicGuest) -> None:
    guest.enable(2, 3)
    for _ in range(QUEUE):
        guest.synic.post(2, 1, b"")
    assert not guest.synic.post(2, 1, b"")
    assert guest.synic.post(3, 1, b"")


def test_a_reset_tells_those_who_wait_for_room(guest: SynicGuest, space: int) -> None:
    guest.enable(2)
    while guest.synic.post(2, 1, b""):
        pass
    guest.synic.reset()
    assert rung(space) == 1
    assert guest.synic.inspect()["messages_queued"] == 0


@pytest.mark.parametrize(
    ("msr", "value"), [(SCONTROL, 0), (SIMP, MESSAGE_PAGE), (SINT0 + 2, VECTOR | MASKED), (SINT0 + 2, VECTOR | 1 << 20)]
)
def test_messages_to_a_closed_sint_are_dropped_and_counted(guest: SynicGuest, msr: int, value: int) -> None:
    guest.enable(2)
    assert guest.write(msr, value)
    assert guest.synic.post(2, 1, b"lost")
    guest.scan()
    assert guest.slot(2).type == 0
    assert guest.interrupts() == []
    found = guest.synic.inspect()
    assert (found["messages_dropped"], found["messages_queued"], found["messages_delivered"]) == (1, 0, 0)


def test_a_polling_sint_gets_its_messages_and_flags_without_interrupt(guest: SynicGuest) -> None:
    guest.enable(2, flags=POLLING)
    guest.synic.post(2, 1, b"quiet")
    guest.scan()
    assert guest.slot(2).payload == b"quiet"
    assert guest.synic.signal_event(2, 5)
    assert guest.flags(2) == {5}
    assert guest.interrupts() == []


@pytest.mark.parametrize(
    ("sint", "kind", "payload"), [(16, 1, b""), (0xFFFFFFFF, 1, b""), (2, 0, b""), (2, 1, bytes(241))]
)
def test_a_message_that_cannot_be_one_is_the_callers_error(
    guest: SynicGuest, sint: int, kind: int, payload: bytes
) -> None:
    with pytest.raises(ValueError):
        guest.synic.post(sint, kind, payload)
    assert guest.synic.inspect()["messages_queued"] == 0


# Event flags


def test_a_flag_interrupts_when_it_goes_from_clear_to_set(guest: SynicGuest) -> None:
    guest.enable(2)
    for flag in (0, 31, 32, 2047):
        assert guest.synic.signal_event(2, flag)
    assert guest.flags(2) == {0, 31, 32, 2047}
    assert guest.interrupts() == [VECTOR + 2] * 4
    assert guest.synic.signal_event(2, 31)
    assert guest.interrupts() == []
    guest.clear_flags(2)
    assert guest.synic.signal_event(2, 31)
    assert guest.interrupts() == [VECTOR + 2]


@pytest.mark.parametrize(("msr", "value"), [(SCONTROL, 0), (SIEFP, EVENT_PAGE), (SINT0 + 2, VECTOR | MASKED)])
def test_flags_of_a_closed_sint_are_not_set(guest: SynicGuest, msr: int, value: int) -> None:
    guest.enable(2)
    assert guest.write(msr, value)
    assert not guest.synic.signal_event(2, 1)
    assert guest.flags(2) == set()
    assert guest.interrupts() == []


def test_a_raised_sint_interrupts_and_nothing_else(guest: SynicGuest) -> None:
    guest.enable(2)
    before = bytes(guest.ram)
    assert guest.synic.raise_sint(2)
    assert guest.synic.raise_sint(2)
    assert guest.interrupts() == [VECTOR + 2] * 2
    assert guest.ram == before
    guest.enable(3, flags=POLLING)
    assert guest.synic.raise_sint(3)
    assert guest.interrupts() == []


@pytest.mark.parametrize(("msr", "value"), [(SCONTROL, 0), (SINT0 + 2, VECTOR | MASKED)])
def test_a_closed_sint_cannot_be_raised(guest: SynicGuest, msr: int, value: int) -> None:
    guest.enable(2)
    assert guest.write(msr, value)
    assert not guest.synic.raise_sint(2)
    assert guest.interrupts() == []
    with pytest.raises(ValueError, match="there is no SINT 16"):
        guest.synic.raise_sint(16)


@pytest.mark.parametrize(("sint", "flag"), [(16, 0), (0, 2048), (0, 0xFFFFFFFF)])
def test_a_flag_that_does_not_exist_is_the_callers_error(guest: SynicGuest, sint: int, flag: int) -> None:
    guest.enable(0)
    with pytest.raises(ValueError, match="there is no"):
        guest.synic.signal_event(sint, flag)


# Reset, save and restore


def busy_guest() -> SynicGuest:
    guest = SynicGuest()
    guest.enable(2, 3)
    for number in range(4):
        guest.synic.post(2, 1, bytes([number]))
    guest.synic.post(3, 5, b"other")
    guest.scan()
    guest.write(STIMER0_CONFIG + 1, 500_000)
    guest.write(STIMER0_CONFIG, 3 << 16 | 3)
    return guest


def test_an_interrupt_without_eoi_waits_for_the_vps_own_thread(guest: SynicGuest) -> None:
    guest.enable(2, 3, flags=AUTO_EOI)
    guest.synic.post(3, 1, b"message")
    guest.scan()
    guest.synic.signal_event(2, 5)
    guest.synic.signal_event(2, 6)
    assert guest.interrupts() == []  # none to KVM's LAPIC, which would want an EOI
    assert guest.synic.inspect()["auto_eoi"] == [VECTOR + 2, VECTOR + 3]
    other = SynicGuest()
    other.synic.restore(guest.synic.save())
    assert other.synic.inspect()["auto_eoi"] == [VECTOR + 2, VECTOR + 3]
    guest.synic.reset()
    assert guest.synic.inspect()["auto_eoi"] == []


def test_reset_brings_back_the_power_on_state() -> None:
    guest = busy_guest()
    guest.synic.reset()
    fresh = SynicGuest()
    assert guest.synic.save() == fresh.synic.save()
    assert guest.scan() == 0


def test_a_restored_synic_goes_on_where_the_saved_one_was() -> None:
    old, new = busy_guest(), SynicGuest()
    state = old.synic.save()
    new.synic.restore(state)
    new.ram[:] = old.ram
    assert new.synic.save() == state
    taken = []
    while slot := new.take(2):
        taken.append(slot.payload[0])
    assert taken == [0, 1, 2, 3]
    assert new.scan() == old.now + 500_000
    assert new.read(SINT0 + 2) == VECTOR + 2


def _damage(key: str, value: Any) -> dict[str, Any]:
    return {**busy_guest().synic.save(), key: value}


@pytest.mark.parametrize(
    "state",
    [
        {},
        _damage("version", 2),
        _damage("version", None),
        _damage("scontrol", "1"),
        _damage("sint", [MASKED] * 15),
        _damage("sint", [MASKED] * 15 + [-1]),
        _damage("sint", [MASKED] * 15 + [3]),
        _damage("sint", (MASKED,) * 16),
        _damage("messages", [[16, 1, b""]]),
        _damage("messages", [[1, 0, b""]]),
        _damage("messages", [[1, 1, bytes(241)]]),
        _damage("messages", [[1, 1]]),
        _damage("messages", [7]),
        _damage("messages", [[1, 1, b""]] * 33),
        _damage("timers", []),
        _damage("timers", [[1 << 20, 0, 0]] * 4),
        _damage("timers", [[0, 0, 5]] * 4),
        _damage("timers", [[0, 0]] * 4),
    ],
)
def test_saved_state_that_does_not_fit_is_refused_and_changes_nothing(state: dict[str, Any]) -> None:
    guest = busy_guest()
    before = guest.synic.save()
    with pytest.raises(ValueError, match="saved SynIC state"):
        guest.synic.restore(state)
    assert guest.synic.save() == before


def test_a_synic_needs_its_memory() -> None:
    with pytest.raises(TypeError):
        _hot.SynIC.__new__(_hot.SynIC)


# Anything in any order

_MSRS = st.one_of(
    st.sampled_from([SCONTROL, SVERSION, SIEFP, SIMP, EOM]),
    st.integers(SINT0, SINT0 + 16),
    st.integers(STIMER0_CONFIG, STIMER0_CONFIG + 8),
)
_VALUES = st.one_of(
    st.sampled_from([0, 1, MESSAGE_PAGE | 1, EVENT_PAGE | 1, 0x4000 | 1, 0x100000 | 1, MASKED, VECTOR, 3 << 16 | 3]),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 1 << 20),
)
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), _MSRS, _VALUES),
        st.tuples(st.just("post"), st.integers(0, 15), st.integers(1, 50)),
        st.tuples(st.just("signal"), st.integers(0, 15), st.integers(0, 2047)),
        st.tuples(st.just("scribble"), st.integers(0, RAM_SIZE - 8), st.integers(0, (1 << 64) - 1)),
        st.tuples(st.just("scan"), st.integers(0, 1 << 62), st.just(0)),
        st.tuples(st.just("take"), st.integers(0, 15), st.just(0)),
        st.tuples(st.just("move"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=300)
@given(_STEPS)
def test_whatever_the_guest_does_no_message_is_lost_uncounted(steps: list[tuple[str, int, int]]) -> None:
    guest = SynicGuest()
    guest.enable(1, 2, 15)
    outside = bytes(guest.rom)
    posted = 0
    for action, first, second in steps:
        if action == "write":
            guest.write(first, second)
        elif action == "post":
            for _ in range(second):
                posted += guest.synic.post(first, 1, b"m")
        elif action == "signal":
            guest.synic.signal_event(first, second)
        elif action == "scribble":
            guest.ram[first : first + 8] = second.to_bytes(8, "little")
        elif action == "scan":
            guest.now = max(guest.now, first)
            deadline = guest.scan()
            assert deadline == 0 or deadline > guest.now
        elif action == "take":
            guest.take(first)
        else:  # live migration in the middle of everything
            moved = SynicGuest()
            moved.synic.restore(guest.synic.save())
            assert moved.synic.save() == guest.synic.save()
        found = guest.synic.inspect()
        timers = found["messages_delivered"] + found["messages_dropped"] + found["messages_queued"] - posted
        assert timers >= 0
        assert found["messages_queued"] <= 16 * QUEUE
        assert len(guest.interrupts()) <= 64
    assert guest.rom == outside
    # Whatever came before, a guest that sets all up again gets its messages.
    guest.synic.reset()
    guest.enable(2)
    guest.synic.post(2, 1, b"after all")
    guest.scan()
    assert guest.slot(2).payload == b"after all"
