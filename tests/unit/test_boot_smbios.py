"""SMBIOS tables, read back by the rules of the specification."""

from __future__ import annotations

import struct
import uuid

import pytest

from pyvmm.boot.layout import HIGH_MEMORY, SMBIOS_ADDRESS
from pyvmm.boot.smbios import build_smbios

GIB = 1 << 30
UUID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
RAM = [(0, 3 * GIB), (4 * GIB, 61 * GIB)]

Structure = tuple[int, int, bytes, list[str]]


def area(cpus: int = 4, identity: str = "hyper-v") -> bytes:
    """Return the guest's memory from SMBIOS_ADDRESS to 1 MiB."""
    memory = bytearray(HIGH_MEMORY - SMBIOS_ADDRESS)
    for gpa, data in build_smbios(RAM, cpus, UUID.bytes_le, identity):
        offset = gpa - SMBIOS_ADDRESS
        assert not any(memory[offset : offset + len(data)])
        memory[offset : offset + len(data)] = data
    return bytes(memory)


def parse(table: bytes) -> list[Structure]:
    """Return (type, handle, formatted area, strings) of each structure; the table must end where the last one does."""
    structures = []
    while table:
        kind, length, handle = struct.unpack_from("<BBH", table)
        end = table.index(b"\0\0", length)
        strings = table[length:end].decode().split("\0")
        structures.append((kind, handle, table[:length], strings))
        table = table[end + 2 :]
    return structures


def by_kind(memory: bytes) -> dict[int, Structure]:
    length, address = struct.unpack_from("<IQ", memory, 0x20 + 12)
    return {item[0]: item for item in parse(memory[address - SMBIOS_ADDRESS :][:length])}


def text(structure: Structure, offset: int) -> str:
    _, _, data, strings = structure
    return strings[data[offset] - 1] if data[offset] else ""


def test_both_entry_points_lead_to_the_same_structures() -> None:
    memory = area()
    old, new = memory[:0x1F], memory[0x20:0x38]
    assert (old[:4], old[5], old[6:8], sum(old) % 256) == (b"_SM_", 0x1F, b"\2\x08", 0)
    assert (old[0x10:0x15], sum(old[0x10:]) % 256) == (b"_DMI_", 0)
    assert (new[:5], new[6], new[7:9], sum(new) % 256) == (b"_SM3_", 0x18, b"\3\0", 0)
    length, address, count = struct.unpack_from("<HIH", old, 0x16)
    assert struct.unpack_from("<IQ", new, 12) == (length, address)
    structures = parse(memory[address - SMBIOS_ADDRESS :][:length])
    assert len(structures) == count
    (largest,) = struct.unpack_from("<H", old, 8)
    assert largest >= max(len(data) for _, _, data, _ in structures)
    assert not any(memory[address - SMBIOS_ADDRESS + length :])


def test_required_structures_are_there_with_unique_handles() -> None:
    memory = area()
    length, address = struct.unpack_from("<IQ", memory, 0x20 + 12)
    structures = parse(memory[address - SMBIOS_ADDRESS :][:length])
    assert [item[0] for item in structures] == [0, 1, 2, 3, 4, 16, 17, 19, 19, 32, 127]
    assert len({item[1] for item in structures}) == len(structures)
    # Lengths of the specification's versions: 2.4, 2.4, one without contained objects, 2.7, 3.0, 2.7, 2.8, 2.7.
    lengths = {item[0]: len(item[2]) for item in structures}
    assert lengths == {0: 0x18, 1: 0x1B, 2: 0x0F, 3: 0x16, 4: 0x30, 16: 0x17, 17: 0x28, 19: 0x1F, 32: 0x0B, 127: 4}


def test_system_is_hyper_vs_by_default_and_ours_on_demand() -> None:
    for identity, manufacturer, product in [
        ("hyper-v", "Microsoft Corporation", "Virtual Machine"),
        ("pyvmm", "pyvmm", "pyvmm virtual machine"),
    ]:
        structures = by_kind(area(identity=identity))
        for kind in (1, 2):
            assert text(structures[kind], 4) == manufacturer
            assert text(structures[kind], 5) == product
        assert text(structures[3], 4) == manufacturer
        assert text(structures[1], 0x1A) == "Virtual Machine"
    assert uuid.UUID(bytes_le=structures[1][2][8:24]) == UUID


def test_processor_has_a_core_per_vp() -> None:
    processor = by_kind(area(cpus=64))[4][2]
    assert processor[0x23:0x26] == bytes([64, 64, 64])
    assert processor[0x18] == 0x41  # populated and enabled


def test_memory_adds_up_over_the_hole() -> None:
    memory = area()
    structures = by_kind(memory)
    array, device = structures[16], structures[17]
    assert struct.unpack_from("<I", array[2], 7) == (0x8000_0000,)
    assert struct.unpack_from("<HQ", array[2], 0x0D) == (1, 64 * GIB)
    assert struct.unpack_from("<H", device[2], 4) == (array[1],)
    assert struct.unpack_from("<H", device[2], 0x0C) == (0x7FFF,)
    assert struct.unpack_from("<I", device[2], 0x1C) == (64 << 10,)
    length, address = struct.unpack_from("<IQ", memory, 0x20 + 12)
    mapped = [item[2] for item in parse(memory[address - SMBIOS_ADDRESS :][:length]) if item[0] == 19]
    assert [struct.unpack_from("<II", item, 4) for item in mapped] == [
        (0, (3 * GIB >> 10) - 1),
        (4 * GIB >> 10, (65 * GIB >> 10) - 1),
    ]


def test_a_small_guests_memory_is_given_in_mib() -> None:
    table = build_smbios([(0, 128 << 20)], 1, UUID.bytes_le)[2][1]
    device = next(data for kind, _, data, _ in parse(table) if kind == 17)
    assert struct.unpack_from("<H", device, 0x0C) == (128,)
    assert struct.unpack_from("<I", device, 0x1C) == (0,)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="a UUID has 16 bytes, not 4"):
        build_smbios(RAM, 1, b"uuid")
    with pytest.raises(ValueError, match="unknown SMBIOS identity 'acme', known are hyper-v, pyvmm"):
        build_smbios(RAM, 1, UUID.bytes_le, "acme")
