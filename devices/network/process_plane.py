"""The data plane in this process, for hosts whose kernel lacks something or gives no privileges: `_hot.Switch`.

Sources: Linux 6.1 include/uapi/linux/if_packet.h and sockios.h; packet(7).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import struct
import sys
import threading

from devices.network import tap
from devices.network.plane import DataPlane, Learned, PlaneError
from devices.network.port import OFFLOAD_CHECKSUM, OFFLOAD_TSO4, OFFLOAD_TSO6, OFFLOAD_TSO_ECN
from devices.network.settings import MAX_VLAN, MIN_VLAN, PortStatistics, VlanMode
from pyvmm.core._hot import Switch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from devices.network.definition import SwitchDefinition
    from devices.network.settings import PortSettings

#: The port of the host's interface or uplink; those of NICs are numbered from 1.
_OUTSIDE = 0
#: The largest pcap file that a mirror writes, in bytes.
MIRROR_LIMIT = 1 << 30
#: Bytes that a port's sockets hold in each direction; the host may allow less.
_SOCKET_BUFFER, _UPLINK_BUFFER = 1 << 20, 4 << 20

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFMTU, _SIOCSIFHWADDR, _SIOCGIFHWADDR = 0x8913, 0x8914, 0x8922, 0x8924, 0x8927
_IFF_UP = 1
_ARPHRD_ETHER = 1
_IFREQ_FLAGS, _IFREQ_INT, _IFREQ_ADDRESS = "16sH22x", "16si20x", "16sH6s16x"

_ETH_P_ALL = 3
_SOL_PACKET = 263
_ADD_MEMBERSHIP, _AUXDATA, _VNET_HDR, _IGNORE_OUTGOING = 1, 8, 15, 23
_MR_PROMISC = 1
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33


class ProcessPlane(DataPlane):
    """Private switches need no privileges. Internal and NAT ones have a TAP, external ones an AF_PACKET socket.

    Frames are carried by a thread of the plane's own. What ends meanwhile is told to `on_trouble`, one line each.
    """

    name = "process"

    def __init__(self, definition: SwitchDefinition, *, manual_time: bool = False) -> None:
        super().__init__(definition)
        self._switch = Switch(definition.mtu, manual_time=manual_time)
        self._thread: threading.Thread | None = None
        self.on_trouble: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)

    def open(self) -> None:
        """Nothing is ever left of an earlier life: interfaces and sockets end with their process."""
        definition = self.definition
        if definition.type in ("internal", "nat"):
            fd = make_tap(definition.host_interface, definition.mtu)
            self._switch.add_port(_OUTSIDE, "tap", fd)
            self.host_interface = definition.host_interface
        elif definition.interface is not None:
            fd, mac = open_packets(definition.interface)
            # Its own address is known, so that what comes for the host itself isn't for VMs.
            self._switch.add_port(_OUTSIDE, "packet", fd, tagged=range(MIN_VLAN, MAX_VLAN + 1), mac=mac)
        self._thread = threading.Thread(target=self._main, name=f"switch {definition.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; the ports and the host's interface go with the switch."""
        if self._thread is not None:
            self._switch.stop()
            self._thread.join()
            self._thread = None
        self._switch = Switch(self.definition.mtu)  # the other one closes its ports as it goes
        self.host_interface = None

    def _main(self) -> None:
        switch = self._switch
        while ended := switch.run():
            for number, why in ended:
                # That a VM is gone the service hears from the VM itself.
                if number == _OUTSIDE or why.startswith("mirror:"):
                    who = "host" if number == _OUTSIDE else f"port {number}"
                    self.on_trouble(f"switch {self.definition.name}: {who}: {why}")

    # Ports ----------------------------------------------------------------------------------------------

    def add_port(self, number: int, settings: PortSettings) -> int:
        """Make a port; its frames are sequenced packets of a socket pair."""
        kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        for end in (ours, theirs):
            _set_buffer(end, _SO_SNDBUFFORCE, socket.SO_SNDBUF, _SOCKET_BUFFER)
        try:
            self._switch.add_port(number, "socket", ours.detach(), **_raw(settings))
        except (OSError, ValueError) as error:
            theirs.close()
            raise PlaneError(f"port {number}: {error}") from error
        return theirs.detach()

    def change_port(self, number: int, settings: PortSettings) -> None:
        """Set the port as told."""
        self._switch.set_port(number, **_raw(settings))

    def set_offloads(self, number: int, offloads: int) -> None:
        """Give the port's NIC only what it takes."""
        self._switch.set_offloads(number, offloads)

    def remove_port(self, number: int) -> None:
        """Forget a port."""
        self._switch.remove_port(number)

    def mirror(self, number: int, path: str | None) -> None:
        """Write all frames of a port to a new pcap file, up to MIRROR_LIMIT bytes, or stop that."""
        self._switch.mirror(number, -1 if path is None else new_file(path), MIRROR_LIMIT)

    def statistics(self, number: int) -> PortStatistics:
        """What the port has counted."""
        return PortStatistics(**self._switch.statistics(number))

    def learned(self) -> Sequence[Learned]:
        """The addresses in the switch's table."""
        return [
            Learned(vlan, mac.hex(":"), None if number == _OUTSIDE else number)
            for vlan, mac, number in self._switch.learned()
        ]


