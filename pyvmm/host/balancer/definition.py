"""What a load balancer is told: an address, the VMs behind it, and how connections are spread over them."""

from __future__ import annotations

import ipaddress
import re
from enum import StrEnum

import msgspec

MAX_BACKENDS = 256
MAX_WEIGHT = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")


class BalancerError(Exception):
    """Something the user asked for cannot be done; the message is one line that says what to change."""


class Algorithm(StrEnum):
    """To which VM a new connection goes, in proportion to the weights."""

    ROUND_ROBIN = "round-robin"
    LEAST_CONNECTIONS = "least-connections"
    SOURCE = "source"  # by the client's address, the same for as long as the VMs that serve are the same


class Backend(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A VM's port. `address` is for one that does not follow the VM's; `draining` VMs get no new connections."""

    vm: str
    port: int
    weight: int = 1
    address: str | None = None
    draining: bool = False

    @property
    def name(self) -> str:
        """What people and HAProxy call it."""
        return f"{self.vm}:{self.port}"


class Balancer(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A load balancer. `check` is ``tcp``, ``http`` or ``http:/PATH``; `interval` seconds between checks."""

    name: str
    vip: str
    port: int
    backends: list[Backend] = []
    algorithm: Algorithm = Algorithm.ROUND_ROBIN
    #: A client that comes again within `affinity_seconds` gets the VM that it had; 0 for no such memory.
    affinity_seconds: int = 0
    check: str = "tcp"
    interval: float = 1.0
    #: Checks that fail, or succeed, in a row before a VM is taken out, or in again.
    fall: int = 2
    rise: int = 1

    def backend(self, name: str) -> Backend:
        """The backend that `name` (VM:PORT) stands for; raises BalancerError."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        known = ", ".join(backend.name for backend in self.backends) or "none"
        raise BalancerError(f"load balancer {self.name} has no backend {name}; it has {known}")


def parse_vip(text: str) -> tuple[str, int]:
    """Address and port from ``192.0.2.1:80`` or ``[2001:db8::1]:80``. Raises BalancerError."""
    address, colon, port = text.rpartition(":")
    try:
        parsed = ipaddress.ip_address(address.removeprefix("[").removesuffix("]"))
        if not colon or (parsed.version == 6) != address.startswith("["):
            raise ValueError
        return str(parsed), _port(port)
    except ValueError:
        raise BalancerError(f"vip {text!r}: write ADDRESS:PORT, such as 192.168.77.1:80 or [fd00::1]:80") from None


def parse_backend(text: str) -> Backend:
    """A backend from ``VM:PORT[,weight=N][,address=IP]``. Raises BalancerError."""
    target, *options = text.split(",")
    vm, _, port = target.rpartition(":")
    try:
        backend = Backend(vm=vm, port=_port(port))
        for option in options:
            key, _, value = option.partition("=")
            if key == "weight":
                backend.weight = parse_weight(value)
            elif key == "address":
                backend.address = str(ipaddress.ip_address(value))
            else:
                raise ValueError
    except ValueError:
        raise BalancerError(f"backend {text!r}: write VM:PORT[,weight=N][,address=IP]") from None
    return backend


def parse_weight(text: str) -> int:
    """A weight, 1 to 256. Raises BalancerError."""
    if text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_WEIGHT:
        return int(text)
    raise BalancerError(f"weight {text!r} is not 1 to {MAX_WEIGHT}")


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 65535:
        return int(text)
    raise ValueError(text)


def check_name(name: str) -> None:
    """Raise BalancerError unless `name` can be a load balancer's."""
    if not _NAME.fullmatch(name):
        raise BalancerError(f"load balancer name {name!r}: up to 32 letters, digits, '-', '_' and '.', not '.' first")


def check(balancer: Balancer) -> None:
    """Raise BalancerError unless the parts of `balancer` fit together and can stand in HAProxy's configuration."""
    check_name(balancer.name)
    where = f"load balancer {balancer.name}"
    parse_vip(join(balancer.vip, balancer.port))
    if len(balancer.backends) > MAX_BACKENDS:
        raise BalancerError(f"{where}: more than {MAX_BACKENDS} backends")
    names = [backend.name for backend in balancer.backends]
    for backend in balancer.backends:
        if not (0 < len(backend.vm) <= 64 and backend.vm.isprintable()):
            raise BalancerError(f"{where}: {backend.vm!r} is no name of a VM")
        if not 1 <= backend.port <= 65535:
            raise BalancerError(f"{where}: port {backend.port} of {backend.vm} is not 1 to 65535")
        parse_weight(str(backend.weight))
        if names.count(backend.name) > 1:
            raise BalancerError(f"{where}: backend {backend.name} is there twice")
        if backend.address is not None:
            try:
                ipaddress.ip_address(backend.address)
            except ValueError:
                raise BalancerError(f"{where}: {backend.address!r} is no address") from None
    kind, colon, path = balancer.check.partition(":")
    if kind not in ("tcp", "http") or (colon and (kind == "tcp" or not re.fullmatch(r"/[!-~]{0,255}", path))):
        raise BalancerError(f"{where}: check {balancer.check!r}: choose tcp, http or http:/PATH")
    if not 0.1 <= balancer.interval <= 3600:
        raise BalancerError(f"{where}: interval {balancer.interval} is not 0.1 to 3600 seconds")
    if not (1 <= balancer.fall <= 100 and 1 <= balancer.rise <= 100):
        raise BalancerError(f"{where}: fall and rise are 1 to 100 checks")
    if not 0 <= balancer.affinity_seconds <= 86400:
        raise BalancerError(f"{where}: affinity {balancer.affinity_seconds} is not 0 to 86400 seconds")


def join(address: str, port: int) -> str:
    """Address and port in the form that `parse_vip` reads."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
