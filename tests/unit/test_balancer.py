"""Load balancers as HAProxy carries them out: who gets connections, and what clients notice of changes."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from typing import TYPE_CHECKING

import msgspec
import pytest

from pyvmm.host.balancer.definition import Algorithm, Backend, Balancer, BalancerError
from pyvmm.host.balancer.follower import Follower
from tests.fakes.web import Web, ask, eventually, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Rig:
    """Two or more servers that stand for VMs, and a load balancer before them."""

    def __init__(self, folder: Path) -> None:
        self.webs: dict[str, Web] = {}
        self.vms: dict[str, str] = {}
        for name in ("a", "b"):
            self.add(name)
        self.balancer = Balancer(
            name="web",
            vip="127.0.0.1",
            port=free_port(),
            backends=[self.backend("a"), self.backend("b")],
            check="http:/",
            interval=0.1,
        )
        self.reported: list[str] = []
        self.follower = Follower(folder, lambda: self.balancer, lambda: self.vms, None, self.reported.append)

    def add(self, name: str) -> None:
        """One more VM."""
        port = self.webs["a"].port if self.webs else 0
        web = self.webs[name] = Web(name, f"127.0.0.{10 + len(self.webs)}", port)
        self.vms[name] = web.address

    def backend(self, name: str, weight: int = 1) -> Backend:
        return Backend(vm=name, port=self.webs[name].port, weight=weight)

    def set(self, **values: object) -> None:
        """Change the definition."""
        self.balancer = msgspec.structs.replace(self.balancer, **values)

    def start(self) -> None:
        self.follower.step()
        self.follower.wait(20)
        eventually(lambda: all(self.state(index).startswith("UP") for index in range(len(self.balancer.backends))))

    def state(self, index: int) -> str:
        return self.follower.statistics()[f"vm{index}"]["status"]

    def sessions(self) -> list[str]:
        found = self.follower.statistics()
        return [found[f"vm{index}"]["scur"] for index in range(len(self.balancer.backends))]

    def ask(self, count: int = 1, source: str = "") -> Counter[str]:
        return Counter(ask(self.balancer.port, source=source) for _ in range(count))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.follower.stop()
    for web in rig.webs.values():
        web.stop()


def test_connections_are_spread_as_weighted(rig: Rig) -> None:
    rig.set(backends=[rig.backend("a", 3), rig.backend("b")])
    rig.start()
    assert rig.ask(40) == {"a": 30, "b": 10}
    rig.set(backends=[rig.backend("a"), rig.backend("b", 4)])
    rig.follower.step()
    assert 72 <= rig.ask(100)["b"] <= 88  # the turns under way are still the old ones


def test_a_vm_that_dies_costs_no_request_once_it_is_found_dead(rig: Rig) -> None:
    rig.start()
    rig.webs["a"].stop()
    eventually(lambda: rig.state(0) == "DOWN")
    assert rig.ask(50) == {"b": 50}


def test_requests_between_the_death_and_its_discovery_go_to_the_others(rig: Rig) -> None:
    rig.set(interval=3600.0)
    rig.follower.step()
    rig.follower.wait(20)
    rig.webs["a"].stop()
    assert rig.ask(10) == {"b": 10}


def test_a_drained_vm_ends_what_it_has_and_gets_nothing_new(rig: Rig) -> None:
    rig.set(backends=[rig.backend("a"), msgspec.structs.replace(rig.backend("b"), draining=True)])
    rig.start()
    assert rig.ask(10) == {"a": 10}
    eventually(lambda: rig.sessions() == ["0", "0"])
    held: list[str] = []
    request = threading.Thread(target=lambda: held.append(ask(rig.balancer.port, path="/held")))
    request.start()
    eventually(lambda: rig.sessions() == ["1", "0"])
    rig.set(backends=[msgspec.structs.replace(rig.backend("a"), draining=True), rig.backend("b")])
    rig.follower.step()
    assert rig.ask(10) == {"b": 10}
    rig.webs["a"].go_on.set()
    request.join()
    assert held == ["a"]


def test_a_client_that_returns_gets_the_same_vm_until_that_drains(rig: Rig) -> None:
    rig.set(affinity_seconds=60)
    rig.start()
    first = {source: ask(rig.balancer.port, source=source) for source in ("127.0.0.1", "127.0.0.2")}
    assert set(first.values()) == {"a", "b"}
    for source, name in first.items():
        assert rig.ask(5, source) == {name: 5}
    rig.set(backends=[msgspec.structs.replace(rig.backend("a"), draining=True), rig.backend("b")])
    rig.follower.step()
    for source in first:
        assert rig.ask(5, source) == {"b": 5}


def test_by_source_the_same_address_always_gets_the_same_vm(rig: Rig) -> None:
    rig.set(algorithm=Algorithm.SOURCE)
    rig.start()
    found = {source: set(rig.ask(5, source)) for source in (f"127.0.0.{number}" for number in range(1, 30))}
    assert all(len(names) == 1 for names in found.values())
    assert set.union(*found.values()) == {"a", "b"}


def test_least_connections_prefers_the_idle_vm(rig: Rig) -> None:
    rig.set(algorithm=Algorithm.LEAST_CONNECTIONS)
    rig.start()
    eventually(lambda: rig.sessions() == ["0", "0"])
    busy: list[str] = []
    request = threading.Thread(target=lambda: busy.append(ask(rig.balancer.port, path="/held")))
    request.start()
    found: set[str] = set()
    for _ in range(5):
        eventually(lambda: sorted(rig.sessions()) == ["0", "1"])  # the request before has ended there too
        found.update(rig.ask())
    (idle,) = found
    for web in rig.webs.values():
        web.go_on.set()
    request.join()
    assert {*busy, idle} == {"a", "b"}


def test_a_vm_is_followed_to_another_address_and_left_out_while_it_has_none(rig: Rig) -> None:
    rig.start()
    gone = rig.vms.pop("a")
    rig.follower.step()
    assert rig.ask(10) == {"b": 10} and rig.state(0) == "MAINT"
    rig.webs["a"].stop()
    rig.webs["a"] = Web("a", "127.0.0.99", rig.webs["b"].port)
    rig.vms["a"] = rig.webs["a"].address
    rig.follower.step()
    eventually(lambda: rig.state(0) == "UP")
    assert rig.ask(10) == {"a": 5, "b": 5}
    port = rig.webs["b"].port
    assert rig.reported[-2:] == [f"a:{port} is away", f"a:{port} is at 127.0.0.99"] and gone != "127.0.0.99"


def test_vms_come_and_go_without_a_failed_request(rig: Rig) -> None:
    rig.start()
    done = threading.Event()
    failed: list[OSError] = []

    def client() -> None:
        while not done.is_set():
            try:
                rig.ask()
            except OSError as error:
                failed.append(error)

    clients = threading.Thread(target=client)
    clients.start()
    try:
        rig.add("c")
        rig.set(backends=[*rig.balancer.backends, rig.backend("c")])
        rig.follower.step()
        eventually(lambda: "c" in rig.ask())
        rig.set(backends=rig.balancer.backends[1:])
        rig.follower.step()
        eventually(lambda: rig.follower.statistics().keys() == {"FRONTEND", "BACKEND", "vm0", "vm1"})
        eventually(lambda: "a" not in rig.ask(6))
    finally:
        done.set()
        clients.join()
    assert not failed


def test_a_definition_that_haproxy_refuses_leaves_the_old_one_at_work(rig: Rig) -> None:
    rig.start()
    rig.set(vip="127.0.0.1 ssl crt /nonexistent")
    with pytest.raises(BalancerError, match="HAProxy refuses"):
        rig.follower.step()
    rig.set(vip="127.0.0.1")
    rig.follower.step()
    assert rig.ask(2) == {"a": 1, "b": 1}


def test_haproxy_is_started_again_when_it_dies(rig: Rig) -> None:
    rig.start()
    pid = rig.follower.process_id
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: rig.follower.process_id is None)
    rig.follower.step()
    eventually(lambda: sum(rig.ask(2).values()) == 2)
    assert "HAProxy has ended and is started again" in rig.reported


def test_an_address_in_use_is_one_line(rig: Rig) -> None:
    rig.set(port=rig.webs["a"].port, vip=rig.webs["a"].address)
    rig.follower.step()
    with pytest.raises(BalancerError, match="cannot bind socket"):
        rig.follower.wait(20)