def _raw(settings: PortSettings) -> dict[str, Any]:
    vlan = {VlanMode.UNTAGGED: 0, VlanMode.ACCESS: settings.vlan, VlanMode.TRUNK: settings.native}[settings.mode]
    return {
        "vlan": vlan,
        "tagged": settings.allowed if settings.mode is VlanMode.TRUNK else (),
        "mac": bytes.fromhex(settings.mac.replace(":", "")),
        "mac_spoofing": settings.mac_spoofing,
        "dhcp_guard": settings.dhcp_guard,
        "router_guard": settings.router_guard,
        "bandwidth": settings.bandwidth or 0,
        "link": settings.link,
    }


def _set_buffer(end: socket.socket, force: int, option: int, size: int) -> None:
    try:
        end.setsockopt(socket.SOL_SOCKET, force, size)
    except PermissionError:
        end.setsockopt(socket.SOL_SOCKET, option, size)


# The host ---------------------------------------------------------------------------------------------


def new_file(path: str) -> int:
    """The descriptor of a file of a mirror."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PlaneError(f"{path}: {error.strerror}") from error


def host_mac(name: str) -> bytes:
    """The address of a host interface: the same at every start, as guests remember it; nobody is given such (802c)."""
    return b"\x02" + hashlib.sha256(name.encode()).digest()[:5]


def make_tap(name: str, mtu: int) -> int:
    """The descriptor of a new TAP that is up."""
    fd = -1
    try:
        fd = tap.create(name)
        tap.set_offloads(fd, OFFLOAD_CHECKSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6 | OFFLOAD_TSO_ECN)
        mac = host_mac(name)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asker:
            fcntl.ioctl(asker, _SIOCSIFHWADDR, struct.pack(_IFREQ_ADDRESS, name.encode(), _ARPHRD_ETHER, mac))
            fcntl.ioctl(asker, _SIOCSIFMTU, struct.pack(_IFREQ_INT, name.encode(), mtu))
            had = struct.unpack(_IFREQ_FLAGS, fcntl.ioctl(asker, _SIOCGIFFLAGS, struct.pack("16s24x", name.encode())))
            fcntl.ioctl(asker, _SIOCSIFFLAGS, struct.pack(_IFREQ_FLAGS, name.encode(), had[1] | _IFF_UP))
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        needs = "; run as root" if isinstance(error, PermissionError) else ""
        raise PlaneError(f"host interface {name}: {error.strerror}{needs}") from error
    return fd


def open_packets(name: str, both_ways: bool = False) -> tuple[int, bytes]:
    """A socket of all frames that come by the interface, or also those that go, and the interface's own address."""
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    try:
        with socket.socket(socket.AF_PACKET, kind, 0) as uplink:
            index = socket.if_nametoindex(name)
            answer = fcntl.ioctl(uplink, _SIOCGIFHWADDR, struct.pack("16s24x", name.encode()))
            _, family, mac = struct.unpack(_IFREQ_ADDRESS, answer)
            if family != _ARPHRD_ETHER:
                raise PlaneError(f"uplink {name}: it is no Ethernet interface")
            for option in (_VNET_HDR, _AUXDATA):
                uplink.setsockopt(_SOL_PACKET, option, 1)
            uplink.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, not both_ways)
            uplink.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, struct.pack("iHH8x", index, _MR_PROMISC, 0))
            _set_buffer(uplink, _SO_RCVBUFFORCE, socket.SO_RCVBUF, _UPLINK_BUFFER)
            _set_buffer(uplink, _SO_SNDBUFFORCE, socket.SO_SNDBUF, _UPLINK_BUFFER)
            uplink.bind((name, _ETH_P_ALL))
            return uplink.detach(), mac
    except PermissionError as error:
        raise PlaneError(f"uplink {name}: CAP_NET_RAW is needed; run as root") from error
    except OSError as error:
        raise PlaneError(f"uplink {name}: {error.strerror or error}") from error
