"""Builds the benchmark guest."""

from __future__ import annotations

from pathlib import Path

from guests.bare.build import build as build_guest

SOURCE = Path(__file__).parent


def build(cache: Path | None = None) -> Path:
    """Return the path of the guest's ELF file, a Multiboot image, built if need be. Raises BuildError."""
    return build_guest("bench", SOURCE, cache, pieces=["vmbus"], elf32=True)
