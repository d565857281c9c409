"""How a VM ends, and why it cannot be made: with exit statuses of `pyvmm run`."""

from __future__ import annotations

import os

from pyvmm.core.device import GuestViolation

EXIT_POWEROFF, EXIT_FAILED, EXIT_USAGE, EXIT_RESET, EXIT_CRASH, EXIT_HOST, EXIT_TIMEOUT = 0, 1, 2, 3, 4, 5, 124


class MachineError(Exception):
    """The VM cannot be made or started. One line, and the exit code that tells the kind."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Outcome:
    """How a VM ended: `kind` is poweroff, reset, crash, timeout, exit or stopped; `message` is for people."""

    __slots__ = ("exit_code", "kind", "message")

    def __init__(self, kind: str, exit_code: int, message: str = "") -> None:
        self.kind = kind
        self.exit_code = exit_code
        self.message = message


def crash_of(where: str, error: BaseException) -> Outcome:
    """The end of a VM because of what a VP's or a device's thread, called `where`, ran into."""
    if isinstance(error, GuestViolation):
        return Outcome("crash", EXIT_CRASH, f"{where}: {error}")
    message = f"{where}: {type(error).__name__}: {error}"
    if os.environ.get("PYVMM_DEBUG"):
        import traceback

        message += "\n" + "".join(traceback.format_exception(error)).rstrip()
    return Outcome("crash", EXIT_CRASH, message)
