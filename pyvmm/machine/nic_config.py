"""What a NIC of a VM is: its words on the command line, its checks, and its MAC address.

Only loaded by VMs that have a NIC.
"""

from __future__ import annotations

import copy
import re

from pyvmm.machine.config import NIC_FORM, ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

NIC_TYPES = ("synthetic", "legacy")
#: A Hyper-V VM of generation 1 has up to eight synthetic and four legacy network adapters.
MAX_SYNTHETIC, MAX_LEGACY = 8, 4
MAX_NICS = MAX_SYNTHETIC + MAX_LEGACY
#: As devices.network.settings and devices.network.definition have them; those need libraries that take time to load.
MIN_VLAN, MAX_VLAN = 1, 4094
MIN_BANDWIDTH = 64_000
MAX_FORWARDS = 64
_MAX_INTERFACE = 15
#: The bytes that Microsoft has of IEEE, and that Hyper-V makes addresses of.
_OUI = "00:15:5d"

_RATE_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_FORWARD = re.compile(r"(?:tcp|udp):(?:(?:\[[0-9A-Fa-f:.]+\]|[0-9.]+):)?([0-9]{1,5}):([0-9]{1,5})")


class NicConfig:
    """A NIC and what its cable leads to: a switch, the host's own network by way of passt (`user`), a TAP, or nothing.

    `mac` None is one made from the VM's name and the NIC's number. VLANs, `mac_spoofing`, the guards and `bandwidth`
    (bits/s) are settings of the switch's port; see `devices.network.settings.PortSettings`. `forward` are ports of the
    host that lead to the guest, of `user`: ``tcp:[ADDRESS:]8080:80``.
    """

    switch: str | None = None
    user: bool = False
    tap: str | None = None
    type: str = "synthetic"
    mac: str | None = None
    link: bool = True
    vlan: int | None = None
    trunk: tuple[int, ...] = ()
    native: int | None = None
    bandwidth: int | None = None
    mac_spoofing: bool = False
    dhcp_guard: bool = False
    router_guard: bool = False
    forward: tuple[str, ...] = ()

    def __init__(self, **values: object) -> None:
        for name, value in values.items():
            if name not in NicConfig.__annotations__:
                raise TypeError(f"a NIC has no {name!r}")
            setattr(self, name, value)

    @property
    def network(self) -> str:
        """What the cable leads to, as on the command line."""
        if self.switch is not None:
            return f"switch={self.switch}"
        if self.tap is not None:
            return f"tap={self.tap}"
        return "user" if self.user else "none"


#: The fields that only fit one kind of network.
_ONLY_FOR = {
    "switch": ("vlan", "trunk", "native", "bandwidth", "mac_spoofing", "dhcp_guard", "router_guard"),
    "user": ("forward",),
}

NIC_DESCRIPTIONS = {
    "switch": "the switch that it is connected to",
    "user": "connected to the host's network as a process of the host is, by passt",
    "tap": "an existing TAP interface of the host that it is connected to",
    "type": f"{' or '.join(NIC_TYPES)}; the legacy one is a DEC 21140",
    "mac": f"MAC address; by default {_OUI} and three bytes made from the VM's name and the NIC's number",
    "link": "whether the cable is plugged in",
    "vlan": f"the VLAN that the port gives access to, {MIN_VLAN} to {MAX_VLAN}",
    "trunk": "the VLANs that the port carries with their tags",
    "native": "the VLAN of a trunk's untagged frames",
    "bandwidth": "limit of bits per second, each way, such as 100M (decimal)",
    "mac_spoofing": "let the guest send from other MAC addresses than the NIC's own",
    "dhcp_guard": "drop what only a DHCP server sends",
    "router_guard": "drop what only a router sends: advertisements and redirects",
    "forward": "ports of the host that lead to the guest, such as tcp:8080:80, under user",
}


