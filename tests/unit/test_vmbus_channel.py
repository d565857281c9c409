"""Channels: back-pressure, signals, the sleep protocol, GPA-direct ranges and pipe frames."""

from __future__ import annotations

import gc
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.vmbus.channel import PENDING_LIMIT
from devices.vmbus.packets import (
    ChannelViolation,
    gpa_direct_ranges,
    gpa_direct_views,
    packet_size,
    parse_pipe_message,
    pipe_message,
)
from pyvmm.core.memory import PAGE_SIZE, GuestMemory
from tests.fakes import vmbus_guest as vg
from tests.fakes.ring import MASK, PENDING_SEND_SIZE
from tests.fakes.vmbus_host import EchoVsp, Rig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from devices.vmbus.channel import Channel
    from pyvmm.core._hot import Packet, SynIC
    from tests.fakes.vmbus_guest import GuestChannel


@pytest.fixture(name="rig")
def make_rig() -> Iterator[Rig]:
    with Rig(EchoVsp()) as rig:
        yield rig


def opened(rig: Rig, version: int = vg.V5_3, pages: int = 4) -> tuple[GuestChannel, Channel]:
    (offer,) = rig.guest.connect(version)
    guest = rig.guest.open(offer, out_pages=pages, in_pages=pages)
    (device,) = rig.bus._devices.values()
    assert isinstance(device, EchoVsp)
    return guest, device.channels[0]


def settle(channel: Channel) -> None:
    """Return once the channel's worker has nothing left to do for what the guest has signalled so far."""
    for _ in range(3):
        channel.worker.run(lambda: None)


def test_an_idle_channel_sleeps_unmasked(rig: Rig) -> None:
    guest, channel = opened(rig)
    guest.send((6, 0, 0, b"", b"12345678"))
    guest.receive()
    settle(channel)
    assert guest.outgoing.word(MASK) == 0
    assert guest.incoming.word(PENDING_SEND_SIZE) == 0


def test_one_signal_each_way_per_packet_on_an_idle_channel(rig: Rig) -> None:
    guest, channel = opened(rig)
    settle(channel)
    before = guest.signalled
    for number in range(10):
        guest.send((6, 1, number, b"", b"12345678"))
        guest.receive()
        settle(channel)
    assert guest.signalled - before == 10
    # One more comes 100 ms after a channel was opened; it may or may not be here by now.
    assert rig.ports.signals[0, 2, guest.offer.channel_id] in (10, 11)


def test_packets_stay_in_order_through_a_full_ring(rig: Rig) -> None:
    guest, channel = opened(rig, pages=2)
    sent = 0
    received: list[int] = []
    # The guest doesn't read until the host's ring is full and its own is too.
    while guest.try_send((6, 1, sent, b"", bytes(700))):
        sent += 1
        settle(channel)
    settle(channel)
    assert channel.inspect()["pending"] > 0
    assert guest.incoming.word(PENDING_SEND_SIZE) > 0
    stuck = guest.outgoing.used
    assert stuck > 2000
    settle(channel)
    assert guest.outgoing.used == stuck  # nothing is taken while replies wait
    while len(received) < sent:
        received += [packet[2] for packet in guest.receive(1)]
    assert received == list(range(sent))
    settle(channel)
    assert (guest.outgoing.used, channel.inspect()["pending"]) == (0, 0)
    assert guest.incoming.word(PENDING_SEND_SIZE) == 0


def test_a_guest_too_old_to_tell_of_room_is_polled(rig: Rig) -> None:
    guest, channel = opened(rig, vg.V1_1, pages=2)
    assert channel.send([(6, 0, number, b"", bytes(700)) for number in range(20)])
    received = 0
    while received < 20:
        received += len(guest.incoming.read(2)[0])  # never signals


def test_what_waits_is_bounded(rig: Rig) -> None:
    _, channel = opened(rig, pages=2)
    packet = (6, 0, 0, b"", bytes(1000))
    assert channel.send([packet] * PENDING_LIMIT)
    assert channel.send([packet] * 3)
    assert not channel.send([packet] * 4)
    assert channel.inspect()["pending"] == PENDING_LIMIT
    assert not channel.complete(1)


def test_a_packet_that_can_never_fit_is_a_bug_of_the_device(rig: Rig) -> None:
    _, channel = opened(rig, pages=2)
    with pytest.raises(ValueError, match="-byte packet for a ring of 4096 bytes"):
        channel.send([(6, 0, 0, b"", bytes(4096 - 8 - 24 + 1))])
    assert channel.send([(6, 0, 0, b"", bytes(4096 - 8 - 24))])


def test_stop_receiving_leaves_packets_in_the_ring(rig: Rig) -> None:
    guest, channel = opened(rig)
    settle(channel)
    channel.stop_receiving()
    guest.send((6, 1, 1, b"", b"12345678"))
    guest.send((6, 1, 2, b"", b"12345678"))
    settle(channel)
    assert guest.outgoing.used == 64
    channel.start_receiving()
    assert guest.receive()[0][2] == 1
    settle(channel)
    assert guest.outgoing.used == 0


def test_a_closed_channel_drops_what_is_sent(rig: Rig) -> None:
    guest, channel = opened(rig)
    guest.close()
    assert channel.send([(6, 0, 0, b"", b"")]) is False
    channel.kick()
    channel.unstick()
    channel.fail("too late")
    assert channel.broken is None


def test_the_guest_gets_one_more_signal_after_it_has_opened_a_channel(rig: Rig) -> None:
    guest, _ = opened(rig)
    rig.ports.take_flag(0, guest.offer.channel_id)


