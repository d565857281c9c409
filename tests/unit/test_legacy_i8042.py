from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.legacy.i8042 import I8042
from tests.fakes.board import RecordingLine, board_bus


class Board:
    def __init__(self) -> None:
        self.irq1 = RecordingLine()
        self.irq12 = RecordingLine()
        self.resets = 0
        self.controller = I8042(self.irq1, self.irq12, self._reset)
        self.controller.reset()
        self.bus = board_bus(self.controller)

    def _reset(self) -> None:
        self.resets += 1

    def command(self, value: int, data: int | None = None) -> None:
        self.bus.write(0x64, 1, value)
        if data is not None:
            self.data(data)

    def data(self, value: int) -> None:
        self.bus.write(0x60, 1, value)

    def status(self) -> int:
        return self.bus.read(0x64, 1)

    def output(self) -> list[int]:
        """Everything that waits for the guest; mouse bytes have 0x100 added."""
        got = []
        while (status := self.status()) & 1:
            got.append(self.bus.read(0x60, 1) | (0x100 if status & 0x20 else 0))
        return got


@pytest.fixture
def board() -> Board:
    return Board()


def test_linux_controller_probe_succeeds(board: Board) -> None:
    """The steps of i8042_controller_selftest, _init and _check_aux in drivers/input/serio/i8042.c."""
    assert board.output() == []
    board.command(0xAA)
    assert board.output() == [0x55]
    board.command(0x20)
    (command_byte,) = board.output()
    assert command_byte & 0x40  # translated
    board.command(0x60, command_byte & ~0x03 | 0x30)
    board.command(0xD3, 0x5A)
    assert board.output() == [0x15A]
    board.command(0xA9)
    assert board.output() == [0x00]
    board.command(0xA7)
    board.command(0x20)
    assert board.output()[0] & 0x20
    board.command(0xA8)
    board.command(0x20)
    assert not board.output()[0] & 0x20
    board.command(0x60, 0x42)
    board.command(0xD3, 0xA5)
    assert (board.irq12.level, board.irq1.level) == (True, False)
    assert board.output() == [0x1A5]


def test_mouse_multiplexer_is_not_claimed(board: Board) -> None:
    for value in (0xF0, 0x56, 0xA4):
        board.command(0xD3, value)
        assert board.output() == [0x100 | value]


def test_keyboard_answers_reset_identify_and_settings(board: Board) -> None:
    board.command(0x60, 0x00)  # no translation, no interrupts
    for sent, answer in (
        ([0xFF], [0xFA, 0xAA]),
        ([0xF2], [0xFA, 0xAB, 0x83]),
        ([0xED, 0x02], [0xFA, 0xFA]),
        ([0xF3, 0x20], [0xFA, 0xFA]),
        ([0xF0, 0x00], [0xFA, 0xFA, 0x02]),
        ([0xF5], [0xFA]),
        ([0xF4], [0xFA]),
        ([0xF6], [0xFA]),
        ([0xEE], [0xEE]),
        ([0x12], [0xFE]),
    ):
        for value in sent:
            board.data(value)
        assert board.output() == answer
    assert board.controller.inspect()["keyboard"]["leds"] == 0  # F6 restored the defaults


def test_identification_is_translated_too(board: Board) -> None:
    board.data(0xF2)
    assert board.output() == [0xFA, 0xAB, 0x41]


def test_leds_are_remembered(board: Board) -> None:
    board.data(0xED)
    board.data(0x05)
    assert board.controller.inspect()["keyboard"]["leds"] == 5


def test_mouse_answers_basic_commands(board: Board) -> None:
    for sent, answer in (
        ([0xFF], [0xFA, 0xAA, 0x00]),
        ([0xF2], [0xFA, 0x00]),
        ([0xF3, 60], [0xFA, 0xFA]),
        ([0xE8, 3], [0xFA, 0xFA]),
        ([0xE7], [0xFA]),
        ([0xF4], [0xFA]),
        ([0xE9], [0xFA, 0x30, 3, 60]),
        ([0xEB], [0xFA, 0x08, 0, 0]),
        ([0xF6], [0xFA]),
        ([0xBB], [0xFE]),
    ):
        for value in sent:
            board.command(0xD4, value)
        assert board.output() == [0x100 | value for value in answer]


