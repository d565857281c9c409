"""Where everything stands on the board: the one place of its I/O ports, interrupt lines and reserved addresses.

The ports are those of a PC/AT. RAM and its hole below 4 GiB are `pyvmm.core.memory`'s; the hole is used so::

    0xC000_0000  PCI devices
    0xF000_0000  VMBus MMIO, low window
    0xF800_0000  free
    0xFEC0_0000  IOAPIC
    0xFEE0_0000  LAPIC
    0xFEFF_B000  reference time for KVM (`pyvmm.machine.kvm_timers`), KVM's identity map page, its three TSS pages
    0xFF00_0000  firmware ROM of up to 16 MiB, ending at 4 GiB; QEMU's pc-testdev has its buffer at the start
"""

from __future__ import annotations

from pyvmm.core.memory import HOLE_END

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.core.memory import GuestMemory

GIB = 1 << 30

# I/O ports and interrupt lines.
COM1_PORT, COM1_IRQ = 0x3F8, 4
COM2_PORT, COM2_IRQ = 0x2F8, 3
RTC_PORT, RTC_IRQ = 0x70, 8
I8042_DATA_PORT, I8042_COMMAND_PORT = 0x60, 0x64
KEYBOARD_IRQ, MOUSE_IRQ = 1, 12
#: PM1a status and enable, 2 bytes each.
PM1A_EVENT_PORT, PM1A_EVENT_SIZE = 0x600, 4
PM1A_CONTROL_PORT, PM1A_CONTROL_SIZE = 0x604, 2
#: A 32-bit counter of 3.579545 MHz.
PM_TIMER_PORT, PM_TIMER_SIZE = 0x608, 4
SCI_IRQ = 9
RESET_PORT, RESET_VALUE = 0xCF9, 0x06
#: Where the bus master registers of the IDE controller stand until the guest moves them.
IDE_MASTER_PORT = 0xFFA0
#: And the registers of legacy NICs, one after the other: ports, memory (in PCI_MMIO).
NIC_PORT, NIC_MMIO = 0xEC00, 0xEFFF_C000
#: ISA interrupts of the PCI interrupts A to D.
PCI_IRQS = (10, 10, 11, 11)
# Present with --testdev only, where QEMU has them (`devices.legacy.testdev` and its neighbours).
PC_TESTDEV_PORT, PC_TESTDEV_LINES_PORT, PC_TESTDEV_BUFFER = 0xE0, 0x2000, 0xFF00_0000
DEBUG_EXIT_PORT = 0xF4
FW_CFG_PORT = 0x510
HYPERV_TESTDEV_PORT = 0x3000

#: SLP_TYP values of PM1a control (bits 10-12); S5 is what `devices.legacy.acpi_pm` powers off on.
SLEEP_TYPE_S0, SLEEP_TYPE_S5 = 0, 5

# Memory below 1 MiB that is not RAM to the guest: the BIOS data area's end up to 1 MiB.
EBDA_START = 0x9_FC00
RSDP_ADDRESS = 0xE_0000
SMBIOS_ADDRESS = 0xF_0000
HIGH_MEMORY = 0x10_0000

IOAPIC_ADDRESS = 0xFEC0_0000
LAPIC_ADDRESS = 0xFEE0_0000
#: A page that tells KVM of reference time, where KVM runs synthetic timers.
KVM_REFERENCE_TIME_ADDRESS = 0xFEFF_B000
#: KVM_SET_IDENTITY_MAP_ADDR (one page) and KVM_SET_TSS_ADDR (three pages).
KVM_IDENTITY_MAP_ADDRESS = 0xFEFF_C000
KVM_TSS_ADDRESS = 0xFEFF_D000
KVM_PAGES_END = 0xFF00_0000

ROM_END = HOLE_END
ROM_MAX_SIZE = 16 << 20

#: Memory of PCI devices, beside that of VGA below 1 MiB.
PCI_MMIO, PCI_MMIO_SIZE = 0xC000_0000, 768 << 20
VGA_MEMORY, VGA_MEMORY_SIZE = 0xA_0000, 0x2_0000

#: What VMBus devices may place in guest physical space (frame buffer, PCI windows).
VMBUS_LOW_MMIO, VMBUS_LOW_MMIO_SIZE = 0xF000_0000, 128 << 20
VMBUS_HIGH_MMIO_SIZE = 512 << 20


def vmbus_high_mmio(memory_top: int) -> int:
    """Return where the high VMBus window of VMBUS_HIGH_MMIO_SIZE bytes starts: the first GiB boundary above all RAM."""
    return (max(memory_top, HOLE_END) + GIB - 1) // GIB * GIB


_E820_RAM, _E820_RESERVED = 1, 2


def e820(memory: GuestMemory) -> list[tuple[int, int, int]]:
    """Return the memory map as (GPA, size in bytes, type), lowest first: RAM is type 1, reserved type 2."""
    entries = []
    for gpa, size in memory.ram_ranges():
        if gpa == 0:
            entries.append((0, EBDA_START, _E820_RAM))
            entries.append((EBDA_START, HIGH_MEMORY - EBDA_START, _E820_RESERVED))
            entries.append((HIGH_MEMORY, size - HIGH_MEMORY, _E820_RAM))
            entries.append((KVM_REFERENCE_TIME_ADDRESS, KVM_PAGES_END - KVM_REFERENCE_TIME_ADDRESS, _E820_RESERVED))
        else:
            entries.append((gpa, size, _E820_RAM))
    return entries
