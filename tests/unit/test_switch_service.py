"""The service of a switch, and the ports that its clients get."""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.network import client, protocol, service
from devices.network.definition import SwitchDefinition
from devices.network.errors import SwitchError
from devices.network.plane import Learned
from devices.network.settings import PortSettings, VlanMode
from devices.network.switch import MAX_PORTS, MAX_SHOWN
from tests.fakes.network import FakeNat, FakePlane
from tests.fakes.switch_service import connect, nic, say, serving, use_folders, vm_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


SHOW = protocol.Show()


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_folders(tmp_path, monkeypatch)


@pytest.fixture
def plane() -> Iterator[FakePlane]:
    with serving() as plane:
        yield plane


def ports() -> list[int]:
    """The numbers of the switch's ports, as the service knows them once it has done all that came before."""
    return [port["port"] for port in client.ask("lan", SHOW)["ports"]]


def until(reached: Callable[[], bool]) -> None:
    """Wait for what a connection's end, which nobody replies to, does in the service."""
    for _ in range(10_000):
        if reached():
            return
        ports()
    pytest.fail("not reached")


def until_ports(expected: list[int]) -> None:
    until(lambda: ports() == expected)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_port_is_a_descriptor_to_the_plane_that_does_not_block(plane: FakePlane) -> None:
    port = client.plug("lan", nic())
    assert (port.name, port.mtu, port.link) == ("switch lan", 1500, True)
    plane.ends[1].send(b"to the NIC")
    assert os.read(port.fd, 100) == b"to the NIC"
    with pytest.raises(BlockingIOError):
        os.read(port.fd, 100)
    os.write(port.fd, b"from the NIC")
    assert plane.ends[1].recv(100) == b"from the NIC"
    port.close()
    until_ports([])
    assert plane.ports == {}


def test_what_show_tells_of_ports(plane: FakePlane) -> None:
    port = client.plug("lan", nic(mode=VlanMode.ACCESS, vlan=10))
    plane.table = [Learned(10, nic().mac, 1), Learned(10, "52:54:00:00:00:01", None)]
    shown = client.ask("lan", SHOW)
    assert {name: shown[name] for name in ("name", "type", "state", "pid", "plane", "plane_reason")} == {
        "name": "lan",
        "type": "private",
        "state": "running",
        "pid": os.getpid(),
        "plane": "process",
        "plane_reason": "a test",
    }
    assert shown["learned_outside"] == 1
    (one,) = shown["ports"]
    assert (one["vm"], one["nic"], one["mode"], one["vlan"], one["pid"]) == ("web01", "nic0", "access", 10, os.getpid())
    assert one["learned"] == [{"vlan": 10, "mac": nic().mac}] and one["learned_count"] == 1
    assert one["statistics"]["received_frames"] == 1 and one["statistics"]["dropped"] == {"vlan": 2}
    assert client.ask("lan", protocol.Show("web01:nic0")) == {"ok": True, **one}
    port.close()


def test_a_reply_larger_than_a_message_comes_whole(plane: FakePlane) -> None:
    made = [client.plug("lan", nic(f"vm{number:03}" + "x" * 50, number)) for number in range(100)]
    plane.table = [Learned(0, f"52:54:00:00:{i >> 8:02x}:{i & 255:02x}", 1 + i % 100) for i in range(20_000)]
    shown = client.ask("lan", SHOW)
    assert [port["port"] for port in shown["ports"]] == list(range(1, 101))
    assert all(len(port["learned"]) == MAX_SHOWN and port["learned_count"] == 200 for port in shown["ports"])
    assert len(msgspec.json.encode(shown)) > 4 * protocol.MAX_MESSAGE
    for port in made:
        port.close()


def test_offloads_reach_the_plane_and_the_last_wins(plane: FakePlane) -> None:
    port = client.plug("lan", nic())
    for offloads in (7, 1, 15, 3):
        port.set_offloads(offloads)
    port.change(nic(bandwidth=1_000_000))  # replies come in order
    assert plane.offloads == {1: 3}
    assert plane.ports[1].bandwidth == 1_000_000
    port.close()


