"""Headers, checksums and segments in C, called through ctypes, against tests.fakes.frames."""

from __future__ import annotations

import ctypes
import random
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core import _hot
from tests.fakes import frames

_LIBRARY = ctypes.CDLL(_hot.__file__)
A4, B4, A6, B6 = "10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"
MAX_HEADERS = 256


class Frame(ctypes.Structure):
    size: int
    ethertype: int
    tci: ctypes.Array[ctypes.c_uint16]
    network: int
    transport: int
    payload: int
    tags: int
    version: int
    protocol: int
    fragment: bool
    obscured: bool
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("ethertype", ctypes.c_uint16),
        ("tci", ctypes.c_uint16 * 2),
        ("network", ctypes.c_uint16),
        ("transport", ctypes.c_uint16),
        ("payload", ctypes.c_uint16),
        ("tags", ctypes.c_uint8),
        ("version", ctypes.c_uint8),
        ("protocol", ctypes.c_uint8),
        ("fragment", ctypes.c_bool),
        ("obscured", ctypes.c_bool),
    ]


class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]


_EMIT = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t
)
for _name in ("net_frame_parse", "net_vnet_valid", "net_vnet_plain", "net_segment"):
    getattr(_LIBRARY, _name).restype = ctypes.c_bool
_LIBRARY.net_sum_parts.restype = _LIBRARY.net_sum.restype = ctypes.c_uint64
_LIBRARY.net_fold.restype = ctypes.c_uint16
_LIBRARY.net_gather.restype = ctypes.c_size_t


def parse(frame: bytes, have: int | None = None, size: int | None = None) -> Frame | None:
    # A copy of just that length, so that a reader of more would be found by the sanitizers' run of the same code.
    head = frame[: len(frame) if have is None else have]
    found = Frame()
    size = len(frame) if size is None else size
    done = _LIBRARY.net_frame_parse(ctypes.byref(found), head, ctypes.c_size_t(len(head)), ctypes.c_size_t(size))
    return found if done else None


def where(found: Frame | None) -> tuple[int, int, int, int, int]:
    assert found is not None
    return found.network, found.transport, found.payload, found.version, found.protocol


class Scattered:
    """Bytes in parts of their own, as an iovec, with the buffers that it points to."""

    def __init__(self, data: bytes, cuts: list[int]) -> None:
        edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        self.buffers = [ctypes.create_string_buffer(data[a:b], b - a) for a, b in pairwise(edges)]
        self.count = len(self.buffers)
        self.parts = (Part * self.count)(*(Part(ctypes.addressof(b), len(b)) for b in self.buffers))

    def data(self) -> bytes:
        return b"".join(b.raw for b in self.buffers)


def segments(message: bytes, cuts: list[int]) -> list[bytes]:
    """What net_segment makes of a virtio_net_hdr and a frame."""
    header, frame = message[:10], message[10:]
    found = parse(frame)
    assert found is not None
    assert _LIBRARY.net_vnet_valid(header, ctypes.byref(found))
    result = []

    def emit(_context: int, head: int, head_size: int, offset: int, length: int) -> bool:
        result.append(ctypes.string_at(head, head_size) + frame[offset : offset + length])
        return True

    scattered = Scattered(frame, cuts)
    done = _LIBRARY.net_segment(
        header, ctypes.byref(found), frame[:MAX_HEADERS], scattered.parts, scattered.count, _EMIT(emit), None
    )
    assert done
    return result


# Headers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tags", [0, 1, 2])
@pytest.mark.parametrize(
    ("ip", "transport", "protocol", "header"),
    [
        (4, "tcp", frames.TCP, 20),
        (4, "udp", frames.UDP, 8),
        (6, "tcp", frames.TCP, 20),
        (6, "udp", frames.UDP, 8),
    ],
)
def test_headers_are_found_behind_tags(tags: int, ip: int, transport: str, protocol: int, header: int) -> None:
    source, to = (A4, B4) if ip == 4 else (A6, B6)
    if transport == "tcp":
        packet = frames.tcp(b"data", source=source, to=to)
    else:
        packet = frames.udp(b"data", source=source, to=to, ports=(1, 2))
    if ip == 4:
        frame = frames.ethernet(frames.ipv4(packet, protocol, source=A4, to=B4), frames.IPV4)
    else:
        frame = frames.ethernet(frames.ipv6(packet, protocol, source=A6, to=B6), frames.IPV6)
    for vlan in (7, 8)[:tags]:
        frame = frames.tagged(frame, vlan, frames.SERVICE_VLAN if vlan == 8 else frames.VLAN)
    found = parse(frame)
    network = 14 + 4 * tags
    begin = network + (20 if ip == 4 else 40)
    assert where(found) == (network, begin, begin + header, ip, protocol)
    assert found is not None and not found.obscured and not found.fragment and found.tags == tags
    assert list(found.tci)[:tags] == [8, 7][2 - tags :]


