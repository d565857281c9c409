from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.legacy.rtc import Rtc
from tests.fakes.board import ManualClock, ManualTimers, RecordingLine, board_bus

MIB = 1 << 20
SECOND = 1_000_000_000
START = 1_709_210_096  # 2024-02-29 12:34:56 UTC, a Thursday
A, B, C, D = 10, 11, 12, 13


class Board:
    def __init__(self, start: int = START, below: int = 512 * MIB, above: int = 0) -> None:
        self.clock = ManualClock(start)
        self.timers = ManualTimers(self.clock)
        self.irq = RecordingLine()
        self.rtc = Rtc(self.irq, below, above, cpus=4, clock=self.clock, call_at=self.timers.call_at)
        self.rtc.reset()
        self.bus = board_bus(self.rtc)

    def read(self, index: int) -> int:
        self.bus.write(0x70, 1, index)
        return self.bus.read(0x71, 1)

    def write(self, index: int, value: int) -> None:
        self.bus.write(0x70, 1, index)
        self.bus.write(0x71, 1, value)

    def time_bytes(self) -> list[int]:
        return [self.read(index) for index in (0x32, 9, 8, 7, 4, 2, 0)]


@pytest.fixture
def board() -> Board:
    return Board()


def test_time_is_utc_in_bcd_and_24_hours(board: Board) -> None:
    assert board.time_bytes() == [0x20, 0x24, 0x02, 0x29, 0x12, 0x34, 0x56]
    assert board.read(6) == 5


def test_register_b_chooses_binary_and_12_hours(board: Board) -> None:
    board.write(B, 0x04)
    assert board.time_bytes() == [20, 24, 2, 29, 0x80 | 12, 34, 56]
    board.clock.advance(12 * 3600 * SECOND)
    assert board.time_bytes() == [20, 24, 3, 1, 12, 34, 56]  # half past midnight


def test_the_nmi_bit_of_the_index_is_ignored(board: Board) -> None:
    assert board.read(0x80) == board.read(0)


def test_update_in_progress_comes_before_the_second_changes(board: Board) -> None:
    assert not board.read(A) & 0x80
    board.clock.advance(SECOND - 1_000_000)
    assert board.read(A) & 0x80
    assert board.read(0) == 0x56
    board.clock.advance(1_000_000)
    assert not board.read(A) & 0x80
    assert board.read(0) == 0x57


def test_a_set_time_goes_on_from_there(board: Board) -> None:
    board.write(B, 0x82)
    for index, value in ((0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x59)):
        board.write(index, value)
    board.clock.advance(10 * SECOND)
    assert board.read(0) == 0x59  # stopped until SET goes
    board.write(B, 0x02)
    board.clock.advance(SECOND)
    assert board.time_bytes() == [0x20, 0x00, 0x01, 0x01, 0, 0, 0]
    assert board.read(6) == 7  # a Saturday


def test_setting_one_register_of_the_running_clock_keeps_the_others(board: Board) -> None:
    board.write(4, 0x05)
    assert board.time_bytes() == [0x20, 0x24, 0x02, 0x29, 0x05, 0x34, 0x56]