def test_settings_changed_by_the_vm_or_a_command_are_known_to_both(plane: FakePlane) -> None:
    links: queue.Queue[bool] = queue.Queue()
    port = client.plug("lan", nic(), on_link=links.put)
    port.change(nic(mode=VlanMode.ACCESS, vlan=5))
    shown = client.ask("lan", protocol.Set("web01", {"link": False}))
    assert (shown["link"], shown["vlan"]) == (False, 5)
    assert links.get(timeout=30) is False
    assert port.settings == plane.ports[1] == nic(mode=VlanMode.ACCESS, vlan=5, link=False)
    assert port.link is False
    port.change(nic())
    assert links.get(timeout=30) is True
    port.close()


def test_a_vm_that_goes_while_its_port_is_set_is_no_failure(plane: FakePlane, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = connect()
    connection.send(msgspec.json.encode(protocol.Plug(nic())))
    _, fd = protocol.receive(connection)
    os.close(fd)
    monkeypatch.setattr(plane, "change_port", lambda *_: connection.close())
    assert client.ask("lan", protocol.Set("web01", {"link": False}))["link"] is False
    until_ports([])


def test_a_refused_change_leaves_all_as_it_was(plane: FakePlane) -> None:
    port = client.plug("lan", nic())
    with pytest.raises(SwitchError, match="vlan 5000 is not 1 to 4094"):
        port.change(nic(mode=VlanMode.ACCESS, vlan=5000))
    with pytest.raises(SwitchError, match="VM, NIC and mac stay"):
        port.change(nic(mac="00:15:5d:00:00:99"))
    with pytest.raises(SwitchError, match="vlan"):
        client.ask("lan", protocol.Set("web01", {"vlan": "many"}))
    plane.refusal = "no memory for that"
    with pytest.raises(SwitchError, match="switch lan: no memory for that") as refused:
        port.change(nic(bandwidth=1_000_000))
    assert refused.value.kind == "host"
    plane.refusal = None
    assert port.settings == plane.ports[1] == nic()
    port.close()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (nic(mac="01:15:5d:00:00:01"), "no NIC's address"),
        (nic(mac="00:15:5D:00:00:01"), "no NIC's address"),
        (nic(mac="00:00:00:00:00:00"), "no NIC's address"),
        (nic(vm=""), "VM name"),
        (nic(vm="a\nb"), "VM name"),
        (nic(nic="n" * 65), "NIC name"),
        (nic(mode=VlanMode.TRUNK), "a trunk needs the VLANs"),
        (nic(bandwidth=10), "less than 64000"),
    ],
)
def test_settings_that_make_no_port_are_refused(plane: FakePlane, settings: msgspec.Struct, why: str) -> None:
    with pytest.raises(SwitchError, match=why):
        client.plug("lan", settings)  # type: ignore[arg-type]
    assert plane.ports == {}


def test_a_nic_or_address_that_is_there_already_is_refused(plane: FakePlane) -> None:
    port = client.plug("lan", nic())
    with pytest.raises(SwitchError, match=f"web01's nic0 .process {os.getpid()}. is plugged in already"):
        client.plug("lan", nic(mac="00:15:5d:00:00:99"))
    with pytest.raises(SwitchError, match="give the VM another name, or its NIC another mac"):
        client.plug("lan", nic(nic="nic1"))
    assert ports() == [1]
    port.close()


def test_a_port_is_found_by_vm_and_nic(plane: FakePlane) -> None:
    made = [client.plug("lan", nic(number=0)), client.plug("lan", nic(number=1)), client.plug("lan", nic("b:c"))]
    assert client.ask("lan", protocol.Show("web01:nic1"))["port"] == 2
    assert client.ask("lan", protocol.Show("b:c"))["port"] == 3
    with pytest.raises(SwitchError, match="choose web01:nic0, web01:nic1"):
        client.ask("lan", protocol.Show("web01"))
    with pytest.raises(SwitchError, match="none has no port") as refused:
        client.ask("lan", protocol.Show("none"))
    assert refused.value.kind == "missing"
    for port in made:
        port.close()


