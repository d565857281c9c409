"""What a switch is, as its definition file says."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import tempfile
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from devices.network import places
from devices.network.errors import SwitchError
from devices.network.port import DEFAULT_MTU, MAX_MTU
from pyvmm.core import toml_file

MIN_MTU = 576
#: IPv6 carries no less (RFC 8200, section 5).
MIN_MTU_V6 = 1280
MAX_ADDRESSES = 16
MAX_FORWARDS = 256
#: Bytes of an interface's name (IFNAMSIZ of linux/if.h, without the NUL).
MAX_INTERFACE = 15

_FORWARD = re.compile(r"(tcp|udp):(?:([0-9.]+):)?([0-9]{1,5}):(.{1,64}):([0-9]{1,5})")


class SwitchType(StrEnum):
    """Who is on the switch beside VMs (New-VMSwitch's types, and Hyper-V's default switch)."""

    PRIVATE = "private"  # nobody
    INTERNAL = "internal"  # the host, by an interface of the switch's own
    EXTERNAL = "external"  # a network, by an interface of the host that joins the switch
    NAT = "nat"  # the host, which gives addresses and the way to other networks


class PlaneChoice(StrEnum):
    """Which data plane carries frames; AUTO is the kernel's where the host offers it."""

    AUTO = "auto"
    KERNEL = "kernel"
    PROCESS = "process"


class Forward(NamedTuple):
    """A port of the host that leads to one of a VM; `address` None is any address of the host."""

    protocol: str
    address: str | None
    port: int
    vm: str
    vm_port: int


class SwitchDefinition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One switch. `check` tells whether its parts fit together."""

    name: str
    type: SwitchType = SwitchType.PRIVATE
    #: Of an external switch: the host's interface that joins it.
    interface: str | None = None
    #: Whether its addresses and routes move to the kernel's bridge, without which the host would lose them.
    share: bool = False
    #: The host's addresses on an internal or NAT switch, such as ``192.168.77.1/24``; NAT has one of IPv4, and at most
    #: one of IPv6.
    addresses: tuple[str, ...] = ()
    plane: PlaneChoice = PlaneChoice.AUTO
    #: Bytes of payload in the largest frame.
    mtu: int = DEFAULT_MTU
    #: Of a NAT switch: ``tcp:[ADDR:]8080:VM:80``; see `parse_forward`.
    forwards: tuple[str, ...] = ()

    @property
    def host_interface(self) -> str:
        """The name of the interface that a switch with a host side has; the same for the same switch."""
        if len(self.name) <= MAX_INTERFACE - 3:
            return f"pv-{self.name}"
        import hashlib

        return f"pv-{hashlib.sha256(self.name.encode()).hexdigest()[: MAX_INTERFACE - 3]}"


def parse_forward(text: str) -> Forward:
    """A forward from ``tcp:[ADDR:]PORT:VM:PORT``, with an IPv4 address. Raises SwitchError."""
    found = _FORWARD.fullmatch(text)
    if found is None:
        raise SwitchError(f"forward {text!r}: write tcp:[ADDRESS:]PORT:VM:PORT, such as tcp:8080:web01:80", "usage")
    protocol, address, port, vm, vm_port = found.groups()
    if address is not None:
        try:
            ipaddress.IPv4Address(address)
        except ValueError:
            raise SwitchError(f"forward {text!r}: {address} is no address", "usage") from None
    for number in (port, vm_port):
        if not 0 < int(number) < 65536:
            raise SwitchError(f"forward {text!r}: {number} is no port", "usage")
    return Forward(protocol, address, int(port), vm, int(vm_port))


def check(definition: SwitchDefinition) -> None:
    """Raise SwitchError unless the parts of `definition` fit together. Looks at nothing of the host."""
    places.check_name(definition.name)
    where = f"switch {definition.name}"
    kind = definition.type
    hosted = kind in (SwitchType.INTERNAL, SwitchType.NAT)
    if (definition.interface is not None) != (kind is SwitchType.EXTERNAL):
        message = "an external switch needs the host's interface that joins it" if definition.interface is None else ""
        raise SwitchError(f"{where}: {message or 'only an external switch has an interface of the host'}", "usage")
    if definition.interface is not None and not _interface_name(definition.interface):
        raise SwitchError(f"{where}: {definition.interface!r} is no interface's name", "usage")
    if definition.share and kind is not SwitchType.EXTERNAL:
        raise SwitchError(f"{where}: only an external switch shares an interface of the host", "usage")
    if definition.addresses and not hosted:
        raise SwitchError(f"{where}: only internal and nat switches have addresses", "usage")
    if len(definition.addresses) > MAX_ADDRESSES:
        raise SwitchError(f"{where}: more than {MAX_ADDRESSES} addresses", "usage")
    versions = [_check_address(where, address).version for address in definition.addresses]
    if kind is SwitchType.NAT and (versions.count(4) != 1 or versions.count(6) > 1):
        raise SwitchError(f"{where}: a nat switch has one IPv4 address, and at most one of IPv6", "usage")
    low = MIN_MTU_V6 if 6 in versions else MIN_MTU
    if not low <= definition.mtu <= MAX_MTU:
        raise SwitchError(f"{where}: mtu {definition.mtu} is not {low} to {MAX_MTU}", "usage")
    if definition.forwards and kind is not SwitchType.NAT:
        raise SwitchError(f"{where}: only nat switches have forwards", "usage")
    if len(definition.forwards) > MAX_FORWARDS:
        raise SwitchError(f"{where}: more than {MAX_FORWARDS} forwards", "usage")
    taken: set[tuple[str, str | None, int]] = set()
    for text in definition.forwards:
        forward = parse_forward(text)
        if forward[:3] in taken:
            raise SwitchError(f"{where}: forward {text!r}: that port of the host leads elsewhere already", "usage")
        taken.add(forward[:3])


def _interface_name(name: str) -> bool:
    """As the kernel's dev_valid_name has it."""
    good = 0 < len(os.fsencode(name)) <= MAX_INTERFACE and name not in (".", "..")
    return good and not re.search(r"[\s/:\0]", name)