def test_a_third_tag_is_not_looked_behind() -> None:
    frame = frames.packet4(frames.tcp(b"", source=A4, to=B4), frames.TCP)
    for vlan in (1, 2, 3):
        frame = frames.tagged(frame, vlan)
    found = parse(frame)
    assert found is not None and found.obscured and found.version == 0 and list(found.tci) == [3, 2]


def test_options_and_extension_headers_are_passed_over() -> None:
    packet = frames.udp(b"data", source=A4, to=B4, ports=(1, 2))
    four = frames.ethernet(frames.ipv4(packet, frames.UDP, source=A4, to=B4, options=bytes(40)), frames.IPV4)
    assert where(parse(four)) == (14, 74, 82, 4, frames.UDP)
    packet = frames.udp(b"data", source=A6, to=B6, ports=(1, 2))
    chain = frames.extension(43, frames.extension(60, frames.extension(frames.UDP, packet, 16)), 24)
    six = frames.ethernet(frames.ipv6(chain, 0, source=A6, to=B6), frames.IPV6)
    assert where(parse(six)) == (14, 14 + 40 + 24 + 8 + 16, 14 + 40 + 48 + 8, 6, frames.UDP)


def test_extension_headers_without_end_are_obscured() -> None:
    packet = frames.extension(frames.UDP, frames.udp(b"data", source=A6, to=B6, ports=(1, 2)))
    for _ in range(30):
        packet = frames.extension(60, packet)
    found = parse(frames.ethernet(frames.ipv6(packet, 60, source=A6, to=B6), frames.IPV6))
    assert found is not None and found.obscured and found.transport == 0


def test_the_first_fragment_has_a_transport_header_and_a_later_one_none() -> None:
    packet = frames.udp(b"data", source=A4, to=B4, ports=(1, 2))
    for fragment, transport in ((0x2000, 34), (0x2001, 0), (0x0001, 0)):
        ip = frames.ipv4(packet, frames.UDP, source=A4, to=B4, fragment=fragment)
        found = parse(frames.ethernet(ip, frames.IPV4))
        assert found is not None and found.fragment and found.transport == transport and not found.obscured
    for offset, transport in ((1, 14 + 48), (8 | 1, 0), (8, 0)):
        fragment6 = struct.pack(">BBHI", frames.UDP, 0, offset, 9) + packet
        found = parse(frames.ethernet(frames.ipv6(fragment6, 44, source=A6, to=B6), frames.IPV6))
        assert found is not None and found.fragment and found.transport == transport and not found.obscured
        assert found.protocol == frames.UDP


def test_headers_that_are_cut_off_are_obscured_and_never_outside_the_frame() -> None:
    packet = frames.tcp(b"", source=A6, to=B6, options=bytes(12))
    whole = frames.tagged(frames.ethernet(frames.ipv6(packet, frames.TCP, source=A6, to=B6), frames.IPV6), 5)
    for length in range(len(whole)):
        for size in (length, len(whole)):
            found = parse(whole, length, size)
            assert (found is None) == (length < 14 or size < 18)
            if found is not None and length != 14 + 4 + 40:
                assert found.obscured
            if found is not None:
                assert max(found.network, found.transport) <= length and found.payload == 0


@given(st.binary(max_size=300), st.integers(0, 70000))
def test_any_bytes_are_taken_apart_within_their_bounds(data: bytes, longer: int) -> None:
    found = parse(data, size=len(data) + longer)
    if found is not None:
        assert max(found.network, found.transport, found.payload) <= min(len(data), MAX_HEADERS)


def test_a_frame_that_is_too_long_is_refused() -> None:
    frame = frames.packet4(b"", 99)
    assert parse(frame, size=65535 + 22) is not None
    assert parse(frame, size=65535 + 23) is None


