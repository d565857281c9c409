"""``pyvmm ctl`` against a control server and against servers that do not behave."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.cli import CliError, main
from pyvmm.cli.ctl import request
from pyvmm.machine.control import Commands, ControlServer
from tests.fakes.machine import FakeMachine


@pytest.fixture
def machine() -> FakeMachine:
    machine = FakeMachine()
    machine.guest_answers.set()
    return machine


@pytest.fixture
def vm(machine: FakeMachine, tmp_path: Path) -> Iterator[str]:
    control = ControlServer(str(tmp_path / "c"), Commands(machine, "web01"))  # type: ignore[arg-type]
    control.start()
    yield str(tmp_path / "c")
    control.close()


def test_a_shutdown_that_the_guest_obeys_is_status_0(
    vm: str, machine: FakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ctl", vm, "shutdown", "--timeout", "7", "--restart"]) == 0
    assert capsys.readouterr().out == "the guest shut down\n"
    assert machine.calls == [("shutdown", 7.0, True)]


def test_a_shutdown_that_the_guest_ignores_is_status_1(
    vm: str, machine: FakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.obeys = False
    assert main(["ctl", vm, "shutdown"]) == 1
    assert "did not answer" in capsys.readouterr().out
    assert main(["ctl", vm, "shutdown", "-o", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["obeyed"] is False


def test_controls_print_the_new_state(vm: str, machine: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    for command, line in (("pause", "state: paused"), ("resume", "state: running"), ("reset", "reset requested")):
        assert main(["ctl", vm, command]) == 0
        assert capsys.readouterr().out == f"{line}\n"
    assert main(["ctl", vm, "poweroff"]) == 0
    assert machine.stopped.is_set()


def test_status_is_text_or_json(vm: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ctl", vm, "status"]) == 0
    assert capsys.readouterr().out == f"name: web01\npid: {os.getpid()}\nstate: running\n"
    assert main(["ctl", vm, "status", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "web01"


def test_inspect_prints_the_tree_or_a_part_of_it(vm: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ctl", vm, "inspect"]) == 0
    assert capsys.readouterr().out == (
        "state: running\nvps:\n  0:\n    index: 0\n    exits:\n      io: 3\ndevices: {}\n"
    )
    assert main(["ctl", vm, "inspect", "vps/0/exits/io"]) == 0
    assert capsys.readouterr().out == "3\n"
    assert main(["ctl", vm, "inspect", "nothing"]) == 1
    assert capsys.readouterr().err == "pyvmm: error: the VM has no 'nothing'; it has state, vps, devices\n"


def test_a_disks_path_is_taken_from_here_not_from_the_vms_folder(
    vm: str, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ctl", vm, "add-disk", "d.img,readonly,controller=2,iops=50"]) == 0
    assert capsys.readouterr().out == "controller: 2\nlun: 1\n"
    assert main(["ctl", vm, "remove-disk", "2:1"]) == 0
    disk = {"path": str(tmp_path / "d.img"), "readonly": True, "bus": "scsi", "controller": 2, "iops": 50}
    assert main(["ctl", vm, "resize-disk", "2:1", "3M"]) == 0
    assert main(["ctl", vm, "eject", "0:3"]) == main(["ctl", vm, "eject", "0:3", "--force"]) == 0
    assert main(["ctl", vm, "insert", "ide1:0", "cd.iso"]) == 0
    assert machine.calls == [
        ("add", disk),
        ("remove", 2, 1),
        ("resize", 2, 1, 3 << 20),
        ("eject", "scsi", 0, 3, False),
        ("eject", "scsi", 0, 3, True),
        ("insert", "ide", 1, 0, str(tmp_path / "cd.iso")),
    ]


def test_nics_come_go_and_change(vm: str, machine: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ctl", vm, "nic", "add", "switch=lan,vlan=10"]) == 0
    assert capsys.readouterr().out == (
        "NIC  TYPE       MAC                NETWORK  LINK\n1    synthetic  00:15:5d:00:00:02  none     down\n"
    )
    assert main(["ctl", vm, "nic", "set", "1", "link=down,vlan=none", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["link"] is False
    assert main(["ctl", vm, "nic", "remove", "1"]) == 0
    assert machine.calls == [("add", "switch=lan", 10), ("set", 1, "link=down,vlan=none"), ("remove", 1)]
    capsys.readouterr()
    assert main(["ctl", vm, "nic", "set", "1", "switch=missing"]) == 1
    assert capsys.readouterr().err == "pyvmm: error: no switch missing\n"


def test_nics_are_listed_as_a_table_or_json(vm: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ctl", vm, "nic", "list"]) == 0
    assert capsys.readouterr().out == (
        "NIC  TYPE       MAC                NETWORK     LINK\n"
        "0    synthetic  00:15:5d:00:00:01  switch=lan  up\n"
        "1    synthetic  00:15:5d:00:00:02  none        down\n"
        "2    synthetic  00:15:5d:00:00:03  user        lost: passt ended\n"
    )
    for words in (["nic", "list", "-o", "json"], ["nic", "-o", "json", "list"]):
        assert main(["ctl", vm, *words]) == 0
        assert [nic["nic"] for nic in json.loads(capsys.readouterr().out)["nics"]] == [0, 1, 2]


@pytest.mark.parametrize(
    "words",
    [
        ["nic", "add", "lan"],
        ["nic", "add", "switch=lan,vlan=5000"],
        ["nic", "remove", "first"],
        ["remove-disk", "1"],
        ["remove-disk", "a:b"],
        ["add-disk", "x,y"],
        ["shutdown", "x"],
        ["resize-disk", "0:1", "big"],
    ],
)
def test_bad_arguments_are_status_2_and_never_sent(
    words: list[str], vm: str, machine: FakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ctl", vm, *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert machine.calls == []


def test_a_refused_command_is_status_1(vm: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ctl", vm, "add-disk", "/missing"]) == 1
    assert capsys.readouterr().err == "pyvmm: error: disk /missing: no such file\n"
    assert main(["ctl", vm, "shutdown", "--timeout", "0"]) == 1


def test_no_vm_at_the_socket_is_status_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(dead))
    for path in (str(dead), str(tmp_path / "nothing"), str(tmp_path), "x" * 200):
        assert main(["ctl", path, "status"]) == 3
        assert capsys.readouterr().err.startswith(f"pyvmm: error: no VM listens at {path}: ")


@pytest.mark.parametrize("answer", [b"", b"not json\n", b"[1]\n", b'{"ok": true'])
def test_a_server_that_answers_nonsense_is_status_1(answer: bytes, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(CliError, match="ended without an answer") as caught:
            request(path, {"command": "status"}, 20)
        thread.join()
    assert caught.value.exit_code == 1


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(CliError, match=r"did not answer within 0\.05 s"):
            request(path, {"command": "status"}, 0.05)
