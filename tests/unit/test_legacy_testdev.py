"""QEMU's devices for test programs, and its firmware configuration device."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.legacy.fw_cfg import FwCfg
from devices.legacy.testdev import BUFFER_ADDRESS, BUFFER_SIZE, DebugExit, PcTestdev
from pyvmm.core.bus import Bus
from tests.fakes.board import RecordingLine, board_bus

GIB = 1 << 30


@pytest.mark.parametrize(("size", "value", "status"), [(1, 0, 1), (1, 0x10, 0x21), (2, 0x1234, 0x2469), (4, 1, 3)])
def test_debug_exit_reports_qemus_status(size: int, value: int, status: int) -> None:
    seen: list[int] = []
    board_bus(DebugExit(seen.append)).write(0xF4, size, value)
    assert seen == [status]


class Testdev:
    __test__ = False

    def __init__(self) -> None:
        self.flushed: list[int] = []
        self.lines = [RecordingLine() for _ in range(24)]
        self.device = PcTestdev(self.flushed.append, list(self.lines))
        self.device.reset()
        self.pio = board_bus(self.device)
        self.mmio = Bus("mmio")
        for window in self.device.memory():
            self.mmio.register(*window)


def test_the_register_is_read_and_written_in_parts_at_both_places() -> None:
    bus = Testdev().pio
    bus.write(0xE0, 4, 0x44332211)
    assert [bus.read(0xE0 + i, 1) for i in range(4)] == [0x11, 0x22, 0x33, 0x44]
    bus.write(0xE9, 2, 0xBBAA)
    assert bus.read(0xE0, 4) == 0x44BBAA11
    assert bus.read(0xEA, 2) == 0x44BB


def test_a_flush_takes_the_page_of_a_32_bit_address() -> None:
    testdev = Testdev()
    testdev.pio.write(0xE4, 4, 0x12345678)
    testdev.pio.write(0xE4, 2, 0x5678)
    assert testdev.flushed == [0x12345000]


def test_a_byte_sets_the_level_of_its_interrupt_line() -> None:
    testdev = Testdev()
    testdev.pio.write(0x2000 + 23, 1, 0x80)
    testdev.pio.write(0x2000 + 5, 1, 1)
    testdev.pio.write(0x2000 + 5, 1, 0)
    testdev.pio.write(0x2000 + 6, 2, 0x0101)
    assert [number for number, line in enumerate(testdev.lines) if line.level] == [23]
    assert [number for number, line in enumerate(testdev.lines) if line.edges] == [5, 23]


def test_the_buffer_keeps_what_is_written_up_to_its_end() -> None:
    bus = Testdev().mmio
    bus.write(BUFFER_ADDRESS + 0x100, 8, 0x8877665544332211)
    assert bus.read(BUFFER_ADDRESS + 0x102, 4) == 0x66554433
    end = BUFFER_ADDRESS + BUFFER_SIZE
    bus.write(end - 4, 8, 0x8877665544332211)
    assert bus.read(end - 4, 8) == 0x44332211


def test_pc_testdev_is_saved_restored_and_reset() -> None:
    old, new = Testdev(), Testdev()
    old.pio.write(0xE0, 4, 0x01020304)
    old.mmio.write(BUFFER_ADDRESS + 9, 4, 0x0A0B0C0D)
    new.device.restore(old.device.save())
    assert new.device.inspect() == {"register": 0x01020304}
    assert new.mmio.read(BUFFER_ADDRESS + 9, 4) == 0x0A0B0C0D
    for broken in ({"register": -1}, {"buffer": b"short"}, {"version": 2}):
        with pytest.raises(ValueError, match="saved state"):
            new.device.restore({**old.device.save(), **broken})
    new.device.reset()
    assert new.device.save() == Testdev().device.save()


def fw_cfg_item(bus: Bus, key: int, count: int) -> bytes:
    bus.write(0x510, 2, key)
    return bytes(bus.read(0x511, 1) for _ in range(count))


@pytest.mark.parametrize(
    ("key", "content"),
    [
        (0x00, b"QEMU"),
        (0x01, b"\x01\0\0\0"),
        (0x03, (5 * GIB).to_bytes(8, "little")),
        (0x05, b"\x03\0"),
        (0x0F, b"\x03\0"),
        (0x19, bytes(4)),
        (0x4005, b"\x03\0"),
        (0x8005, b""),
        (0x7777, b""),
    ],
)
def test_fw_cfg_has_its_items_and_zeros_after_them(key: int, content: bytes) -> None:
    bus = board_bus(FwCfg(5 * GIB, 3))
    assert fw_cfg_item(bus, key, len(content) + 3) == content + bytes(3)
    assert fw_cfg_item(bus, key, len(content)) == content


def test_fw_cfg_takes_only_whole_selectors_and_no_data() -> None:
    bus = board_bus(FwCfg(GIB, 3))
    bus.write(0x510, 2, 5)
    bus.write(0x510, 1, 0)
    bus.write(0x511, 1, 0x77)
    bus.write(0x511, 2, 0)
    assert bus.read(0x511, 1) == 3
    assert bus.read(0x510, 2) == 0xFFFF


def test_fw_cfg_is_saved_restored_and_reset() -> None:
    old, new = FwCfg(GIB, 3), FwCfg(GIB, 3)
    fw_cfg_item(board_bus(old), 0, 2)
    new.restore(old.save())
    assert new.inspect() == {"selected": 0, "offset": 2}
    assert board_bus(new).read(0x511, 1) == ord("M")
    for broken in ({"selected": 0x10000}, {"offset": 5}, {"selected": 0x99}, {"version": 0}):
        with pytest.raises(ValueError, match="saved state"):
            new.restore({**old.save(), **broken})
    new.reset()
    assert board_bus(new).read(0x511, 1) == ord("Q")


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from([*range(0xE0, 0xEC), *range(0x2000, 0x2018), 0x510, 0x511, 0xF4]),
            st.sampled_from([1, 2, 4]),
            st.integers(0, 2**32 - 1),
        )
    )
)
def test_no_access_raises(pokes: list[tuple[bool, int, int, int]]) -> None:
    testdev = Testdev()
    seen: list[Any] = []
    bus = board_bus(testdev.device, FwCfg(GIB, 1), DebugExit(seen.append))
    for is_write, port, size, value in pokes:
        if is_write:
            bus.write(port, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= bus.read(port, size) < 1 << 8 * size
