"""``python -m tests.docs``: write the tables of docs/enlightenments.md anew."""

from __future__ import annotations

from tests.docs.enlightenments import PAGE, updated

PAGE.write_text(updated(PAGE.read_text()))
