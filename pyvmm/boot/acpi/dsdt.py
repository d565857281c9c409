"""The DSDT: the board's devices as ACPI names them."""

from __future__ import annotations

from pyvmm.boot import layout
from pyvmm.boot.acpi import aml


def definition_block(memory_top: int, cpus: int, *, vmbus: bool, com1: bool, i8042: bool) -> bytes:
    """Return the AML of the DSDT, without the table's header. The arguments are those of `build_acpi`."""
    board = [_processor(index) for index in range(cpus)]
    board += [_interrupt_controller(), _timer(), _rtc(), _pci()]
    if com1:
        board.append(_com1())
    if i8042:
        board += [_keyboard(), _mouse()]
    if vmbus:
        board.append(_vmbus(memory_top))
    return (
        _sleep_state("_S0", layout.SLEEP_TYPE_S0)
        + _sleep_state("_S5", layout.SLEEP_TYPE_S5)
        + aml.scope("\\_SB", *board)
    )


def _sleep_state(name: str, sleep_type: int) -> bytes:
    return aml.name(name, aml.package(*(aml.integer(value) for value in (sleep_type, sleep_type, 0, 0))))


def _legacy(name: str, pnp_id: str, *resources: bytes) -> bytes:
    return aml.device(name, aml.name("_HID", aml.eisa_id(pnp_id)), aml.name("_CRS", aml.resources(*resources)))


def _processor(index: int) -> bytes:
    """Return a processor whose _UID is the one that the MADT pairs with its APIC id."""
    return aml.device(f"C{index:03X}", aml.name("_HID", aml.string("ACPI0007")), aml.name("_UID", aml.integer(index)))


def _interrupt_controller() -> bytes:
    return _legacy("PIC", "PNP0000", aml.io(0x20, 2), aml.io(0xA0, 2), aml.io(0x4D0, 2), aml.irq_no_flags(2))


def _timer() -> bytes:
    return _legacy("TIMR", "PNP0100", aml.io(0x40, 4), aml.irq_no_flags(0))


def _rtc() -> bytes:
    return _legacy("RTC", "PNP0B00", aml.io(layout.RTC_PORT, 2), aml.irq_no_flags(layout.RTC_IRQ))


def _com1() -> bytes:
    return _legacy("COM1", "PNP0501", aml.io(layout.COM1_PORT, 8), aml.irq_no_flags(layout.COM1_IRQ))


def _keyboard() -> bytes:
    return _legacy(
        "KBD",
        "PNP0303",
        aml.io(layout.I8042_DATA_PORT, 1),
        aml.io(layout.I8042_COMMAND_PORT, 1),
        aml.irq_no_flags(layout.KEYBOARD_IRQ),
    )


def _mouse() -> bytes:
    return _legacy("MOUS", "PNP0F13", aml.irq_no_flags(layout.MOUSE_IRQ))


def _pci() -> bytes:
    """Return the PCI host bridge.

    Interrupts A to D go to fixed inputs of the IOAPIC, shifted by one from device to device as on an i440FX board; they
    are the ISA interrupts that the ISA bridge's registers name.
    """
    windows = aml.resources(
        aml.bus_numbers(0, 256),
        aml.io(0xCF8, 8),
        aml.io_window(0, 0xCF8),
        aml.io_window(0xD00, 0xF300),
        aml.dword_memory(layout.VGA_MEMORY, layout.VGA_MEMORY_SIZE, cacheable=True),
        aml.dword_memory(layout.PCI_MMIO, layout.PCI_MMIO_SIZE),
    )
    routes = [
        aml.package(
            aml.integer(device << 16 | 0xFFFF),
            aml.integer(pin),
            aml.integer(0),
            aml.integer(layout.PCI_IRQS[(device - 1 + pin) % 4]),
        )
        for device in range(1, 32)
        for pin in range(4)
    ]
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name("_CRS", windows),
        aml.name("_PRT", aml.package(*routes)),
    )


def _vmbus(memory_top: int) -> bytes:
    """Return the VMBus device inside the module device whose memory windows it may hand out.

    Guests look for the *string* "VMBus" as _HID and take their MMIO from the first ancestor with memory in its
    _CRS (Linux, drivers/hv/vmbus_drv.c). The _STA/_DIS/_PS0/_PS3 set is the one of OpenVMM's dsdt.rs; its _ADR, which
    the specification forbids beside a _HID and Windows does without, is left out.
    """
    status = aml.name_string("STA")
    bus = aml.device(
        "VMBS",
        aml.name("STA", aml.integer(0xF)),
        aml.name("_DDN", aml.string("VMBUS")),
        aml.name("_HID", aml.string("VMBus")),
        aml.name("_UID", aml.integer(0)),
        aml.method("_DIS", aml.bit_and(status, aml.integer(0xD), status)),
        aml.method("_PS0", aml.bit_or(status, aml.integer(0xF), status)),
        aml.method("_STA", aml.return_value(status)),
        aml.method("_PS3"),
        aml.name("_CRS", aml.resources()),
    )
    windows = aml.resources(
        aml.qword_memory(layout.VMBUS_LOW_MMIO, layout.VMBUS_LOW_MMIO_SIZE),
        aml.qword_memory(layout.vmbus_high_mmio(memory_top), layout.VMBUS_HIGH_MMIO_SIZE),
    )
    return aml.device(
        "VMOD",
        aml.name("_HID", aml.string("ACPI0004")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", windows),
        bus,
    )
