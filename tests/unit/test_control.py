"""The control socket: commands, replies, and clients that do not behave."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.machine.config import ConfigError
from pyvmm.machine.control import MAX_CLIENTS, MAX_REQUEST, Commands, ControlServer
from pyvmm.machine.unix_socket import UnixListener
from tests.fakes.machine import FakeMachine


def commands(machine: FakeMachine) -> Commands:
    return Commands(machine, "web01")  # type: ignore[arg-type]


def ask(machine: FakeMachine, **request: Any) -> dict[str, Any]:
    line = commands(machine).answer(json.dumps(request).encode())
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    reply: dict[str, Any] = json.loads(line)
    assert reply.pop("version") == 1
    return reply


def test_status_names_the_vm_its_process_and_state() -> None:
    assert ask(FakeMachine(), command="status") == {
        "ok": True,
        "name": "web01",
        "pid": os.getpid(),
        "state": "running",
    }


def test_controls_reach_the_vm_and_reply_with_its_state() -> None:
    machine = FakeMachine()
    assert ask(machine, command="pause") == {"ok": True, "state": "paused"}
    assert ask(machine, command="resume") == {"ok": True, "state": "running"}
    assert ask(machine, command="reset") == {"ok": True, "message": "reset requested"}
    assert machine.calls == ["reset"]
    assert ask(machine, command="poweroff") == {"ok": True, "message": "power-off requested"}
    assert machine.stopped.is_set()


def test_enlightenments_is_the_report_of_their_use() -> None:
    machine = FakeMachine()
    reply = ask(machine, command="enlightenments")
    assert reply == {"ok": True, **machine.observed.report()}


@pytest.mark.parametrize("obeys", [True, False])
def test_shutdown_says_whether_the_guest_obeyed(obeys: bool) -> None:
    machine = FakeMachine()
    machine.obeys = obeys
    machine.guest_answers.set()
    assert ask(machine, command="shutdown", timeout=5, restart=True)["obeyed"] is obeys
    assert machine.calls == [("shutdown", 5.0, True)]


def test_disks_come_and_go() -> None:
    machine = FakeMachine()
    place = {"bus": "scsi", "controller": 1, "lun": 1}
    disk = {"path": "/d", "readonly": True, **place, "format": "vhd", "iops": 10, "bandwidth": 65536}
    assert ask(machine, command="add-disk", **disk) == {"ok": True, "controller": 1, "lun": 1}
    assert ask(machine, command="remove-disk", controller=1, lun=1)["ok"]
    assert machine.calls == [("add", disk), ("remove", 1, 1)]


def test_inspect_walks_to_a_part_of_the_tree() -> None:
    machine = FakeMachine()
    assert ask(machine, command="inspect")["inspect"] == machine.inspect()
    assert ask(machine, command="inspect", path="vps/0/exits/io") == {"ok": True, "inspect": 3}
    assert "'vps' has" not in str(ask(machine, command="inspect", path="/vps/"))
    assert ask(machine, command="inspect", path="vps/1") == {"ok": False, "error": "vps has no '1'; it has 0"}
    assert "it has nothing" in ask(machine, command="inspect", path="state/x")["error"]


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({}, "unknown command"),
        ({"command": "fly"}, "unknown command"),
        ({"command": ["pause"]}, "unknown command"),
        ({"command": "pause", "hard": True}, "pause has no argument 'hard'"),
        ({"command": "shutdown", "timeout": 0}, "timeout"),
        ({"command": "shutdown", "timeout": float("nan")}, "timeout"),
        ({"command": "shutdown", "timeout": float("inf")}, "timeout"),
        ({"command": "shutdown", "timeout": True}, "timeout"),
        ({"command": "shutdown", "restart": 1}, "restart"),
        ({"command": "add-disk"}, "path"),
        ({"command": "add-disk", "path": "relative"}, "not absolute"),
        ({"command": "add-disk", "path": "/a\0"}, "NUL"),
        ({"command": "add-disk", "path": "/a", "controller": 4}, "controller"),
        ({"command": "add-disk", "path": "/a", "lun": -1}, "lun"),
        ({"command": "add-disk", "path": "/a", "iops": 9}, "iops"),
        ({"command": "add-disk", "path": "/a", "bandwidth": "1M"}, "bandwidth"),
        ({"command": "add-disk", "path": "/a", "format": "qcow2"}, "choose raw, vhd"),
        ({"command": "add-disk", "path": "/missing"}, "disk /missing: no such file"),
        ({"command": "insert", "controller": 0, "lun": 1, "path": "x.iso"}, "not absolute"),
        ({"command": "eject", "controller": 0, "lun": 1, "force": 1}, "force"),
        ({"command": "resize-disk", "controller": 0, "lun": 1}, "size"),
        ({"command": "resize-disk", "controller": 0, "lun": 1, "size": (64 << 40) + 1}, "size"),
        ({"command": "remove-disk", "controller": 0, "lun": 64}, "lun"),
        ({"command": "remove-disk", "controller": 0}, "lun"),
        ({"command": "remove-disk", "controller": True, "lun": 0}, "controller"),
        ({"command": "inspect", "path": 1}, "path"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(request_: dict[str, Any], why: str) -> None:
    reply = ask(FakeMachine(), **request_)
    assert reply["ok"] is False
    assert why in reply["error"]


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["pause", "reset", "inspect", "add-disk", "remove-disk", "status"])
arguments = st.dictionaries(st.sampled_from(["path", "readonly", "controller", "lun", "timeout"]), json_values)


@given(st.binary(max_size=200) | st.builds(lambda n, a: json.dumps({"command": n, **a}).encode(), names, arguments))
def test_any_request_gets_a_reply_of_one_line(line: bytes) -> None:
    reply = commands(FakeMachine()).answer(line)
    assert reply.count(b"\n") == 1
    assert isinstance(json.loads(reply)["ok"], bool)


@pytest.mark.parametrize("line", [b"[" * 60_000, b'{"command":"shutdown","timeout":' + b"9" * 6000 + b"}", b"\xff\xfe"])
def test_json_that_python_chokes_on_is_refused(line: bytes) -> None:
    assert json.loads(commands(FakeMachine()).answer(line))["ok"] is False


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


@pytest.fixture
def server(machine: FakeMachine, tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "c")
    control = ControlServer(path, commands(machine))
    control.start()
    yield path
    machine.guest_answers.set()
    control.close()
    assert not os.path.exists(path)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("control")]


class Client:
    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(20)
        self.socket.connect(path)
        self._replies = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reply(self) -> dict[str, Any] | None:
        """The next reply, None if the server hung up."""
        line = self._replies.readline()
        return json.loads(line) if line else None

    def ask(self, command: str) -> dict[str, Any]:
        self.send(json.dumps({"command": command}).encode() + b"\n")
        reply = self.reply()
        assert reply is not None
        return reply

    def close(self) -> None:
        self._replies.close()
        self.socket.close()


def test_the_socket_is_its_owners_alone(server: str) -> None:
    assert os.stat(server).st_mode & 0o777 == 0o600


def test_several_requests_on_one_connection_are_answered_in_order(server: str) -> None:
    client = Client(server)
    client.send(b'{"command":"pause"}\n{"command":"nonsense"}\n\n{"command":"resume"}\n')
    replies = [client.reply() for _ in range(4)]
    assert [reply["ok"] for reply in replies if reply] == [True, False, False, True]
    client.close()


def test_a_shutdown_that_waits_for_the_guest_holds_up_no_other_client(server: str, machine: FakeMachine) -> None:
    slow, quick = Client(server), Client(server)
    slow.send(b'{"command":"shutdown"}\n')
    assert machine.shutting_down.wait(20)
    assert quick.ask("status")["state"] == "running"
    machine.guest_answers.set()
    reply = slow.reply()
    assert reply is not None
    assert reply["obeyed"] is True
    slow.close()
    quick.close()


def test_garbage_and_half_requests_harm_nobody_else(server: str) -> None:
    good = Client(server)
    for garbage in (b"\x00\xff" * 500 + b"\n", b'{"command":', b"\n" * 50, b"{}"):
        bad = Client(server)
        bad.send(garbage)
        bad.close()
    assert good.ask("status")["ok"]
    good.close()


def test_a_request_beyond_the_limit_is_refused_and_the_connection_closed(server: str) -> None:
    client = Client(server)
    client.send(b"x" * (MAX_REQUEST + 1))
    reply = client.reply()
    assert reply is not None
    assert "longer than" in reply["error"]
    assert client.reply() is None
    client.close()


def test_a_request_of_just_the_limit_is_answered(server: str) -> None:
    client = Client(server)
    client.send(b'{"command":"status"}'.ljust(MAX_REQUEST - 1) + b"\n")
    reply = client.reply()
    assert reply is not None
    assert reply["ok"]
    client.close()


def test_one_client_too_many_is_refused_and_room_comes_back(server: str) -> None:
    clients = [Client(server) for _ in range(MAX_CLIENTS)]
    for client in clients:
        assert client.ask("status")["ok"]
    extra = Client(server)
    reply = extra.reply()
    assert reply is not None
    assert "more than 8 clients" in reply["error"]
    assert extra.reply() is None
    extra.close()
    leaving = clients.pop()
    leaving.socket.shutdown(socket.SHUT_WR)
    assert leaving.reply() is None  # the server has let go of it, so there is room
    leaving.close()
    while True:  # its thread may still be about to sign off
        late = Client(server)
        try:
            if late.ask("status")["ok"]:
                break
        except OSError:
            pass
        late.close()
    for client in (*clients, late):
        client.close()


def test_closing_sends_the_replies_under_way_first(machine: FakeMachine, tmp_path: Path) -> None:
    control = ControlServer(str(tmp_path / "c"), commands(machine))
    control.start()
    client = Client(str(tmp_path / "c"))
    client.send(b'{"command":"shutdown"}\n')
    assert machine.shutting_down.wait(20)
    machine.guest_answers.set()
    control.close()
    control.close()
    reply = client.reply()
    assert reply is not None
    assert reply["obeyed"] is True
    assert client.reply() is None
    client.close()


def test_a_stale_socket_is_replaced_and_a_live_one_or_another_file_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    listener = UnixListener(path, "control")
    with pytest.raises(ConfigError, match="in use by another process"):
        UnixListener(path, "control")
    listener.close()
    assert not os.path.exists(path)
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        UnixListener(path, "control")
    assert (tmp_path / "s").read_text() == "precious"


def test_closing_leaves_a_socket_alone_that_took_its_place(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    first = UnixListener(path, "control")
    os.unlink(path)
    second = UnixListener(path, "control")
    first.close()
    assert os.path.exists(path)
    second.close()


def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    for path, why in (("x" * 108, "longer than the 107 bytes"), ("", "not a path"), ("a\0", "not a path")):
        with pytest.raises(ConfigError, match=why):
            UnixListener(path, "control")
    with pytest.raises(ConfigError, match="No such file"):
        UnixListener(str(tmp_path / "no" / "s"), "control")
