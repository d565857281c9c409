"""Guests that break the rules: every case ends in a refused message or a closed channel, with a note that says why."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.vmbus.bus import QUEUE_LENGTH
from devices.vmbus.gpadl import MAX_GPADLS
from tests.fakes import vmbus_guest as vg
from tests.fakes.ring import IN, OUT
from tests.fakes.vmbus_host import EchoVsp, Rig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fakes.vmbus_guest import GuestChannel

TOP_PAGE = (16 << 20) // 4096


@pytest.fixture(name="rig")
def make_rig() -> Iterator[Rig]:
    with Rig(EchoVsp()) as rig:
        yield rig


def assert_channel_broken(rig: Rig, guest: GuestChannel, reason: str) -> None:
    """The guest gets a rescind, the device a close, and a reader of `inspect` or the log the reason."""
    assert rig.guest.expect(vg.RESCIND) == struct.pack("<I", guest.offer.channel_id)
    (offer,) = rig.bus.inspect()["offers"]
    assert offer["state"] == "rescinded"
    assert reason in offer["broken"]
    assert f"channel 1 (echo0) closed: {offer['broken']}" in rig.notes.getvalue()
    (device,) = rig.bus._devices.values()
    assert isinstance(device, EchoVsp)
    assert device.log[-1] == "close 0"
    assert rig.ports.event_ports == {}
    # The guest cleans up, and has the device again after it has reconnected.
    guest.close()
    rig.guest.post(vg.REL_ID_RELEASED, struct.pack("<I", 1))
    rig.guest.unload()
    (offer_again,) = rig.guest.connect()
    again = rig.guest.open(offer_again)
    again.send((6, 0, 0, b"", b"12345678"))
    assert again.receive()


# Rings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [4, 3 * 4096, 0xFFFFFFF8])
def test_a_write_index_outside_the_ring_closes_the_channel(rig: Rig, index: int) -> None:
    guest = rig.guest.open(rig.guest.connect()[0])
    guest.outgoing.set_word(IN, index)
    guest.signal()
    assert_channel_broken(rig, guest, f"incoming ring: write index {index} is not an offset")


def test_a_read_index_outside_the_ring_closes_the_channel(rig: Rig) -> None:
    guest = rig.guest.open(rig.guest.connect()[0])
    guest.incoming.set_word(OUT, 0x77777777)
    guest.send((6, 0, 0, b"", b"12345678"))
    assert_channel_broken(rig, guest, "outgoing ring: read index 2004318071")


def test_a_packet_longer_than_what_is_in_the_ring_closes_the_channel(rig: Rig) -> None:
    guest = rig.guest.open(rig.guest.connect()[0])
    guest.outgoing.poke(0, struct.pack("<HHHHQ", 6, 2, 0xFFFF, 0, 0))
    guest.outgoing.set_word(IN, 32)
    guest.signal()
    assert_channel_broken(rig, guest, "packet of 524280 bytes")


def test_a_packet_that_the_device_rejects_closes_the_channel(rig: Rig) -> None:
    guest = rig.guest.open(rig.guest.connect()[0])
    guest.send((6, 0, 0, b"", b"refuse.."))
    assert_channel_broken(rig, guest, "the guest said refuse")


def test_a_broken_sub_channel_leaves_the_primary_alone(rig: Rig) -> None:
    primary = rig.guest.open(rig.guest.connect()[0])
    primary.send((6, 0, 0, b"", b"subs1..."))
    sub = rig.guest.open(rig.guest.next_offer())
    sub.send((6, 0, 0, b"", b"refuse.."))
    assert rig.guest.expect(vg.RESCIND) == struct.pack("<I", 2)
    primary.send((6, 1, 1, b"", b"12345678"))
    assert primary.receive()


def test_a_storm_of_packets_does_not_keep_the_worker_from_pausing(rig: Rig) -> None:
    guest = rig.guest.open(rig.guest.connect()[0], out_pages=3, in_pages=3)
    for number in range(500):
        guest.send((6, 1, number, b"", b""))
        guest.incoming.read()
        if number % 100 == 0:
            rig.bus.pause()
            rig.bus.resume()
    assert rig.bus.inspect()["offers"][0]["broken"] is None


# Messages ------------------------------------------------------------------------------------------


def test_a_message_storm_meets_a_bounded_queue(rig: Rig) -> None:
    rig.guest.connect()
    rig.bus.pause()
    accepted = [rig.ports.hv_post_message(4, struct.pack("<II", 3, 0)) for _ in range(1000)]
    assert accepted == [True] * QUEUE_LENGTH + [False] * (1000 - QUEUE_LENGTH)
    assert rig.bus.inspect()["queued_messages"] == {"incoming": QUEUE_LENGTH, "outgoing": 0}
    rig.bus.resume()
    rig.guest.unload()
    notes = rig.notes.getvalue()
    assert "REQUEST_OFFERS for the second time" in notes
    assert notes.count("\n") <= 20
    assert rig.bus.inspect()["violations"] == QUEUE_LENGTH


def test_a_guest_that_takes_no_messages_is_held_back_and_loses_none() -> None:
    devices = [EchoVsp(f"echo{n}", n) for n in range(1, 30)]
    with Rig(*devices, capacity=1) as rig:
        assert rig.guest.contact()[0] == 1
        rig.guest.post(vg.REQUEST_OFFERS)
        rig.settle()
        assert rig.bus.inspect()["queued_messages"]["outgoing"] == 29
        assert rig.ports.hv_post_message(4, struct.pack("<II", 16, 0)) is False
        offers = [rig.guest.next_offer().channel_id for _ in devices]
        rig.guest.expect(vg.ALL_OFFERS_DELIVERED)
        assert offers == list(range(1, 30))
        rig.guest.unload()


def test_other_message_types_and_connections_are_refused(rig: Rig) -> None:
    assert rig.ports.hv_post_message(4, bytes(240), message_type=2) is True
    assert rig.ports.hv_post_message(7, bytes(240)) is None
    assert "SynIC message of type 2" in rig.notes.getvalue()


@pytest.mark.parametrize("number", [5, 7, 8, 9, 11, 13, 14, 18, 19, 21, 22])
def test_truncated_messages_are_noted_and_ignored(rig: Rig, number: int) -> None:
    rig.guest.connect()
    rig.guest.post(number, b"\1")
    rig.guest.unload()
    assert "is too short" in rig.notes.getvalue()


@given(
    st.lists(
        st.tuples(
            st.sampled_from((5, 7, 8, 9, 11, 13, 18, 19, 21, 22)),
            st.lists(st.integers(0, 3) | st.sampled_from((0xE1E10, 24, 0xFFFFFFFF)), min_size=2, max_size=8),
            st.binary(max_size=40),
        ),
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_messages_never_break_the_bus(storm: list[tuple[int, list[int], bytes]]) -> None:
    with Rig(EchoVsp()) as rig:
        rig.guest.open(rig.guest.connect()[0])
        for number, words, tail in storm:
            rig.guest.post(number, struct.pack(f"<{len(words)}I", *words) + tail + bytes(160 - len(tail)))
        rig.settle()
        rig.ports.messages.clear()
        rig.guest.unload()
        rig.guest.open(rig.guest.connect()[0])


@pytest.mark.parametrize(
    ("number", "body", "note"),
    [
        (vg.OPEN_CHANNEL, struct.pack("<IIIII120x", 9, 0, 0, 0, 0), "OPEN_CHANNEL for unknown channel 9"),
        (vg.OPEN_CHANNEL, struct.pack("<IIIII120x", 0, 0, 0, 0, 0), "OPEN_CHANNEL for unknown channel 0"),
        (vg.CLOSE_CHANNEL, struct.pack("<I", 1), "CLOSE_CHANNEL for channel 1, which is not open"),
        (vg.GPADL_HEADER, struct.pack("<IIHH", 9, 1, 16, 1), "GPADL_HEADER of unknown channel 9"),
        (vg.GPADL_BODY, struct.pack("<II", 0, 5), "GPADL_BODY for GPADL 0x5, which waits for none"),
        (vg.GPADL_TEARDOWN, struct.pack("<II", 1, 5), "GPADL_TEARDOWN for GPADL 0x5 of channel 1"),
        (vg.REL_ID_RELEASED, struct.pack("<I", 5), "REL_ID_RELEASED for unknown channel 5"),
        (vg.INITIATE_CONTACT, struct.pack("<IIQQQ", vg.V5_3, 4, 2, 0, 0), "INITIATE_CONTACT for VP 4 of 4"),
    ],
)
def test_messages_that_make_no_sense_are_noted_and_ignored(rig: Rig, number: int, body: bytes, note: str) -> None:
    rig.guest.connect()
    rig.guest.post(number, body)
    rig.guest.unload()
    assert rig.notes.getvalue() == f"pyvmm: vmbus: {note}\n"


# GPADLs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("count", [1, 26, 27, 54, 55, 1000, 4096])
def test_lists_of_every_length_arrive(rig: Rig, count: int, pad: bool) -> None:
    rig.guest.connect()
    pages = list(range(100, 100 + count)) if count < 3900 else [100 + n % 3000 for n in range(count)]
    gpadl_id = rig.guest.create_gpadl(1, pages, pad)
    gpadl = rig.bus._server.gpadls.get(gpadl_id)
    assert gpadl is not None
    assert [(part.length, part.offset, list(part.pages)) for part in gpadl.ranges] == [(count * 4096, 0, pages)]
    rig.guest.teardown_gpadl(1, gpadl_id)


def test_several_ranges_with_offsets(rig: Rig) -> None:
    rig.guest.connect()
    gpadl_id = rig.guest.send_gpadl(1, [(100, 4090, [30, 31]), (4096, 0, [40])])
    assert rig.guest.gpadl_status(gpadl_id) == 0
    gpadl = rig.bus._server.gpadls.get(gpadl_id)
    assert gpadl is not None
    assert [(part.length, part.offset, part.pages) for part in gpadl.ranges] == [
        (100, 4090, (30, 31)),
        (4096, 0, (40,)),
    ]


def test_devices_find_the_gpadls_of_their_channels_and_hear_of_their_end(rig: Rig) -> None:
    device = rig.bus._devices["echo0"]
    assert isinstance(device, EchoVsp)
    rig.guest.open(rig.guest.connect()[0])
    gpadl_id = rig.guest.create_gpadl(1, [200, 201])
    gpadl = rig.bus.gpadl(device, gpadl_id)
    assert gpadl is not None and gpadl.ranges[0].pages == (200, 201)
    assert rig.bus.gpadl(EchoVsp("other", 2), gpadl_id) is None
    rig.guest.teardown_gpadl(1, gpadl_id)
    assert device.released_gpadls == [gpadl_id]
    assert rig.bus.gpadl(device, gpadl_id) is None


@pytest.mark.parametrize(
    ("ranges", "header", "why"),
    [
        ([(4096, 0, [TOP_PAGE])], {}, "page 0x1000 is not in guest RAM"),
        ([(8192, 0, [16, 0xC0000])], {}, "page 0xc0000 is not in guest RAM"),
        ([(4096, 0, [2**64 - 1])], {}, "is not in guest RAM"),
        ([(4096, 0, [2**52 + 16])], {}, "is not in guest RAM"),
        ([(4097, 0, [16])], {}, "does not fit the list"),
        ([(4096, 1, [16])], {}, "does not fit the list"),
        ([(4096, 4096, [16, 17])], {}, "does not fit the list"),
        ([(0, 0, [16])], {}, "does not fit the list"),
        ([(0xFFFFFFFF, 0, [16])], {}, "does not fit the list"),
        ([(4096, 0, [16])], {"count": 0}, "0 ranges in 16 bytes"),
        ([(4096, 0, [16])], {"count": 2}, "2 ranges in 16 bytes"),
        ([(4096, 0, [16])], {"count": 0xFFFF}, "65535 ranges in 16 bytes"),
        ([(4096, 0, [16, 17])], {"count": 1, "length": 12}, "1 ranges in 12 bytes"),
        ([(4096, 0, [16, 0, 18])], {"length": 32, "count": 2}, "does not fit the list"),
    ],
)
def test_bad_gpadls_are_refused(
    rig: Rig, ranges: list[tuple[int, int, list[int]]], header: dict[str, int], why: str
) -> None:
    rig.guest.connect()
    gpadl_id = rig.guest.send_gpadl(1, ranges, False, **header)
    assert rig.guest.gpadl_status(gpadl_id) < 0
    assert why in rig.notes.getvalue()
    assert rig.bus.inspect()["gpadls"] == {"count": 0, "pages": 0}


def test_a_gpadl_id_in_use_is_not_taken_again(rig: Rig) -> None:
    rig.guest.connect()
    gpadl_id = rig.guest.create_gpadl(1, [16, 17])
    rig.guest.send_gpadl(1, [(4096, 0, [18])], gpadl_id=gpadl_id)
    rig.settle()
    assert f"GPADL_HEADER in use already: {gpadl_id:#x}" in rig.notes.getvalue()
    gpadl = rig.bus._server.gpadls.get(gpadl_id)
    assert gpadl is not None and gpadl.ranges[0].pages == (16, 17)


def test_gpadls_without_end_are_refused(rig: Rig) -> None:
    rig.guest.connect()
    refused = 0
    for number in range(MAX_GPADLS + 10):
        gpadl_id = rig.guest.send_gpadl(1, [(4096, 0, [16])], length=64)  # never complete
        if number >= MAX_GPADLS:
            refused += rig.guest.gpadl_status(gpadl_id) < 0
    assert refused == 10
    assert rig.bus.inspect()["gpadls"]["count"] == MAX_GPADLS
    rig.guest.unload()
    assert rig.bus.inspect()["gpadls"]["count"] == 0


def test_pages_without_end_are_refused(rig: Rig) -> None:
    rig.guest.connect()
    statuses = []
    for _ in range(40):
        # 65528 bytes of list are announced and none sent.
        rig.guest.send_gpadl(1, [(0, 0, [])], length=65528)
    rig.settle()
    while rig.ports.messages[0, 2]:
        statuses.append(struct.unpack("<IIi", rig.guest.expect(vg.GPADL_CREATED))[2])
    assert len(statuses) == 40 - (1 << 18) // 8191
    assert all(status < 0 for status in statuses)


# Opening -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "downstream", "vp", "why"),
    [
        ([20, 21, 22, 23], 1, 0, "rings of 1 and 3 pages"),
        ([20, 21, 22, 23], 3, 0, "rings of 3 and 1 pages"),
        ([20, 21, 22, 23], 0, 0, "rings of 0 and 4 pages"),
        ([20, 21, 22, 23], 0xFFFFFFFF, 0, "rings of 4294967295 and"),
        ([20, 21, 22], 2, 0, "rings of 2 and 1 pages"),
        ([20, 21, 22, 22], 2, 0, "names one page twice"),
        ([20, 21, 22, 23], 2, 4, "VP 4 of 4"),
    ],
)
def test_bad_rings_are_not_opened(rig: Rig, pages: list[int], downstream: int, vp: int, why: str) -> None:
    rig.guest.connect()
    gpadl_id = rig.guest.create_gpadl(1, pages)
    assert rig.guest.try_open(1, gpadl_id, downstream, vp) < 0
    assert why in rig.notes.getvalue()
    assert rig.ports.event_ports == {}


@pytest.mark.parametrize(
    ("ranges", "why"),
    [
        ([(8192, 0, [20, 21]), (8192, 0, [22, 23])], "a ring of 2 ranges"),
        ([(4 * 4096 - 8, 8, [20, 21, 22, 23])], "not made of whole pages"),
        ([(4 * 4096 - 8, 0, [20, 21, 22, 23])], "not made of whole pages"),
    ],
)
def test_rings_are_one_range_of_whole_pages(rig: Rig, ranges: list[tuple[int, int, list[int]]], why: str) -> None:
    rig.guest.connect()
    gpadl_id = rig.guest.send_gpadl(1, ranges)
    assert rig.guest.gpadl_status(gpadl_id) == 0
    assert rig.guest.try_open(1, gpadl_id, 2) < 0
    assert why in rig.notes.getvalue()


def test_a_ring_index_that_is_wrong_from_the_start_is_not_opened(rig: Rig) -> None:
    rig.guest.connect()
    gpadl_id = rig.guest.create_gpadl(1, [20, 21, 22, 23])
    rig.memory.write(20 * 4096, struct.pack("<I", 12345))
    assert rig.guest.try_open(1, gpadl_id, 2) < 0
    assert "write index 12345" in rig.notes.getvalue()


def test_a_gpadl_that_is_missing_unfinished_or_another_channels_is_no_ring() -> None:
    with Rig(EchoVsp("echo0", 1), EchoVsp("echo1", 2)) as rig:
        rig.guest.connect()
        other = rig.guest.create_gpadl(2, [20, 21, 22, 23])
        unfinished = rig.guest.send_gpadl(1, [(4096, 0, [16])], length=64)
        for gpadl_id in (other, unfinished, 0x1234):
            assert rig.guest.try_open(1, gpadl_id, 2) < 0
        assert rig.notes.getvalue().count("is not this channel's") == 3


def test_rings_and_other_gpadls_share_no_page() -> None:
    with Rig(EchoVsp("echo0", 1), EchoVsp("echo1", 2)) as rig:
        rig.guest.connect()
        first = rig.guest.create_gpadl(1, [20, 21, 22, 23])
        second = rig.guest.create_gpadl(2, [30, 31, 32, 20])
        assert rig.guest.try_open(1, first, 2) < 0
        assert f"the ring overlaps GPADL {second:#x}" in rig.notes.getvalue()
        rig.guest.teardown_gpadl(2, second)
        assert rig.guest.try_open(1, first, 2) == 0
        third = rig.guest.send_gpadl(2, [(4096, 0, [23])])
        assert rig.guest.gpadl_status(third) < 0
        assert "overlaps the ring of an open channel" in rig.notes.getvalue()


def test_a_ring_lent_to_an_open_channel_comes_back_when_it_is_closed(rig: Rig) -> None:
    (offer,) = rig.guest.connect()
    guest = rig.guest.open(offer)
    rig.guest.post(vg.GPADL_TEARDOWN, struct.pack("<II", 1, guest.gpadl_id))
    guest.send((6, 0, 0, b"", b"12345678"))
    assert guest.receive()
    guest.close(teardown=False)
    assert rig.guest.expect(vg.GPADL_TORNDOWN) == struct.pack("<I", guest.gpadl_id)


def test_releasing_the_id_of_an_open_channel_closes_it(rig: Rig) -> None:
    device = rig.bus._devices["echo0"]
    assert isinstance(device, EchoVsp)
    (offer,) = rig.guest.connect()
    guest = rig.guest.open(offer)
    rig.guest.post(vg.REL_ID_RELEASED, struct.pack("<I", 1))
    rig.guest.post(vg.CLOSE_CHANNEL, struct.pack("<I", 1))
    rig.settle()
    assert device.log[-1] == "close 0"
    assert device.released_gpadls == [guest.gpadl_id]
    assert rig.guest.connect() == [offer]


def test_a_ring_that_changes_all_the_time_never_crashes_the_host() -> None:
    chance = random.Random(1)
    for _ in range(20):
        with Rig(EchoVsp()) as rig:
            guest = rig.guest.open(rig.guest.connect()[0], out_pages=2, in_pages=2)
            for _ in range(200):
                ring = chance.choice((guest.outgoing, guest.incoming))
                if chance.random() < 0.7:
                    ring.poke(chance.randrange(0, 4096, 8), chance.randbytes(16))
                else:
                    ring.set_word(chance.choice((0, 4, 8, 12)), chance.randrange(0, 4096, 8))
                rig.ports.hv_signal_event(guest.offer.connection_id)
            rig.settle()
