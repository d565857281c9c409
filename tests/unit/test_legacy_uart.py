from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.legacy.uart import Uart
from tests.fakes.board import ManualClock, ManualTimers, RecordingLine

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FCR = IIR


class Port:
    """A UART with what stands around it."""

    def __init__(self, timers: bool = False) -> None:
        self.irq = RecordingLine()
        self.sent = bytearray()
        self.chunks = 0
        self.clock = ManualClock()
        self.timers = ManualTimers(self.clock)
        self.uart = Uart("uart0", self.irq, self._sink, self.clock, self.timers.call_at if timers else None)
        self.uart.reset()

    def _sink(self, data: bytes) -> None:
        self.sent += data
        self.chunks += 1

    def read(self, offset: int) -> int:
        return self.uart.read(offset, 1)

    def write(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)


@pytest.fixture
def port() -> Port:
    return Port()


def test_linux_autoconfiguration_finds_a_16550a(port: Port) -> None:
    """The steps of autoconfig() in drivers/tty/serial/8250/8250_port.c."""
    port.write(IER, 0)
    assert port.read(IER) & 0x0F == 0
    port.write(IER, 0x0F)
    assert port.read(IER) & 0x0F == 0x0F
    port.write(IER, 0)
    port.write(MCR, 0x1A)
    assert port.read(MSR) & 0xF0 == 0x90
    port.write(MCR, 0)
    port.write(LCR, 0xBF)
    port.write(FCR, 0)
    port.write(LCR, 0)
    port.write(FCR, 1)
    assert port.read(IIR) >> 6 == 3  # a 16550A
    port.write(LCR, 0x80)
    assert port.read(IIR) != 0  # and no 16650
    port.write(LCR, 0)
    port.write(FCR, 0x21)
    port.write(LCR, 0x80)
    port.write(FCR, 0x21)
    assert port.read(IIR) >> 5 == 6  # and no 16750
    port.write(LCR, 0)
    port.write(IER, 0x40)
    assert port.read(IER) == 0  # and no XScale


def test_bytes_written_reach_the_sink_in_order(port: Port) -> None:
    for value in b"hello":
        port.write(DATA, value)
    assert port.sent == b"hello"


def test_output_is_gathered_until_its_deadline() -> None:
    port = Port(timers=True)
    for value in b"hello":
        port.write(DATA, value)
    assert port.sent == b""
    assert len(port.timers.pending) == 1
    port.timers.advance(5_000_000)
    assert port.sent == b"hello"
    assert port.chunks == 1


def test_a_full_output_buffer_does_not_wait_for_its_deadline() -> None:
    port = Port(timers=True)
    for _ in range(1024):
        port.write(DATA, 0x41)
    assert (len(port.sent), port.chunks) == (1024, 1)


def test_pausing_empties_the_output_buffer() -> None:
    port = Port(timers=True)
    port.write(DATA, 0x41)
    port.uart.pause()
    assert port.sent == b"A"


def test_transmitter_interrupt_comes_with_enabling_and_after_each_write(port: Port) -> None:
    port.write(MCR, 0x08)
    port.write(IER, 2)
    assert port.irq.edges == 1
    assert port.read(IIR) & 0x0F == 0x02
    assert not port.irq.level  # reading the cause acknowledges it
    assert port.read(IIR) & 0x0F == 0x01
    for value in b"0123456789abcdef":
        port.write(DATA, value)
    assert (port.irq.level, port.irq.edges) == (True, 2)
    assert port.sent == b"0123456789abcdef"


def test_enabling_the_transmitter_interrupt_again_raises_it_again(port: Port) -> None:
    port.write(MCR, 0x08)
    for _ in range(2):
        port.write(IER, 2)
        assert port.read(IIR) & 0x0F == 0x02
        port.write(IER, 0)


def test_out2_gates_the_interrupt(port: Port) -> None:
    port.write(IER, 2)
    assert not port.irq.level
    port.write(MCR, 0x08)
    assert port.irq.level


def test_input_below_the_trigger_level_is_a_character_timeout(port: Port) -> None:
    port.write(FCR, 0xC1)
    port.write(MCR, 0x08)
    port.write(IER, 1)
    assert port.uart.receive(b"ab") == 2
    assert port.read(IIR) == 0xCC
    assert port.uart.receive(b"c" * 12) == 12
    assert port.read(IIR) == 0xC4
    got = bytes(port.read(DATA) for _ in range(14))
    assert got == b"ab" + b"c" * 12
    assert port.read(LSR) == 0x60
    assert not port.irq.level


def test_without_fifos_one_byte_is_held_and_none_is_lost(port: Port) -> None:
    port.uart.receive(b"xyz")
    got = bytearray()
    while port.read(LSR) & 1:
        got.append(port.read(DATA))
    assert got == b"xyz"