def parse_rate(text: str) -> int:
    """Bits per second from ``64000``, ``100M``, ``1G`` and the like, powers of 1000. Raises ConfigError."""
    unit = text[-1:].upper()
    number = text[:-1] if unit in ("K", "M", "G") else text
    if not (number.isascii() and number.isdigit()) or len(number) > 15:
        raise ConfigError(f"{text!r} is no rate: write a whole number of bits/s with K, M or G, such as 100M")
    return int(number) * _RATE_UNITS[unit if number is not text else ""]


def format_rate(rate: int) -> str:
    """The shortest exact form that `parse_rate` reads back."""
    for unit in ("G", "M", "K"):
        if rate and rate % _RATE_UNITS[unit] == 0:
            return f"{rate // _RATE_UNITS[unit]}{unit}"
    return str(rate)


def parse_mac(text: str) -> str:
    """``00:15:5d:01:02:03`` from that, in upper case too, or with hyphens. Raises ConfigError."""
    mac = text.lower().replace("-", ":")
    if not _MAC.fullmatch(mac):
        raise ConfigError(f"{text!r} is no MAC address, such as {_OUI}:01:02:03")
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise ConfigError(f"{text} is no NIC's MAC address: it is zero, or a group's (the first byte is odd)")
    return mac


def parse_nic(text: str) -> NicConfig:
    """A NIC from `NIC_FORM`. Raises ConfigError."""
    if text.split(",")[0].partition("=")[0] not in ("switch", "user", "tap", "none"):
        raise ConfigError(f"nic {text!r}: begin with switch=NAME, user, tap=INTERFACE or none")
    return change_nic(NicConfig(), text)


def change_nic(nic: NicConfig, text: str) -> NicConfig:
    """`nic` with what `text` says, which may be any part of `NIC_FORM`; raises ConfigError.

    On another network the settings of the one before are gone. ``none`` ends a vlan, a trunk, a limit or forwards.
    """
    changed = copy.copy(nic)
    in_trunk = False
    forwards: tuple[str, ...] = ()
    for number, word in enumerate(text.split(",")):
        key, _, value = word.partition("=")
        in_trunk = key == "trunk" or (in_trunk and _is_number(word))
        if word in ("user", "none") or (key in ("switch", "tap") and value):
            if number:
                raise ConfigError(f"nic {text!r}: {word!r} comes first")
            _connect(changed, key, value)
        elif key in ("vlan", "native", "bandwidth", "trunk", "forward") and value == "none":
            setattr(changed, key, getattr(NicConfig, key))
        elif key in ("vlan", "native") and _is_number(value):
            setattr(changed, key, int(value))
        elif key == "trunk" and _is_number(value):
            changed.trunk = (int(value),)
        elif in_trunk and _is_number(word):
            changed.trunk += (int(word),)
        elif key == "bandwidth" and value:
            changed.bandwidth = parse_rate(value)
        elif key == "type" and value:
            changed.type = value
        elif key == "mac" and value:
            changed.mac = parse_mac(value)
        elif key == "link" and value in ("up", "down"):
            changed.link = value == "up"
        elif key in ("mac_spoofing", "dhcp_guard", "router_guard") and (word == key or value in ("on", "off")):
            setattr(changed, key, value != "off")
        elif key == "forward" and value:
            changed.forward = forwards = (*forwards, value)
        else:
            raise ConfigError(f"nic {text!r}: unknown option {word!r}: write {NIC_FORM}")
    check_nic(changed)
    return changed


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 8


def _connect(nic: NicConfig, kind: str, value: str) -> None:
    for other, fields in _ONLY_FOR.items():
        if other != kind:
            for name in fields:
                setattr(nic, name, getattr(NicConfig, name))
    nic.switch = value if kind == "switch" else None
    nic.tap = value if kind == "tap" else None
    nic.user = kind == "user"


