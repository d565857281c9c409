"""Which address each NIC of a NAT switch has: the same whenever possible, so that what is forwarded finds it."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re

from devices.network.plane import PlaneError

#: One in so many addresses of the network is for whoever is no NIC of the switch, such as a guest's own VMs.
_SHARE, _MOST_LEASED = 4, 1024
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


class Reservations:
    """Addresses of the network of `own`, the host's address there, by MAC; remembered in the file `path`."""

    def __init__(self, own: ipaddress.IPv4Interface, path: str) -> None:
        network = own.network
        self._own = own.ip
        self._first, last = int(network[1]), int(network[-2])
        leased = min((last - self._first) // _SHARE, _MOST_LEASED)
        self._last = last - leased
        #: The first and last address that is reserved for nobody.
        self.leased = (ipaddress.IPv4Address(self._last + 1), network[-2]) if leased else None
        self._path = path
        self._known: dict[str, tuple[str, str]] = self._load()  # MAC: address, VM; the last that was plugged at the end

    def reserve(self, mac: str, vm: str, busy: set[str]) -> tuple[str | None, bool]:
        """The address of a NIC, None if there is none, and whether that is news.

        If all are taken that of a NIC is given away that is not among the `busy`, whose MACs these are.
        """
        known = self._known.pop(mac, None)
        address = known[0] if known is not None else self._free(mac, busy)
        if address is None:
            return None, False
        self._known[mac] = address, vm
        changed = known != (address, vm)
        if changed:
            self._store()
        return address, changed

    def all(self) -> list[tuple[str, str, str]]:
        """MAC, address and name of each, where the VM's name can be one, of its first NIC."""
        named: set[str] = set()
        result = []
        for mac, (address, vm) in self._known.items():
            name = vm.lower() if _NAME.fullmatch(vm) and vm.lower() not in named else ""
            named.add(name)
            result.append((mac, address, name))
        return result

    def _free(self, mac: str, busy: set[str]) -> str | None:
        taken = {int(ipaddress.IPv4Address(address)) for address, _ in self._known.values()} | {int(self._own)}
        count = self._last - self._first + 1
        start = int.from_bytes(hashlib.sha256(mac.encode()).digest()[:8], "big")
        for step in range(min(count, len(taken) + 1)):
            address = self._first + (start + step) % count
            if address not in taken:
                return str(ipaddress.IPv4Address(address))
        idle = next((each for each in self._known if each not in busy), None)
        return None if idle is None else self._known.pop(idle)[0]

    def _load(self) -> dict[str, tuple[str, str]]:
        try:
            with open(self._path, encoding="utf-8") as file:
                kept = json.load(file)
            found = {str(mac): (str(address), str(vm)) for mac, address, vm in kept}
        except (OSError, ValueError, TypeError):
            return {}
        # The network may be another one by now.
        return {mac: known for mac, known in found.items() if self._is_ours(known[0])}

    def _is_ours(self, address: str) -> bool:
        try:
            found = ipaddress.IPv4Address(address)
        except ValueError:
            return False
        return self._first <= int(found) <= self._last and found != self._own

    def _store(self) -> None:
        part = f"{self._path}.part"
        try:
            with open(part, "w", encoding="utf-8") as file:
                json.dump([[mac, *known] for mac, known in self._known.items()], file)
            os.replace(part, self._path)
        except OSError as error:
            raise PlaneError(f"{self._path}: {error.strerror}") from error
