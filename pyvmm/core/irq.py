"""Interrupt lines into the in-kernel PIC and IOAPIC."""

from __future__ import annotations


class IrqLine:
    """One line of the board's interrupt controllers. Subclasses say where the level goes."""

    def set(self, level: bool) -> None:
        """Drive the line high or low; may be called from any thread."""
        raise NotImplementedError
