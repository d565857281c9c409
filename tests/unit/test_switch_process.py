"""Services of switches as processes: how they start, end and are killed, and what they leave."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devices.network import admin, client, definition, places, planes, protocol
from devices.network.definition import PlaneChoice, SwitchDefinition, SwitchType
from devices.network.errors import SwitchError
from devices.network.port import VNET_HEADER_SIZE
from devices.network.service import MAX_LOG
from devices.network.settings import VlanMode
from pyvmm.cli import main
from tests.fakes.frames import ARP, BROADCAST, IPV4, ethernet, mac_bytes, vnet
from tests.fakes.netns import NetworkNamespace
from tests.fakes.switch_service import nic, use_folders, vm_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from devices.network.client import SwitchPort

ROOT = os.geteuid() == 0
WAIT_S = 30
PYVMM = [sys.executable, "-m", "pyvmm"]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_folders(tmp_path, monkeypatch)
    yield
    delete_all()


def delete_all() -> None:
    for name in definition.names():
        with contextlib.suppress(SwitchError):
            admin.delete(name, force=True)


@pytest.fixture
def lan() -> SwitchDefinition:
    """A private switch that no service runs for yet."""
    made = SwitchDefinition(name="lan", plane=PlaneChoice.PROCESS)
    admin.create(made)
    return made


def service() -> int:
    """The process of the switch ``lan``."""
    pid = client.ask("lan", protocol.Show())["pid"]
    assert isinstance(pid, int)
    return pid


def wait_end(pid: int) -> None:
    """Wait for the end of a process that is no child."""
    with contextlib.suppress(ProcessLookupError):
        file = os.pidfd_open(pid)
        try:
            assert select.select([file], [], [], WAIT_S)[0]
        finally:
            os.close(file)


def frame(to: str, source: str, payload: bytes) -> bytes:
    """Its kind is one for local experiments (IEEE 802)."""
    return vnet() + ethernet(payload.ljust(46, b"\0"), 0x88B5, to=to, source=source)


def read(port: SwitchPort) -> bytes:
    """The next frame, without its header of virtio."""
    assert select.select([port.fd], [], [], WAIT_S)[0]
    return os.read(port.fd, 1 << 17)[VNET_HEADER_SIZE:]


def read_until(port: SwitchPort, wanted: Callable[[bytes], bool]) -> bytes:
    """The next frame that is `wanted`; a host's interface has things to say of its own."""
    while True:
        got = read(port)
        if wanted(got):
            return got


def test_the_first_port_starts_a_service_of_its_own_and_frames_pass(lan: SwitchDefinition) -> None:
    assert admin.describe("lan")["state"] == "stopped"
    one, two = client.plug("lan", nic("one")), client.plug("lan", nic("two"))
    pid = service()
    assert pid != os.getpid() and os.getsid(pid) == pid
    assert stat.S_IMODE(os.stat(places.running("lan", "sock")).st_mode) == 0o600
    os.write(one.fd, frame(BROADCAST, nic("one").mac, b"hello"))
    assert read(two)[14:19] == b"hello"
    shown = admin.describe("lan")
    assert [port["vm"] for port in shown["ports"]] == ["one", "two"]
    assert shown["plane"] == "process"
    assert [port["statistics"]["received_frames"] for port in shown["ports"]] == [1, 0]
    assert [port["statistics"]["sent_frames"] for port in shown["ports"]] == [0, 1]
    assert shown["ports"][0]["learned"] == [{"vlan": 0, "mac": nic("one").mac}]
    one.close()
    two.close()
    admin.delete("lan")
    wait_end(pid)
    assert os.listdir(os.path.dirname(places.running("lan", "sock"))) == []


def test_a_switch_is_started_by_command(lan: SwitchDefinition) -> None:
    for _ in range(2):  # the second time it runs already
        assert main(["switch", "start", "lan"]) == 0
        assert admin.describe("lan")["state"] == "running"
    assert main(["switch", "start", "other"]) == 3


