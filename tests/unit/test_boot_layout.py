"""The board's addresses do not collide, and the devices agree with them."""

from __future__ import annotations

import itertools

import pytest

from devices.legacy import acpi_pm, fw_cfg, hyperv_testdev, rtc, testdev
from pyvmm.boot import layout
from pyvmm.boot.acpi.tables import RTC_CENTURY
from pyvmm.core.memory import HOLE_END, HOLE_START

GIB = 1 << 30


def test_nothing_in_the_hole_overlaps() -> None:
    ranges = [
        (layout.VMBUS_LOW_MMIO, layout.VMBUS_LOW_MMIO + layout.VMBUS_LOW_MMIO_SIZE),
        (layout.IOAPIC_ADDRESS, layout.IOAPIC_ADDRESS + 0x1000),
        (layout.LAPIC_ADDRESS, layout.LAPIC_ADDRESS + 0x1000),
        (layout.KVM_REFERENCE_TIME_ADDRESS, layout.KVM_REFERENCE_TIME_ADDRESS + 0x1000),
        (layout.KVM_IDENTITY_MAP_ADDRESS, layout.KVM_IDENTITY_MAP_ADDRESS + 0x1000),
        (layout.KVM_TSS_ADDRESS, layout.KVM_TSS_ADDRESS + 0x3000),
        (layout.ROM_END - layout.ROM_MAX_SIZE, layout.ROM_END),
    ]
    assert all(low_end <= high_start for (_, low_end), (high_start, _) in itertools.pairwise(ranges))
    assert ranges[0][0] >= HOLE_START
    assert ranges[-1][1] == HOLE_END
    assert layout.KVM_TSS_ADDRESS + 0x3000 == layout.KVM_PAGES_END


@pytest.mark.parametrize(
    ("memory_top", "window"),
    [
        (128 << 20, 4 * GIB),
        (HOLE_END, 4 * GIB),
        (HOLE_END + 4096, 5 * GIB),
        (65 * GIB, 65 * GIB),
        (65 * GIB + (1 << 20), 66 * GIB),
    ],
)
def test_the_high_vmbus_window_starts_at_the_first_gib_above_ram(memory_top: int, window: int) -> None:
    assert layout.vmbus_high_mmio(memory_top) == window


def test_the_power_management_device_agrees_with_the_tables() -> None:
    assert acpi_pm.PM1_EVENT_PORT == layout.PM1A_EVENT_PORT
    assert acpi_pm.PM1_CONTROL_PORT == layout.PM1A_CONTROL_PORT
    assert acpi_pm.PM_TIMER_PORT == layout.PM_TIMER_PORT
    assert acpi_pm.SCI_IRQ == layout.SCI_IRQ
    assert acpi_pm.S5_SLEEP_TYPE == layout.SLEEP_TYPE_S5


def test_the_test_devices_agree_with_the_layout() -> None:
    assert testdev.DEBUG_EXIT_PORT == layout.DEBUG_EXIT_PORT
    assert testdev.REGISTER_PORT == layout.PC_TESTDEV_PORT
    assert testdev.LINES_PORT == layout.PC_TESTDEV_LINES_PORT
    assert testdev.BUFFER_ADDRESS == layout.PC_TESTDEV_BUFFER
    assert fw_cfg.FW_CFG_PORT == layout.FW_CFG_PORT
    assert hyperv_testdev.HYPERV_TESTDEV_PORT == layout.HYPERV_TESTDEV_PORT


def test_the_rtc_keeps_the_century_where_the_fadt_says() -> None:
    assert rtc.CENTURY == RTC_CENTURY
