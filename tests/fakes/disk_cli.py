"""Calling ``pyvmm disk`` as a user does."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from pyvmm.cli import main


def disk(*words: str) -> int:
    """Run an action; return its exit status."""
    return main(["disk", *words])


def tree(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> dict[str, Any]:
    """What an action prints as JSON."""
    capsys.readouterr()
    assert disk(*words, "-o", "json") == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *words: str, status: int = 2) -> str:
    """The one line with which an action refuses."""
    capsys.readouterr()
    assert disk(*words) == status
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith("pyvmm: error: ")
    return output.err


def files() -> list[str]:
    """What is in the working directory."""
    return sorted(os.listdir())
