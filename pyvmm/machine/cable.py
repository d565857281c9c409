"""A NIC's cable: the port at its other end, opened, changed, and found again when it is lost."""

from __future__ import annotations

import copy
import itertools
import threading

from devices.network.errors import SwitchError
from pyvmm.machine.nic_config import NicConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from devices.network.port import Nic, Port
    from devices.network.settings import PortSettings
    from pyvmm.core.clock import Clock
    from pyvmm.core.trace import GuestLog
    from pyvmm.core.worker import Timer, Worker

#: When a lost port is looked for: soon, then less and less often.
_RETRY_NS, _LONGEST_RETRY_NS = 100_000_000, 10_000_000_000


class Cable:
    """Leads to nothing until `plug_in`. `name` is the NIC's. Any thread may call; `worker` does what ports tell."""

    def __init__(
        self, vm: str, name: str, mac: str, config: NicConfig, worker: Worker, clock: Clock, log: GuestLog
    ) -> None:
        self._vm = vm
        self._name = name
        self._mac = mac
        self._config = config
        self._worker = worker
        self._clock = clock
        self._log = log
        self._lock = threading.RLock()
        self._nic: Nic | None = None
        self._port: Port | None = None
        self._tickets = itertools.count(1)
        self._ticket = 0  # of the port, or of the one that was lost
        self._lost: str | None = None
        self._retry_ns = _RETRY_NS
        self._retry_timer: Timer | None = None

    @property
    def config(self) -> NicConfig:
        """As it is now: `pyvmm switch port` may have changed it meanwhile."""
        settings = getattr(self._port, "settings", None)
        return self._config if settings is None else _with_settings(self._config, settings)

    def plug_in(self) -> None:
        """Open the port; raises SwitchError."""
        with self._lock:
            self._replace(*self._open(self._config))

    def attach(self, nic: Nic) -> None:
        """Join the NIC to its cable."""
        with self._lock:
            self._nic = nic
            nic.connect(self._port)
            self._show_link()

    def change(self, config: NicConfig) -> None:
        """Lead where `config` says, with its settings; raises SwitchError, and all is as before then."""
        with self._lock:
            now = self.config
            same = self._port is not None and (now.network, now.forward) == (config.network, config.forward)
            if same and config.switch is not None:
                self._port.change(_settings(self._vm, self._name, self._mac, config))  # type: ignore[union-attr]
            elif not same:
                if now.user and config.user:  # their forwards may have ports of the host in common
                    self._replace(None, self._ticket)
                try:
                    self._replace(*self._open(config))
                except SwitchError:
                    if now.network != "none" and self._port is None:
                        self._look_again()
                    raise
            self._config = config
            self._show_link()

    def cut(self) -> None:
        """Give the port back. Harmless the second time."""
        with self._lock:
            self._replace(None, next(self._tickets))

    def inspect(self) -> dict[str, Any]:
        """Live state as plain JSON data."""
        with self._lock:
            port = self._port.inspect() if self._port is not None else None
            return {"network": self.config.network, "link": self._is_up(), "lost": self._lost, "port": port}

    # Inside: the lock is held ------------------------------------------------------------------------

    def _replace(self, port: Port | None, ticket: int) -> None:
        before, self._port = self._port, port
        self._ticket = ticket
        if port is not None:
            self._lost = None
            self._retry_ns = _RETRY_NS
        if self._nic is not None:
            self._nic.connect(port)
            self._show_link()
        if before is not None:
            before.close()

    def _is_up(self) -> bool:
        if self._port is None:
            return False
        return self._port.link and self.config.link

    def _show_link(self) -> None:
        if self._nic is not None:
            self._nic.set_link(self._is_up())

    def _look_again(self) -> None:
        ticket = self._ticket
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        self._retry_timer = self._worker.call_at(self._clock.now_ns() + self._retry_ns, lambda: self._retry(ticket))
        self._retry_ns = min(2 * self._retry_ns, _LONGEST_RETRY_NS)

    # On the worker -----------------------------------------------------------------------------------

    def _on_link(self, ticket: int) -> None:
        with self._lock:
            if ticket == self._ticket:
                self._show_link()

    def _on_lost(self, ticket: int) -> None:
        with self._lock:
            if ticket == self._ticket and self._port is not None:
                self._config = self.config
                self._replace(None, ticket)
                self._lost = "its other end has gone"
                self._log.warn(self._name, f"{self._config.network} is lost: {self._lost}; looking for it again")
                self._look_again()

    def _retry(self, ticket: int) -> None:
        with self._lock:
            config = self._config
            if ticket != self._ticket or self._port is not None:
                return
        error: str | None = None
        port: Port | None = None
        try:
            port, found = self._open(config)  # without the lock: a service may take long to start
        except SwitchError as refused:
            error = str(refused)
        with self._lock:
            if ticket != self._ticket or self._port is not None:  # changed meanwhile
                if port is not None:
                    port.close()
            elif port is None:
                self._lost = error
                self._look_again()
            else:
                if self._lost is not None:
                    self._log.warn(self._name, f"{config.network} is there again")
                self._replace(port, found)

    # Ports -------------------------------------------------------------------------------------------

    def _open(self, config: NicConfig) -> tuple[Port | None, int]:
        """A port of the network that `config` names, and its ticket; raises SwitchError."""
        ticket = next(self._tickets)

        def on_link(_: bool) -> None:
            self._worker.call_soon(lambda: self._on_link(ticket))

        def on_lost() -> None:
            self._worker.call_soon(lambda: self._on_lost(ticket))

        port: Port | None = None
        if config.switch is not None:
            from devices.network.client import plug

            port = plug(config.switch, _settings(self._vm, self._name, self._mac, config), on_link, on_lost)
        elif config.tap is not None:
            from devices.network.tap import open_tap

            port = open_tap(config.tap)
        elif config.user:
            from devices.network.user import UserPort

            port = UserPort(config.forward, on_lost)
        return port, ticket


def _settings(vm: str, nic: str, mac: str, config: NicConfig) -> PortSettings:
    from devices.network.settings import PortSettings, VlanMode

    return PortSettings(
        vm=vm,
        nic=nic,
        mac=mac,
        mode=VlanMode.ACCESS if config.vlan else VlanMode.TRUNK if config.trunk else VlanMode.UNTAGGED,
        vlan=config.vlan or 0,
        allowed=config.trunk,
        native=config.native or 0,
        mac_spoofing=config.mac_spoofing,
        dhcp_guard=config.dhcp_guard,
        router_guard=config.router_guard,
        bandwidth=config.bandwidth,
        link=config.link,
    )


def _with_settings(config: NicConfig, settings: PortSettings) -> NicConfig:
    changed = copy.copy(config)
    changed.vlan = settings.vlan if settings.mode == "access" else None
    changed.trunk = settings.allowed if settings.mode == "trunk" else ()
    changed.native = settings.native or None if settings.mode == "trunk" else None
    for name in ("mac_spoofing", "dhcp_guard", "router_guard", "bandwidth", "link"):
        setattr(changed, name, getattr(settings, name))
    return changed
