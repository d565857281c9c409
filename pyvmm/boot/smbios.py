"""SMBIOS tables: what the machine says it is.

Source: DMTF DSP0134, SMBIOS reference specification 3.0, chapters 5 to 7.
"""

from __future__ import annotations

import struct

from pyvmm.boot.layout import SMBIOS_ADDRESS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: Manufacturer, product and version by identity. With the real strings of Hyper-V, Linux's ata_piix leaves emulated
#: IDE disks alone (`piix_ignore_devices_quirk`), so that disks must be offered by VMBus; use the other one otherwise.
IDENTITIES = {
    "hyper-v": ("Microsoft Corporation", "Virtual Machine", "7.0"),
    "pyvmm": ("pyvmm", "pyvmm virtual machine", "1.0"),
}

_TABLE_OFFSET = 0x40
_CHASSIS_HANDLE, _MEMORY_ARRAY_HANDLE = 0x300, 0x1000
_NO_HANDLE, _NO_ERROR_HANDLE = 0xFFFF, 0xFFFE


def build_smbios(
    ram_ranges: Iterable[tuple[int, int]], cpus: int, uuid: bytes, identity: str = "hyper-v"
) -> list[tuple[int, bytes]]:
    """Return the tables as (GPA, bytes): entry points of SMBIOS 2.8 and 3.0, at layout.SMBIOS_ADDRESS, and structures.

    `ram_ranges` are (GPA, bytes), `cpus` at most 255; `uuid` is 16 bytes in SMBIOS order (`uuid.UUID.bytes_le`).
    Raises ValueError for a UUID of another length or an identity that is not in IDENTITIES.
    """
    if len(uuid) != 16:
        raise ValueError(f"a UUID has 16 bytes, not {len(uuid)}")
    if identity not in IDENTITIES:
        raise ValueError(f"unknown SMBIOS identity {identity!r}, known are {', '.join(IDENTITIES)}")
    manufacturer, product, version = IDENTITIES[identity]
    structures = [
        _bios(),
        _system(manufacturer, product, version, uuid),
        _board(manufacturer, product, version),
        _chassis(manufacturer, version),
        _processor(cpus),
        *_memory(list(ram_ranges)),
        _structure(32, 0x2000, bytes(7)),  # Boot status: no errors.
        _structure(127, 0x7F00, b""),
    ]
    table = b"".join(structures)
    table_gpa = SMBIOS_ADDRESS + _TABLE_OFFSET
    largest = max(len(structure) for structure in structures)
    legacy = bytearray(struct.pack("<4sBBBBHB5x", b"_SM_", 0, 0x1F, 2, 8, largest, 0))
    legacy += struct.pack("<5sBHIHB", b"_DMI_", 0, len(table), table_gpa, len(structures), 0x28)
    legacy[0x15] = _checksum(legacy[0x10:])
    legacy[4] = _checksum(legacy)
    entry = bytearray(struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, 0x18, 3, 0, 0, 1, 0, len(table), table_gpa))
    entry[5] = _checksum(entry)
    return [(SMBIOS_ADDRESS, bytes(legacy)), (SMBIOS_ADDRESS + 0x20, bytes(entry)), (table_gpa, table)]


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _structure(kind: int, handle: int, body: bytes, *strings: str) -> bytes:
    """Return a structure; its `body` refers to `strings` by numbers from 1."""
    head = struct.pack("<BBH", kind, 4 + len(body), handle)
    return head + body + (b"".join(text.encode("ascii") + b"\0" for text in strings) or b"\0") + b"\0"


def _bios() -> bytes:
    # Characteristics: not given (bit 3); extension byte 2: describes a virtual machine (bit 4). Releases: not given.
    body = struct.pack("<BBHBBQBBBBBB", 1, 2, 0, 3, 0, 1 << 3, 0, 1 << 4, 0xFF, 0xFF, 0xFF, 0xFF)
    return _structure(0, 0, body, "pyvmm", "1.0", "01/01/2026")


def _system(manufacturer: str, product: str, version: str, uuid: bytes) -> bytes:
    # Woken by the power switch.
    body = struct.pack("<BBBB16sBBB", 1, 2, 3, 0, uuid, 6, 0, 4)
    return _structure(1, 0x100, body, manufacturer, product, version, "Virtual Machine")


def _board(manufacturer: str, product: str, version: str) -> bytes:
    # A hosting board of type motherboard.
    body = struct.pack("<BBBBBBBHBB", 1, 2, 3, 0, 0, 1, 0, _CHASSIS_HANDLE, 0x0A, 0)
    return _structure(2, 0x200, body, manufacturer, product, version)


def _chassis(manufacturer: str, version: str) -> bytes:
    # A desktop; boot-up, power supply and thermal state safe, security none.
    body = struct.pack("<BBBBBBBBBIBBBBB", 1, 3, 2, 0, 0, 3, 3, 3, 3, 0, 0, 0, 0, 0, 0)
    return _structure(3, _CHASSIS_HANDLE, body, manufacturer, version)


def _processor(cpus: int) -> bytes:
    """Return one socket whose cores are the VPs."""
    central, unknown, populated_enabled, is_64_bit = 3, 2, 0x41, 1 << 2
    body = struct.pack("<BBBBQBBHHHBB", 1, central, unknown, 0, 0, 0, 0, 0, 0, 0, populated_enabled, unknown)
    body += struct.pack("<HHHBBB", _NO_HANDLE, _NO_HANDLE, _NO_HANDLE, 0, 0, 0)
    body += struct.pack("<BBBHHHHH", cpus, cpus, cpus, is_64_bit, unknown, cpus, cpus, cpus)
    return _structure(4, 0x400, body, "CPU 0")


def _memory(ram_ranges: list[tuple[int, int]]) -> list[bytes]:
    """Return the array, its one device, and one mapped range per run of RAM."""
    total = sum(size for _, size in ram_ranges)
    on_board, system_memory, no_ecc = 3, 3, 3
    array = struct.pack("<BBBIHHQ", on_board, system_memory, no_ecc, 0x8000_0000, _NO_ERROR_HANDLE, 1, total)
    mib = total >> 20
    dimm, ram, other = 9, 7, 1 << 1
    device = struct.pack("<HHHHHBBBB", _MEMORY_ARRAY_HANDLE, _NO_ERROR_HANDLE, 64, 64, min(mib, 0x7FFF), dimm, 0, 1, 0)
    device += struct.pack("<BHHBBBBBIHHHH", ram, other, 0, 0, 0, 0, 0, 0, mib if mib >= 0x7FFF else 0, 0, 0, 0, 0)
    structures = [
        _structure(16, _MEMORY_ARRAY_HANDLE, array),
        _structure(17, 0x1100, device, "DIMM 0"),
    ]
    for index, (gpa, size) in enumerate(ram_ranges):
        first, last = gpa >> 10, (gpa + size - 1) >> 10
        mapped = struct.pack("<IIHBQQ", first, last, _MEMORY_ARRAY_HANDLE, 1, 0, 0)
        structures.append(_structure(19, 0x1300 + index, mapped))
    return structures
