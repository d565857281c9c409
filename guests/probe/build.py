"""Builds the probe."""

from __future__ import annotations

from pathlib import Path

from guests.bare.build import build as build_guest

SOURCE = Path(__file__).parent


def build(cache: Path | None = None) -> Path:
    """Return the path of the probe's ELF file, built if need be. Raises BuildError."""
    return build_guest("probe", SOURCE, cache, pieces=["vmbus"])