def test_settings_take_effect_at_once(lan: SwitchDefinition) -> None:
    one, two = client.plug("lan", nic("one")), client.plug("lan", nic("two"))
    two.change(nic("two", mode=VlanMode.ACCESS, vlan=10))
    os.write(one.fd, frame(BROADCAST, nic("one").mac, b"not for you"))
    while not client.ask("lan", protocol.Show("one"))["statistics"]["received_frames"]:
        pass  # what is read later is in the VLAN of later
    client.ask("lan", protocol.Set("one", {"mode": "access", "vlan": 10}))
    os.write(one.fd, frame(BROADCAST, nic("one").mac, b"for you"))
    assert read(two)[14:21] == b"for you"
    one.close()
    two.close()


def test_many_first_ports_at_once_start_one_service(lan: SwitchDefinition) -> None:
    ports: list[SwitchPort] = []
    threads = [
        threading.Thread(target=lambda number=number: ports.append(client.plug("lan", nic(f"vm{number}", number))))
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admin.describe("lan")["ports"]) == 4
    for port in ports:
        port.close()


def test_a_killed_service_is_noticed_and_followed_by_another(lan: SwitchDefinition) -> None:
    lost = threading.Event()
    port = client.plug("lan", nic(), on_lost=lost.set)
    pid = service()
    os.kill(pid, signal.SIGKILL)
    assert lost.wait(WAIT_S)
    wait_end(pid)
    assert os.path.exists(places.running("lan", "sock"))
    again = client.plug("lan", port.settings)
    assert service() != pid
    assert [one["vm"] for one in admin.describe("lan")["ports"]] == ["web01"]
    port.close()
    again.close()


def test_a_service_that_is_told_to_end_leaves_nothing_but_its_log_and_lock(lan: SwitchDefinition) -> None:
    lost = threading.Event()
    port = client.plug("lan", nic(), on_lost=lost.set)
    pid = service()
    os.kill(pid, signal.SIGTERM)
    assert lost.wait(WAIT_S)
    wait_end(pid)
    assert sorted(os.listdir(os.path.dirname(places.running("lan", "sock")))) == ["lan.lock", "lan.log"]
    assert Path(places.running("lan", "log")).read_text().endswith("ended\n")
    port.close()


def test_the_service_outlives_the_vm_that_started_it_and_takes_its_port_back(lan: SwitchDefinition) -> None:
    with vm_process("victim") as vm:
        pid = service()
        vm.kill()
    while admin.describe("lan")["ports"]:
        pass
    assert service() == pid
    client.plug("lan", nic("victim")).close()


def test_the_log_of_a_service_begins_anew_once_it_is_long(lan: SwitchDefinition) -> None:
    port = client.plug("lan", nic())
    log = Path(places.running("lan", "log"))
    with log.open("a") as file:
        file.write("x" * (MAX_LOG + 1))
    client.ask("lan", protocol.Show())
    assert log.stat().st_size == 0
    os.kill(service(), signal.SIGTERM)
    port.close()


def test_a_service_that_hangs_is_one_line_and_holds_up_no_port(
    lan: SwitchDefinition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "REPLY_S", 1)
    port = client.plug("lan", nic())
    pid = service()
    os.kill(pid, signal.SIGSTOP)
    try:
        for offloads in range(1000):
            port.set_offloads(offloads & 15)
        with pytest.raises(SwitchError, match="switch lan: its service does not answer"):
            port.change(nic(bandwidth=1_000_000))
        with pytest.raises(SwitchError, match="switch lan: its service did not answer within 1 s"):
            client.plug("lan", nic("two"))
    finally:
        os.kill(pid, signal.SIGCONT)
    port.change(nic(bandwidth=2_000_000))
    assert [one["bandwidth"] for one in admin.describe("lan")["ports"]] == [2_000_000]
    port.close()


def test_a_definition_that_is_gone_or_broken_is_one_line_to_the_vm(lan: SwitchDefinition) -> None:
    with pytest.raises(SwitchError, match="no switch other: make it with pyvmm switch create other") as missing:
        client.plug("other", nic())
    assert missing.value.kind == "missing"
    Path(places.definition("lan")).write_text("name = 1\n")
    with pytest.raises(SwitchError, match=r"lan\.toml: name: expected str, got int"):
        client.plug("lan", nic())