def test_a_port_is_mirrored_to_a_file(plane: FakePlane, tmp_path: Path) -> None:
    port = client.plug("lan", nic())
    path = str(tmp_path / "a.pcap")
    assert client.ask("lan", protocol.Mirror("web01", path))["mirror"] == path
    assert plane.mirrors == {1: path}
    assert client.ask("lan", protocol.Mirror("web01", None))["mirror"] is None
    with pytest.raises(SwitchError, match="absolute"):
        client.ask("lan", protocol.Mirror("web01", "a.pcap"))
    port.close()


def test_a_killed_vm_loses_its_port(plane: FakePlane) -> None:
    with vm_process("victim") as vm:
        assert plane.ports[1].vm == "victim"
        vm.kill()
    until_ports([])
    client.plug("lan", nic("victim")).close()  # and may have it again


def test_a_vm_learns_that_the_service_has_ended() -> None:
    lost = threading.Event()
    with serving():
        port = client.plug("lan", nic(), on_lost=lost.set)
    assert lost.wait(30)
    assert os.read(port.fd, 10) == b""
    with pytest.raises(SwitchError, match="has ended") as refused:
        port.change(nic(bandwidth=1_000_000))
    assert refused.value.kind == "stopped"
    port.set_offloads(1)  # harmless
    assert port.inspect()["lost"] is True
    port.close()


def test_a_closed_port_calls_nobody(plane: FakePlane) -> None:
    lost = threading.Event()
    port = client.plug("lan", nic(), on_lost=lost.set)
    port.close()
    port.close()
    until_ports([])
    assert not lost.is_set()


