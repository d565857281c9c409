"""Checked access to saved state: it may come from a damaged file or from another version of pyvmm."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def check_version(state: dict[str, Any], version: int) -> None:
    """Raise ValueError unless `state` has the version that this program writes."""
    if state.get("version") != version:
        raise ValueError(f"saved state has version {state.get('version')!r}, not {version}")


def saved_int(state: dict[str, Any], key: str, low: int, high: int) -> int:
    """Return an integer from `low` to `high`; raise ValueError if `key` holds anything else."""
    value = state.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"saved state: {key} is {value!r}, not a number from {low:#x} to {high:#x}")
    return value


def saved_bool(state: dict[str, Any], key: str) -> bool:
    """Return a truth value; raise ValueError if `key` holds anything else."""
    value = state.get(key)
    if type(value) is not bool:
        raise ValueError(f"saved state: {key} is {value!r}, not true or false")
    return value


def saved_bytes(state: dict[str, Any], key: str, low: int, high: int) -> bytes:
    """Return `low` to `high` bytes; raise ValueError if `key` holds anything else."""
    value = state.get(key)
    if type(value) is not bytes or not low <= len(value) <= high:
        raise ValueError(f"saved state: {key} is not {low} to {high} bytes")
    return value
