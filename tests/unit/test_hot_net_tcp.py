"""TCP between two kernels through the NIC's fast path: one behind its port, the other in place of the guest."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devices.network.port import GSO_ECN, OFFLOAD_CHECKSUM, OFFLOAD_TSO4, OFFLOAD_TSO6, VNET_NEEDS_CSUM
from devices.network.tap import TapPort, open_tap
from tests.fakes import frames
from tests.fakes.net_rig import CHECKSUM, LSO, PACKET_ID, SUCCESS, VNET, Received, Rig, ppi, rndis
from tests.fakes.netns import NetworkNamespace

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")

ALL = OFFLOAD_CHECKSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6
SIZE = 3_000_000
HOST, GUEST = {4: "10.0.0.1", 6: "fd00::1"}, {4: "10.0.0.2", 6: "fd00::2"}
TCP_GOOD, TCP_UNSET = 1 << 3, 1 << 7


def tap_of(namespace: NetworkNamespace, addresses: dict[int, str]) -> TapPort:
    """A TAP that is up, with these addresses."""
    namespace.command("ip", "tuntap", "add", "tap0", "mode", "tap")
    port = namespace.run(lambda: open_tap("tap0"))
    port.set_offloads(ALL)
    # Nothing but what a test sends is to go through it.
    namespace.run(lambda: Path("/proc/sys/net/ipv6/conf/tap0/router_solicitations").write_text("0"))
    namespace.command("ip", "link", "set", "tap0", "up")
    namespace.command("ip", "address", "add", f"{addresses[4]}/24", "dev", "tap0")
    namespace.command("ip", "address", "add", f"{addresses[6]}/64", "dev", "tap0", "nodad")
    return port


class Guest:
    """A kernel behind a TAP, and its NIC's driver, which does what Linux's netvsc does."""

    def __init__(self, rig: Rig, tap: TapPort) -> None:
        self.rig = rig
        self.tap = tap
        self.seen: Counter[str] = Counter()
        self._parts: list[Received] = []
        self._stop = os.eventfd(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)
        if self._error is not None:
            raise self._error

    def _main(self) -> None:
        try:
            files = [self.tap.fd, self.rig.queue.engine.event, self._stop]
            while self._stop not in (ready := select.select(files, [], [])[0]):
                if self.tap.fd in ready:
                    self._send(os.read(self.tap.fd, 70000))
                assert self.rig.queue.run() == (0, [])
                self._receive()
        except BaseException as error:  # noqa: BLE001 - told by `close`
            self._error = error

    def _send(self, data: bytes) -> None:
        flags, gso, _, mss, start, _ = VNET.unpack(data[:10])
        frame, ppis = data[10:], b""
        if flags & VNET_NEEDS_CSUM:
            found = frames.parts(frame)
            network, six = found.network, found.version == 6
            if gso:
                assert gso & ~GSO_ECN == (4 if six else 1)
                at = network + (4 if six else 2)
                frame = frame[:at] + bytes(2) + frame[at + 2 :]
                if not six:
                    frame = frame[: network + 10] + bytes(2) + frame[network + 12 :]
                pseudo = frames.checksum(frames.pseudo_of(frame, 0)) ^ 0xFFFF
                frame = frame[: start + 16] + struct.pack(">H", pseudo) + frame[start + 18 :]
                ppis = ppi(LSO, mss | start << 20 & 0x3FF00000 | 1 << 30 | six << 31)
                self.seen["large sent"] += 1
            else:
                bits = (2 if six else 1) | (4 if found.protocol == frames.TCP else 8)
                ppis = ppi(CHECKSUM, bits | start << 16)
                self.seen["partial sent"] += 1
        message = rndis(frame, ppis)
        if len(message) <= 6144:
            self.rig.send(message)
        else:
            self.rig.send_direct([message[at : at + 4096] for at in range(0, len(message), 4096)])

    def _receive(self) -> None:
        for kind, _, number, header, payload in self.rig.queue.take():
            if kind == 0xB:
                assert struct.unpack_from("<II", payload) == (108, SUCCESS)
                continue
            for at in range(8, len(header), 8):
                size, offset = struct.unpack_from("<II", header, at)
                self._parts.append(Rig.parse(self.rig.read_section(offset, size), number))
                if self._parts[-1].ppis.get(PACKET_ID, 0x400) & 0x400:
                    self._hand_over()
            assert not self._parts
            self.rig.give_back(number)
        assert self.rig.queue.run() == (0, [])

    def _hand_over(self) -> None:
        frame = b"".join(part.data for part in self._parts)
        checksum = self._parts[0].ppis.get(CHECKSUM, 0)
        header = frames.vnet()
        if len(self._parts) > 1:
            self.seen["large received"] += 1
            assert checksum & (TCP_GOOD | TCP_UNSET) == TCP_GOOD | TCP_UNSET
            # A TAP can't be told that all is well, but that the checksum is not computed.
            header = frames.vnet(VNET_NEEDS_CSUM, start=frames.parts(frame).transport, at=16)
        elif checksum & TCP_GOOD:
            self.seen["good received"] += 1
        self._parts.clear()
        os.write(self.tap.fd, header + frame)


@pytest.fixture(name="host")
def make_host() -> Iterator[NetworkNamespace]:
    with NetworkNamespace() as namespace:
        yield namespace


@pytest.fixture(name="inside")
def make_inside() -> Iterator[NetworkNamespace]:
    with NetworkNamespace() as namespace:
        yield namespace


def transfer(source: NetworkNamespace, sink: NetworkNamespace, address: str) -> None:
    """Move bytes through a connection, and compare them."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = sink.run(lambda: socket.create_server((address, 7), family=family))
    listener.settimeout(20)
    content = bytes((at * at >> 7) & 0xFF for at in range(1 << 16)) * (SIZE >> 16)
    found = bytearray()

    def receive() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(20)
            while part := connection.recv(1 << 20):
                found.extend(part)

    receiver = threading.Thread(target=receive)
    receiver.start()
    sender = source.run(lambda: socket.create_connection((address, 7), 20))
    with sender, listener:
        sender.sendall(content)
        sender.shutdown(socket.SHUT_WR)
        receiver.join(60)
    assert found == content


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("offloads", [0xFF, 0], ids=["all offloads", "none"])
def test_connections_both_ways(host: NetworkNamespace, inside: NetworkNamespace, version: int, offloads: int) -> None:
    port, tap = tap_of(host, HOST), tap_of(inside, GUEST)
    if not offloads:
        port.set_offloads(0)
        tap.set_offloads(0)
    rig = Rig(ring_pages=33)
    rig.device.set_offloads(offloads)
    rig.device.set_port(port.fd)
    guest = Guest(rig, tap)
    try:
        transfer(inside, host, HOST[version])
        transfer(host, inside, GUEST[version])
    finally:
        guest.close()
        rig.close()
        port.close()
        tap.close()
    assert {name for name, count in guest.seen.items() if count > 5} == (
        {"large sent", "partial sent", "large received", "good received"} if offloads else set()
    )
    statistics = rig.device.statistics()
    assert {name for name, value in statistics.items() if value} <= {
        *("sent_frames", "sent_bytes", "received_frames", "received_bytes", "received_coalesced"),
    }


def test_what_waits_in_a_tap_while_nothing_is_received_never_comes(host: NetworkNamespace) -> None:
    port = tap_of(host, HOST)
    rig = Rig()
    rig.device.set_port(port.fd)
    with host.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)) as wire:
        wire.bind(("tap0", 0x88B5))
        rig.device.set_link(False)
        for at in range(20):
            wire.send(frames.ethernet(bytes((at,)) * 50, 0x88B5))
        rig.device.set_link(True)
        wire.send(frames.ethernet(b"new" * 20, 0x88B5))
        assert rig.queue.run() == (0, [])
        assert [entry.data[14:17] for entry in rig.received() if entry.data[12:14] == b"\x88\xb5"] == [b"new"]
    rig.close()
    port.close()
