"""What a guest knows of its cable, told no faster than its driver keeps up."""

from __future__ import annotations

#: Linux takes one change in two seconds (LINKCHANGE_INT in drivers/net/hyperv/netvsc_drv.c); others see each as well.
GAP_NS = 2_000_000_000


class Link:
    """The cable of a NIC: plugged in or not, and what the guest has been told of that."""

    def __init__(self) -> None:
        self.up = False
        self.shown = False
        self._replugged = False
        self._not_before = 0

    def begin(self) -> None:
        """A guest begins, and asks by itself."""
        self.shown, self._replugged = self.up, False

    def change(self, up: bool, replugged: bool = False) -> None:
        """The cable is plugged in or not from now on; or it was pulled, and is plugged in elsewhere."""
        self.up = up
        self._replugged |= replugged

    def due(self) -> int | None:
        """When the guest is to be told next, in ns of the clock; None if it knows all."""
        if self.shown == self.up and not (self._replugged and self.up):
            return None
        return self._not_before

    def tell(self, now_ns: int) -> bool:
        """What the guest is to be told now that it is due: whether the cable is plugged in."""
        self._replugged = False
        self.shown = not self.shown  # down also if it is plugged in again already: that comes next
        self._not_before = now_ns + GAP_NS
        return self.shown
