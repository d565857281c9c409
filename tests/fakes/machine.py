"""A VM without a guest, for tests of what stands above it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from devices.network.errors import SwitchError
from pyvmm.machine.outcome import MachineError, Outcome
from tests.fakes.observed import ObservedGuest

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from pyvmm.machine.config import DiskConfig
    from pyvmm.machine.nic_config import NicConfig


class FakeDisks:
    """Remembers in `calls` what was asked of it."""

    def __init__(self, calls: list[Any]) -> None:
        self._calls = calls

    def add(self, config: DiskConfig) -> dict[str, Any]:
        self._calls.append(("add", {name: value for name, value in vars(config).items() if value is not None}))
        if "missing" in config.path:
            raise MachineError(f"disk {config.path}: no such file", 2)
        return {"controller": config.controller, "lun": 1}

    def remove(self, controller: int, lun: int) -> dict[str, Any]:
        self._calls.append(("remove", controller, lun))
        return {"message": "removed"}

    def eject(self, controller: int, lun: int, force: bool, bus: str) -> dict[str, Any]:
        self._calls.append(("eject", bus, controller, lun, force))
        return {}

    def insert(self, controller: int, lun: int, path: str, bus: str) -> dict[str, Any]:
        self._calls.append(("insert", bus, controller, lun, path))
        return {}

    def resize(self, controller: int, lun: int, size: int) -> dict[str, Any]:
        self._calls.append(("resize", controller, lun, size))
        return {"controller": controller, "lun": lun, "size": size}


class FakeNics:
    """Remembers in `calls` what was asked of it."""

    def __init__(self, calls: list[Any]) -> None:
        self._calls = calls

    def add(self, config: NicConfig) -> dict[str, Any]:
        self._calls.append(("add", config.network, config.vlan))
        return self.inspect()[1]

    def remove(self, number: int) -> dict[str, Any]:
        self._calls.append(("remove", number))
        return self.inspect()[number]

    def change(self, number: int, text: str) -> dict[str, Any]:
        self._calls.append(("set", number, text))
        if text == "switch=missing":
            raise SwitchError("no switch missing", "missing")
        return self.inspect()[number]

    def inspect(self) -> list[dict[str, Any]]:
        nic = {"type": "synthetic", "lost": None, "port": None}
        return [
            {"nic": 0, "mac": "00:15:5d:00:00:01", "network": "switch=lan", "link": True, **nic},
            {"nic": 1, "mac": "00:15:5d:00:00:02", "network": "none", "link": False, **nic},
            {"nic": 2, "mac": "00:15:5d:00:00:03", "network": "user", "link": False, **nic, "lost": "passt ended"},
        ]


class FakeMachine:
    """Ends when `stop` or `poweroff` is called, or as `script` says; remembers what was asked of it in `calls`."""

    #: Runs in place of the guest; None to wait for `stop`.
    script: Callable[[FakeMachine], Outcome] | None = None
    #: Raised while the VM is made.
    construction_error: Exception | None = None
    #: The one made last.
    last: FakeMachine

    def __init__(self, config: Any = None, *, tracer: Any = None, log: Any = None, console: Any = None) -> None:
        if self.construction_error is not None:
            raise self.construction_error
        type(self).last = self
        self.config = config
        self.tracer = tracer
        self.console = console
        self.state = "running"
        self.calls: list[Any] = []
        self.outcome: Outcome | None = None
        self.stopped = threading.Event()
        #: What `shutdown` waits for before it answers.
        self.guest_answers = threading.Event()
        self.shutting_down = threading.Event()
        self.obeys = True
        self.closed = False
        self.observed = ObservedGuest()

    def run(self) -> Outcome:
        if self.script is not None:
            return type(self).script(self)  # type: ignore[misc]
        self.stopped.wait(20)
        assert self.outcome is not None, "nobody stopped the VM"
        return self.outcome

    def pause(self) -> None:
        self.state = "paused"

    def resume(self) -> None:
        self.state = "running"

    def reset(self) -> None:
        self.calls.append("reset")

    def poweroff(self) -> None:
        self._end(Outcome("poweroff", 0))

    def stop(self, exit_code: int, message: str) -> None:
        self._end(Outcome("stopped", exit_code, message))

    def _end(self, outcome: Outcome) -> None:
        self.state = "stopped"
        self.outcome = outcome
        self.stopped.set()

    def shutdown(self, timeout: float, restart: bool = False) -> dict[str, Any]:
        self.calls.append(("shutdown", timeout, restart))
        self.shutting_down.set()
        self.guest_answers.wait(20)
        if self.obeys:
            return {"obeyed": True, "message": "the guest shut down"}
        return {"obeyed": False, "message": f"the guest did not answer within {timeout:g} s"}

    def inspect(self) -> dict[str, Any]:
        return {"state": self.state, "vps": [{"index": 0, "exits": {"io": 3}}], "devices": {}}

    def enlightenments(self) -> dict[str, Any]:
        self.observed.seconds += 1
        return self.observed.report()

    def nics(self) -> FakeNics:
        return FakeNics(self.calls)

    @property
    def disks(self) -> FakeDisks:
        return FakeDisks(self.calls)

    def close(self) -> None:
        self.closed = True


def install(monkeypatch: pytest.MonkeyPatch) -> type[FakeMachine]:
    """Have `pyvmm run` make FakeMachines; returns a fresh class whose attributes the test may set."""
    cls = type("FakeMachine", (FakeMachine,), {})
    monkeypatch.setattr("pyvmm.machine.machine.Machine", cls)
    return cls