def test_scan_codes_arrive_translated_with_an_edge_each(board: Board) -> None:
    codes = bytes([0x1E, 0x9E, 0xE0, 0x48, 0xE0, 0xC8, 0x2A, 0xAA])
    assert board.controller.type_scancodes(codes) == len(codes)
    assert board.output() == list(codes)
    assert board.irq1.edges == len(codes)
    assert not board.irq1.level


@pytest.mark.parametrize("code", range(1, 0x59))
def test_every_key_survives_the_way_through_set_2(board: Board, code: int) -> None:
    assert board.controller.type_scancodes(bytes([code, code | 0x80])) == 2
    assert board.output() == [code, code | 0x80]


def test_scan_codes_are_set_2_without_translation(board: Board) -> None:
    board.command(0x60, 0x01)
    board.controller.type_scancodes(bytes([0x1E, 0x9E]))
    assert board.output() == [0x1C, 0xF0, 0x1C]


def test_a_guest_can_choose_set_1(board: Board) -> None:
    board.command(0x60, 0x01)
    board.data(0xF0)
    board.data(0x01)
    board.output()
    board.controller.type_scancodes(bytes([0x1E, 0x9E]))
    assert board.output() == [0x1E, 0x9E]


def test_keys_wait_while_the_keyboard_interface_is_off(board: Board) -> None:
    board.command(0xAD)
    board.controller.type_scancodes(b"\x1e")
    assert board.output() == []
    board.command(0xAE)
    assert board.output() == [0x1E]


def test_keys_are_dropped_while_scanning_is_off(board: Board) -> None:
    board.data(0xF5)
    board.output()
    assert board.controller.type_scancodes(b"\x1e") == 1
    assert board.output() == []


def test_key_queue_is_bounded_and_says_so(board: Board) -> None:
    board.command(0xAD)
    assert board.controller.type_scancodes(bytes([0x1E]) * 1000) == 256


def test_reply_queue_is_bounded(board: Board) -> None:
    for _ in range(1000):
        board.command(0xAA)
        board.data(0xF2)
        board.command(0xD4, 0xF2)
    assert len(board.output()) <= 1 + 16 + 256 + 256


def test_reset_pulse_and_output_port_reset(board: Board) -> None:
    board.command(0xFF)
    assert board.resets == 0
    board.command(0xFE)
    board.command(0xD1, 0x02)
    assert board.resets == 2


def test_a20_is_shown_by_the_output_port(board: Board) -> None:
    board.command(0xD1, 0x01)
    assert not board.controller.a20
    board.command(0xDF)
    assert board.controller.a20
    board.command(0xD0)
    assert board.output()[0] & 0x03 == 0x03


def test_state_survives_saving_between_command_and_data(board: Board) -> None:
    board.controller.type_scancodes(bytes([0x1E, 0xE0, 0xC8]))
    board.command(0xD4)
    board.controller.pause()
    state = board.controller.save()

    other = Board()
    other.controller.pause()
    other.controller.restore(state)
    assert other.controller.save() == state
    other.controller.resume()
    assert other.irq1.level
    other.data(0xF2)
    assert other.output() == [0x1E, 0xE0, 0xC8, 0x1FA, 0x100]


def test_nothing_is_raised_while_paused(board: Board) -> None:
    board.controller.pause()
    board.controller.type_scancodes(b"\x1e")
    assert not board.irq1.level
    board.controller.resume()
    assert board.irq1.level


def test_damaged_state_is_refused(board: Board) -> None:
    good = board.controller.save()
    damages: list[tuple[str, object]] = [
        ("version", 9),
        ("ram", b""),
        ("replies", b"x"),
        ("keyboard", None),
        ("mouse", {}),
        ("status", -1),
    ]
    for key, value in damages:
        with pytest.raises(ValueError):
            board.controller.restore({**good, key: value})


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("read", "write", "keys")),
            st.sampled_from((0x60, 0x64)),
            st.integers(0, 255),
            st.sampled_from((1, 2, 4)),
        ),
        max_size=80,
    )
)
def test_no_register_access_raises(pokes: list[tuple[str, int, int, int]]) -> None:
    board = Board()
    for kind, port, value, size in pokes:
        if kind == "read":
            board.bus.read(port, size)
        elif kind == "write":
            board.bus.write(port, size, value)
        else:
            board.controller.type_scancodes(bytes([value]) * size)
    board.controller.inspect()
    board.controller.pause()
    state = board.controller.save()
    fresh = Board()
    fresh.controller.pause()
    fresh.controller.restore(state)
    assert fresh.controller.save() == state
