"""Which IP addresses the NICs of a switch have: heard from their ARP and Neighbor Discovery, told by DHCP leases.

A guest may claim any address, so these are for finding a VM, not for trusting it. Sources: RFC 826 (ARP), RFC 4861,
sections 4.3 and 4.4 (Neighbor Solicitation and Advertisement), RFC 4862, section 5.4 (duplicate address detection).
"""

from __future__ import annotations

import ipaddress
import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_ADDRESSES = 16
#: What is read of a frame: two tags, IPv6 header, and Neighbor Discovery up to its target.
SNAP = 14 + 8 + 40 + 24

_ETH_P_ALL = 3
_ARP, _IPV6, _TAGS = 0x0806, 0x86DD, (0x8100, 0x88A8)
_ICMPV6, _SOLICITATION, _ADVERTISEMENT = 58, 135, 136
_SO_ATTACH_FILTER = 26


class AddressBook:
    """The addresses of the NICs that it has been told to know; others' are nothing to it."""

    def __init__(self) -> None:
        self._heard: dict[str, dict[str, None]] = {}  # the last heard at the end
        self._leased: dict[str, list[str]] = {}

    def know(self, mac: str) -> None:
        """Keep what is heard of the NIC with the address `mac`."""
        self._heard.setdefault(mac, {})

    def forget(self, mac: str) -> None:
        """The opposite of `know`."""
        self._heard.pop(mac, None)

    def of(self, mac: str) -> list[str]:
        """The IP addresses of a NIC: those leased first, then the last heard first."""
        found = dict.fromkeys(self._leased.get(mac, ()))
        found.update(dict.fromkeys(reversed(self._heard.get(mac, {}))))
        return list(found)

    def hear(self, frame: bytes) -> None:
        """Learn from a frame, whose end may be missing."""
        claimed = claim(frame)
        if claimed is None:
            return
        mac, address = claimed
        heard = self._heard.get(mac)
        if heard is None:
            return
        heard.pop(address, None)
        heard[address] = None
        if len(heard) > MAX_ADDRESSES:
            del heard[next(iter(heard))]

    def set_leases(self, leases: Iterable[tuple[str, str]]) -> None:
        """Take these (MAC, IP) for all leases that there are."""
        self._leased = {}
        for mac, address in leases:
            self._leased.setdefault(mac, []).append(address)


def claim(frame: bytes) -> tuple[str, str] | None:
    """The MAC and IP that the sender of `frame` says to have, if that is what the frame is for."""
    sender = frame[6:12]
    at = 12
    for _ in range(2):
        if len(frame) >= at + 2 and int.from_bytes(frame[at : at + 2], "big") in _TAGS:
            at += 4
    kind = int.from_bytes(frame[at : at + 2], "big")
    body = frame[at + 2 :]
    if kind == _ARP and len(body) >= 28 and body[:6] == b"\x00\x01\x08\x00\x06\x04" and body[8:14] == sender:
        return _claim(sender, body[14:18])
    if kind == _IPV6 and len(body) >= 64 and body[6] == _ICMPV6 and body[7] == 255:
        if body[40] == _ADVERTISEMENT:
            return _claim(sender, body[48:64])
        if body[40] == _SOLICITATION:
            source = body[8:24]
            return _claim(sender, source if any(source) else body[48:64])
    return None


def _claim(sender: bytes, packed: bytes) -> tuple[str, str] | None:
    address = ipaddress.ip_address(packed)
    if address.is_unspecified or address.is_multicast or address.is_loopback:
        return None
    return sender.hex(":"), str(address)


def listen(interface: str) -> socket.socket:
    """A socket that doesn't block and gets what `claim` may understand of all frames of a host's interface, both ways.

    Raises OSError: PermissionError without CAP_NET_RAW.
    """
    heard = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    try:
        import ctypes

        code = b"".join(_INSTRUCTIONS)
        program = ctypes.create_string_buffer(code, len(code))
        fprog = struct.pack("@HP", len(_INSTRUCTIONS), ctypes.addressof(program))
        heard.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
        heard.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)  # what comes faster is not worth hearing
        heard.bind((interface, _ETH_P_ALL))
    except BaseException:
        heard.close()
        raise
    return heard


def _program(instructions: Sequence[tuple[int, int, int, int]]) -> list[bytes]:
    """``struct sock_filter`` (linux/filter.h): code, where to go on if true and if false, operand."""
    return [struct.pack("@HBBI", *each) for each in instructions]


_LOAD_HALF, _LOAD_HALF_INDEXED, _LOAD_BYTE_INDEXED, _SET_INDEX = 0x28, 0x48, 0x50, 0x01
_JUMP_EQUAL, _RETURN = 0x15, 0x06
#: ARP; solicitations and advertisements; each with a tag or without. (The kernel takes tags out of most frames.)
_INSTRUCTIONS = _program(
    [
        (_SET_INDEX, 0, 0, 0),
        (_LOAD_HALF, 0, 0, 12),
        (_JUMP_EQUAL, 0, 1, _TAGS[0]),
        (_SET_INDEX, 0, 0, 4),
        (_LOAD_HALF_INDEXED, 0, 0, 12),
        (_JUMP_EQUAL, 7, 0, _ARP),
        (_JUMP_EQUAL, 0, 5, _IPV6),
        (_LOAD_BYTE_INDEXED, 0, 0, 20),
        (_JUMP_EQUAL, 0, 3, _ICMPV6),
        (_LOAD_BYTE_INDEXED, 0, 0, 54),
        (_JUMP_EQUAL, 2, 0, _SOLICITATION),
        (_JUMP_EQUAL, 1, 0, _ADVERTISEMENT),
        (_RETURN, 0, 0, 0),
        (_RETURN, 0, 0, SNAP),
    ]
)
