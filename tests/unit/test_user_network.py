"""The host's own network by passt. A network namespace is the host, another the guest: its kernel is behind a TAP whose
frames are relayed to the port as they are."""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.network.errors import SwitchError
from devices.network.port import MAX_FRAME, OFFLOAD_CHECKSUM, OFFLOAD_TSO4, Port
from devices.network.tap import open_tap
from devices.network.user import UserPort
from tests.fakes.netns import NetworkNamespace

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")

_OFFLOADS = OFFLOAD_CHECKSUM | OFFLOAD_TSO4
_PATIENCE_S = 20
_BURST = 64
_CONFIGURE = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip address add "$ip/$mask" dev "$interface"
ip route add default via "$router"
echo "$ip $router $mtu" > "$0.lease"
"""


class Guest:
    """A kernel whose interface ``nic`` is a port's NIC."""

    def __init__(self, port: Port, folder: Path) -> None:
        self.network = NetworkNamespace()
        self.network.command("ip", "tuntap", "add", "nic", "mode", "tap")
        self._tap = self.network.run(lambda: open_tap("nic"))
        self._tap.set_offloads(_OFFLOADS)  # it leaves checksums and segments to the port, as guests do
        port.set_offloads(_OFFLOADS)
        self._end, self._ended = os.pipe()
        self._port = port
        self._relay = threading.Thread(target=self._carry)
        self._relay.start()
        self.network.command("ip", "link", "set", "nic", "up")
        self._script = folder / "configure"
        self._script.write_text(_CONFIGURE)
        self._script.chmod(stat.S_IRWXU)

    def lease(self) -> tuple[str, str, int]:
        """Address, gateway and MTU that DHCP gives."""
        self.network.command(
            "busybox", "udhcpc", "-i", "nic", "-n", "-q", "-t", "20", "-T", "1", "-s", str(self._script)
        )
        address, gateway, mtu = Path(f"{self._script}.lease").read_text().split()
        return address, gateway, int(mtu)

    def close(self) -> None:
        os.close(self._ended)
        self._relay.join()
        os.close(self._end)
        self._tap.close()
        self.network.close()

    def _carry(self) -> None:
        ways = {self._tap.fd: self._port.fd, self._port.fd: self._tap.fd}
        while True:
            ready, _, _ = select.select([self._end, *ways], [], [])
            if self._end in ready:
                return
            for fd in ready:
                for _ in range(_BURST):
                    try:
                        frame = os.read(fd, MAX_FRAME)
                    except (BlockingIOError, ConnectionError):  # no more, or the end of the port
                        break
                    self._write(ways[fd], frame)

    def _write(self, fd: int, frame: bytes) -> None:
        try:
            os.write(fd, frame)
        except BlockingIOError:  # NICs hold the guest back then
            select.select([], [fd], [])
            os.write(fd, frame)
        except OSError:  # the interface isn't up yet
            pass


@pytest.fixture
def host() -> Iterator[NetworkNamespace]:
    with NetworkNamespace() as namespace:
        yield namespace


def connected(host: NetworkNamespace, *forwards: str) -> UserPort:
    return host.run(lambda: UserPort(forwards))


def passts(host: NetworkNamespace) -> list[int]:
    """The passt processes of a namespace."""
    network = os.stat(host.fd).st_ino
    found = []
    for entry in os.listdir("/proc"):
        try:
            here = entry.isdigit() and os.stat(f"/proc/{entry}/ns/net").st_ino == network
            if here and Path(f"/proc/{entry}/comm").read_text().startswith("passt"):
                found.append(int(entry))
        except OSError:  # it has ended
            continue
    return found


def wait_for_end(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], _PATIENCE_S)[0], "passt goes on"
    finally:
        os.close(pidfd)