@given(st.integers(-62_167_219_200 + 86400, 253_402_300_799 - 86400))
def test_any_time_that_the_registers_can_hold_reads_back_as_written(seconds: int) -> None:
    board = Board()
    date = time.gmtime(seconds)
    board.write(B, 0x86)
    for index, value in (
        (0x32, date.tm_year // 100),
        (9, date.tm_year % 100),
        (8, date.tm_mon),
        (7, date.tm_mday),
        (4, date.tm_hour),
        (2, date.tm_min),
        (0, date.tm_sec),
    ):
        board.write(index, value)
    board.write(B, 0x06)
    assert board.rtc.inspect()["time"] == time.strftime("%Y-%m-%dT%H:%M:%SZ", date)


def test_update_ended_interrupt_comes_each_second_once_acknowledged(board: Board) -> None:
    board.write(B, 0x12)
    board.timers.advance(SECOND)
    assert board.irq.level
    board.timers.advance(5 * SECOND)
    assert board.irq.edges == 1  # not acknowledged: no timer runs
    assert board.timers.pending == []
    assert board.read(C) & 0x90 == 0x90
    assert not board.irq.level
    board.timers.advance(SECOND)
    assert board.irq.edges == 2


def test_periodic_interrupt_has_the_rate_of_register_a(board: Board) -> None:
    board.write(A, 0x2A)  # 64 Hz
    board.write(B, 0x42)
    board.read(C)
    for _ in range(64):
        board.timers.advance(15_625_000)
        assert board.read(C) & 0xC0 == 0xC0
    assert board.irq.edges == 64


def test_alarm_interrupt_comes_at_its_time(board: Board) -> None:
    for index, value in ((1, 0x10), (3, 0x35), (5, 0x12)):
        board.write(index, value)
    board.write(B, 0x22)
    board.timers.advance(13 * SECOND)
    assert not board.irq.level
    board.timers.advance(SECOND)
    assert board.read(C) & 0xA0 == 0xA0


def test_alarm_with_wildcards_comes_each_minute(board: Board) -> None:
    for index, value in ((1, 0x00), (3, 0xFF), (5, 0xC0)):
        board.write(index, value)
    board.write(B, 0x22)
    for minute in range(3):
        board.timers.advance(60 * SECOND)
        assert board.irq.edges == minute + 1
        board.read(C)


def test_an_impossible_alarm_never_comes(board: Board) -> None:
    board.write(5, 0x30)
    board.write(B, 0x22)
    assert board.timers.pending == []


def test_timers_do_not_pile_up_whatever_the_guest_writes(board: Board) -> None:
    board.write(B, 0x72)
    for step in range(1000):
        board.write(1 + 2 * (step % 3), step & 0xFF)
        board.write(A, 0x20 | step & 0x0F)
        board.clock.advance(1000)
    assert len(board.timers.pending) < 20


def test_flags_are_set_without_interrupts_for_guests_that_poll(board: Board) -> None:
    board.read(C)
    assert board.read(C) == 0
    board.clock.advance(SECOND)
    assert board.read(C) == 0x50
    assert board.irq.edges == 0


def test_memory_sizes_are_told_in_cmos() -> None:
    board = Board(below=3072 * MIB, above=5120 * MIB)
    assert board.read(0x15) | board.read(0x16) << 8 == 640
    assert board.read(0x17) | board.read(0x18) << 8 == 0xFFFF
    assert board.read(0x30) | board.read(0x31) << 8 == 0xFFFF
    assert board.read(0x34) | board.read(0x35) << 8 == (3072 - 16) * 16
    assert board.read(0x5B) | board.read(0x5C) << 8 | board.read(0x5D) << 16 == 5120 * 16
    assert board.read(0x5F) == 3


def test_small_memory_is_told_in_kilobytes() -> None:
    board = Board(below=8 * MIB)
    assert board.read(0x30) | board.read(0x31) << 8 == 7 * 1024
    assert board.read(0x34) | board.read(0x35) << 8 == 0


def test_shutdown_status_and_the_set_time_survive_a_reset(board: Board) -> None:
    board.write(0x0F, 0x0A)
    board.write(4, 0x05)
    board.write(B, 0x12)
    board.timers.advance(SECOND)
    board.rtc.reset()
    assert not board.irq.level
    assert (board.read(0x0F), board.read(4), board.read(B)) == (0x0A, 0x05, 0x02)


def test_valid_ram_bit_cannot_be_written(board: Board) -> None:
    board.write(D, 0)
    assert board.read(D) == 0x80


def test_a_pause_stops_interrupts_and_does_not_make_up_for_them(board: Board) -> None:
    board.write(B, 0x12)
    board.rtc.pause()
    board.timers.advance(10 * SECOND)
    assert board.irq.edges == 0
    board.rtc.resume()
    assert board.irq.edges == 0
    board.timers.advance(SECOND)
    assert board.irq.edges == 1


def test_state_survives_saving_while_the_guest_sets_the_time(board: Board) -> None:
    board.write(B, 0x82)
    board.write(9, 0x30)
    board.write(0x40, 0x77)
    board.rtc.pause()
    state = board.rtc.save()

    other = Board(start=START + 3600)
    other.rtc.pause()
    other.rtc.restore(state)
    assert other.rtc.save() == state
    other.rtc.resume()
    other.bus.write(0x71, 1, 0x55)  # the index came along
    assert other.read(0x40) == 0x55
    other.write(B, 0x02)
    assert other.time_bytes() == [0x20, 0x30, 0x03, 0x01, 0x12, 0x34, 0x56]  # 2030 has no 29 February


def test_an_unacknowledged_interrupt_survives_saving(board: Board) -> None:
    board.write(B, 0x12)
    board.timers.advance(SECOND)
    board.rtc.pause()
    other = Board()
    other.rtc.pause()
    other.rtc.restore(board.rtc.save())
    other.rtc.resume()
    assert other.irq.level
    assert other.read(C) & 0x90 == 0x90
    assert not other.irq.level


def test_damaged_state_is_refused(board: Board) -> None:
    good = board.rtc.save()
    for damage in ({"version": 0}, {"cmos": bytes(64)}, {"index": 128}, {"offset_ns": 1 << 80}):
        with pytest.raises(ValueError):
            board.rtc.restore({**good, **damage})


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 255), st.integers(0, 255), st.integers(0, 3 * SECOND)), max_size=60
    )
)
def test_no_register_access_raises(pokes: list[tuple[bool, int, int, int]]) -> None:
    board = Board()
    for is_write, index, value, elapsed in pokes:
        if is_write:
            board.write(index, value)
        else:
            assert 0 <= board.read(index) <= 255
        board.clock.advance(elapsed)
        board.timers.advance(0)
    board.rtc.inspect()
    board.rtc.pause()
    state = board.rtc.save()
    fresh = Board()
    fresh.rtc.pause()
    fresh.rtc.restore(state)
    assert fresh.rtc.save() == state
