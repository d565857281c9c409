"""What callers outside are told of a switch that cannot be had as asked."""

from __future__ import annotations


class SwitchError(Exception):
    """A switch or port cannot be had as asked; the message is one line that says why.

    `kind` is ``refused``, ``usage``, ``missing`` (no such switch, VM or NIC), ``stopped`` (its service does not run) or
    ``host`` (the host lacks something).
    """

    def __init__(self, message: str, kind: str = "refused") -> None:
        super().__init__(message)
        self.kind = kind
