"""The NIC's fast path does with any frame, offload and lie what plain Python says it should."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from tests.fakes import frames, net_model
from tests.fakes.net_rig import (
    CHECKSUM,
    HASH,
    INVALID,
    LSO,
    PACKET_ID,
    SECTION,
    SUCCESS,
    VLAN,
    VNET,
    Received,
    Rig,
    ppi,
    rndis,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = int(os.environ.get("PYVMM_EXAMPLES", "150"))
ROOM = SECTION - 112 - 36


@pytest.fixture(name="rig", scope="module")
def make_rig() -> Iterator[Rig]:
    rig = Rig(ring_pages=9)
    yield rig
    rig.close()


# Frames ---------------------------------------------------------------------------------------------------

ADDRESSES = {4: ("10.1.2.3", "10.9.8.7"), 6: ("fd00::1:2", "fd00::ffff:fffe")}


@st.composite
def payloads(draw: st.DrawFn, most: int = 1800) -> bytes:
    size = draw(st.one_of(st.integers(0, 40), st.integers(0, most), st.sampled_from([1447, 1448, 1449, 1460, 1461])))
    seed = draw(st.integers(0, 255))
    return bytes((seed + at * 7) & 0xFF for at in range(size))


@st.composite
def ip_frames(draw: st.DrawFn, most: int = 1800) -> bytes:
    version = draw(st.sampled_from([4, 6]))
    source, to = ADDRESSES[version]
    data = draw(payloads(most))
    protocol = draw(st.sampled_from([frames.TCP, frames.TCP, frames.UDP]))
    if protocol == frames.TCP:
        flags = draw(st.sampled_from([frames.ACK, frames.ACK | frames.PSH | frames.FIN, frames.ACK | frames.CWR]))
        options = bytes((1,)) * draw(st.sampled_from([0, 0, 12, 40]))
        packet = frames.tcp(data, source=source, to=to, flags=flags, options=options)
    else:
        packet = frames.udp(data, source=source, to=to, ports=(53, 5353))
    if version == 4:
        packet = frames.ipv4(
            packet, protocol, source=source, to=to, options=bytes((1,)) * draw(st.sampled_from([0, 8]))
        )
        frame = frames.ethernet(packet, frames.IPV4)
    else:
        frame = frames.ethernet(frames.ipv6(packet, protocol, source=source, to=to), frames.IPV6)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        frame = frames.tagged(frame, draw(st.integers(0, 0xFFFF)), draw(st.sampled_from([0x8100, 0x8100, 0x88A8])))
    return frame


other_frames = st.binary(min_size=0, max_size=80).map(lambda data: bytes(12) + b"\x88\xb5" + data)
cut_off = st.builds(lambda frame, size: frames.tagged(frame, 5)[:size], ip_frames(), st.integers(12, 30))
some_frames = st.one_of(ip_frames(), ip_frames(), ip_frames(), other_frames, st.binary(max_size=13))


# To the network -------------------------------------------------------------------------------------------


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    frame = draw(st.one_of(some_frames, cut_off))
    ppis = b""
    kind = draw(st.sampled_from(["plain", "checksum", "checksum", "lso", "lso"]))
    tcp = len(frame) > 40 and 6 in (frame[23], frame[20], frame[27], frame[24])
    six = len(frame) > 14 and b"\x86\xdd" in frame[12:22]
    if kind == "checksum":
        bits = draw(st.sampled_from([4 if tcp else 8] * 4 + [4, 8, 0x10, 0x14, 0x18, 0x1F, 0]))
        ppis += ppi(CHECKSUM, bits | draw(st.integers(0, 0x3FF)) << 16, draw(st.sampled_from([12, 12, 16])))
    if kind == "lso":
        mss = draw(st.sampled_from([1448, 1448, 1440, 100, 48, 47, 0, 1460, 1461, 0xFFFFF]))
        version = six if draw(st.integers(0, 7)) else not six
        v2 = draw(st.sampled_from([1] * 9 + [0]))
        ppis += ppi(LSO, mss | draw(st.integers(0, 0x3FF)) << 20 | v2 << 30 | version << 31)
    if draw(st.integers(0, 2)) == 0:
        ppis += ppi(VLAN, draw(st.integers(0, 0xFFFFF)))
    if draw(st.integers(0, 5)) == 0:
        ppis += ppi(draw(st.sampled_from([8, 9, PACKET_ID, 77])), 5, draw(st.sampled_from([12, 40])))
    message = bytearray(rndis(frame, ppis, draw(st.integers(0, 8))))
    if draw(st.integers(0, 7)) == 0:  # a lie
        at = draw(st.integers(0, min(len(message), 44 + len(ppis)) // 4 - 1)) * 4
        value = draw(st.one_of(st.integers(0, 2000), st.sampled_from([2**32 - 1, 2**31, 2**32 - 8, 12, 16])))
        struct.pack_into("<I", message, at, value)
    return bytes(message)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.lists(packets(), min_size=1, max_size=4).map(b"".join),
    st.lists(st.integers(1, 3000), max_size=4),
    st.sampled_from([1514, 1514, 600, 9014]),
)
def test_what_the_guest_sends_is_what_the_port_gets(rig: Rig, data: bytes, cuts: list[int], frame_size: int) -> None:
    rig.device.set_frame_size(frame_size)
    try:
        expected = net_model.send(data, frame_size)
    except net_model.UnknownError:  # headers that a lie has moved
        reject()
    pieces, rest = [], data
    for cut in cuts:
        if rest[:cut]:
            pieces.append(rest[:cut])
        rest = rest[cut:]
    while rest:
        pieces.append(rest[:4096])
        rest = rest[4096:]
    if len(data) <= 6144 and not cuts:
        number = rig.send(data)
    else:
        number = rig.send_direct(pieces)
    assert rig.queue.run() == (0, [])
    assert [VNET.pack(*header) + frame for header, frame in rig.sent()] == expected.writes
    assert rig.statuses() == {number: SUCCESS if expected.valid else INVALID}


def test_large_packets_are_cut_by_the_network_not_by_us(rig: Rig) -> None:
    # The model's own check: a segment's sizes are right whatever the guest left out.
    rig.device.set_frame_size(1514)
    for version, size in ((4, 60000), (6, 65000)):
        source, to = ADDRESSES[version]
        packet = frames.tcp(bytes(size), source=source, to=to)
        if version == 4:
            frame = frames.ethernet(frames.ipv4(packet, frames.TCP, source=source, to=to), frames.IPV4)
            as_linux = frame[:16] + bytes(2) + frame[18:24] + bytes(2) + frame[26:]
        else:
            frame = frames.ethernet(frames.ipv6(packet, frames.TCP, source=source, to=to), frames.IPV6)
            as_linux = frame[:18] + bytes(2) + frame[20:]
        data = rndis(as_linux, ppi(LSO, 1400 | 1 << 30 | (version == 6) << 31))
        number = rig.send_direct([data[at : at + 4096] for at in range(0, len(data), 4096)])
        rig.queue.run()
        ((header, sent),) = rig.sent()
        assert header == (1, 1 if version == 4 else 4, len(frame) - size, 1400, len(frame) - size - 20, 16)
        assert VNET.pack(*header) + sent == frames.partial(frame, 1400)
        assert rig.statuses() == {number: SUCCESS}


# From the network -----------------------------------------------------------------------------------------


def put_together(received: list[Received]) -> net_model.Seen:
    """One frame, of which there are parts if it has an id."""
    first = received[0]
    ids = [entry.ppis.get(PACKET_ID, 0) for entry in received]
    if len(received) > 1:
        assert len({(number & 0xFF, number >> 16) for number in ids}) == 1
        assert ids[0] & 0xFF == 1
        assert [number >> 8 & 0xFF for number in ids] == [3] + [1] * (len(ids) - 2) + [5]
        assert all(set(entry.ppis) == {PACKET_ID} for entry in received[1:])
        assert len({entry.transaction for entry in received}) == 1
    else:
        assert ids == [0]
    known = {kind: value for kind, value in first.ppis.items() if kind != PACKET_ID}
    return net_model.Seen(b"".join(entry.data for entry in received), known)


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[bytes, bytes]:
    frame = draw(st.one_of(some_frames, ip_frames(30000)))
    kind = draw(st.sampled_from(["plain", "valid", "partial", "partial", "large"]))
    whole = len(frame) >= 54 and frame[12:14] in (b"\x08\x00", b"\x86\xdd", b"\x81\x00", b"\x88\xa8")
    if kind == "valid":
        return frames.vnet(2), frame
    if kind == "plain" or not whole:
        return frames.vnet(), frame
    found = frames.parts(frame)
    if kind == "large" and len(frame) > found.payload:
        made = frames.partial(frame, draw(st.sampled_from([48, 536, 1448])))
    else:
        made = frames.partial(frame)
    header = bytearray(made[:10])
    if kind == "partial" and draw(st.integers(0, 9)) == 0:
        struct.pack_into("<H", header, draw(st.sampled_from([6, 8])), draw(st.integers(0, 3000)))
    return bytes(header), made[10:]


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.lists(arrivals(), min_size=1, max_size=3),
    st.integers(0, 255),
    st.sampled_from([1514, 1514, 600, 1560, 9014]),
)
def test_what_comes_to_the_port_is_what_the_guest_receives(
    rig: Rig, sequence: list[tuple[bytes, bytes]], offloads: int, frame_size: int
) -> None:
    rig.device.set_frame_size(frame_size)
    rig.device.set_offloads(offloads)
    for vnet, frame in sequence:
        rig.arrive(frame, vnet)
    assert rig.queue.run() == (0, [])
    received = rig.received()
    for vnet, frame in sequence:
        expected = net_model.receive(vnet, frame, offloads, frame_size, ROOM)
        if expected is None:
            continue
        parts = [received.pop(0)]
        while parts[-1].ppis.get(PACKET_ID, 0x400) & 0x400 == 0:
            parts.append(received.pop(0))
        assert put_together(parts) == expected
    assert not received
    rig.queue.run()


# Receive side scaling -------------------------------------------------------------------------------------

#: learn.microsoft.com, "Verifying the RSS Hash Calculation".
KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
VERIFIED = [
    ("66.9.149.187", 2794, "161.142.100.80", 1766, 0x323E8FC2, 0x51CCC178),
    ("199.92.111.2", 14230, "65.69.140.83", 4739, 0xD718262A, 0xC626B0EA),
    ("24.19.198.95", 12898, "12.22.207.184", 38024, 0xD2D0A5DE, 0x5C2B394A),
    ("3ffe:2501:200:1fff::7", 2794, "3ffe:2501:200:3::1", 1766, 0x2CC18CD5, 0x40207D3D),
    ("3ffe:501:8::260:97ff:fe40:efab", 14230, "ff02::1", 4739, 0x0F0C461C, 0xDDE51BBF),
    ("3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251, "fe80::200:f8ff:fe21:67cf", 38024, 0x4B61E985, 0x02D1FEEF),
]


@pytest.mark.parametrize("ports", [True, False])
@pytest.mark.parametrize(("source", "from_port", "to", "to_port", "pair", "four"), VERIFIED)
def test_hashes_are_those_that_microsoft_publishes(
    rig: Rig, source: str, from_port: int, to: str, to_port: int, pair: int, four: int, ports: bool
) -> None:
    six = ":" in source
    rig.device.set_frame_size(1514)
    rig.device.set_offloads(0)
    rig.device.set_rss(KEY, [0], (0x1000 if six else 0x200) if ports else (0x400 if six else 0x100))
    packet = frames.tcp(b"data", source=source, to=to, ports=(from_port, to_port))
    make, kind = (frames.ipv6, frames.IPV6) if six else (frames.ipv4, frames.IPV4)
    rig.arrive(frames.ethernet(make(packet, frames.TCP, source=source, to=to), kind))
    rig.queue.run()
    (received,) = rig.received()
    rig.queue.run()
    rig.device.set_rss(b"", [], 0)
    assert received.ppis == {HASH: four if ports else pair}
