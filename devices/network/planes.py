"""What the host offers to switches, and which data plane a switch gets."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess

from devices.network.definition import PlaneChoice, SwitchType
from devices.network.errors import SwitchError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.network.definition import SwitchDefinition
    from devices.network.plane import DataPlane

_TUN = "/dev/net/tun"
#: Bits of capabilities (linux/capability.h).
_NET_ADMIN, _NET_RAW = 12, 13
_PROBE_S = 10.0
#: The address is used at once (IFA_F_NODAD of linux/if_addr.h): nobody else is there yet.
_NO_DAD = 0x02
_SIOCGIFADDR = 0x8915
_LINK_LOCAL = 0x20


class Offer:
    """Something that a host has or not; `why` says what is missing, and what to do."""

    def __init__(self, name: str, why: str, purpose: str) -> None:
        self.name = name
        self.why = why
        self.purpose = purpose

    @property
    def there(self) -> bool:
        """Whether the host has it."""
        return not self.why


def examine() -> dict[str, Offer]:
    """All that networks may need of the host, by name. Takes some milliseconds; nothing is changed."""
    offers = [
        Offer("tun", _tun(), "host interfaces of switches, TAP"),
        Offer("net_admin", _capability(_NET_ADMIN, "CAP_NET_ADMIN"), "internal, nat and external switches"),
        Offer("net_raw", _capability(_NET_RAW, "CAP_NET_RAW"), "external switches, finding VMs' addresses"),
        Offer("vlan_filtering", _vlan_filtering(), "the kernel's data plane: bridges that keep VLANs apart"),
        _program("nft", "nftables", "the kernel's data plane, nat switches"),
        _program("dnsmasq", "dnsmasq-base", "nat switches: DHCP and DNS"),
        _program("passt", "passt", "--nic user"),
        _program("haproxy", "haproxy", "load balancing between VMs"),
    ]
    return {offer.name: offer for offer in offers}


def plane_for(definition: SwitchDefinition, host: dict[str, Offer] | None = None) -> tuple[str, str]:
    """``kernel`` or ``process``, and why. Raises SwitchError if the host cannot have such a switch."""
    host = examine() if host is None else host
    needs = {
        SwitchType.PRIVATE: (),
        SwitchType.INTERNAL: ("net_admin", "tun"),
        SwitchType.EXTERNAL: ("net_admin", "net_raw"),
        SwitchType.NAT: ("net_admin", "tun", "net_raw", "nft", "dnsmasq"),
    }[definition.type]
    for name in needs:
        if not host[name].there:
            message = f"switch {definition.name}: {definition.type} switches need {host[name].why}"
            raise SwitchError(f"{message}; private switches and --nic user do without", "host")
    lacking = [host[name].why for name in ("net_admin", "tun", "vlan_filtering", "nft") if not host[name].there]
    if definition.plane is PlaneChoice.PROCESS:
        return "process", "asked for"
    if definition.plane is PlaneChoice.KERNEL:
        if lacking:
            raise SwitchError(f"switch {definition.name}: the kernel's data plane needs {lacking[0]}", "host")
        return "kernel", "asked for"
    if lacking:
        return "process", f"the kernel's needs {lacking[0]}"
    if definition.interface is not None and not definition.share and _has_addresses(definition.interface):
        return "process", f"{definition.interface} has addresses, which the host keeps so; --share moves them"
    return "kernel", "the host has all that it needs"


def make(definition: SwitchDefinition, name: str) -> DataPlane:
    """The data plane `name`, not opened yet."""
    if name == "kernel":
        from devices.network.kernel.plane import KernelPlane

        return KernelPlane(definition)
    from devices.network.process_plane import ProcessPlane

    return ProcessPlane(definition)


def set_addresses(interface: str, addresses: Sequence[str]) -> None:
    """Give a switch's host interface these, such as ``192.168.77.1/24``. Raises SwitchError.

    What VMs say of routers is nothing to the host.
    """
    from pyroute2 import IPRoute, NetlinkError

    try:
        with open(f"/proc/sys/net/ipv6/conf/{interface}/accept_ra", "w", encoding="ascii") as file:
            file.write("0")
    except FileNotFoundError:
        pass  # a host without IPv6
    except OSError as error:
        raise SwitchError(f"{error.filename}: {error.strerror}", "host") from error
    try:
        with IPRoute() as route:
            index = route.link_lookup(ifname=interface)[0]
            for address in addresses:
                host, _, length = address.partition("/")
                extra = {"flags": _NO_DAD} if ":" in host else {}
                route.addr("replace", index=index, address=host, prefixlen=int(length), **extra)
    except (NetlinkError, OSError, IndexError) as error:
        raise SwitchError(f"{interface} cannot have the addresses {', '.join(addresses)}: {error}", "host") from error


def _tun() -> str:
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        remedy = "modprobe tun" if isinstance(error, FileNotFoundError) else "run as root"
        return f"{_TUN} ({error.strerror}: {remedy})"
    return ""


def _has_addresses(interface: str) -> bool:
    """Whether the host has addresses there (netdevice(7); net/ipv6/addrconf.c: if6_seq_show)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asker:
        try:
            fcntl.ioctl(asker, _SIOCGIFADDR, struct.pack("16s24x", os.fsencode(interface)))
            return True
        except OSError:
            pass
    try:
        with open("/proc/net/if_inet6", encoding="utf-8", errors="surrogateescape") as file:
            rows = [line.split() for line in file]
    except OSError:
        return False  # a host without IPv6
    return any(row[5] == interface and int(row[3], 16) != _LINK_LOCAL for row in rows)


def _capability(bit: int, name: str) -> str:
    """Of this process (proc(5): CapEff of /proc/self/status)."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            held = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    except (OSError, StopIteration, ValueError, IndexError):
        held = 0
    return "" if held >> bit & 1 else f"{name} (run as root)"


def _vlan_filtering() -> str:
    """Try it on a bridge in a network namespace that is gone at once."""
    words = ["unshare", "--net", "ip", "link", "add", "pyvmm", "type", "bridge", "vlan_filtering", "1"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_PROBE_S, check=False)
    except FileNotFoundError:
        return "to be asked with unshare and ip (apt install util-linux iproute2)"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bridge VLAN filtering ({error})"
    if done.returncode == 0:
        return ""
    if "ermission" in done.stderr or "not permitted" in done.stderr:
        return "CAP_NET_ADMIN and CAP_SYS_ADMIN (run as root)"
    return "bridge VLAN filtering, which this kernel lacks"


def _program(name: str, package: str, purpose: str) -> Offer:
    there = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin") is not None
    return Offer(name, "" if there else f"{name} (apt install {package})", purpose)
