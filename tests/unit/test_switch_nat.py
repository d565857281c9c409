"""A NAT switch with its service, dnsmasq and nftables, on a host and a network of the test's own."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
from typing import TYPE_CHECKING

import pytest

from devices.network import admin, client, definition, places, protocol
from devices.network.definition import SwitchDefinition, SwitchType
from tests.fakes.ip_guest import IpGuest
from tests.fakes.netns import NetworkNamespace
from tests.fakes.switch_service import nic, use_folders

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NET = SwitchDefinition(name="net", type=SwitchType.NAT, addresses=("192.168.77.1/24",), forwards=("tcp:8080:web01:80",))
HOST, OUTSIDE = "10.9.0.1", "10.9.0.2"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NetworkNamespace]:
    """A host with an address beside its NAT switch."""
    if os.geteuid():
        pytest.skip("only root can make network namespaces")
    use_folders(tmp_path, monkeypatch)
    with NetworkNamespace() as host:
        host.run(lambda: admin.create(NET))
        yield host
        if NET.name in definition.names():
            host.run(lambda: admin.delete(NET.name, force=True))


@pytest.fixture
def outside(host: NetworkNamespace) -> Iterator[NetworkNamespace]:
    """Somebody in the host's other network, who knows no way to the switch's."""
    with NetworkNamespace() as outside:
        there = f"/proc/{os.getpid()}/fd/{outside.fd}"
        host.command("ip", "link", "add", "eth7", "up", "type", "veth", "peer", "name", "far", "netns", there)
        outside.command("ip", "link", "set", "far", "up")
        host.command("ip", "address", "add", f"{HOST}/24", "dev", "eth7")
        outside.command("ip", "address", "add", f"{OUTSIDE}/24", "dev", "far")
        yield outside


@pytest.fixture
def guest(host: NetworkNamespace) -> Iterator[IpGuest]:
    port = client.plug("net", nic())
    guest = IpGuest(port)
    guest.dhcp()
    yield guest
    port.close()


def service() -> int:
    pid = client.ask("net", protocol.Show())["pid"]
    assert isinstance(pid, int)
    return pid


def test_a_vm_gets_an_address_which_is_shown(guest: IpGuest) -> None:
    assert guest.router == "192.168.77.1"
    assert guest.address.startswith("192.168.77.")
    assert client.ask("net", protocol.Show("web01"))["addresses"][0] == guest.address


def test_a_vm_reaches_other_networks_as_its_host(guest: IpGuest, outside: NetworkNamespace) -> None:
    guest.ping(OUTSIDE)


def test_a_port_of_the_host_leads_to_the_vm(guest: IpGuest, outside: NetworkNamespace) -> None:
    def connect() -> socket.socket:
        connection = socket.socket()
        connection.setblocking(False)
        assert connection.connect_ex((HOST, 8080)) == errno.EINPROGRESS
        return connection

    with outside.run(connect) as connection:
        guest.accept(80)
        assert select.select([], [connection], [], 30)[1]
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_a_killed_service_is_followed_by_one_that_gives_the_same_address(
    host: NetworkNamespace, guest: IpGuest, outside: NetworkNamespace
) -> None:
    pid = service()
    os.kill(pid, signal.SIGKILL)
    _wait_end(pid)
    port = host.run(lambda: client.plug("net", nic()))
    again = IpGuest(port)
    again.dhcp()
    assert again.address == guest.address
    again.ping(OUTSIDE)
    port.close()


def test_nothing_is_left_of_a_deleted_switch(host: NetworkNamespace, guest: IpGuest) -> None:
    host.run(lambda: admin.delete("net", force=True))
    assert "pv-net" not in host.command("ip", "link")
    assert host.command("nft", "list", "ruleset") == ""
    left = os.listdir(os.path.dirname(places.running("net", "sock")))
    assert [file for file in left if file.startswith("net.")] == []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if _namespace(pid) == os.fstat(host.fd).st_ino:
            _wait_end(int(pid))  # the service itself, which has replied just before


def _namespace(pid: str) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


def _wait_end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        file = os.pidfd_open(pid)
        assert select.select([file], [], [], 30)[0]
        os.close(file)
