"""TAP interfaces of the host as ports, in a network namespace."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.network.errors import SwitchError
from devices.network.port import OFFLOAD_CHECKSUM, OFFLOAD_TSO4, VNET_HEADER_SIZE, VNET_NEEDS_CSUM
from devices.network.tap import TapPort, open_tap
from tests.fakes.netns import NetworkNamespace

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")

_FRAME = bytes.fromhex("ffffffffffff 00155d000001 88b5") + bytes(range(50))


@pytest.fixture
def host() -> Iterator[NetworkNamespace]:
    with NetworkNamespace() as namespace:
        yield namespace


def opened(host: NetworkNamespace, name: str, *options: str) -> TapPort:
    host.command("ip", "tuntap", "add", name, "mode", "tap", *options)
    return host.run(lambda: open_tap(name))


def _up_without_ipv6(host: NetworkNamespace) -> None:
    host.run(lambda: Path("/proc/sys/net/ipv6/conf/tap0/disable_ipv6").write_text("1"))
    host.command("ip", "link", "set", "tap0", "up")


def read(port: TapPort) -> bytes:
    assert select.select([port.fd], [], [], 10)[0], "no frame came"
    return os.read(port.fd, 70000)


def test_frames_go_both_ways_behind_a_header_of_ten_bytes(host: NetworkNamespace) -> None:
    port = opened(host, "tap0")
    _up_without_ipv6(host)
    with host.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5))) as wire:
        wire.bind(("tap0", 0x88B5))
        wire.settimeout(10)
        wire.send(_FRAME)
        assert read(port) == bytes(VNET_HEADER_SIZE) + _FRAME
        os.write(port.fd, bytes(VNET_HEADER_SIZE) + _FRAME)
        assert wire.recv(2000) == _FRAME
    port.close()


def test_partial_checksums_come_only_to_a_nic_that_takes_them(host: NetworkNamespace) -> None:
    port = opened(host, "tap0")
    _up_without_ipv6(host)
    host.command("ip", "address", "add", "10.0.0.1/24", "dev", "tap0")
    host.command("ip", "neighbour", "add", "10.0.0.2", "lladdr", "00:15:5d:00:00:01", "dev", "tap0")
    with host.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
        sender.sendto(b"whole", ("10.0.0.2", 9))
        assert not read(port)[0] & VNET_NEEDS_CSUM
        port.set_offloads(OFFLOAD_CHECKSUM | OFFLOAD_TSO4)
        sender.sendto(b"partial", ("10.0.0.2", 9))
        assert read(port)[0] & VNET_NEEDS_CSUM
    port.close()


def test_what_the_nic_before_took_is_forgotten(host: NetworkNamespace) -> None:
    port = opened(host, "tap0")
    port.set_offloads(OFFLOAD_CHECKSUM)
    port.close()
    port = host.run(lambda: open_tap("tap0"))
    assert "tx-checksum-ip-generic: off" in host.command("ethtool", "-k", "tap0")
    port.close()


def test_the_ports_mtu_is_the_interfaces_up_to_9000(host: NetworkNamespace) -> None:
    for name, mtu, seen in (("tap0", 1400, 1400), ("tap1", 9000, 9000), ("tap2", 20000, 9000)):
        host.command("ip", "tuntap", "add", name, "mode", "tap")
        host.command("ip", "link", "set", name, "mtu", str(mtu))
        port = host.run(lambda name=name: open_tap(name))  # type: ignore[misc]
        assert (port.mtu, port.name, port.link) == (seen, f"tap {name}", True)
        port.close()


def test_a_tap_is_for_one_nic_unless_it_was_made_with_queues(host: NetworkNamespace) -> None:
    port = opened(host, "tap0")
    with pytest.raises(SwitchError, match="tap tap0: another process uses it"):
        host.run(lambda: open_tap("tap0"))
    port.close()
    first, second = opened(host, "tap1", "multi_queue"), host.run(lambda: open_tap("tap1"))
    first.close()
    second.close()


def test_what_is_no_tap_is_refused_and_nothing_is_made(host: NetworkNamespace) -> None:
    host.command("ip", "tuntap", "add", "tun0", "mode", "tun")
    files = sorted(os.listdir("/proc/self/fd"))
    for name, why in (
        ("tun0", "tap tun0: that interface is no TAP"),
        ("lo", "tap lo: that interface is no TAP"),
        ("nowhere", "tap nowhere: no such interface; make it with ip tuntap add nowhere mode tap"),
    ):
        with pytest.raises(SwitchError, match=why) as caught:
            host.run(lambda name=name: open_tap(name))  # type: ignore[misc]
        assert caught.value.kind == "host"
    assert sorted(os.listdir("/proc/self/fd")) == files
    assert "nowhere" not in host.command("ip", "link")


def test_a_host_without_the_tun_device_is_told_so(host: NetworkNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    host.command("ip", "tuntap", "add", "tap0", "mode", "tap")

    def refuse(path: str, flags: int) -> int:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr("devices.network.tap.os.open", refuse)
    with pytest.raises(SwitchError, match="tap tap0: /dev/net/tun: No such file or directory; see pyvmm doctor"):
        host.run(lambda: open_tap("tap0"))