# Checksums --------------------------------------------------------------------------------------------


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=6), st.integers(0, 400), st.integers(0, 400))
def test_sums_over_scattered_bytes_are_those_over_all_of_them(
    data: bytes, cuts: list[int], offset: int, size: int
) -> None:
    offset = min(offset, len(data))
    size = min(size, len(data) - offset)
    scattered = Scattered(data, cuts)
    total = _LIBRARY.net_sum_parts(
        scattered.parts, scattered.count, ctypes.c_size_t(offset), ctypes.c_size_t(size), ctypes.c_uint64(0)
    )
    folded = struct.unpack(">H", struct.pack("=H", _LIBRARY.net_fold(ctypes.c_uint64(total))))[0]
    assert folded ^ 0xFFFF == frames.checksum(data[offset : offset + size])
    copy = ctypes.create_string_buffer(size + 1)
    done = _LIBRARY.net_gather(scattered.parts, scattered.count, ctypes.c_size_t(offset), copy, ctypes.c_size_t(size))
    assert done == size and copy.raw == data[offset : offset + size] + b"\0"


@given(st.lists(st.sampled_from((0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)), min_size=1, max_size=200))
def test_carries_are_not_lost(words: list[int]) -> None:
    data = struct.pack(f">{len(words)}H", *words)
    total = _LIBRARY.net_sum(data, ctypes.c_size_t(len(data)), ctypes.c_uint64(0xFFFFFFFFFFFFFFFF))
    folded = struct.unpack(">H", struct.pack("=H", _LIBRARY.net_fold(ctypes.c_uint64(total))))[0]
    # All ones is minus zero.
    assert folded % 0xFFFF == (frames.checksum(data) ^ 0xFFFF) % 0xFFFF


def complete(message: bytes, cuts: list[int]) -> bytes:
    scattered = Scattered(message[10:], cuts)
    _LIBRARY.net_complete_checksum(message[:10], scattered.parts, scattered.count)
    return scattered.data()


@given(st.binary(max_size=200), st.lists(st.integers(0, 250), max_size=5), st.booleans(), st.booleans())
def test_a_partial_checksum_is_completed(data: bytes, cuts: list[int], six: bool, as_tcp: bool) -> None:
    source, to = (A6, B6) if six else (A4, B4)
    protocol = frames.TCP if as_tcp else frames.UDP
    if as_tcp:
        packet = frames.tcp(data, source=source, to=to)
    else:
        packet = frames.udp(data, source=source, to=to, ports=(1, 2))
    ip = frames.ipv6 if six else frames.ipv4
    frame = frames.ethernet(ip(packet, protocol, source=source, to=to), frames.IPV6 if six else frames.IPV4)
    message = frames.partial(frame)
    found = parse(frame)
    assert found is not None
    assert _LIBRARY.net_vnet_valid(message, ctypes.byref(found)) and _LIBRARY.net_vnet_plain(
        message, ctypes.byref(found)
    )
    assert complete(message, cuts) == frame


def test_a_udp_checksum_of_zero_is_sent_as_all_ones() -> None:
    packet = frames.udp(bytes(2), source=A4, to=B4, ports=(1, 2))
    # The data makes up for what the checksum was, so that the checksum is 0.
    packet = packet[:8] + packet[6:8]
    frame = frames.packet4(packet[:6] + frames.udp(packet[8:], source=A4, to=B4, ports=(1, 2))[6:], frames.UDP)
    assert frame[40:42] == b"\xff\xff"
    assert complete(frames.partial(frame), []) == frame


@pytest.mark.parametrize(
    "header",
    [
        frames.vnet(1, start=100, at=0),
        frames.vnet(1, start=52, at=1),
        frames.vnet(1, start=0xFFFF, at=0xFFFF),
        frames.vnet(1, start=4, at=6),  # in the Ethernet header
        frames.vnet(1, 4, 0, 1000, 34, 16),  # TCP over IPv6, which it isn't
        frames.vnet(1, 3, 0, 1000, 34, 16),  # UDP
        frames.vnet(1, 5, 0, 1000, 34, 16),  # newer UDP
        frames.vnet(1, 0x80, 0, 1000, 34, 16),  # ECN alone
        frames.vnet(1, 1, 0, 0, 34, 16),
        frames.vnet(1, 1, 0, 47, 34, 16),  # a flood of small ones
        frames.vnet(1, 1, 0, 1000, 34, 14),  # not TCP's checksum
        frames.vnet(1, 1, 0, 1000, 38, 12),
    ],
)
def test_headers_that_lie_are_refused(header: bytes) -> None:
    frame = frames.packet4(frames.tcp(b"", source=A4, to=B4), frames.TCP)
    assert len(frame) == 54
    found = parse(frame, size=54)
    assert found is not None
    assert not _LIBRARY.net_vnet_valid(header, ctypes.byref(found))