def listening(network: NetworkNamespace, address: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    listener = network.run(lambda: socket.socket(socket.AF_INET, kind))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.settimeout(_PATIENCE_S)
    listener.bind((address, port))
    if kind == socket.SOCK_STREAM:
        listener.listen()
    return listener


def talk(listener: socket.socket, network: NetworkNamespace, address: tuple[str, int], size: int = 4 << 20) -> None:
    """Connect to `listener` from `network`; send `size` bytes and get as many, which arrive as they were.

    The client speaks first: before it does, Debian 12's passt doesn't tell a guest that a forward is connected.
    """
    question, answer = os.urandom(size), os.urandom(size)
    received: list[bytes] = []

    def serve() -> None:
        server, _ = listener.accept()
        with server, server.makefile("rb") as stream:
            server.settimeout(_PATIENCE_S)
            received.append(stream.read(size))
            server.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    with listener, network.run(lambda: socket.create_connection(address, _PATIENCE_S)) as client:
        client.sendall(question)
        with client.makefile("rb") as stream:
            received.append(stream.read(size))
        thread.join()
    assert received == [question, answer], [len(text) for text in received]


def test_a_guest_gets_an_address_and_reaches_the_host_by_its_gateway(host: NetworkNamespace, tmp_path: Path) -> None:
    port = connected(host)
    guest = Guest(port, tmp_path)
    assert guest.lease() == ("10.0.2.15", "10.0.2.2", 1500)
    talk(listening(host, "127.0.0.1", 5000), guest.network, ("10.0.2.2", 5000))
    told = port.inspect()
    assert told["nic"]["received_frames"] > 0 and told["passt"]["received_frames"] > 0
    assert told["nic"]["dropped"] == told["passt"]["dropped"] == {}
    guest.close()
    port.close()


def test_forwards_lead_from_the_host_to_the_guest(host: NetworkNamespace, tmp_path: Path) -> None:
    port = connected(host, "tcp:127.0.0.1:8080:80", "udp:5353:53")
    guest = Guest(port, tmp_path)
    guest.lease()
    # No more than fits a guest's first window: Debian 12's passt now and then stands still after what it sent in vain.
    talk(listening(guest.network, "0.0.0.0", 80), host, ("127.0.0.1", 8080), 48 << 10)
    client = host.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with listening(guest.network, "0.0.0.0", 53, socket.SOCK_DGRAM) as server, client:
        client.settimeout(_PATIENCE_S)
        client.sendto(b"question", ("127.0.0.1", 5353))
        question, source = server.recvfrom(100)
        server.sendto(b"answer to " + question, source)
        assert client.recv(100) == b"answer to question"
    guest.close()
    port.close()


def test_a_host_with_a_way_out_gives_the_guest_its_own_address(host: NetworkNamespace, tmp_path: Path) -> None:
    host.command("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far")
    for name in ("eth0", "far"):
        host.command("ip", "link", "set", name, "up")
    host.command("ip", "address", "add", "192.0.2.7/24", "dev", "eth0")
    host.command("ip", "route", "add", "default", "via", "192.0.2.1")
    port = connected(host)
    guest = Guest(port, tmp_path)
    assert guest.lease() == ("192.0.2.7", "192.0.2.1", 1500)
    guest.close()
    port.close()


def test_passt_ends_with_its_port_and_gives_the_hosts_back(host: NetworkNamespace) -> None:
    for _ in range(3):
        port = connected(host, "tcp:8080:80", "udp:127.0.0.1:53:53")
        (passt,) = passts(host)
        host.run(port.close)
        wait_for_end(passt)


def test_passt_ends_with_a_vm_that_is_killed(host: NetworkNamespace) -> None:
    code = "from devices.network.user import UserPort; port = UserPort(()); print('up', flush=True); input()"
    command = [sys.executable, "-c", code]
    vm = host.run(lambda: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    assert vm.stdin is not None and vm.stdout is not None
    with vm:
        assert vm.stdout.readline() == b"up\n"
        (passt,) = passts(host)
        vm.kill()
    wait_for_end(passt)


def test_a_passt_that_hears_of_nothing_ends_with_a_vm_that_is_killed(host: NetworkNamespace) -> None:
    code = "from devices.network.user import UserPort; port = UserPort(()); print('up', flush=True); input()"
    command = [sys.executable, "-c", code]
    vm = host.run(lambda: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    assert vm.stdin is not None and vm.stdout is not None
    with vm:
        assert vm.stdout.readline() == b"up\n"
        (passt,) = passts(host)
        os.kill(passt, signal.SIGSTOP)
        vm.kill()
    wait_for_end(passt)


def test_a_port_is_lost_when_passt_ends(host: NetworkNamespace) -> None:
    lost = threading.Event()
    port = host.run(lambda: UserPort((), lost.set))
    (passt,) = passts(host)
    os.kill(passt, 9)
    assert lost.wait(_PATIENCE_S)
    port.close()


def test_a_port_of_the_host_that_is_taken_is_told_and_no_passt_runs(host: NetworkNamespace) -> None:
    for kind, protocol in ((socket.SOCK_STREAM, "tcp"), (socket.SOCK_DGRAM, "udp")):
        taken = f"forward {protocol}:8080:80: port 8080 of the host: it is in use"
        with listening(host, "127.0.0.1", 8080, kind), pytest.raises(SwitchError, match=taken):
            connected(host, f"{protocol}:8080:80")
    with pytest.raises(SwitchError, match="port 8080 of the host: Cannot assign requested address") as caught:
        connected(host, "tcp:192.0.2.1:8080:80")
    assert caught.value.kind == "host"
    assert passts(host) == []


def test_a_host_without_passt_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    files = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(SwitchError, match="passt is missing; on Debian: apt install passt"):
        UserPort(())
    assert sorted(os.listdir("/proc/self/fd")) == files


def test_what_passt_says_when_it_cannot_start_is_told(
    host: NetworkNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "passt"
    fake.write_text("#!/bin/sh\necho first >&2; echo 'it is broken' >&2; exit 1\n")
    fake.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SwitchError, match="user network: passt does not start: it is broken"):
        connected(host)