def test_a_service_that_dies_as_it_starts_points_to_its_log(
    lan: SwitchDefinition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "msgspec.py").write_text("raise SystemExit('no such luck')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bad"))
    with pytest.raises(SwitchError, match=r"ended while it started; see .*lan\.log"):
        client.plug("lan", nic())
    assert "no such luck" in Path(places.running("lan", "log")).read_text()


def test_a_path_too_long_for_a_socket_is_one_line(
    lan: SwitchDefinition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYVMM_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(SwitchError, match="path too long") as refused:
        client.plug("lan", nic())
    assert refused.value.kind == "host"


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that anybody may enter, unlike pytest's, with those of a user without privileges."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        for name in ("state", "run"):
            (folder / name).mkdir(mode=0o700)
            os.chown(folder / name, 65534, 65534)
        use_folders(folder, monkeypatch)
        yield folder
        delete_all()


@pytest.mark.skipif(not ROOT, reason="only root can become another user")
def test_a_user_without_privileges_has_private_switches_and_no_others(public: Path) -> None:

    def as_nobody(*words: str, uid: int = 65534) -> subprocess.CompletedProcess[str]:
        become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        return subprocess.run([*become, *words], capture_output=True, text=True, check=False)

    assert as_nobody(*PYVMM, "switch", "create", "lan").returncode == 0
    made = as_nobody(
        sys.executable,
        "-c",
        "import os; from devices.network import client; from tests.fakes.switch_service import nic\n"
        "one, two = client.plug('lan', nic('one')), client.plug('lan', nic('two'))\n"
        "from tests.unit.test_switch_process import BROADCAST, frame, read\n"
        "os.write(one.fd, frame(BROADCAST, nic('one').mac, b'hello'))\n"
        "print(read(two)[14:19], flush=True)",
    )
    assert (made.returncode, made.stdout) == (0, "b'hello'\n"), made.stderr
    for path in (public / "run", public / "run" / "switches", Path(places.running("lan", "sock"))):
        path.chmod(0o777)
    other = as_nobody(
        sys.executable,
        "-c",
        "from devices.network import client, protocol\n"
        "try: client.ask('lan', protocol.Show())\n"
        "except Exception as error: print(error)",
        uid=65533,
    )
    assert other.stdout == "switch lan belongs to another user\n"
    (public / "run" / "switches").chmod(0o700)
    assert client.ask("lan", protocol.Show())["ports"] == []  # root may ask
    for kind in ("internal", "nat"):
        refused = as_nobody(*PYVMM, "switch", "create", "other", "--type", kind)
        assert refused.returncode == 5
        assert f"{kind} switches need CAP_NET_ADMIN (run as root)" in refused.stderr and refused.stderr.count("\n") == 1
    assert as_nobody(*PYVMM, "switch", "delete", "lan").returncode == 0


@pytest.fixture
def host() -> Iterator[NetworkNamespace]:
    """A host's network of the test's own."""
    if not ROOT:
        pytest.skip("only root can make network namespaces")
    with NetworkNamespace() as host:
        yield host


def arp(source: str, address: bytes, wanted: bytes) -> bytes:
    body = struct.pack(">HHBBH", 1, IPV4, 6, 4, 1) + mac_bytes(source) + address + bytes(6) + wanted
    return vnet() + ethernet(body, ARP, source=source)


#: The planes that this host has: in the lab, both.
PLANES = [PlaneChoice.PROCESS, *([PlaneChoice.KERNEL] if planes.examine()["vlan_filtering"].there else [])]


@pytest.fixture(params=PLANES, ids=str)
def internal(request: pytest.FixtureRequest) -> SwitchDefinition:
    """A switch that is not made yet."""
    addresses = ("192.168.77.1/24", "fd00:77::1/64")
    return SwitchDefinition(name="lan", type=SwitchType.INTERNAL, addresses=addresses, plane=request.param)


@pytest.fixture(params=PLANES, ids=str)
def external(request: pytest.FixtureRequest) -> SwitchDefinition:
    """The same, for an interface that may be made."""
    return SwitchDefinition(name="lan", type=SwitchType.EXTERNAL, interface="eth7", plane=request.param)


def test_the_host_is_on_an_internal_switch_from_its_making_to_its_end(
    host: NetworkNamespace, internal: SwitchDefinition
) -> None:
    host.run(lambda: admin.create(internal))
    assert admin.describe("lan")["host_interface"] == "pv-lan"
    shown = host.command("ip", "-o", "address", "show", "pv-lan", "scope", "global")
    assert "192.168.77.1/24" in shown and "fd00:77::1/64" in shown and "tentative" not in shown
    port = client.plug("lan", nic())
    os.write(port.fd, arp(nic().mac, bytes([192, 168, 77, 7]), bytes([192, 168, 77, 1])))
    reply = read_until(port, lambda got: got[12:14] == b"\x08\x06" and got[20:22] == b"\0\x02")
    assert reply[28:32] == bytes([192, 168, 77, 1])
    assert client.ask("lan", protocol.Show("web01"))["addresses"] == ["192.168.77.7"]
    port.close()
    admin.delete("lan")
    assert "pv-lan" not in host.command("ip", "link")


def test_what_a_killed_service_left_of_the_hosts_is_replaced_and_deleted(
    host: NetworkNamespace, internal: SwitchDefinition
) -> None:
    host.run(lambda: admin.create(internal))
    for _ in range(2):
        pid = service()
        os.kill(pid, signal.SIGKILL)
        wait_end(pid)
        port = host.run(lambda: client.plug("lan", nic()))
        os.write(port.fd, arp(nic().mac, bytes([192, 168, 77, 7]), bytes([192, 168, 77, 1])))
        assert read_until(port, lambda got: got[12:14] == b"\x08\x06" and got[20:22] == b"\0\x02")
        port.close()
    pid = service()
    os.kill(pid, signal.SIGKILL)
    wait_end(pid)
    host.run(lambda: admin.delete("lan"))
    assert "pv-lan" not in host.command("ip", "link")
    assert definition.names() == [] and os.listdir(os.path.dirname(places.running("lan", "sock"))) == []


def test_vms_are_on_the_network_that_an_external_switch_is_joined_to(
    host: NetworkNamespace, external: SwitchDefinition
) -> None:
    host.command("ip", "link", "add", "eth7", "up", "type", "veth", "peer", "name", "far")
    host.command("ip", "link", "set", "far", "up")
    host.run(lambda: admin.create(external))
    port = client.plug("lan", nic())

    def listen() -> socket.socket:
        far = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        far.bind(("far", 0x0806))
        return far

    with host.run(listen) as far:
        os.write(port.fd, arp(nic().mac, bytes([10, 0, 0, 7]), bytes([10, 0, 0, 1])))
        assert select.select([far], [], [], WAIT_S)[0]
        assert far.recv(2000)[6:12].hex(":") == nic().mac
        far.send(frame(nic().mac, "02:00:00:00:00:01", b"welcome")[VNET_HEADER_SIZE:])
        assert read_until(port, lambda got: got[12:14] == b"\x88\xb5")[14:21] == b"welcome"
    shown = admin.describe("lan")
    assert shown["learned_outside"] >= 1 and shown["ports"][0]["addresses"] == ["10.0.0.7"]
    port.close()
    admin.delete("lan")
    host.command("ip", "link", "del", "eth7")


def test_an_uplink_that_is_not_there_leaves_no_switch(host: NetworkNamespace, external: SwitchDefinition) -> None:
    with pytest.raises(SwitchError, match=r"switch lan: uplink eth7: .*no ") as refused:
        host.run(lambda: admin.create(external))
    assert refused.value.kind == "host" and definition.names() == []


def test_an_address_that_the_host_refuses_leaves_no_switch(host: NetworkNamespace, internal: SwitchDefinition) -> None:
    host.run(lambda: Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1"))
    with pytest.raises(SwitchError, match="pv-lan cannot have the addresses") as refused:
        host.run(lambda: admin.create(internal))
    assert refused.value.kind == "host"
    assert definition.names() == [] and "pv-lan" not in host.command("ip", "link")
    assert os.listdir(os.path.dirname(places.running("lan", "sock"))) == []
