"""What a guest and its NIC have agreed on by the messages of the handshake."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.network.port import MAX_MTU
from devices.saved import saved_int
from devices.synthetic.netvsp.protocol import DEFAULT_FRAME_SIZE, V6_1, receive_section_size

if TYPE_CHECKING:
    from typing import Any

HEADER_SIZE = 14


class Agreement:
    """Nothing yet, at first."""

    def __init__(self) -> None:
        #: NVSP version; 0 before there is one.
        self.version = 0
        #: The guest's NDIS version.
        self.ndis: tuple[int, int] | None = None
        #: Largest frame without tags, and capabilities of the guest; the frame is 0 before it is agreed.
        self.frame_size = 0
        self.capabilities = 0
        #: Sub-channels that the guest has asked for.
        self.subchannels = 0

    @property
    def section_size(self) -> int:
        """Bytes of a section of the receive buffer."""
        return receive_section_size(max(self.frame_size, DEFAULT_FRAME_SIZE))

    def save(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "protocol": self.version,
            "ndis_major": self.ndis[0] if self.ndis is not None else 0,
            "ndis_minor": self.ndis[1] if self.ndis is not None else 0,
            "frame_size": self.frame_size,
            "capabilities": self.capabilities,
            "subchannels": self.subchannels,
        }

    @classmethod
    def restored(cls, state: dict[str, Any], max_subchannels: int) -> Agreement:
        """What `save` returned; raises ValueError."""
        agreed = cls()
        agreed.version = saved_int(state, "protocol", 0, V6_1)
        major, minor = (saved_int(state, name, 0, 0xFFFF_FFFF) for name in ("ndis_major", "ndis_minor"))
        agreed.ndis = (major, minor) if major else None
        agreed.frame_size = saved_int(state, "frame_size", 0, HEADER_SIZE + MAX_MTU)
        agreed.capabilities = saved_int(state, "capabilities", 0, (1 << 64) - 1)
        agreed.subchannels = saved_int(state, "subchannels", 0, max_subchannels)
        return agreed