def _check_address(where: str, text: str) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface:
    try:
        address = ipaddress.ip_interface(text)
    except ValueError:
        raise SwitchError(f"{where}: {text!r} is no address, such as 192.168.77.1/24", "usage") from None
    network = address.network
    if "/" not in text or network.num_addresses < 4:
        raise SwitchError(f"{where}: {text}: say the network's size and leave room in it, such as /24", "usage")
    if address.ip == network.network_address or (address.version == 4 and address.ip == network.broadcast_address):
        raise SwitchError(f"{where}: {text}: the host's own address is wanted, not the network's", "usage")
    if address.is_multicast or address.is_loopback or address.is_unspecified:
        raise SwitchError(f"{where}: {text}: no address that a host can have", "usage")
    return address


def free_network(definitions: list[SwitchDefinition], routes: str = "/proc/net/route") -> str:
    """The host's address in a 192.168.x.0/24 that neither routes of the host nor other switches overlap.

    `routes` has the form of /proc/net/route: destination and mask are columns 1 and 7, hexadecimal, little-endian.
    """
    taken = [ipaddress.ip_interface(address).network for each in definitions for address in each.addresses]
    try:
        with open(routes, encoding="ascii") as file:
            rows = [line.split() for line in file][1:]
        for row in rows:
            destination, mask = (int.from_bytes(bytes.fromhex(row[column]), "little") for column in (1, 7))
            if mask:  # all overlap the default route
                taken.append(ipaddress.ip_network((destination, mask.bit_count())))
    except (OSError, ValueError, IndexError):
        pass  # a host without IPv4
    for third in range(100, 356):
        network = ipaddress.ip_network(f"192.168.{third % 256}.0/24")
        if not any(other.version == 4 and network.overlaps(other) for other in taken):
            return f"{network[1]}/24"
    raise SwitchError("no 192.168.x.0/24 is free: give an address", "usage")


def load(name: str) -> SwitchDefinition:
    """The switch `name`; raises SwitchError, of kind ``missing`` if there is none."""
    places.check_name(name)
    path = places.definition(name)
    if not os.path.exists(path):
        raise SwitchError(f"no switch {name}: make it with pyvmm switch create {name}", "missing")
    try:
        definition = toml_file.decode(toml_file.read(path), path, SwitchDefinition)
    except ValueError as error:
        raise SwitchError(str(error), "usage") from error
    if definition.name != name:
        raise SwitchError(f"{path}: name: it says {definition.name!r}", "usage")
    check(definition)
    return definition


def names() -> list[str]:
    """The names of all switches, also those whose definition is broken."""
    try:
        files = os.listdir(os.path.dirname(places.definition("x")))
    except OSError:
        return []
    found = sorted(file.removesuffix(".toml") for file in files if file.endswith(".toml"))
    return [name for name in found if places.is_name(name)]


def load_all() -> list[SwitchDefinition]:
    """All switches, by name, but broken ones, which `pyvmm switch list` tells of."""
    found = []
    for name in names():
        try:
            found.append(load(name))
        except SwitchError:
            continue
    return found


def store(definition: SwitchDefinition) -> None:
    """Write the definition of a new switch, whole or not at all; raises SwitchError."""
    check(definition)
    path = places.definition(definition.name)
    try:
        places.make_folder(path)
        handle, part = tempfile.mkstemp(dir=os.path.dirname(path), prefix=f".{definition.name}.", suffix=".part")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(to_toml(definition))
                file.flush()
                os.fsync(file.fileno())
            os.link(part, path)  # unlike a rename this never replaces
        finally:
            os.unlink(part)
    except FileExistsError:
        raise SwitchError(f"there is a switch {definition.name} already") from None
    except OSError as error:
        raise SwitchError(f"{path}: {error.strerror}") from error


def remove(name: str) -> None:
    """Forget the definition of switch `name`; raises SwitchError."""
    places.check_name(name)
    path = places.definition(name)
    try:
        os.unlink(path)
    except FileNotFoundError:
        raise SwitchError(f"no switch {name}", "missing") from None
    except OSError as error:
        raise SwitchError(f"{path}: {error.strerror}") from error


def plain(definition: SwitchDefinition) -> dict[str, Any]:
    """The first part of what is shown of a switch; ``plane`` there is what `plane` has come to."""
    values: dict[str, Any] = msgspec.to_builtins(definition)
    values["plane_choice"] = values.pop("plane")
    return values


def to_toml(definition: SwitchDefinition) -> str:
    """The file that gives `definition` again; what has no value is left out. JSON's values are TOML's too."""
    values = msgspec.to_builtins(definition)
    return "".join(
        f"{name} = {json.dumps(value)}\n" for name, value in values.items() if value not in (None, False, ())
    )