def test_each_sub_channel_may_have_its_own_worker() -> None:
    device = EchoVsp()
    device.worker_count = 2
    with Rig(device) as rig:
        guest, channel = opened(rig)
        guest.send((6, 0, 0, b"", b"subs1..."))
        sub = rig.guest.open(rig.guest.next_offer())
        sub.send((6, 0, 0, b"", b"12345678"))
        sub.receive()
        assert device.threads == {"echo0.0", "echo0.1"}
        assert channel.worker is not device.channels[1].worker


# GPA-direct ----------------------------------------------------------------------------------------


def gpa_direct(*ranges: tuple[int, int, list[int]], count: int | None = None) -> tuple[int, int, int, bytes, bytes]:
    header = struct.pack("<II", 0xDEAD, len(ranges) if count is None else count)
    for length, offset, pages in ranges:
        header += struct.pack(f"<II{len(pages)}Q", length, offset, *pages)
    return 9, 1, 7, header, b"payload"


def test_ranges_join_neighbouring_pages() -> None:
    packet = gpa_direct((10000, 4000, [5, 6, 9, 10]), (8, 4088, [3]))
    assert gpa_direct_ranges(packet) == [[(5 * 4096 + 4000, 96 + 4096), (9 * 4096, 5808)], [(3 * 4096 + 4088, 8)]]


def test_views_are_guest_memory() -> None:
    memory = GuestMemory(1 << 20)
    memory.write(6 * PAGE_SIZE - 2, b"abcd")
    views = gpa_direct_views(gpa_direct((4, 4094, [5, 6]), (3, 0, [9])), memory, write=True)
    assert [bytes(view) for view in views] == [b"abcd", bytes(3)]
    views[1][:] = b"xyz"
    assert memory.read(9 * PAGE_SIZE, 3) == b"xyz"


def test_an_empty_range_has_no_views() -> None:
    assert gpa_direct_ranges(gpa_direct((0, 0, []))) == [[]]


@pytest.mark.parametrize(
    "packet",
    [
        (6, 0, 0, b"", b""),
        (9, 0, 0, b"", b""),
        gpa_direct(),
        gpa_direct((4096, 0, [5]), count=2),
        gpa_direct((4096, 0, [5]), count=0xFFFFFFFF),
        gpa_direct((4097, 0, [5])),
        gpa_direct((4096, 1, [5])),
        gpa_direct((1, 4096, [5, 6])),
        gpa_direct((0xFFFFFFFF, 0, [5])),
        gpa_direct((4096, 0, [1 << 20])),
        gpa_direct((4096, 0, [2**64 - 1])),
        gpa_direct((4096, 0, [0xC0000])),
    ],
)
def test_bad_ranges_are_violations(packet: tuple[int, int, int, bytes, bytes]) -> None:
    with pytest.raises(ChannelViolation):
        gpa_direct_views(packet, GuestMemory(1 << 20), write=False)


def test_the_total_is_limited() -> None:
    packet = gpa_direct((4096, 0, [5]), (4096, 0, [5]))
    assert len(gpa_direct_ranges(packet, 8192)) == 2
    with pytest.raises(ChannelViolation):
        gpa_direct_ranges(packet, 8191)


@given(st.binary(max_size=200))
def test_any_gpa_direct_header_gives_ranges_or_a_violation(header: bytes) -> None:
    memory = GuestMemory(1 << 16)
    try:
        views = gpa_direct_views((9, 0, 0, header, b""), memory, write=True)
    except ChannelViolation:
        return
    assert sum(len(view) for view in views) <= 1 << 24


# Pipes ---------------------------------------------------------------------------------------------


@given(st.binary(max_size=100))
def test_pipe_frames_keep_the_message(message: bytes) -> None:
    assert parse_pipe_message(pipe_message(message) + b"padding") == message


@pytest.mark.parametrize("data", [b"", bytes(7), struct.pack("<II", 2, 0), struct.pack("<II", 1, 1)])
def test_bad_pipe_frames_are_violations(data: bytes) -> None:
    with pytest.raises(ChannelViolation):
        parse_pipe_message(data)


def test_packet_size_is_what_a_ring_needs() -> None:
    assert packet_size((6, 0, 0, b"", b"")) == 24
    assert packet_size((9, 0, 0, bytes(24), bytes(9))) == 16 + 24 + 16 + 8


def test_doorbells_are_closed_with_their_channels(rig: Rig) -> None:
    opened(rig)[0].close()
    gc.collect()  # what other tests left closes no file in between
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        opened(rig)[0].close()
        rig.guest.unload()
    assert len(os.listdir("/proc/self/fd")) == before


class Idle:
    """An engine that counts its turns and never has anything to do."""

    name = "idle"

    def __init__(self) -> None:
        self.turns = 0

    def serve(self) -> tuple[bool, int, list[Packet], list[Packet], bool]:
        self.turns += 1
        return True, 0, [], [], False

    def quiesce(self) -> tuple[list[Packet], list[Packet]]:
        return [], []

    def set_target(self, synic: SynIC | None, sint: int, flag: int, /) -> None:
        pass

    def inspect(self) -> dict[str, int]:
        return {}


def test_an_engine_gets_its_turn_when_its_file_has_something_new_until_the_channel_closes(rig: Rig) -> None:
    guest, channel = opened(rig)
    source, sink = os.pipe()
    engine = Idle()
    channel.use_engine(engine, source)
    settle(channel)
    for _ in range(3):
        before = engine.turns
        os.write(sink, b"x")  # nobody reads it
        settle(channel)
        assert engine.turns > before
    guest.close()
    before = engine.turns
    os.write(sink, b"x")
    settle(channel)
    assert engine.turns == before
    os.close(source)
    os.close(sink)
