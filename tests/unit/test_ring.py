"""The ring in C against a guest's ring written from the rules: both ways, and what each must signal."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.core._hot import Ring, RingError
from pyvmm.core.memory import PAGE_SIZE, GuestMemory
from tests.fakes.ring import FEATURES, IN, MASK, OUT, PENDING_SEND_SIZE, GuestRing, pack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.core._hot import Packet

MEMORY = GuestMemory(1 << 20)
# Scattered and out of order: a ring is as long as its list, not a run of memory.
PAGES = (40, 17, 90, 16)

packets = st.tuples(
    st.sampled_from((6, 7, 9, 11)),
    st.integers(0, 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 12).map(lambda n: bytes(range(8 * n))),
    st.binary(max_size=900),
)


def make_rings(start: int = 0) -> tuple[Ring, GuestRing]:
    guest = GuestRing(MEMORY, PAGES)
    guest.init()
    guest.set_word(IN, start)
    guest.set_word(OUT, start)
    return Ring(MEMORY.hot, PAGES), guest


def padded(packet: Packet) -> Packet:
    """The packet as the other side sees it: only multiples of 8 bytes travel."""
    return (*packet[:4], packet[4] + bytes(-len(packet[4]) % 8))


def test_size_is_the_data_area() -> None:
    host, guest = make_rings()
    assert host.size == guest.size == 3 * PAGE_SIZE
    assert host.inspect() == {"in": 0, "out": 0, "mask": 0, "pending_send_size": 0, "size": 12288, "free": 12280}


def test_init_sets_the_mask_of_an_incoming_and_the_feature_of_an_outgoing_ring() -> None:
    host, guest = make_rings()
    guest.set_word(FEATURES, 0)
    guest.set_word(PENDING_SEND_SIZE, 77)
    host.init_incoming()
    assert (guest.word(MASK), guest.word(FEATURES)) == (1, 0)
    host.init_outgoing()
    assert (guest.word(FEATURES), guest.word(PENDING_SEND_SIZE)) == (1, 0)


@given(st.lists(packets, max_size=60), st.integers(0, 3 * PAGE_SIZE // 8 - 1), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_what_the_guest_writes_the_host_reads(batch: list[Packet], start: int, limit: int) -> None:
    host, guest = make_rings(8 * start)
    expected, got = [], []
    for packet in batch:
        while not guest.write(packet)[0]:
            read, _ = host.read(limit)
            assert read
            got += read
        expected.append(padded(packet))
    while guest.used:
        got += host.read(limit)[0]
    assert got == expected
    assert host.read(1) == ([], False)


@given(st.lists(packets, max_size=60), st.integers(0, 3 * PAGE_SIZE // 8 - 1), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_what_the_host_writes_the_guest_reads(batch: list[Packet], start: int, limit: int) -> None:
    host, guest = make_rings(8 * start)
    rest, got = list(batch), []
    while rest:
        written, _ = host.write(rest)
        del rest[:written]
        got += guest.read(limit)[0]
    got += guest.read()[0]
    assert got == [padded(packet) for packet in batch]
    assert guest.free == guest.size - 8


def test_a_packet_may_wrap_around_at_every_offset() -> None:
    packet = (9, 1, 0x1122334455667788, bytes(range(16)), bytes(range(100, 140)))
    size = 3 * PAGE_SIZE
    for start in range(size - len(pack(packet)) - 16, size, 8):
        host, guest = make_rings(start)
        assert guest.write(packet) == (True, True)
        assert host.read(1) == ([packet], False)
        host, guest = make_rings(start)
        assert host.write([packet]) == (1, True)
        assert guest.read() == ([packet], False)


def test_a_ring_is_full_8_bytes_before_its_end() -> None:
    host, guest = make_rings(4096)
    big = (6, 0, 0, b"", bytes(guest.size - 8 - 24))
    assert host.write([big]) == (1, True)
    assert host.inspect()["free"] == 0
    assert host.write([(6, 0, 0, b"", b"")]) == (0, False)
    assert guest.read()[0] == [big]
    with pytest.raises(ValueError, match="does not fit a ring of 12288 bytes"):
        host.write([(6, 0, 0, b"", bytes(guest.size - 8 - 24 + 1))])


def test_write_takes_whole_packets_as_long_as_they_fit() -> None:
    host, guest = make_rings()
    batch = [(6, 0, number, b"", bytes(5000)) for number in range(4)]
    assert host.write(batch) == (2, True)
    assert [packet[2] for packet in guest.read()[0]] == [0, 1]


def test_bad_arguments_write_nothing() -> None:
    host, guest = make_rings()
    good = (6, 0, 1, b"", b"x")
    for bad in ((6, 0, 0, b"12345", b""), (6, 0, 0, b"", bytes(1 << 20)), (6, 0, 0, b"", "text"), (6,), 5):
        with pytest.raises((ValueError, TypeError)):
            host.write([good, bad])  # type: ignore[list-item]
        assert guest.used == 0


def test_the_reader_is_signalled_only_on_empty_to_non_empty_and_unmasked() -> None:
    host, guest = make_rings()
    packet = (6, 0, 0, b"", b"")
    assert host.write([packet]) == (1, True)
    assert host.write([packet]) == (1, False)
    guest.read(1)
    assert host.write([packet]) == (1, False)
    guest.read()
    guest.set_word(MASK, 1)
    assert host.write([packet]) == (1, False)
    assert host.write([]) == (0, False)


def test_the_writer_is_signalled_when_a_read_makes_the_room_it_waits_for() -> None:
    host, guest = make_rings()
    for _ in range(11):
        assert guest.write((6, 0, 0, b"", bytes(1000)))[0]  # 1024 bytes each, leaving 1016
    guest.set_word(PENDING_SEND_SIZE, 3000)
    assert host.read(1)[1] is False  # 2040 free
    assert host.read(1)[1] is True  # 3064 free
    assert host.read(1)[1] is False  # it was there before
    guest.set_word(PENDING_SEND_SIZE, 0)
    assert host.read(100)[1] is False


def test_a_writer_that_waits_for_the_whole_ring_is_signalled() -> None:
    host, guest = make_rings()
    guest.write((6, 0, 0, b"", b""))
    guest.set_word(PENDING_SEND_SIZE, guest.size - 1)
    assert host.read(1)[1] is True


def test_mask_tells_whether_there_is_data_after_all() -> None:
    host, guest = make_rings()
    assert host.mask(False) is False
    assert guest.word(MASK) == 0
    guest.write((6, 0, 0, b"", b""))
    assert host.mask(True) is True
    assert guest.word(MASK) == 1


def test_await_space_sets_pending_send_size_and_looks_again() -> None:
    host, guest = make_rings()
    host.write([(6, 0, 0, b"", bytes(9000))])
    assert host.await_space(6000) is False
    assert guest.word(PENDING_SEND_SIZE) == 6000
    assert guest.read()[1] is True  # the guest has to signal
    assert host.await_space(6000) is True
    assert host.await_space(0) is True
    assert guest.word(PENDING_SEND_SIZE) == 0
    with pytest.raises(ValueError, match="never has"):
        host.await_space(guest.size)


def test_our_own_index_is_not_taken_from_guest_memory() -> None:
    host, guest = make_rings()
    guest.write((6, 0, 1, b"", b""))
    guest.write((6, 0, 2, b"", b""))
    assert host.read(1)[0][0][2] == 1
    guest.set_word(OUT, 0xFFFFFFFF)
    assert host.read(1)[0][0][2] == 2
    assert guest.word(OUT) == guest.word(IN)


def test_a_new_ring_goes_on_where_the_control_page_says() -> None:
    host, guest = make_rings()
    guest.write((6, 0, 1, b"", b""))
    guest.write((6, 0, 2, b"", b""))
    host.read(1)
    assert Ring(MEMORY.hot, PAGES).read(9)[0][0][2] == 2


@pytest.mark.parametrize(
    "pages", [(), (16,), (16, 1 << 20), (16, -1), (16, 2**64 - 1), (16, 2**70), (2**52, 16), (0xC0000, 16)]
)
def test_rings_outside_ram_are_refused(pages: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        Ring(MEMORY.hot, pages)


def test_rings_in_rom_are_refused() -> None:
    memory = GuestMemory(1 << 20)
    memory.add_rom(0xFFFF0000, bytes(2 * PAGE_SIZE))
    with pytest.raises(ValueError, match="is not guest RAM"):
        Ring(memory.hot, (16, 0xFFFF0))


# Hostile guests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [1, 7, 12, 3 * PAGE_SIZE, 0x80000000, 0xFFFFFFF8, 0xFFFFFFFF])
def test_an_index_outside_the_ring_is_an_error(index: int) -> None:
    host, guest = make_rings()
    guest.set_word(IN, index)
    with pytest.raises(RingError, match=f"write index {index} is not an offset"):
        host.read(1)
    with pytest.raises(RingError, match=f"write index {index} is not an offset"):
        host.mask(False)
    guest.set_word(IN, 0)
    guest.set_word(OUT, index)
    with pytest.raises(RingError, match=f"read index {index} is not an offset"):
        host.write([])
    with pytest.raises(RingError, match=f"read index {index} is not an offset"):
        host.await_space(8)
    with pytest.raises(RingError):
        Ring(MEMORY.hot, PAGES)
    assert host.inspect()["free"] == 0


@pytest.mark.parametrize(
    ("descriptor", "used"),
    [
        (struct.pack("<HHHHQ", 6, 2, 3, 0, 0), 24),  # no room for its footer
        (struct.pack("<HHHHQ", 6, 2, 0xFFFF, 0, 0), 64),
        (struct.pack("<HHHHQ", 6, 2, 1, 0, 0), 64),
        (struct.pack("<HHHHQ", 6, 1, 4, 0, 0), 64),
        (struct.pack("<HHHHQ", 6, 5, 4, 0, 0), 64),
        (struct.pack("<HHHHQ", 6, 2, 4, 2, 0), 64),
        (struct.pack("<HHHHQ", 6, 0, 0, 0, 0), 64),
        (struct.pack("<HHHHQ", 6, 2, 2, 0, 0), 16),
    ],
)
def test_a_bad_descriptor_is_an_error_and_nothing_is_consumed(descriptor: bytes, used: int) -> None:
    host, guest = make_rings()
    guest.write((6, 0, 1, b"", b""))
    start = guest.word(IN)
    guest.poke(start, descriptor)
    guest.set_word(IN, start + used)
    with pytest.raises(RingError):
        host.read(10)
    assert guest.word(OUT) == 0
    assert host.read(1)[0] == [(6, 0, 1, b"", b"")]


@given(
    st.integers(0, 2**32 - 1) | st.integers(0, 3 * PAGE_SIZE).map(lambda n: n & ~7),
    st.integers(0, 2**32 - 1) | st.integers(0, 3 * PAGE_SIZE).map(lambda n: n & ~7),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(min_size=16, max_size=256),
)
@settings(max_examples=300, deadline=None)
def test_no_ring_content_does_more_than_raise(write: int, read: int, mask: int, pending: int, data: bytes) -> None:
    host, guest = make_rings()
    guest.set_word(IN, write)
    guest.set_word(OUT, read)
    guest.set_word(MASK, mask)
    guest.set_word(PENDING_SEND_SIZE, pending)
    for at in range(0, guest.size, len(data)):
        guest.poke(at, data[: guest.size - at])
    for call in (
        lambda: host.read(1000),
        lambda: host.mask(True),
        lambda: host.write([(6, 0, 0, b"", bytes(100))]),
        lambda: host.await_space(4096),
        host.inspect,
        lambda: Ring(MEMORY.hot, PAGES).read(1000),
    ):
        try:
            call()
        except RingError:
            pass
