"""Keeps HAProxy in step with a load balancer's definition and with its VMs: where they are, and whether they run."""

from __future__ import annotations

import os
import time

import msgspec

from pyvmm.host.balancer import haproxy
from pyvmm.host.balancer.definition import Balancer, BalancerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    #: By name of the VM, for VMs that run, have their cable plugged in and have been heard of.
    Addresses = Mapping[str, str]


class Follower:
    """One load balancer at work. `step` looks once at everything; `reported` gets one line for each event."""

    def __init__(
        self,
        folder: Path,
        load: Callable[[], Balancer],
        locate: Callable[[], Addresses],
        user: str | None,
        reported: Callable[[str], None],
    ) -> None:
        self._config = folder / "haproxy.cfg"
        self._socket = folder / "haproxy.sock"
        self._load = load
        self._locate = locate
        self._user = user
        self._reported = reported
        self._process = haproxy.Process(self._config, folder / "haproxy.log")
        self._runtime = haproxy.Runtime(self._socket)
        self._balancer: Balancer | None = None
        self._addresses: dict[str, str] = {}

    @property
    def balancer(self) -> Balancer | None:
        """The definition that HAProxy works by."""
        return self._balancer

    def step(self) -> None:
        """Bring HAProxy in line; raises BalancerError for a definition that it refuses, with all left as it was."""
        balancer = self._load()
        addresses = self._find(balancer)
        before, known = self._balancer, self._addresses
        if before is not None and self._process.running and _shape(before) == _shape(balancer):
            try:
                self._adjust(before, balancer, addresses)
            except OSError as error:  # it is just starting, or has just died: next time
                self._reported(f"HAProxy does not answer: {error}")
                return
        else:
            self._write(balancer, addresses)
            if self._process.running:
                self._process.reload()
            else:
                if before is not None:
                    self._reported("HAProxy has ended and is started again")
                self._process.start()
        for name in known.keys() | addresses.keys():
            if known.get(name) != addresses.get(name):
                self._reported(f"{name} is {'at ' + addresses[name] if name in addresses else 'away'}")
        self._balancer, self._addresses = balancer, addresses

    def wait(self, seconds: float) -> None:
        """Return once HAProxy listens; raises BalancerError if it ends instead, or takes longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._runtime.ask("show info")
                return
            except OSError:
                if not self._process.running or time.monotonic() > deadline:
                    raise BalancerError(f"HAProxy does not start: {self._process.complaint()}") from None
            time.sleep(0.01)

    def statistics(self) -> dict[str, dict[str, str]]:
        """HAProxy's counters; raises OSError while it doesn't listen."""
        return self._runtime.statistics()

    @property
    def process_id(self) -> int | None:
        """HAProxy's process, None while it doesn't run."""
        return self._process.pid

    def stop(self) -> None:
        """End HAProxy."""
        self._process.stop()
        self._socket.unlink(missing_ok=True)

    def _find(self, balancer: Balancer) -> dict[str, str]:
        found = self._locate()
        places = {backend.name: backend.address or found.get(backend.vm) for backend in balancer.backends}
        return {name: address for name, address in places.items() if address}

    def _write(self, balancer: Balancer, addresses: Addresses) -> None:
        text = haproxy.configuration(balancer, addresses, self._socket, self._user)
        old = self._config.read_bytes() if self._config.exists() else None
        self._replace(text.encode())
        try:
            self._process.check()
        except BalancerError:
            if old is not None:
                self._replace(old)
            raise

    def _replace(self, text: bytes) -> None:
        new = self._config.with_suffix(".new")
        new.write_bytes(text)
        os.replace(new, self._config)

    def _adjust(self, before: Balancer, balancer: Balancer, addresses: Addresses) -> None:
        changed = False
        for index, (old, new) in enumerate(zip(before.backends, balancer.backends, strict=True)):
            was, address = self._addresses.get(new.name), addresses.get(new.name)
            if address != was:
                changed = True
                if address is not None:
                    self._runtime.place(index, address, new.port)
                self._runtime.enable(index, address is not None)
            if (old.weight, old.draining) != (new.weight, new.draining):
                changed = True
                self._runtime.weigh(index, 0 if new.draining else new.weight)
        if changed:  # for the case that it has to be started again
            self._write(balancer, addresses)


def _shape(balancer: Balancer) -> bytes:
    """What HAProxy can only be told by a new configuration."""
    still = [msgspec.structs.replace(backend, weight=1, draining=False, address=None) for backend in balancer.backends]
    return msgspec.json.encode(msgspec.structs.replace(balancer, backends=still))
