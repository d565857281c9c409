"""``python -m pyvmm``."""

from __future__ import annotations

from pyvmm.cli import entry

entry()
