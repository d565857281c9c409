"""Firmware ROMs: where they are mapped, what the shadow below 1 MiB holds, and which files are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.boot.entry import BootError
from pyvmm.boot.firmware import load_firmware
from pyvmm.core.memory import GuestMemory, GuestMemoryError

KIB = 1 << 10
MIB = 1 << 20


def rom_file(tmp_path: Path, size: int) -> tuple[Path, bytes]:
    image = b"".join(index.to_bytes(4, "little") for index in range(size // 4)) + bytes(size % 4)
    path = tmp_path / "bios.bin"
    path.write_bytes(image)
    return path, image


@pytest.mark.parametrize("size", [64 * KIB, 192 * KIB, 16 * MIB])
def test_rom_ends_at_4_gib_and_its_last_128_kib_at_1_mib(tmp_path: Path, size: int) -> None:
    path, image = rom_file(tmp_path, size)
    memory = GuestMemory(2 * MIB)
    entry = load_firmware(memory, path)
    assert entry.mode == "reset"
    assert memory.read((1 << 32) - size, size) == image
    shadow = image[-128 * KIB :]
    assert memory.read(MIB - len(shadow), len(shadow)) == shadow
    assert memory.read(MIB - len(shadow) - 4096, 4096) == bytes(4096)


def test_the_rom_is_read_only_and_its_shadow_is_not(tmp_path: Path) -> None:
    memory = GuestMemory(MIB)
    load_firmware(memory, rom_file(tmp_path, 64 * KIB)[0])
    with pytest.raises(GuestMemoryError):
        memory.write((1 << 32) - 16, b"x")
    memory.write(MIB - 16, b"x")


def test_loading_again_renews_the_shadow_and_maps_nothing_twice(tmp_path: Path) -> None:
    path, image = rom_file(tmp_path, 64 * KIB)
    memory = GuestMemory(MIB)
    load_firmware(memory, path)
    regions = list(memory.regions)
    memory.write(MIB - 64 * KIB, bytes(64 * KIB))
    load_firmware(memory, path)
    assert memory.regions == regions
    assert memory.read(MIB - 64 * KIB, 64 * KIB) == image


@pytest.mark.parametrize("size", [0, 1, 64 * KIB - 1, 64 * KIB + 1, 96 * KIB, 16 * MIB + 64 * KIB])
def test_a_file_of_an_odd_size_is_refused(tmp_path: Path, size: int) -> None:
    path, _ = rom_file(tmp_path, size)
    memory = GuestMemory(MIB)
    with pytest.raises(BootError, match=r"bios\.bin: a firmware ROM is a multiple of 64 KiB up to 16 MiB"):
        load_firmware(memory, path)
    assert len(memory.regions) == 1


def test_missing_files_and_directories_are_named(tmp_path: Path) -> None:
    memory = GuestMemory(MIB)
    with pytest.raises(BootError, match="nowhere: No such file or directory"):
        load_firmware(memory, tmp_path / "nowhere")
    with pytest.raises(BootError, match="Is a directory"):
        load_firmware(memory, tmp_path)


def test_memory_below_1_mib_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BootError, match="at least 1 MiB of guest memory"):
        load_firmware(GuestMemory(512 * KIB), rom_file(tmp_path, 64 * KIB)[0])


def test_the_module_imports_nothing_but_the_ground() -> None:
    """It is on the way to a guest's first instruction, where every import is paid for."""
    program = (
        "import sys, os, mmap, pyvmm.core.memory; before = set(sys.modules); import pyvmm.boot.firmware;"
        "print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == ["pyvmm.boot", "pyvmm.boot.entry", "pyvmm.boot.firmware", "pyvmm.boot.layout"]