def test_only_whole_packets_with_data_are_segmented() -> None:
    header = frames.vnet(1, 1, 0, 1000, 34, 16)
    packet = frames.tcp(b"data", source=A4, to=B4)
    good = frames.packet4(packet, frames.TCP)
    cut = frames.ethernet(frames.ipv4(packet, frames.TCP, source=A4, to=B4, fragment=0x2000), frames.IPV4)
    udp = frames.packet4(packet, frames.UDP)
    datagrams = frames.vnet(1, 5, 0, 1000, 34, 6)
    for frame in (good, cut):
        found = parse(frame)
        assert found is not None and not _LIBRARY.net_vnet_valid(datagrams, ctypes.byref(found))
    found = parse(udp)
    assert found is not None and _LIBRARY.net_vnet_valid(datagrams, ctypes.byref(found))
    for frame, right in ((good, True), (good[:-4], False), (cut, False), (udp, False)):
        found = parse(frame)
        assert found is not None
        assert bool(_LIBRARY.net_vnet_valid(header, ctypes.byref(found))) is right


# Segments ---------------------------------------------------------------------------------------------


@given(
    st.integers(1, 9000),
    st.integers(48, 9000),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 0xFFFFFFFF),
    st.sampled_from((0, 12, 40)),
    st.lists(st.integers(0, 9100), max_size=4),
    st.integers(0, 0xFF),
)
def test_segments_are_right_and_together_what_was_cut(
    size: int, most: int, six: bool, tags: int, sequence: int, options: int, cuts: list[int], flags: int
) -> None:
    data = random.Random(size).randbytes(size)
    source, to = (A6, B6) if six else (A4, B4)
    packet = frames.tcp(data, source=source, to=to, sequence=sequence, flags=flags, options=bytes(options))
    ip = frames.ipv6 if six else frames.ipv4
    frame = frames.ethernet(ip(packet, frames.TCP, source=source, to=to), frames.IPV6 if six else frames.IPV4)
    for vlan in range(tags):
        frame = frames.tagged(frame, vlan)
    found = frames.parts(frame)
    result = segments(frames.partial(frame, most), cuts)
    assert len(result) == -(-size // most)
    assert b"".join(segment[found.payload :] for segment in result) == data
    for number, segment in enumerate(result):
        frames.assert_right(segment)
        first, last = number == 0, number == len(result) - 1
        assert segment[: found.network] == frame[: found.network]
        wanted = flags & ~(0 if first else frames.CWR) & ~(0 if last else frames.FIN | frames.PSH)
        assert segment[found.transport + 13] == wanted
        at = int.from_bytes(segment[found.transport + 4 : found.transport + 8], "big")
        assert at == (sequence + number * most) % (1 << 32)
        if not six:
            assert int.from_bytes(segment[found.network + 4 : found.network + 6], "big") == 0x1234 + number
        for start, end in ((8, 12), (14, 16), (18, 20 + options)):  # acknowledgement, window, urgent and options
            assert segment[found.transport + start : found.transport + end] == packet[start:end]


def test_64_kib_are_cut_into_frames_of_1514_bytes() -> None:
    data = random.Random(1).randbytes(65535 - 40)
    frame = frames.packet4(frames.tcp(data, source=A4, to=B4), frames.TCP)
    result = segments(frames.partial(frame, 1460), [1000, 1001, 33333])
    assert [len(segment) for segment in result] == [1514] * 44 + [54 + len(data) - 44 * 1460]
    for segment in result:
        frames.assert_right(segment)


@given(st.integers(1, 9000), st.integers(48, 9000), st.booleans(), st.lists(st.integers(0, 9100), max_size=4))
def test_datagrams_are_right_and_together_what_was_cut(size: int, most: int, six: bool, cuts: list[int]) -> None:
    data = random.Random(size).randbytes(size)
    source, to = (A6, B6) if six else (A4, B4)
    packet = frames.udp(data, source=source, to=to, ports=(5, 6))
    ip = frames.ipv6 if six else frames.ipv4
    frame = frames.ethernet(ip(packet, frames.UDP, source=source, to=to), frames.IPV6 if six else frames.IPV4)
    found = frames.parts(frame)
    result = segments(frames.partial(frame, most), cuts)
    assert b"".join(segment[found.payload :] for segment in result) == data
    for segment in result:
        frames.assert_right(segment)
        at = found.transport
        assert segment[at : at + 4] == packet[:4] and segment[at + 6 : at + 8] != b"\0\0"
        assert int.from_bytes(segment[at + 4 : at + 6], "big") == len(segment) - at
