"""What every device has in common: its life cycle."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class GuestViolation(Exception):
    """The guest broke a rule in a way that only stopping its VM can answer.

    The message is shown to the user as it is: one line that says what the guest did.
    """


class Device:
    """One device of a VM.

    A device is made, then `reset` once before the guest runs. `pause` returns when none of the device's
    threads touches guest memory any more; `save` is only called between `pause` and `resume`, and
    `restore` only on a fresh, paused device of the same configuration.
    """

    #: Unique in one VM and stable over restarts, e.g. ``uart0`` or ``scsi0``.
    name: str = "device"

    def reset(self) -> None:
        """Bring the device to its power-on state."""

    def pause(self) -> None:
        """Stop the device's own activity; return once it has stopped."""

    def resume(self) -> None:
        """Go on after `pause`."""

    def save(self) -> dict[str, Any]:
        """Return the state as plain data (dict, list, int, str, bytes, bool, None) with a ``version``."""
        return {"version": 1}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; raise ValueError if it does not fit."""

    def inspect(self) -> dict[str, Any]:
        """Return live state for people and tools, as plain JSON data."""
        return {}
