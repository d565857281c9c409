"""``pyvmm lb``: load balancers in processes of their own, from their making to their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm import cli
from pyvmm.host.balancer import process, store
from tests.fakes.web import Web, ask, eventually, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYVMM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("PYVMM_RUNTIME_DIR", str(tmp_path / "run"))
    yield
    for name in store.names():
        process.stop(name)


@pytest.fixture
def webs() -> Iterator[list[Web]]:
    first = Web("a", "127.0.0.10")
    webs = [first, Web("b", "127.0.0.11", first.port)]
    yield webs
    for web in webs:
        web.stop()


def lb(*words: str) -> int:
    return cli.main(["lb", *words])


def tree(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert lb(*words, "-o", "json") == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    capsys.readouterr()
    assert lb(*words) == status
    error = capsys.readouterr().err
    assert error.startswith("pyvmm: error: ") and error.count("\n") == 1
    return error


def create(webs: list[Web], *more: str) -> int:
    """Load balancer ``web`` before all `webs`; return its port."""
    port = free_port()
    backends = [word for web in webs for word in ("--backend", f"{web.name}:{web.port},address={web.address}")]
    assert lb("create", "web", "--vip", f"127.0.0.1:{port}", *backends, "--interval", "0.1", *more) == 0
    return port


def test_a_load_balancer_serves_from_its_making_to_its_deletion(
    webs: list[Web], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    port = create(webs)
    assert {ask(port) for _ in range(4)} == {"a", "b"}
    assert f"web: 127.0.0.1:{port}, round-robin, check tcp, process" in capsys.readouterr().out
    (row,) = tree(capsys, "list")
    assert (row["name"], row["running"], row["backends"]) == ("web", True, 2)
    eventually(lambda: sum(each["connections_total"] for each in tree(capsys, "show", "web")["backends"]) >= 4)
    assert lb("delete", "web") == 0
    with pytest.raises(OSError, match="refused"):
        ask(port)
    assert tree(capsys, "list") == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_it_is_changed_while_it_runs(webs: list[Web], capsys: pytest.CaptureFixture[str]) -> None:
    port = create(webs[:1])
    target = f"b:{webs[1].port}"
    assert lb("add", "web", f"{target},address={webs[1].address},weight=2") == 0
    eventually(lambda: {ask(port) for _ in range(4)} == {"a", "b"})
    assert lb("drain", "web", target) == 0
    assert {ask(port) for _ in range(8)} == {"a"}
    assert tree(capsys, "show", "web")["backends"][1]["state"] == "draining"
    assert lb("undrain", "web", target) == 0
    assert lb("weigh", "web", target, "9") == 0
    eventually(lambda: [ask(port) for _ in range(10)].count("b") >= 8)
    assert tree(capsys, "remove", "web", target)["backends"][0]["vm"] == "a"
    eventually(lambda: {ask(port) for _ in range(4)} == {"a"})


def test_it_stops_and_starts_again(webs: list[Web], capsys: pytest.CaptureFixture[str]) -> None:
    port = create(webs)
    assert lb("stop", "web") == 0
    assert not tree(capsys, "show", "web")["running"]
    assert "does not run" in refused(capsys, 1, "stop", "web")
    assert lb("start", "web") == 0
    assert ask(port) in "ab"
    assert "runs already" in refused(capsys, 1, "start", "web")


def test_haproxy_ends_with_its_killed_process_and_a_start_finds_nothing_in_its_way(webs: list[Web]) -> None:
    port = create(webs)
    pid = process.pid_of("web")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)

    def gone() -> bool:
        try:
            ask(port)
        except OSError:
            return process.pid_of("web") is None
        return False

    eventually(gone)
    assert lb("start", "web") == 0
    assert ask(port) in "ab"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives the host addresses")
@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_the_host_has_the_address_for_as_long_as_it_is_needed(webs: list[Web], killed: bool) -> None:
    address, backend = "198.51.100.77", f"a:{webs[0].port},address={webs[0].address}"
    assert lb("create", "web", "--vip", f"{address}:8099", "--backend", backend) == 0
    assert ask(8099, address) == "a"
    pid = process.pid_of("web")
    if killed and pid is not None:
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: process.pid_of("web") is None)
        assert lb("start", "web") == 0
    assert lb("delete", "web") == 0
    shown = subprocess.run(["ip", "-o", "address"], capture_output=True, text=True, check=True).stdout
    assert address not in shown


def test_two_cannot_have_one_address(webs: list[Web], capsys: pytest.CaptureFixture[str]) -> None:
    port = create(webs)
    assert "cannot bind" in refused(capsys, 1, "create", "other", "--vip", f"127.0.0.1:{port}")
    assert [row["name"] for row in tree(capsys, "list")] == ["web"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["create", "../x", "--vip", "127.0.0.1:80"], 1, "load balancer name"),
        (["create", "x", "--vip", "nowhere:80"], 1, "write ADDRESS:PORT"),
        (["create", "x", "--vip", "::1:80"], 1, "write ADDRESS:PORT"),
        (["create", "x", "--vip", "127.0.0.1:0"], 1, "write ADDRESS:PORT"),
        (["create", "x", "--vip", "127.0.0.1:1", "--backend", "web"], 1, "write VM:PORT"),
        (["create", "x", "--vip", "127.0.0.1:1", "--backend", "web:80,weight=0"], 1, "weight '0' is not 1 to 256"),
        (["create", "x", "--vip", "127.0.0.1:1", "--backend", "web:80,address=no"], 1, "write VM:PORT"),
        (["create", "x", "--vip", "127.0.0.1:1", *["--backend", "web:80"] * 2], 1, "there twice"),
        (["create", "x", "--vip", "127.0.0.1:1", "--check", "http:/a b"], 1, "choose tcp, http or http:/PATH"),
        (["create", "x", "--vip", "127.0.0.1:1", "--check", "http:/\n    server x"], 1, "choose tcp"),
        (["create", "x", "--vip", "127.0.0.1:1", "--interval", "0"], 1, "interval 0.0"),
        (["create", "x", "--vip", "127.0.0.1:1", "--fall", "0"], 1, "1 to 100 checks"),
        (["create", "x", "--vip", "127.0.0.1:1", "--affinity", "-1"], 1, "affinity -1"),
        (["create", "x"], 2, "--vip"),
        (["show", "x"], 3, "no load balancer x"),
        (["delete", "x"], 3, "no load balancer x"),
        (["drain", "x", "a:1"], 3, "no load balancer x"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    words: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, status, *words)
    assert store.names() == []


def test_a_backend_that_is_not_there_is_named_with_those_that_are(
    webs: list[Web], capsys: pytest.CaptureFixture[str]
) -> None:
    create(webs[:1])
    assert f"it has a:{webs[0].port}" in refused(capsys, 1, "drain", "web", "b:80")


def test_a_broken_definition_is_said_with_its_place(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "state" / "balancers" / "web.toml"
    path.parent.mkdir(parents=True)
    path.write_text('name = "web"\nvip = "127.0.0.1"\nport = "80"\n')
    assert "web.toml: port: expected int, got str" in refused(capsys, 1, "show", "web")
