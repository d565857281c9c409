"""The PCI bus: who answers configuration accesses, and which ranges come and go."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.legacy.chipset import HostBridge, IsaBridge
from devices.legacy.pci import COMMAND, Bar, PciBus, PciFunction
from pyvmm.core.bus import Bus, BusHandler
from tests.fakes.board import RecordingLine

ONES = 0xFFFF_FFFF
IO, MEMORY = 1, 2


class Answers(BusHandler):
    def __init__(self, value: int) -> None:
        self.value = value

    def read(self, offset: int, size: int) -> int:
        return self.value + offset

    def write(self, offset: int, size: int, value: int) -> None:
        """Dropped."""


class Host:
    """A board with a PCI bus, seen through its ports."""

    def __init__(self) -> None:
        self.pio, self.mmio = Bus("pio"), Bus("mmio")
        self.bus = PciBus(self.pio, self.mmio)
        self.lines = [RecordingLine() for _ in range(16)]
        for port in self.bus.ports():
            self.pio.register(*port)
        card = PciFunction("card", (0x1234, 0x5678), 0x020000, 3)
        card.define(COMMAND, 2, 0, IO | MEMORY)
        card.define_bar(0, Bar(16, Answers(0x40), "card ports"), 0xE000)
        card.define_bar(1, Bar(4096, Answers(0x80), "card memory", memory=True))
        self.bus.add(0, 0, HostBridge())
        self.isa_bridge = IsaBridge((10, 10, 11, 11), lambda number: self.lines[number])
        self.bus.add(7, 0, self.isa_bridge)
        card.connect_interrupt(1, self.isa_bridge.pin(10, 1), 11)
        self.card = card
        self.bus.add(10, 0, card)
        self.bus.reset()

    def high(self) -> set[int]:
        """The ISA interrupts that are asked for."""
        return {number for number, line in enumerate(self.lines) if line.level}

    def select(self, device: int, register: int, function: int = 0, bus: int = 0) -> None:
        self.pio.write(0xCF8, 4, 1 << 31 | bus << 16 | device << 11 | function << 8 | register & 0xFC)

    def get(self, device: int, register: int, size: int = 4, **place: int) -> int:
        self.select(device, register, **place)
        return self.pio.read(0xCFC + register % 4, size)

    def put(self, device: int, register: int, value: int, size: int = 4) -> None:
        self.select(device, register)
        self.pio.write(0xCFC + register % 4, size, value)


@pytest.fixture
def host() -> Host:
    return Host()


def test_the_functions_are_where_hyper_v_has_them(host: Host) -> None:
    assert host.get(0, 0) == 0x1237_8086
    assert host.get(7, 0) == 0x7110_8086
    assert host.get(7, 0x0E, 1) == 0x80, "the ISA bridge has functions beside it"
    assert host.get(0, 8) >> 8 == 0x060000 and host.get(7, 8) >> 8 == 0x060100


@pytest.mark.parametrize("place", [{"device": 1}, {"device": 0, "function": 1}, {"device": 0, "bus": 1}])
def test_where_no_function_is_all_ones_are_read(host: Host, place: dict[str, int]) -> None:
    assert host.get(register=0, **place) == ONES


def test_the_address_takes_double_words_only(host: Host) -> None:
    host.select(7, 0)
    host.pio.write(0xCFB, 1, 0x01)
    host.pio.write(0xCF8, 1, 0x55)
    assert host.pio.read(0xCF8, 4) == 1 << 31 | 7 << 11
    assert host.pio.read(0xCF8, 1) == 0xFF


def test_a_disabled_address_reaches_nothing(host: Host) -> None:
    host.pio.write(0xCF8, 4, 0)
    assert host.pio.read(0xCFC, 4) == ONES


def test_bytes_and_words_of_a_register_are_reached_alone(host: Host) -> None:
    assert host.get(0, 2, 2) == 0x1237
    assert host.get(0, 1, 1) == 0x80
    host.put(10, 0x3C, 0x0B, 1)
    assert host.get(10, 0x3C) == 0x020B
    host.select(0, 0)
    assert host.pio.read(0xCFE, 4) == ONES, "an access across the register's end"


def test_read_only_bits_stay(host: Host) -> None:
    for register in (0, 4, 8, 0x0C, 0x2C):
        before = host.get(0, register)
        host.put(0, register, ONES)
        assert host.get(0, register) == before


def test_what_firmware_writes_to_shadow_and_routing_registers_stays(host: Host) -> None:
    host.put(0, 0x59, 0x3F, 1)
    host.put(0, 0x5A, 0x33, 1)
    host.put(7, 0x60, 0x8F05, 2)
    assert (host.get(0, 0x59, 1), host.get(0, 0x5A, 1), host.get(7, 0x60, 2)) == (0x30, 0x33, 0x8F05)
    host.bus.reset()
    assert (host.get(0, 0x59, 1), host.get(7, 0x60)) == (0, 0x0B0B_0A0A)


def test_ports_are_decoded_while_the_command_register_allows_it(host: Host) -> None:
    assert host.pio.read(0xE001, 1) == 0xFF
    host.put(10, COMMAND, IO, 2)
    assert host.pio.read(0xE001, 1) == 0x41
    host.put(10, COMMAND, 0, 2)
    assert host.pio.read(0xE001, 1) == 0xFF


def test_a_bar_tells_its_size_and_moves(host: Host) -> None:
    host.put(10, COMMAND, IO | MEMORY, 2)
    host.put(10, 0x10, ONES)
    assert host.get(10, 0x10) == 0xFFFF_FFF1
    host.put(10, 0x10, 0xC123)
    assert host.get(10, 0x10) == 0xC121
    assert (host.pio.read(0xE000, 1), host.pio.read(0xC122, 1)) == (0xFF, 0x42)
    host.put(10, 0x14, ONES)
    assert host.get(10, 0x14) == 0xFFFF_F000
    host.put(10, 0x14, 0xC000_0000)
    assert host.mmio.read(0xC000_0004, 4) == 0x84


def test_a_bar_at_zero_or_beyond_all_ports_is_not_decoded(host: Host) -> None:
    host.put(10, COMMAND, IO | MEMORY, 2)
    host.put(10, 0x10, 0)
    assert host.pio.read(0, 1) == 0xFF and host.mmio.read(0, 1) == 0xFF
    host.put(10, 0x10, 0x1_0000)
    assert host.pio.read(0x1_0000, 1) == 0xFF


def test_a_bar_over_another_device_is_decoded_once_that_is_gone(host: Host) -> None:
    host.put(10, COMMAND, IO, 2)
    host.put(10, 0x10, 0xCF0)  # reaches over the configuration ports
    assert host.get(10, 0) == 0x5678_1234
    assert host.pio.read(0xCF0, 1) == 0xFF
    host.put(10, 0x10, 0xD000)
    assert host.pio.read(0xD000, 1) == 0x40


def test_a_reset_takes_what_was_decoded_away(host: Host) -> None:
    host.put(10, COMMAND, IO, 2)
    host.put(10, 0x10, 0xD000)
    host.bus.reset()
    assert host.pio.read(0xD000, 1) == 0xFF
    assert host.get(10, 0x10) == 0xE001


def test_saved_state_decodes_the_same(host: Host) -> None:
    host.put(10, COMMAND, IO, 2)
    host.put(10, 0x10, 0xD000)
    host.select(7, 0x60)
    other = Host()
    other.bus.restore(host.bus.save())
    assert other.pio.read(0xD001, 1) == 0x41
    assert other.pio.read(0xCFC, 1) == 10, "the address register is part of it"


@pytest.mark.parametrize(("device", "pin", "irq"), [(1, 0, 10), (10, 0, 10), (10, 1, 11), (10, 2, 11), (10, 3, 10)])
def test_an_interrupt_pin_leads_to_the_interrupt_that_acpi_names(host: Host, device: int, pin: int, irq: int) -> None:
    line = host.isa_bridge.pin(device, pin)
    line.set(True)
    assert host.high() == {irq}
    assert host.isa_bridge.irq(device, pin) == irq
    line.set(False)
    assert host.high() == set()


def test_functions_share_an_interrupt_that_is_high_while_one_of_them_asks(host: Host) -> None:
    lines = [host.isa_bridge.pin(10, pin) for pin in (0, 3)] + [host.isa_bridge.pin(14, 0)]
    for line in lines:
        line.set(True)
    for line in lines:
        assert host.high() == {10}
        line.set(False)
    assert host.high() == set()


def test_firmware_leads_interrupts_elsewhere_while_they_are_high(host: Host) -> None:
    line = host.isa_bridge.pin(10, 0)  # PIRQ B
    line.set(True)
    host.put(7, 0x61, 5, 1)
    assert host.high() == {5}
    host.put(7, 0x61, 0x80 | 5, 1)
    assert host.high() == set()
    host.put(7, 0x61, 2, 1)
    assert host.high() == set(), "a reserved interrupt"
    host.put(7, 0x61, 5, 1)
    host.bus.reset()
    assert host.high() == set()


def test_a_function_tells_its_pin_and_its_interrupt(host: Host) -> None:
    assert host.get(10, 0x3C, 2) == 0x020B
    host.put(10, 0x3C, 0xFF09, 2)
    assert host.get(10, 0x3C, 2) == 0x0209
    host.card.interrupt.set(True)
    assert host.high() == {11}


def _other_function(state: dict[str, Any]) -> None:
    state["functions"]["03.0"] = {}


def _other_identity(state: dict[str, Any]) -> None:
    state["functions"]["0a.0"]["config"] = struct.pack("<H254x", 0x8086)


def _short(state: dict[str, Any]) -> None:
    state["functions"]["0a.0"]["config"] = b""


@pytest.mark.parametrize("damage", [_other_function, _other_identity, _short])
def test_saved_state_of_another_machine_is_refused(host: Host, damage: Any) -> None:
    state = host.bus.save()
    damage(state)
    with pytest.raises(ValueError, match="saved state"):
        host.bus.restore(state)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 7, 10, 31]),
            st.integers(0, 255),
            st.sampled_from([1, 2, 4]),
            st.one_of(st.integers(0, ONES), st.sampled_from([0, ONES, 0xCF0, 0x60])),
        ),
        max_size=40,
    )
)
def test_whatever_is_written_the_bus_stays_usable(writes: list[tuple[int, int, int, int]]) -> None:
    host = Host()
    for device, register, size, value in writes:
        host.put(device, register, value & (1 << 8 * size) - 1, size)
        host.get(device, register, size)
    assert host.get(0, 0) == 0x1237_8086
    other = Host()
    other.bus.restore(host.bus.save())
    assert other.pio.inspect()["ranges"] == host.pio.inspect()["ranges"]