def check_nic(nic: NicConfig) -> None:
    """Raise ConfigError unless the parts of `nic` fit together; looks at nothing of the host."""
    where = f"nic {nic.network}"
    if (nic.switch is not None) + (nic.tap is not None) + nic.user > 1:
        raise ConfigError(f"{where}: its cable leads to one of switch, tap and user")
    for kind, fields in _ONLY_FOR.items():
        if not (nic.user if kind == "user" else nic.switch is not None):
            for name in fields:
                if getattr(nic, name) not in (None, False, ()):
                    raise ConfigError(f"{where}: {name} is for {'a switch' if kind == 'switch' else kind} only")
    if nic.tap is not None and (not 0 < len(nic.tap.encode()) <= _MAX_INTERFACE or re.search(r"[\s/:\0]", nic.tap)):
        raise ConfigError(f"{where}: that is no interface's name")
    if nic.type not in NIC_TYPES:
        raise ConfigError(f"{where}: type {nic.type!r}: choose {' or '.join(NIC_TYPES)}")
    if nic.mac is not None:
        parse_mac(nic.mac)
    _check_vlans(nic, where)
    if nic.bandwidth is not None and nic.bandwidth < MIN_BANDWIDTH:
        raise ConfigError(f"{where}: bandwidth {nic.bandwidth} is less than {format_rate(MIN_BANDWIDTH)} bits/s")
    if len(nic.forward) > MAX_FORWARDS:
        raise ConfigError(f"{where}: more than {MAX_FORWARDS} forwards")
    taken = set()
    for forward in nic.forward:
        found = _FORWARD.fullmatch(forward)
        if found is None:
            raise ConfigError(f"{where}: forward {forward!r}: write tcp:[ADDRESS:]8080:80 or udp:...")
        if not all(0 < int(port) < 65536 for port in found.groups()):
            raise ConfigError(f"{where}: forward {forward!r}: ports are 1 to 65535")
        source = forward.rpartition(":")[0]
        if source in taken:
            raise ConfigError(f"{where}: forward {forward!r}: that port of the host leads elsewhere already")
        taken.add(source)


def _check_vlans(nic: NicConfig, where: str) -> None:
    if nic.vlan is not None and nic.trunk:
        raise ConfigError(f"{where}: vlan or trunk, not both")
    if nic.native is not None and not nic.trunk:
        raise ConfigError(f"{where}: native is for a trunk only")
    for vlan in (nic.vlan, *nic.trunk, nic.native):
        if vlan is not None and not MIN_VLAN <= vlan <= MAX_VLAN:
            raise ConfigError(f"{where}: vlan {vlan} is not {MIN_VLAN} to {MAX_VLAN}")


def check_nics(nics: Sequence[NicConfig]) -> None:
    """Raise ConfigError unless a VM can have `nics`."""
    macs = set()
    taps = set()
    for nic in nics:
        check_nic(nic)
        if nic.mac in macs or nic.tap in taps:
            what = f"MAC address {nic.mac}" if nic.mac in macs else f"TAP {nic.tap}"
            raise ConfigError(f"nic {nic.network}: another NIC of the VM has {what}")
        macs |= {nic.mac} - {None}
        taps |= {nic.tap} - {None}
    for kind, most in zip(NIC_TYPES, (MAX_SYNTHETIC, MAX_LEGACY), strict=True):
        if sum(nic.type == kind for nic in nics) > most:
            raise ConfigError(f"more than {most} {kind} NICs")


def make_mac(vm: str, number: int, taken: set[str]) -> str:
    """The address of NIC `number` of the VM named `vm`, the same each time, unless a NIC of it has that already."""
    import hashlib

    for attempt in range(256):
        digest = hashlib.sha256(f"{vm}\0{number}\0{attempt}".encode()).hexdigest()
        mac = f"{_OUI}:{digest[0:2]}:{digest[2:4]}:{digest[4:6]}"
        if mac not in taken:
            return mac
    raise ConfigError(f"no MAC address is left for NIC {number} of {vm}")
