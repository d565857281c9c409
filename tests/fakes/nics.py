"""NICs without a guest and networks without frames, for tests of what joins them."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import pytest

from devices.network.errors import SwitchError
from devices.network.port import Nic, Port
from devices.network.settings import PortSettings


class FakeNic(Nic):
    """Remembers in `seen` what its network told it."""

    def __init__(self, mac: bytes = bytes(6)) -> None:
        self.mac = mac
        self.port: Port | None = None
        self.up: bool | None = None
        self.seen: queue.Queue[tuple[str, Any]] = queue.Queue()

    def connect(self, port: Port | None) -> Port | None:
        assert port is None or not getattr(port, "closed", False)
        before, self.port = self.port, port
        self.seen.put(("connect", None if port is None else port.name))
        return before

    def set_link(self, up: bool) -> None:
        self.up = up
        self.seen.put(("link", up))

    def wait_for(self, what: str, value: Any) -> None:
        """Return once the network has told that."""
        while self.seen.get(timeout=20) != (what, value):
            pass


class FakePort(Port):
    """A port of one of `FakeNetworks`; the test calls its callbacks as a network would."""

    def __init__(self, networks: FakeNetworks, name: str, settings: PortSettings | None = None) -> None:
        super().__init__(-1, name)
        self.networks = networks
        self.closed = False
        if settings is not None:
            self.settings = settings
            self.link = settings.link

    def change(self, settings: PortSettings) -> None:
        self.networks.check()
        self.settings = settings
        self.link = settings.link

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        self.networks.open.remove(self)


class FakeNetworks:
    """Stands in for switches, TAPs and passt: `open` are the ports that are, `refusal` is why there are no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open: list[FakePort] = []
        self.refusal: SwitchError | None = None
        self.asked: queue.Queue[str] = queue.Queue()
        monkeypatch.setattr("devices.network.client.plug", self._plug)
        monkeypatch.setattr("devices.network.tap.open_tap", lambda name: self._open(f"tap {name}"))
        monkeypatch.setattr("devices.network.user.UserPort", self._user)

    def check(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def _open(self, name: str, settings: PortSettings | None = None) -> FakePort:
        self.asked.put(name)
        self.check()
        self.open.append(FakePort(self, name, settings))
        return self.open[-1]

    def _plug(
        self, switch: str, settings: PortSettings, on_link: Callable[[bool], None], on_lost: Callable[[], None]
    ) -> FakePort:
        port = self._open(f"switch {switch}", settings)
        port.on_link, port.on_lost = on_link, on_lost
        return port

    def _user(self, forwards: tuple[str, ...], on_lost: Callable[[], None]) -> FakePort:
        taken = {forward for port in self.open for forward in getattr(port, "forwards", ())}
        sources = {forward.rpartition(":")[0] for forward in taken}
        if sources.intersection(forward.rpartition(":")[0] for forward in forwards):
            raise SwitchError("user network: the port of the host is in use", "host")
        port = self._open("user")
        port.forwards = forwards  # type: ignore[attr-defined]
        port.on_lost = on_lost
        return port
