"""Synthetic timers. TLFS v6.0b, chapter 12.3."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.synic_guest import EOM, MASKED, SINT0, STIMER0_CONFIG, VECTOR, SynicGuest

ENABLE, PERIODIC, LAZY, AUTO_ENABLE, DIRECT = 1, 2, 4, 8, 1 << 12
EXPIRED = 0x80000010


def config(timer: int = 0) -> int:
    return STIMER0_CONFIG + 2 * timer


def count(timer: int = 0) -> int:
    return STIMER0_CONFIG + 2 * timer + 1


def to_sint(sint: int) -> int:
    return sint << 16


def to_vector(vector: int) -> int:
    return DIRECT | vector << 4


@pytest.fixture
def guest() -> SynicGuest:
    guest = SynicGuest()
    guest.enable(3, 4)
    return guest


def expirations(guest: SynicGuest, sint: int = 3) -> list[tuple[int, int, int]]:
    """(timer, expiration time, delivery time) of the messages that wait, taken one after the other."""
    found = []
    while slot := guest.take(sint):
        assert slot.type == EXPIRED
        assert len(slot.payload) == 24
        found.append(
            (
                int.from_bytes(slot.payload[0:4], "little"),
                int.from_bytes(slot.payload[8:16], "little"),
                int.from_bytes(slot.payload[16:24], "little"),
            )
        )
    return found


def test_a_one_shot_expires_once_at_its_absolute_time(guest: SynicGuest) -> None:
    guest.write(count(), 5000)
    guest.write(config(), ENABLE | to_sint(3))
    assert guest.scan() == 5000
    guest.now = 4999
    assert guest.scan() == 5000
    assert expirations(guest) == []
    guest.now = 5003
    assert guest.scan() == 0
    assert guest.interrupts() == [VECTOR + 3]
    assert expirations(guest) == [(0, 5000, 5003)]
    assert guest.read(config()) == to_sint(3), "an expired one-shot is no longer enabled"
    assert guest.read(count()) == 5000
    guest.now = 10_000
    assert guest.scan() == 0
    assert expirations(guest) == []


def test_a_one_shot_in_the_past_expires_at_once(guest: SynicGuest) -> None:
    guest.write(count(), 1)
    guest.write(config(), ENABLE | to_sint(3))
    assert expirations(guest) == [(0, 1, guest.now)]


def test_a_periodic_timer_expires_again_and_again(guest: SynicGuest) -> None:
    start = guest.now
    guest.write(count(), 100)
    guest.write(config(), ENABLE | PERIODIC | to_sint(3))
    for number in range(1, 6):
        assert guest.scan() == start + 100 * number
        guest.now = start + 100 * number
        guest.scan()
        assert expirations(guest) == [(0, start + 100 * number, guest.now)]
    assert guest.read(config()) == ENABLE | PERIODIC | to_sint(3)


def test_missed_periods_are_not_made_up_for_but_the_phase_stays(guest: SynicGuest) -> None:
    start = guest.now
    guest.write(count(), 100)
    guest.write(config(), ENABLE | PERIODIC | LAZY | to_sint(3))
    guest.now = start + 1050
    assert guest.scan() == start + 1100
    assert expirations(guest) == [(0, start + 100, start + 1050)]
    assert guest.scan() == start + 1100


def test_auto_enable_starts_with_the_count(guest: SynicGuest) -> None:
    guest.write(config(), AUTO_ENABLE | to_sint(3))
    assert guest.scan() == 0
    for deadline in (2000, 3000):  # re-armed by the count alone
        guest.write(count(), deadline)
        assert guest.read(config()) == ENABLE | AUTO_ENABLE | to_sint(3)
        assert guest.scan() == deadline
        guest.now = deadline
        guest.scan()
        assert guest.read(config()) == AUTO_ENABLE | to_sint(3)
        assert len(expirations(guest)) == 1


def test_a_count_of_zero_stops_the_timer(guest: SynicGuest) -> None:
    guest.write(count(), 2000)
    guest.write(config(), ENABLE | AUTO_ENABLE | to_sint(3))
    guest.write(count(), 0)
    assert guest.read(config()) == AUTO_ENABLE | to_sint(3)
    assert guest.scan() == 0


def test_a_timer_without_count_waits_for_it(guest: SynicGuest) -> None:
    guest.write(config(), ENABLE | to_sint(3))
    assert guest.scan() == 0
    guest.write(count(), 7000)
    assert guest.scan() == 7000


def test_disabling_stops_the_timer(guest: SynicGuest) -> None:
    guest.write(count(), 2000)
    guest.write(config(), ENABLE | to_sint(3))
    guest.write(config(), to_sint(3))
    assert guest.scan() == 0
    guest.now = 3000
    guest.scan()
    assert expirations(guest) == []


def test_a_message_needs_another_sint_than_0(guest: SynicGuest) -> None:
    guest.write(count(), 2000)
    assert guest.write(config(), ENABLE | PERIODIC)
    assert guest.read(config()) == PERIODIC
    assert guest.scan() == 0


def test_direct_mode_interrupts_without_a_message(guest: SynicGuest) -> None:
    guest.write(count(), 2000)
    guest.write(config(), ENABLE | to_vector(0xEC))
    assert guest.scan() == 2000
    guest.now = 2000
    assert guest.scan() == 0
    assert guest.interrupts() == [0xEC]
    assert guest.read(config()) == to_vector(0xEC)
    assert [guest.slot(sint).type for sint in range(16)] == [0] * 16


def test_direct_mode_needs_no_synic() -> None:
    guest = SynicGuest()
    guest.write(count(), 2000)
    guest.write(config(), ENABLE | PERIODIC | to_vector(0xEC))
    guest.now = 3000
    guest.scan()
    assert guest.interrupts() == [0xEC]


def test_direct_mode_faults_where_it_is_not_offered(guest: SynicGuest) -> None:
    guest.synic.direct_timers = False
    assert not guest.write(config(), ENABLE | to_vector(0xEC))
    assert guest.read(config()) == 0


@pytest.mark.parametrize("bit", [13, 14, 15, 20, 21, 31, 32, 63])
def test_reserved_bits_fault_and_change_nothing(guest: SynicGuest, bit: int) -> None:
    guest.write(config(), to_sint(3))
    assert not guest.write(config(), ENABLE | to_sint(4) | 1 << bit)
    assert guest.read(config()) == to_sint(3)


def test_a_busy_slot_delays_the_expiration_until_eom(guest: SynicGuest) -> None:
    guest.synic.post(3, 1, b"in the way")
    guest.write(count(), 2000)
    guest.write(config(), ENABLE | to_sint(3))
    guest.now = 2000
    guest.scan()
    assert guest.slot(3).payload == b"in the way"
    assert guest.slot(3).pending
    assert guest.read(config()) == ENABLE | to_sint(3)
    guest.now = 2500
    assert guest.clear_slot(3)
    guest.write(EOM, 0)
    assert expirations(guest) == [(0, 2000, 2500)]
    assert guest.read(config()) == to_sint(3)


def test_messages_that_wait_go_before_an_expiration(guest: SynicGuest) -> None:
    for text in (b"first", b"second"):
        guest.synic.post(3, 1, text)
    guest.write(count(), 2000)
    guest.write(config(), ENABLE | to_sint(3))
    guest.now = 3000
    guest.scan()
    taken = []
    while slot := guest.take(3):
        taken.append(slot.type)
    assert taken == [1, 1, EXPIRED]


def test_an_expiration_waits_for_a_closed_sint_to_open(guest: SynicGuest) -> None:
    guest.write(SINT0 + 3, VECTOR + 3 | MASKED)
    guest.write(count(), 2000)
    guest.write(config(), ENABLE | to_sint(3))
    guest.now = 2600
    assert guest.scan() == 0
    assert guest.slot(3).type == 0
    guest.write(SINT0 + 3, VECTOR + 3)
    assert expirations(guest) == [(0, 2000, 2600)]


def test_four_timers_run_side_by_side(guest: SynicGuest) -> None:
    for timer in range(4):
        guest.write(count(timer), 2000 + timer)
        guest.write(config(timer), ENABLE | to_sint(3 + timer % 2))
    assert guest.scan() == 2000
    guest.now = 2001
    assert guest.scan() == 2002
    guest.now = 2100
    guest.scan()
    assert [number for number, *_ in expirations(guest, 3)] == [0, 2]
    assert [number for number, *_ in expirations(guest, 4)] == [1, 3]


def test_a_period_beyond_the_end_of_time_never_expires(guest: SynicGuest) -> None:
    guest.write(count(), (1 << 64) - 1)
    guest.write(config(), ENABLE | PERIODIC | to_sint(3))
    guest.now = 1 << 62
    assert guest.scan() == (1 << 64) - 1
    assert expirations(guest) == []


def test_a_restored_period_near_the_end_of_time_does_not_wrap(guest: SynicGuest) -> None:
    state = guest.synic.save()
    state["timers"] = [[ENABLE | PERIODIC | to_sint(3), (1 << 64) - 1, 5]] + [[0, 0, 0]] * 3
    guest.synic.restore(state)
    assert guest.scan() == (1 << 64) - 1
    assert len(expirations(guest)) == 1


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 7), st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, 0xF1FFF)), st.integers(0, 9999)
        ),
        max_size=40,
    )
)
def test_the_next_deadline_is_always_in_the_future(steps: list[tuple[int, int, int]]) -> None:
    guest = SynicGuest()
    guest.enable(*range(1, 16))
    for register, value, passed in steps:
        guest.write(STIMER0_CONFIG + register, value)
        guest.now += passed
        deadline = guest.scan()
        assert deadline == 0 or deadline > guest.now
        for timer in range(4):
            read = guest.read(config(timer))
            assert read is not None and not read & ~0xF1FFF
