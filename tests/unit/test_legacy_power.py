from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.legacy.acpi_pm import PM_TIMER_HZ, S5_SLEEP_TYPE, AcpiPm
from devices.legacy.i8042 import I8042
from devices.legacy.system_ports import SystemPorts
from pyvmm.core.bus import Bus
from tests.fakes.board import ManualClock, RecordingLine, board_bus

SECOND = 1_000_000_000


class Board:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.sci = RecordingLine()
        self.calls: list[str] = []
        self.pm = AcpiPm(self.sci, lambda: self.calls.append("poweroff"), self.clock)
        self.controller = I8042(RecordingLine(), RecordingLine(), lambda: None)
        self.system = SystemPorts(self.controller, lambda: self.calls.append("reset"))
        self.pm.reset()
        self.system.reset()
        self.bus: Bus = board_bus(self.pm, self.system)


@pytest.fixture
def board() -> Board:
    return Board()


def test_entering_s5_powers_off(board: Board) -> None:
    board.bus.write(0x604, 2, S5_SLEEP_TYPE << 10 | 1 << 13)
    assert board.calls == ["poweroff"]


def test_byte_writes_enter_s5_too(board: Board) -> None:
    board.bus.write(0x605, 1, S5_SLEEP_TYPE << 2 | 1 << 5)
    assert board.calls == ["poweroff"]


@pytest.mark.parametrize("value", [S5_SLEEP_TYPE << 10, 1 << 13, 1 << 10 | 1 << 13])
def test_other_sleep_writes_do_nothing(board: Board, value: int) -> None:
    board.bus.write(0x604, 2, value)
    assert board.calls == []


def test_acpi_mode_is_always_on(board: Board) -> None:
    board.bus.write(0x604, 2, 0)
    assert board.bus.read(0x604, 2) == 1


def test_pm_timer_runs_at_its_frequency_and_wraps(board: Board) -> None:
    start = board.bus.read(0x608, 4)
    board.clock.advance(10 * SECOND)
    assert board.bus.read(0x608, 4) - start == 10 * PM_TIMER_HZ
    board.clock.advance((1 << 32) * SECOND // PM_TIMER_HZ)
    assert abs(board.bus.read(0x608, 4) - start - 10 * PM_TIMER_HZ) <= 1
    assert board.bus.read(0x609, 1) == board.bus.read(0x608, 4) >> 8 & 0xFF


def test_pm_timer_carry_is_an_event(board: Board) -> None:
    board.bus.write(0x602, 2, 1)
    assert board.bus.read(0x600, 2) == 0
    board.clock.advance((1 << 31) * SECOND // PM_TIMER_HZ + 1)
    assert board.bus.read(0x600, 2) == 1
    assert board.sci.level
    board.bus.write(0x600, 2, 1)
    assert not board.sci.level


def test_power_button_raises_sci_until_its_status_is_cleared(board: Board) -> None:
    board.bus.write(0x602, 2, 1 << 8)
    board.pm.press_power_button()
    assert board.sci.level
    assert board.bus.read(0x600, 4) == 1 << 24 | 1 << 8
    board.bus.write(0x600, 2, 1 << 8)
    assert not board.sci.level
    assert board.bus.read(0x600, 2) == 0


def test_power_button_pressed_early_waits_for_its_enable(board: Board) -> None:
    board.pm.press_power_button()
    assert not board.sci.level
    board.bus.write(0x602, 2, 1 << 8)
    assert board.sci.level


def test_pm_state_survives_saving_with_a_pressed_button(board: Board) -> None:
    board.bus.write(0x602, 2, 1 << 8)
    board.clock.advance(7 * SECOND)
    board.pm.press_power_button()
    board.pm.pause()
    state = board.pm.save()

    other = Board()
    other.pm.pause()
    other.pm.restore(state)
    assert other.pm.save() == state
    other.pm.resume()
    assert other.sci.level
    assert other.bus.read(0x608, 4) == board.bus.read(0x608, 4)


@pytest.mark.parametrize("value", [0x06, 0x0E, 0x04])
def test_reset_register_resets(board: Board, value: int) -> None:
    board.bus.write(0xCF9, 1, 0x02)
    assert board.calls == []
    board.bus.write(0xCF9, 1, value)
    assert board.calls == ["reset"]


def test_fast_reset_needs_a_rising_bit(board: Board) -> None:
    board.bus.write(0x92, 1, 0x03)
    board.bus.write(0x92, 1, 0x03)
    assert board.calls == ["reset"]
    board.bus.write(0x92, 1, 0x02)
    board.bus.write(0x92, 1, 0x03)
    assert board.calls == ["reset", "reset"]


def test_port_92_and_the_keyboard_controller_share_a20(board: Board) -> None:
    board.bus.write(0x92, 1, 0x00)
    assert not board.controller.a20
    board.controller.a20 = True
    assert board.bus.read(0x92, 1) == 0x02


def test_system_ports_survive_saving(board: Board) -> None:
    board.bus.write(0x92, 1, 0x01)
    board.bus.write(0xCF9, 1, 0x02)
    state = board.system.save()
    other = Board()
    other.system.restore(state)
    assert other.system.save() == state
    assert other.bus.read(0xCF9, 1) == board.bus.read(0xCF9, 1) == 0x02
    with pytest.raises(ValueError):
        other.system.restore({**state, "port_a": 99})
    with pytest.raises(ValueError):
        other.pm.restore({**other.pm.save(), "timer": -1})


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from((0x92, 0xCF9, 0x600, 0x601, 0x602, 0x603, 0x604, 0x605, 0x608, 0x60B)),
            st.sampled_from((1, 2, 4)),
            st.integers(0, 2**32 - 1),
        ),
        max_size=60,
    )
)
def test_no_register_access_raises(pokes: list[tuple[bool, int, int, int]]) -> None:
    board = Board()
    for is_write, port, size, value in pokes:
        if is_write:
            board.bus.write(port, size, value & (1 << 8 * size) - 1)
        else:
            board.bus.read(port, size)
        board.clock.advance(value)
    fresh = Board()
    for old, new in ((board.pm, fresh.pm), (board.system, fresh.system)):
        new.restore(old.save())
        assert new.save() == old.save()
        assert old.inspect()
