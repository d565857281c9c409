"""The ACPI tables around the DSDT, and all of them laid out for guest memory.

Source: ACPI specification 6.5, sections 5.2.5 (RSDP) to 5.2.12 (MADT).
"""

from __future__ import annotations

import struct

from pyvmm.boot import layout
from pyvmm.boot.acpi import dsdt

MAX_CPUS = 64

_OEM_ID = b"PYVMM "
_OEM_TABLE_ID = b"PYVMM   "
_CREATOR_ID = b"PYVM"
_FACS_ALIGNMENT = 64

# FADT flags (table 5.10): WBINVD, PROC_C1, no fixed sleep button (but a power button, bit 4 clear), RTC_S4, a 32-bit
# PM timer, RESET_REG, USE_PLATFORM_CLOCK.
_FADT_FLAGS = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 10 | 1 << 15
# IAPC_BOOT_ARCH (table 5.11).
_BOOT_LEGACY_DEVICES, _BOOT_8042, _BOOT_NO_VGA = 1 << 0, 1 << 1, 1 << 2
RTC_CENTURY = 0x32

_POLARITY_HIGH, _TRIGGER_LEVEL = 1 << 0, 3 << 2


def build_acpi(
    memory_top: int, cpus: int, *, vmbus: bool = True, com1: bool = True, i8042: bool = True
) -> list[tuple[int, bytes]]:
    """Return the tables as (GPA, bytes), the RSDP first, at layout.RSDP_ADDRESS.

    `memory_top` is the first GPA above all RAM, `cpus` 1 to MAX_CPUS; VP n has APIC id n. The others say which
    devices the guest is told of. Raises ValueError for any other number of CPUs.
    """
    if not 1 <= cpus <= MAX_CPUS:
        raise ValueError(f"{cpus} CPUs, but ACPI tables are made for 1 to {MAX_CPUS}")
    placed: list[tuple[int, bytes]] = []

    def place(table: bytes) -> int:
        last_gpa, last = placed[-1] if placed else (layout.RSDP_ADDRESS, bytes(_FACS_ALIGNMENT))
        gpa = (last_gpa + len(last) + _FACS_ALIGNMENT - 1) // _FACS_ALIGNMENT * _FACS_ALIGNMENT
        placed.append((gpa, table))
        return gpa

    facs = place(_facs())
    block = dsdt.definition_block(memory_top, cpus, vmbus=vmbus, com1=com1, i8042=i8042)
    fadt = place(_fadt(facs, place(_table(b"DSDT", 2, block)), i8042))
    madt = place(_madt(cpus))
    xsdt = place(_table(b"XSDT", 1, struct.pack("<2Q", fadt, madt)))
    return [(layout.RSDP_ADDRESS, _rsdp(xsdt)), *placed]


def _checksum(data: bytes | bytearray) -> int:
    """Return the byte that makes the sum of all bytes 0."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    length = 36 + len(body)
    table = bytearray(
        struct.pack("<4sIBB6s8sI4sI", signature, length, revision, 0, _OEM_ID, _OEM_TABLE_ID, 1, _CREATOR_ID, 1)
    )
    table += body
    table[9] = _checksum(table)
    return bytes(table)


def _rsdp(xsdt: int) -> bytes:
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM_ID, 2, 0, 36, xsdt, 0))
    rsdp[8] = _checksum(rsdp[:20])
    rsdp[32] = _checksum(rsdp)
    return bytes(rsdp)


def _facs() -> bytes:
    """Return a FACS of version 2, which no one has to find: it has neither checksum nor XSDT entry."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def _port(port: int, size: int, access: int | None = None) -> bytes:
    """Return the Generic Address Structure of `size` bytes of I/O ports, accessed by `access` bytes at a time."""
    access_size = {1: 1, 2: 2, 4: 3}[access or size]
    return struct.pack("<BBBBQ", 1, 8 * size, 0, access_size, port)


def _fadt(facs: int, dsdt_gpa: int, i8042: bool) -> bytes:
    """Return a FADT of revision 6 for a board that is in ACPI mode from the start (no SMI command port).

    The power-management blocks are given both as 32-bit ports and as GAS: hypervisor loaders of guests refuse
    an empty PM1a GAS.
    """
    boot_flags = _BOOT_LEGACY_DEVICES | _BOOT_NO_VGA | (_BOOT_8042 if i8042 else 0)
    nothing = bytes(12)
    body = struct.pack("<IIBBHIBBBB", facs, dsdt_gpa, 0, 0, layout.SCI_IRQ, 0, 0, 0, 0, 0)
    body += struct.pack("<IIII", layout.PM1A_EVENT_PORT, 0, layout.PM1A_CONTROL_PORT, 0)
    body += struct.pack("<IIII", 0, layout.PM_TIMER_PORT, 0, 0)
    body += struct.pack("<8B", layout.PM1A_EVENT_SIZE, layout.PM1A_CONTROL_SIZE, 0, layout.PM_TIMER_SIZE, 0, 0, 0, 0)
    # Latencies above 100 and 1000 us say that there are no C2 and C3.
    body += struct.pack("<HHHHBBBBBHBI", 101, 1001, 0, 0, 0, 0, 0, 0, RTC_CENTURY, boot_flags, 0, _FADT_FLAGS)
    body += _port(layout.RESET_PORT, 1) + struct.pack("<BHB", layout.RESET_VALUE, 0, 0)
    # X_FIRMWARE_CTRL is 0 where FIRMWARE_CTRL is used.
    body += struct.pack("<QQ", 0, dsdt_gpa)
    body += _port(layout.PM1A_EVENT_PORT, layout.PM1A_EVENT_SIZE, 2) + nothing
    body += _port(layout.PM1A_CONTROL_PORT, layout.PM1A_CONTROL_SIZE) + nothing
    body += nothing + _port(layout.PM_TIMER_PORT, layout.PM_TIMER_SIZE)
    # GPE0, GPE1, sleep control, sleep status and the hypervisor's vendor.
    body += 4 * nothing + bytes(8)
    return _table(b"FACP", 6, body)


def _madt(cpus: int) -> bytes:
    """Return the MADT of a board with 8259s and one IOAPIC, on whose input n is ISA IRQ n; the SCI is level triggered.

    A PC has IRQ 0 on input 2, but KVM connects GSI 0, its PIT's, to input 0 unless it is given other routes.
    """
    body = struct.pack("<II", layout.LAPIC_ADDRESS, 1)
    for index in range(cpus):
        body += struct.pack("<BBBBI", 0, 8, index, index, 1)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, layout.IOAPIC_ADDRESS, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, layout.SCI_IRQ, layout.SCI_IRQ, _POLARITY_HIGH | _TRIGGER_LEVEL)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)
    return _table(b"APIC", 5, body)
