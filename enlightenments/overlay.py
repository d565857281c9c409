"""Overlay pages: what the hypervisor shows in place of guest memory. TLFS v6.0b, chapter 5.2.1."""

from __future__ import annotations

from pyvmm.core.memory import PAGE_SIZE, GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.core.memory import GuestMemory


class OverlayPage:
    """A page that the hypervisor lays over guest memory: what was beneath comes back when it goes."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.gpa: int | None = None
        self._beneath = b""

    def place(self, gpa: int, content: bytes) -> bool:
        """Lay `content` over the page at `gpa`; False if there is no RAM."""
        try:
            view = self._memory.view(gpa, PAGE_SIZE, write=True)
        except GuestMemoryError:
            return False
        self.remove()
        self._beneath = bytes(view)
        view[:] = content
        self.gpa = gpa
        return True

    def remove(self) -> None:
        """Give the guest its own page back."""
        if self.gpa is not None:
            self._memory.write(self.gpa, self._beneath)
            self.gpa = None

    def save(self) -> dict[str, Any]:
        """Where it lies and what is beneath."""
        return {"gpa": self.gpa, "beneath": self._beneath}

    def restore(self, state: dict[str, Any]) -> None:
        """The page itself is in guest memory, which is restored apart."""
        gpa, beneath = state["gpa"], state["beneath"]
        if gpa is not None and len(beneath) != PAGE_SIZE:
            raise ValueError("what is beneath an overlay page is not a page")
        if gpa is not None:
            self._memory.view(gpa, PAGE_SIZE, write=True)
        self.gpa, self._beneath = gpa, beneath