def test_input_queue_is_bounded(port: Port) -> None:
    port.write(FCR, 1)
    assert port.uart.receive(bytes(10_000)) == 4096
    assert port.uart.receive(bytes(10_000)) == 16  # the room that the FIFO made
    assert port.uart.receive(b"x") == 0


def test_clearing_the_receiver_drops_the_fifo_only(port: Port) -> None:
    port.write(FCR, 1)
    port.uart.receive(b"0123456789abcdefREST")
    port.write(FCR, 3)
    assert bytes(port.read(DATA) for _ in range(4)) == b"REST"


def test_loopback_receives_what_is_sent_and_overruns(port: Port) -> None:
    port.write(FCR, 1)
    port.write(MCR, 0x10)
    for value in range(17):
        port.write(DATA, value)
    assert port.sent == b""
    assert port.read(LSR) == 0x63  # data and overrun
    assert port.read(LSR) == 0x61  # reading clears the overrun
    assert [port.read(DATA) for _ in range(16)] == list(range(16))


def test_loopback_shows_modem_outputs_as_inputs_with_changes(port: Port) -> None:
    port.write(MCR, 0x10)
    port.read(MSR)
    port.write(MCR, 0x11)
    assert port.read(MSR) == 0x22
    assert port.read(MSR) == 0x20


def test_modem_status_interrupt_follows_a_change(port: Port) -> None:
    port.write(IER, 8)
    port.write(MCR, 0x18)
    assert port.irq.level
    assert port.read(IIR) & 0x0F == 0
    port.read(MSR)
    assert not port.irq.level


def test_line_status_comes_first(port: Port) -> None:
    port.write(IER, 7)
    port.write(MCR, 0x10)
    port.write(DATA, 1)
    port.write(DATA, 2)
    assert port.read(IIR) & 0x0F == 6
    port.read(LSR)
    assert port.read(IIR) & 0x0F == 4


def test_divisor_and_scratch_hold_what_is_written(port: Port) -> None:
    port.write(LCR, 0x83)
    port.write(DATA, 0x34)
    port.write(IER, 0x12)
    assert (port.read(DATA), port.read(IER)) == (0x34, 0x12)
    port.write(LCR, 0x03)
    assert port.read(IER) == 0
    port.write(SCR, 0x5A)
    assert port.read(SCR) == 0x5A
    assert port.sent == b""


def test_wide_accesses_touch_the_registers_in_turn(port: Port) -> None:
    port.uart.write(SCR, 2, 0x1234)
    assert port.read(SCR) == 0x34
    assert port.uart.read(SCR, 2) == 0xFF34


def test_input_while_paused_waits_for_resume(port: Port) -> None:
    port.write(MCR, 0x08)
    port.write(IER, 1)
    port.uart.pause()
    port.uart.receive(b"x")
    assert not port.irq.level
    assert not port.read(LSR) & 1
    port.uart.resume()
    assert port.irq.level
    assert port.read(DATA) == ord("x")


def test_state_survives_saving_in_the_middle_of_things(port: Port) -> None:
    port.write(FCR, 0x41)
    port.write(MCR, 0x0B)
    port.write(IER, 3)
    port.write(SCR, 7)
    port.uart.receive(b"0123456789abcdefREST")
    port.read(DATA)
    port.uart.pause()
    state = port.uart.save()

    other = Port()
    other.uart.pause()
    other.uart.restore(state)
    assert other.uart.save() == state
    other.uart.resume()
    assert other.irq.level
    assert other.read(IIR) == 0xC4
    assert bytes(other.read(DATA) for _ in range(19)) == b"123456789abcdefREST"
    assert other.read(IIR) == 0xC2  # the transmitter's interrupt was still waiting
    assert other.read(SCR) == 7


def test_damaged_state_is_refused(port: Port) -> None:
    good = port.uart.save()
    for damage in ({"version": 2}, {"ier": 256}, {"ier": "x"}, {"fifo": bytes(17)}, {"line": 1}, {"lcr": None}):
        with pytest.raises(ValueError):
            port.uart.restore({**good, **damage})


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 7),
            st.sampled_from((1, 2, 4)),
            st.integers(0, 2**32 - 1),
            st.binary(max_size=9),
        ),
        max_size=60,
    )
)
def test_no_register_access_raises(pokes: list[tuple[bool, int, int, int, bytes]]) -> None:
    port = Port(timers=True)
    for is_write, offset, size, value, data in pokes:
        port.uart.receive(data)
        if is_write:
            port.uart.write(offset, size, value)
        else:
            assert 0 <= port.uart.read(offset, size) < 1 << (8 * size)
    port.uart.pause()
    state = port.uart.save()
    fresh = Port()
    fresh.uart.pause()
    fresh.uart.restore(state)
    assert fresh.uart.save() == state
    fresh.uart.resume()
    port.uart.inspect()
