"""Ports that are TAP interfaces of the host: made by others, with the bridge or routes that the user wants.

Sources: Linux 6.1 drivers/net/tun.c, include/uapi/linux/if_tun.h, include/uapi/linux/sockios.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct

from devices.network.errors import SwitchError
from devices.network.port import MAX_MTU, VNET_HEADER_SIZE, Port

_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2
_TUNSETOFFLOAD, _TUNSETVNETHDRSZ, _TUNSETVNETLE = 0x400454D0, 0x400454D8, 0x400454DC
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x2, 0x100, 0x1000, 0x4000, 0x8000
_SIOCGIFMTU = 0x8921
#: struct ifreq: the name, and a union whose first field we use.
_IFREQ_FLAGS, _IFREQ_INT = "16sH22x", "16si20x"


class TapPort(Port):
    """One queue of a TAP."""

    def set_offloads(self, offloads: int) -> None:
        """The OFFLOAD_* are the kernel's own."""
        set_offloads(self.fd, offloads)

    def close(self) -> None:
        """Leave the TAP, which is gone then unless it is persistent."""
        os.close(self.fd)


def open_tap(name: str) -> TapPort:
    """The existing TAP `name`, with one more queue if it was made with several. Raises SwitchError."""
    mtu = _question(name, _SIOCGIFMTU)
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SwitchError(f"tap {name}: /dev/net/tun: {error.strerror}; see pyvmm doctor", "host") from error
    try:
        _attach(fd, name)
        _agree(fd)
    except OSError as error:
        os.close(fd)
        raise SwitchError(f"tap {name}: {_reason(error)}", "host") from error
    return TapPort(fd, f"tap {name}", min(mtu, MAX_MTU))


def create(name: str) -> int:
    """The descriptor of a new TAP, which is down and goes with it; raises OSError, EBUSY if there is that name."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack(_IFREQ_FLAGS, name.encode(), flags))
        _agree(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def set_offloads(fd: int, offloads: int) -> None:
    """Say what may come out of a TAP. The OFFLOAD_* are the kernel's own."""
    fcntl.ioctl(fd, _TUNSETOFFLOAD, offloads)


def _agree(fd: int) -> None:
    """Have frames as `devices.network.port` says."""
    fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_SIZE))
    fcntl.ioctl(fd, _TUNSETVNETLE, struct.pack("i", 1))
    set_offloads(fd, 0)


def _attach(fd: int, name: str) -> None:
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack(_IFREQ_FLAGS, name.encode(), flags))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Whoever made it with several queues wants them asked for by all.
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack(_IFREQ_FLAGS, name.encode(), flags | _IFF_MULTI_QUEUE))
    _, got = struct.unpack(_IFREQ_FLAGS, fcntl.ioctl(fd, _TUNGETIFF, bytes(struct.calcsize(_IFREQ_FLAGS))))
    if not got & _IFF_VNET_HDR:  # of another queue that is in use
        raise OSError(errno.EBUSY, "")


def _question(name: str, request: int) -> int:
    """Ask for an integer of the interface `name`, without which TUNSETIFF would make one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asker:
        try:
            answer = fcntl.ioctl(asker, request, struct.pack(_IFREQ_INT, name.encode(), 0))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise SwitchError(f"tap {name}: {error.strerror}", "host") from error
            raise SwitchError(
                f"tap {name}: no such interface; make it with ip tuntap add {name} mode tap", "host"
            ) from None
    value: int = struct.unpack(_IFREQ_INT, answer)[1]
    return value


def _reason(error: OSError) -> str:
    match error.errno:
        case errno.EBUSY:
            return "another process uses it"
        case errno.EPERM | errno.EACCES:
            return "not allowed; its owner is set by ip tuntap add ... user NAME"
        case errno.EINVAL:
            return "that interface is no TAP"
    return error.strerror or str(error)
