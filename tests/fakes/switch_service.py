"""A switch's service in the test's own process, on a data plane that carries nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from devices.network import definition, places, protocol
from devices.network.service import Service
from devices.network.settings import PortSettings
from devices.network.switch import Switch
from tests.fakes.network import FakeNat, FakePlane

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    import pytest


def use_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have switches kept below `tmp_path`."""
    monkeypatch.setenv("PYVMM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("PYVMM_RUNTIME_DIR", str(tmp_path / "run"))


@contextmanager
def serving(name: str = "lan", heard: socket.socket | None = None, nat: FakeNat | None = None) -> Iterator[FakePlane]:
    """The service of a private switch, which is defined by this."""
    made = definition.SwitchDefinition(name=name)
    definition.store(made)
    plane = FakePlane(made)
    path = places.running(name, "sock")
    places.make_folder(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    listener.bind(path)
    listener.listen(8)
    service = Service(Switch(made, plane, "a test", nat), listener, heard)

    def serve() -> None:
        service.serve()
        service.close(plane.close)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield plane
    finally:
        if thread.is_alive():
            service.stop()
        thread.join()


def nic(vm: str = "web01", number: int = 0, **changes: Any) -> PortSettings:
    """A NIC's settings, with an address of its own for each VM and number."""
    mac = f"00:15:5d:{number:02x}:{sum(vm.encode()) % 256:02x}:{len(vm):02x}"
    return msgspec.structs.replace(PortSettings(vm=vm, nic=f"nic{number}", mac=mac), **changes)


@contextmanager
def vm_process(vm: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose NIC has a port of the switch ``lan``; it goes on until it is killed."""
    program = (
        "import signal; from devices.network import client; from tests.fakes.switch_service import nic\n"
        f"port = client.plug('lan', nic({vm!r})); print('plugged', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"plugged\n"
        yield process


def connect(name: str = "lan") -> socket.socket:
    """A connection to the service, to say to it what no client would."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(places.running(name, "sock"))
    connection.settimeout(30)
    return connection


def say(connection: socket.socket, message: bytes | protocol.Request) -> dict[str, Any]:
    """What the service replies."""
    connection.send(message if isinstance(message, bytes) else msgspec.json.encode(message))
    reply, fd = protocol.receive(connection)
    assert reply is not None and fd < 0
    return reply
