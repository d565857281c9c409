"""Load balancers find VMs by what their switches have heard of them."""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

import msgspec
import pytest

from devices.network import admin, client
from devices.network.definition import PlaneChoice, SwitchDefinition, SwitchType
from devices.network.port import VNET_HEADER_SIZE
from pyvmm.host.balancer.process import locate
from tests.fakes.netns import NetworkNamespace
from tests.fakes.switch_service import nic, use_folders
from tests.fakes.web import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has switches that the host is on")


@pytest.fixture
def lan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_folders(tmp_path, monkeypatch)
    with NetworkNamespace() as host:
        made = SwitchDefinition(
            name="lan", type=SwitchType.INTERNAL, addresses=("10.9.8.1/24",), plane=PlaneChoice.PROCESS
        )
        host.run(lambda: admin.create(made))
        yield
        admin.delete("lan", force=True)


def announce(fd: int, mac: str, address: str) -> None:
    """Say by ARP who has an address, as a host does that has just got it (RFC 5227)."""
    ours, ip = bytes.fromhex(mac.replace(":", "")), socket.inet_aton(address)
    arp = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + ours + ip + bytes(6) + ip
    os.write(fd, bytes(VNET_HEADER_SIZE) + b"\xff" * 6 + ours + b"\x08\x06" + arp.ljust(46, b"\0"))


@pytest.mark.usefixtures("lan")
def test_a_vm_is_where_it_says_for_as_long_as_it_is_plugged_in() -> None:
    assert locate() == {}
    settings = nic("web1")
    port = client.plug("lan", settings)
    assert locate() == {}
    announce(port.fd, settings.mac, "10.9.8.77")
    eventually(lambda: locate() == {"web1": "10.9.8.77"})
    announce(port.fd, settings.mac, "172.16.0.9")  # which the host does not reach
    announce(port.fd, settings.mac, "10.9.8.78")
    eventually(lambda: locate() == {"web1": "10.9.8.78"})
    announce(port.fd, settings.mac, "172.16.0.10")
    port.change(msgspec.structs.replace(settings, link=False))
    eventually(lambda: locate() == {})
    port.change(settings)
    eventually(lambda: locate() == {"web1": "10.9.8.78"})
    port.close()
    eventually(lambda: locate() == {})
