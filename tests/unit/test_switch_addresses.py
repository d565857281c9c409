"""IP addresses of NICs, from what is heard on the host's interface."""

from __future__ import annotations

import os
import select
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.network.addresses import MAX_ADDRESSES, SNAP, AddressBook, claim, listen
from tests.fakes.netns import NetworkNamespace

if TYPE_CHECKING:
    from collections.abc import Iterator

MAC = bytes.fromhex("00155d010203")
MAC_TEXT = "00:15:5d:01:02:03"
LINK_LOCAL = bytes.fromhex("fe800000000000000000000000000001")
ALL_NODES = bytes.fromhex("ff020000000000000000000000000001")


def arp(address: bytes, sender: bytes = MAC, source: bytes = MAC, tag: bytes = b"", operation: int = 1) -> bytes:
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, operation) + sender + address + bytes(6) + bytes([10, 0, 0, 1])
    return b"\xff" * 6 + source + tag + b"\x08\x06" + body


def discovery(kind: int, source: bytes, target: bytes, tag: bytes = b"", hops: int = 255) -> bytes:
    message = struct.pack(">BBHI", kind, 0, 0, 0) + target
    header = struct.pack(">IHBB", 0x60000000, len(message), 58, hops) + source + ALL_NODES
    return b"\x33\x33\x00\x00\x00\x01" + MAC + tag + b"\x86\xdd" + header + message


@pytest.mark.parametrize("tag", [b"", bytes.fromhex("8100000a"), bytes.fromhex("88a8000a8100000b")])
@pytest.mark.parametrize(
    ("frame", "address"),
    [
        (lambda tag: arp(bytes([10, 0, 0, 7]), tag=tag), "10.0.0.7"),
        (lambda tag: arp(bytes([10, 0, 0, 7]), tag=tag, operation=2), "10.0.0.7"),
        (lambda tag: discovery(135, LINK_LOCAL, ALL_NODES, tag), "fe80::1"),
        (lambda tag: discovery(135, bytes(16), LINK_LOCAL, tag), "fe80::1"),
        (lambda tag: discovery(136, ALL_NODES, LINK_LOCAL, tag), "fe80::1"),
    ],
    ids=["request", "reply", "solicitation", "duplicate detection", "advertisement"],
)
def test_a_nic_claims_an_address(frame: object, address: str, tag: bytes) -> None:
    assert callable(frame)
    made = frame(tag)
    assert claim(made) == (MAC_TEXT, address)
    for length in range(len(made)):
        claim(made[:length])  # whatever that says, it raises nothing


@pytest.mark.parametrize(
    "frame",
    [
        arp(bytes(4)),  # a probe
        arp(bytes([127, 0, 0, 1])),
        arp(bytes([224, 0, 0, 1])),
        arp(bytes([10, 0, 0, 7]), sender=bytes(6)),  # about somebody else
        discovery(134, LINK_LOCAL, LINK_LOCAL),
        discovery(136, LINK_LOCAL, LINK_LOCAL, hops=64),  # from beyond the link
        discovery(136, LINK_LOCAL, ALL_NODES),
        b"",
        bytes(SNAP),
    ],
)
def test_what_claims_nothing(frame: bytes) -> None:
    assert claim(frame) is None


@given(st.binary(max_size=SNAP))
def test_no_frame_does_harm(frame: bytes) -> None:
    book = AddressBook()
    book.know(MAC_TEXT)
    book.hear(frame)


def test_only_known_nics_are_kept_the_last_heard_first_and_not_without_end() -> None:
    book = AddressBook()
    book.hear(arp(bytes([10, 0, 0, 1])))
    assert book.of(MAC_TEXT) == []
    book.know(MAC_TEXT)
    for last in (1, 2, 1):
        book.hear(arp(bytes([10, 0, 0, last])))
    assert book.of(MAC_TEXT) == ["10.0.0.1", "10.0.0.2"]
    for number in range(1000):
        book.hear(arp(bytes([10, 1, number >> 8, number & 255])))
    assert len(book.of(MAC_TEXT)) == MAX_ADDRESSES and book.of(MAC_TEXT)[0] == "10.1.3.231"
    book.forget(MAC_TEXT)
    assert book.of(MAC_TEXT) == []


def test_leased_addresses_come_first() -> None:
    book = AddressBook()
    book.know(MAC_TEXT)
    book.hear(arp(bytes([10, 0, 0, 1])))
    book.set_leases([(MAC_TEXT, "10.0.0.9"), ("00:15:5d:00:00:00", "10.0.0.8")])
    assert book.of(MAC_TEXT) == ["10.0.0.9", "10.0.0.1"]
    book.set_leases([])
    assert book.of(MAC_TEXT) == ["10.0.0.1"]


@pytest.fixture
def veth() -> Iterator[NetworkNamespace]:
    if os.geteuid():
        pytest.skip("only root can make network namespaces")
    with NetworkNamespace() as host:
        host.run(lambda: Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1"))  # it would speak itself
        host.command("ip", "link", "add", "near", "up", "type", "veth", "peer", "name", "far")
        host.command("ip", "link", "set", "far", "up")
        yield host


def test_a_listener_gets_both_ways_of_an_interface_but_nothing_that_claims_nothing(veth: NetworkNamespace) -> None:
    def make() -> tuple[socket.socket, socket.socket, socket.socket]:
        far, near = (socket.socket(socket.AF_PACKET, socket.SOCK_RAW) for _ in range(2))
        far.bind(("far", 0))
        near.bind(("near", 0))
        return far, near, listen("near")

    far, near, heard = veth.run(make)
    tag = bytes.fromhex("8100000a")
    wanted = [
        (far, arp(bytes([10, 0, 0, 1]))),
        (near, arp(bytes([10, 0, 0, 2]))),
        (far, discovery(135, LINK_LOCAL, ALL_NODES)),
        (near, discovery(136, LINK_LOCAL, LINK_LOCAL, tag)),
        (near, arp(bytes([10, 0, 0, 3]), tag=tag)),
    ]
    with far, near, heard:
        for sender, frame in wanted:
            sender.send(b"\xff" * 6 + MAC + b"\x08\x00" + bytes(46))
            sender.send(discovery(134, LINK_LOCAL, LINK_LOCAL, tag))
            sender.send(b"\xff" * 6 + MAC + tag + b"\x08\x00" + bytes(100))
            sender.send(frame)
        for _, frame in wanted:
            assert select.select([heard], [], [], 30)[0]
            assert claim(heard.recv(SNAP)) == claim(frame)
        with pytest.raises(BlockingIOError):
            heard.recv(SNAP)
