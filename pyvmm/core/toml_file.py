"""TOML files that people write, checked against a type; an error says file, key and reason in one line."""

from __future__ import annotations

from typing import TypeVar

import msgspec

_MAX_FILE = 1 << 20

T = TypeVar("T")


def read(path: str) -> bytes:
    """The text at `path`; raises ValueError if there is none, or more than anybody writes."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_FILE + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"{path}: {why}") from error
    if len(text) > _MAX_FILE:
        raise ValueError(f"{path}: larger than {_MAX_FILE >> 20}MiB")
    return text


def decode(text: bytes, path: str, kind: type[T]) -> T:
    """A `kind` from the text of the file at `path`; raises ValueError."""
    try:
        return msgspec.toml.decode(text, type=kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}: {_explain(str(error))}") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not TOML: {str(error) or 'nested too deeply'}") from error


def _explain(message: str) -> str:
    """Turn the checker's ``Expected `str`, got `int` - at `$.disks[0].path``` into ``disks[0].path: expected ...``."""
    reason, _, place = message.partition(" - at `$")
    reason = (reason[:1].lower() + reason[1:]).replace("`", "")
    place = place.rstrip("`").lstrip(".")
    return f"{place}: {reason}" if place else reason
