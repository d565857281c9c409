"""Builds the kit, for 32-bit protected mode and for 64-bit long mode, as Multiboot images (32-bit ELF both)."""

from __future__ import annotations

from pathlib import Path

from guests.bare.build import build as build_guest

SOURCE = Path(__file__).parent
WIDTHS = (32, 64)


def build(bits: int, cache: Path | None = None) -> Path:
    """Return the path of the kit's ELF file for that mode, built if need be. Raises BuildError."""
    if bits == 32:
        return build_guest("kit32", SOURCE, cache, flags=["-m32"])
    return build_guest("kit64", SOURCE, cache, elf32=True)
