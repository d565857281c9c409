"""What a NIC and a network share: frames through a file descriptor, and what is agreed about them.

A frame is one `read` or `write`: 10 bytes of ``struct virtio_net_hdr`` (little-endian: u8 flags, u8 gso_type, u16
hdr_len, u16 gso_size, u16 csum_start, u16 csum_offset; OASIS virtio 1.2, section 5.1.6), then an Ethernet frame without
its FCS, 802.1Q tags in place. That is what a TAP with IFF_VNET_HDR, an AF_PACKET socket with PACKET_VNET_HDR and the
sequenced-packet sockets of the in-process switch have in common.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

VNET_HEADER_SIZE = 10
#: Flags of the header.
VNET_NEEDS_CSUM, VNET_DATA_VALID = 1, 2
#: Kinds of segmentation; ECN may be added to both of TCP's.
GSO_NONE, GSO_TCPV4, GSO_UDP, GSO_TCPV6, GSO_ECN = 0, 1, 3, 4, 0x80

#: What a NIC takes from its network, for `Port.set_offloads` (the TUN_F_* bits of linux/if_tun.h): partial checksums,
#: and TCP over IPv4 and IPv6 not yet cut into segments, also with ECN. Each segmentation wants CHECKSUM.
OFFLOAD_CHECKSUM, OFFLOAD_TSO4, OFFLOAD_TSO6, OFFLOAD_TSO_ECN = 1, 2, 4, 8

#: Bytes of payload in a frame, without Ethernet header and tags.
DEFAULT_MTU, MAX_MTU = 1500, 9000
#: The most bytes that come with one read: header, Ethernet header, two tags, and 64 KiB that wait for segmentation.
MAX_FRAME = VNET_HEADER_SIZE + 14 + 8 + 65535


class Port:
    """A NIC's end of its link to a network. Whoever made it decides what is on the other end.

    The callbacks run on any thread, and not after `close`.
    """

    def __init__(self, fd: int, name: str, mtu: int = DEFAULT_MTU) -> None:
        #: Does not block. NICs of all kinds may hand it partial checksums and TCP segments of up to 64 KiB; what comes
        #: out is as `set_offloads` says, at first complete frames only.
        self.fd = fd
        #: What people call the network, such as ``switch lan``.
        self.name = name
        #: The largest that the network carries.
        self.mtu = mtu
        #: Whether the cable is plugged in.
        self.link = True
        #: The link has changed.
        self.on_link: Callable[[bool], None] = lambda up: None
        #: The other end is gone for good; `fd` gives and takes nothing any more.
        self.on_lost: Callable[[], None] = lambda: None

    def set_offloads(self, offloads: int) -> None:
        """Say which of the OFFLOAD_* the NIC takes from now on. What is under way may still be as before."""
        raise NotImplementedError

    def close(self) -> None:
        """Unplug: the network forgets the port. The NIC has stopped using `fd`."""
        raise NotImplementedError

    def inspect(self) -> dict[str, Any]:
        """Return live state for people and tools, as plain JSON data."""
        return {"network": self.name, "mtu": self.mtu, "link": self.link}


class Nic:
    """What networks ask of a NIC, beside its being a device. Any thread, while the guest runs or not."""

    #: Six bytes, the same over restarts.
    mac: bytes

    def connect(self, port: Port | None) -> Port | None:
        """Use `port` from now on, or none; return the one before once nothing uses it, for the caller to close.

        The guest sees the link go down and up again.
        """
        raise NotImplementedError

    def set_link(self, up: bool) -> None:
        """Show the guest that the cable is plugged in or not. Frames neither come nor go while it isn't."""
        raise NotImplementedError