def test_many_clients_at_once_get_ports_of_their_own(plane: FakePlane) -> None:
    made: queue.Queue[client.SwitchPort] = queue.Queue()
    failed: queue.Queue[BaseException] = queue.Queue()

    def plug(number: int) -> None:
        try:
            for turn in range(5):
                port = client.plug("lan", nic(f"vm{number}", number))
                port.change(nic(f"vm{number}", number, bandwidth=1_000_000 + turn))
                if turn < 4:
                    port.close()
                    while any(one["vm"] == f"vm{number}" for one in client.ask("lan", SHOW)["ports"]):
                        pass
            made.put(port)
        except BaseException as error:
            failed.put(error)
            raise

    threads = [threading.Thread(target=plug, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed.empty()
    assert sorted(settings.vm for settings in plane.ports.values()) == sorted(f"vm{number}" for number in range(12))
    while not made.empty():
        made.get().close()


def test_all_ports_may_be_taken_and_not_one_more(plane: FakePlane) -> None:
    held = []
    for number in range(MAX_PORTS):
        connection = connect()
        held.append(connection)
        settings = nic(f"vm{number}", mac=f"00:15:5d:00:{number >> 8:02x}:{number & 255:02x}")
        connection.send(msgspec.json.encode(protocol.Plug(settings)))
        reply, fd = protocol.receive(connection)
        assert reply is not None and reply["port"] == number + 1
        os.close(fd)
    with pytest.raises(SwitchError, match=f"all {MAX_PORTS} ports are taken"):
        client.plug("lan", nic("late"))
    for connection in held:
        connection.close()
    until_ports([])


@pytest.mark.parametrize(
    "message",
    [
        b"nothing",
        b"[]",
        b"\xff",
        b"[" * 20_000,
        b'{"command": "explode"}',
        b'{"command": "plug"}',
        b'{"command": "plug", "settings": {"vm": 1}}',
        b'{"command": "show", "port": null, "more": 1}',
        b'{"command": "offloads", "offloads": -1}',
        b'{"command": "offloads", "offloads": 1}',
        b'{"command": "change", "settings": {"vm": "a", "nic": "b", "mac": "00:15:5d:00:00:01"}}',
        b'{"command": "mirror", "port": "x", "path": "/a\\u0000"}',
        b" " * (protocol.MAX_MESSAGE + 1),
    ],
)
def test_what_is_no_request_is_refused_and_the_connection_goes_on(plane: FakePlane, message: bytes) -> None:
    with connect() as connection:
        reply = say(connection, message)
        assert reply["ok"] is False and "internal error" not in reply["error"] and "\n" not in reply["error"]
        assert say(connection, SHOW)["ok"] is True


def test_one_connection_has_one_port(plane: FakePlane) -> None:
    with connect() as connection:
        connection.send(msgspec.json.encode(protocol.Plug(nic())))
        reply, fd = protocol.receive(connection)
        assert reply is not None and reply["ok"]
        os.close(fd)
        assert "one port" in say(connection, protocol.Plug(nic(number=1)))["error"]
        assert ports() == [1]
    until_ports([])


def test_a_client_that_never_reads_holds_up_nobody_and_costs_one_reply(plane: FakePlane) -> None:
    port = client.plug("lan", nic())
    with connect() as greedy:
        greedy.setblocking(False)
        sent = 0
        full = False
        while not full:
            try:
                sent += greedy.send(msgspec.json.encode(SHOW)) > 0
            except BlockingIOError:
                full = True
        port.change(nic(bandwidth=1_000_000))
        assert client.ask("lan", SHOW)["ports"][0]["bandwidth"] == 1_000_000
        greedy.settimeout(30)
        replies = 0
        while replies < sent:  # all are answered once it reads
            reply, _ = protocol.receive(greedy)
            assert reply is not None and reply["ok"]
            replies += 1
    port.close()


def test_a_vm_that_does_not_read_hears_only_the_last_of_many_changes(plane: FakePlane) -> None:
    with connect() as connection:
        connection.send(msgspec.json.encode(protocol.Plug(nic())))
        _, fd = protocol.receive(connection)
        os.close(fd)
        for number in range(2000):
            client.ask("lan", protocol.Set("web01", {"bandwidth": 1_000_000 + number}))
        heard: list[int] = []
        while not heard or heard[-1] != 1_001_999:
            event, _ = protocol.receive(connection)
            assert event is not None and event["event"] == "settings"
            heard.append(event["settings"]["bandwidth"])
    assert heard == sorted(heard)


def test_idle_connections_make_room_for_others_but_ports_stay(plane: FakePlane) -> None:
    port = client.plug("lan", nic())
    idle = [connect() for _ in range(service.MAX_VISITORS + 10)]
    assert ports() == [1]
    assert idle[0].recv(10) == b""  # the first were closed
    assert say(idle[-1], SHOW)["ok"]
    for connection in idle:
        connection.close()
    port.close()


def test_descriptors_that_nobody_asked_for_are_not_kept(plane: FakePlane) -> None:
    before = descriptors()
    with connect() as connection, open(os.devnull, "rb") as file:
        for _ in range(50):
            socket.send_fds(connection, [msgspec.json.encode(SHOW)], [file.fileno()] * 4)
            reply, _ = protocol.receive(connection)
            assert reply is not None and reply["ok"]
        until(lambda: descriptors() <= before + 3)  # both ends of the connection, and the file


def test_no_descriptor_is_left_of_ports_that_came_and_went(plane: FakePlane) -> None:
    client.plug("lan", nic()).close()
    until_ports([])
    before = descriptors()
    for _ in range(20):
        client.plug("lan", nic()).close()
        until_ports([])
    plane.refusal = "no"
    for _ in range(20):
        with pytest.raises(SwitchError):
            client.plug("lan", nic())
    plane.refusal = None
    assert ports() == []
    until(lambda: descriptors() <= before)


def test_a_bug_in_one_request_leaves_the_service_to_others(
    plane: FakePlane, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("bug")

    with monkeypatch.context() as patched:
        patched.setattr(plane, "learned", fail)
        with pytest.raises(SwitchError, match="internal error: ZeroDivisionError"):
            client.ask("lan", SHOW)
    assert "Traceback" in capfd.readouterr().err
    assert ports() == []


def test_stop_is_refused_while_there_are_ports_and_obeyed_after_force() -> None:
    with serving() as plane:
        port = client.plug("lan", nic())
        with pytest.raises(SwitchError, match="1 port in use"):
            client.ask("lan", protocol.Stop())
        assert ports() == [1]
        assert client.ask("lan", protocol.Stop(force=True))["ok"]
        assert plane.closed == 1 and plane.ports == {}  # before the reply
        port.close()


def test_what_cannot_be_removed_at_the_end_is_told_to_who_asked_for_it(capfd: pytest.CaptureFixture[str]) -> None:
    with serving() as plane:
        plane.refusal_to_close = "the bridge is busy"
        with pytest.raises(SwitchError, match="switch lan: the bridge is busy") as refused:
            client.ask("lan", protocol.Stop())
        assert refused.value.kind == "host"
    assert "the bridge is busy" in capfd.readouterr().err


def test_addresses_that_a_nic_claims_are_shown(plane: FakePlane) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs.setblocking(False)
    mac = bytes.fromhex(nic().mac.replace(":", ""))
    arp = bytes.fromhex("ffffffffffff") + mac + bytes.fromhex("08060001080006040001") + mac + bytes([10, 0, 0, 7])
    with ours, serving("heard", theirs):
        port = client.plug("heard", nic())
        for _ in range(1000):
            ours.send(arp + bytes(10))  # more than are heard in one go
        while True:
            shown = client.ask("heard", protocol.Show("web01"))["addresses"]
            if shown:
                break
        assert shown == ["10.0.0.7"]
        port.close()


@pytest.fixture
def nat(plane: FakePlane) -> Iterator[FakeNat]:
    """That of the switch ``net``."""
    nat = FakeNat(SwitchDefinition(name="net"), "pv-net")
    with serving("net", nat=nat):
        yield nat
    nat.stop()


def test_nat_knows_the_nics_and_its_leases_are_shown(nat: FakeNat) -> None:
    port = client.plug("net", nic())
    assert nat.nics == {nic().mac: "web01"}
    nat.leased = [(nic().mac, "192.168.77.2")]
    assert client.ask("net", protocol.Show("web01"))["addresses"] == ["192.168.77.2"]
    assert client.ask("net", SHOW)["ports"][0]["addresses"] == ["192.168.77.2"]
    port.close()
    until(lambda: nat.nics == {})


def test_a_nic_that_nat_refuses_gets_no_port(nat: FakeNat) -> None:
    nat.refusal = "no nftables"
    with pytest.raises(SwitchError, match="switch net: no nftables"):
        client.plug("net", nic())
    assert client.ask("net", SHOW)["ports"] == []
    nat.refusal = None
    client.plug("net", nic()).close()


def test_what_befalls_nat_is_logged_and_ends_nothing(nat: FakeNat, capfd: pytest.CaptureFixture[str]) -> None:
    for trouble in (None, "dnsmasq was started again", "broken"):
        nat.troubles.append(trouble)
        os.eventfd_write(nat.alarm, 1)
        until(lambda: not nat.troubles)
    assert client.ask("net", SHOW)["ports"] == []
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "dnsmasq was started again",
        "dnsmasq cannot be started again",
    ]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
_NAMES = st.sampled_from(["plug", "offloads", "change", "show", "set", "mirror", "explode"])
_FIELDS = st.sampled_from(["settings", "offloads", "port", "changes", "path", "force", "more"])
_KNOWN = {
    "plug": ("settings",),
    "change": ("settings",),
    "offloads": ("offloads",),
    "show": ("port",),
    "set": ("port", "changes"),
    "mirror": ("port", "path"),
}
_SOUND = {"settings": msgspec.to_builtins(nic()), "offloads": 1, "port": "web01", "changes": {}, "path": None}
_SETTINGS = st.dictionaries(st.sampled_from([*PortSettings.__struct_fields__, "more"]), _JSON, max_size=5)


@given(
    requests=st.lists(
        st.tuples(_NAMES, st.dictionaries(_FIELDS, _JSON | _SETTINGS | st.just("web01"), max_size=4), st.booleans()),
        max_size=4,
    )
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_is_answered_and_brings_no_bug_to_light(
    plane: FakePlane, requests: list[tuple[str, dict[str, object], bool]]
) -> None:
    with connect() as connection:
        for name, fields, sound in requests:
            if sound:
                fields = {key: fields.get(key, _SOUND[key]) for key in _KNOWN.get(name, ())}
            connection.send(json.dumps({**fields, "command": name}).encode())
            reply, fd = protocol.receive(connection)
            while reply is not None and "event" in reply:
                reply, fd = protocol.receive(connection)
            assert reply is not None and "internal error" not in str(reply.get("error"))
            if fd >= 0:
                os.close(fd)
