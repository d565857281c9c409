"""The synthetic NIC with guests that lie: each ends with its channel given up, or a refusal, and nothing else."""

from __future__ import annotations

import io
import random
import struct
from typing import TYPE_CHECKING

import pytest

from devices.synthetic.netvsp import protocol
from devices.vmbus.packets import (
    COMPLETION_REQUESTED,
    PACKET_COMPLETION,
    PACKET_GPA_DIRECT,
    PACKET_INBAND,
    PACKET_TRANSFER_PAGES,
)
from tests.fakes import netvsc
from tests.fakes.netvsc import start_linux
from tests.fakes.netvsp_rig import MAC, PEER, frame
from tests.fakes.netvsp_rig import make as make
from tests.fakes.netvsp_rig import make_lying as make_lying
from tests.fakes.vmbus_guest import RESCIND
from tests.fakes.vmbus_host import EchoVsp

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fakes.netvsp_rig import Rig

    Make = Callable[..., Rig]

INBOUND = frame(to=MAC, source=PEER)
INIT, CONFIG = struct.pack("<II", netvsc.V6_1, netvsc.V6_1), struct.pack("<IIQ", 1514, 0, 8)


def still_serves(rig: Rig) -> None:
    """The NIC does all that it did before."""
    assert rig.driver.query(netvsc.PERMANENT_ADDRESS).data == MAC
    assert rig.driver.transmit(frame()) == netvsc.SUCCESS
    assert rig.port.sent()[1] == frame()


# NVSP -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", sorted(protocol.REQUESTS))
def test_truncated_messages_end_the_channel(make_lying: Make, number: int) -> None:
    whole = 4 + protocol.REQUESTS[number][1].size
    for size in range(0, whole, 8):  # what is in a ring is filled up to 8 bytes
        rig = make_lying()
        if number != netvsc.INIT:
            rig.driver.negotiate()
        rig.driver.send(struct.pack("<I", number).ljust(size, b"\0")[:size])
        assert "bytes" in rig.broken()
    for size in range(whole):
        with pytest.raises(ValueError, match="bytes"):
            protocol.parse(struct.pack("<I", number).ljust(whole, b"\0")[:size], protocol.V6_1)


@pytest.mark.parametrize("number", [0, 2, 3, 99, 102, 105, 109, 124, 126, 128, 130, 132, 134, 135, 0xFFFFFFFF])
def test_unknown_messages_end_the_channel(make_lying: Make, number: int) -> None:
    rig = make_lying()
    rig.driver.negotiate()
    rig.driver.message(number, b"")
    assert rig.broken() == f"NVSP: unknown message {number}"


@pytest.mark.parametrize("number", sorted(set(protocol.REQUESTS) - {netvsc.INIT, netvsc.RNDIS_PACKET}))
def test_nothing_comes_before_a_version(make_lying: Make, number: int) -> None:
    rig = make_lying()
    rig.driver.message(number, bytes(16))
    assert "under protocol version 0x0" in rig.broken()


@pytest.mark.parametrize(
    ("version", "number"),
    [
        (netvsc.V1, netvsc.NDIS_CONFIG),
        (netvsc.V2, netvsc.SWITCH_DATA_PATH),
        (netvsc.V4, netvsc.SUB_CHANNEL),
        (netvsc.V4, netvsc.OID_QUERY_EX),
    ],
)
def test_messages_of_later_versions_end_the_channel(make_lying: Make, version: int, number: int) -> None:
    rig = make_lying()
    rig.driver.negotiate((version,))
    rig.driver.message(number, bytes(16))
    assert f"under protocol version {version:#x}" in rig.broken()


def test_steps_out_of_order_or_for_the_second_time_end_the_channel(make_lying: Make) -> None:
    receive = struct.pack("<IH", 1, netvsc.RECEIVE_ID)
    steps: list[tuple[list[tuple[int, bytes]], str]] = [
        ([(netvsc.INIT, INIT), (netvsc.INIT, INIT)], "INIT for the second time"),
        ([(netvsc.INIT, INIT), (netvsc.NDIS_CONFIG, CONFIG), (netvsc.NDIS_CONFIG, CONFIG)], "configuration"),
        ([(netvsc.INIT, INIT), (netvsc.NDIS_VERSION, bytes(8)), (netvsc.NDIS_VERSION, bytes(8))], "NDIS version"),
        ([(netvsc.INIT, INIT), (netvsc.RECEIVE_BUFFER, receive)], "receive buffer out of place"),
        ([(netvsc.INIT, INIT), (netvsc.RNDIS_PACKET, struct.pack("<III", 1, 0xFFFFFFFF, 0))], "before the handshake"),
    ]
    for messages, reason in steps:
        rig = make_lying()
        for number, body in messages:
            rig.driver.message(number, body)
        assert reason in rig.broken()


def test_a_second_buffer_of_a_kind_ends_the_channel(make_lying: Make) -> None:
    for number in (netvsc.RECEIVE_BUFFER, netvsc.SEND_BUFFER):
        rig = make_lying()
        start_linux(rig.driver)
        gpadl = rig.guest.create_gpadl(rig.offer.channel_id, rig.guest.allocate(64))
        rig.driver.message(number, struct.pack("<IH", gpadl, 7))
        assert "buffer" in rig.broken()


@pytest.mark.parametrize("kind", [PACKET_TRANSFER_PAGES, 1, 8, 0xC])
def test_packets_of_other_types_end_the_channel(make_lying: Make, kind: int) -> None:
    rig = make_lying()
    start_linux(rig.driver)
    rig.driver.send(struct.pack("<I", netvsc.INIT).ljust(40, b"\0"), kind, bytes(16))
    assert f"type {kind}" in rig.broken()


def test_control_messages_on_a_sub_channel_end_it_but_not_the_primary(make_lying: Make) -> None:
    for number, body in ((netvsc.INIT, INIT), (netvsc.RNDIS_PACKET, struct.pack("<III", 1, 0xFFFFFFFF, 0))):
        rig = make_lying(subchannels=1)
        start_linux(rig.driver, channels=2)
        rig.driver.channels[1].hostile = True
        rig.driver.send((struct.pack("<I", number) + body).ljust(40, b"\0"), channel=1)
        assert int.from_bytes(rig.guest.expect(RESCIND)[:4], "little") == rig.driver.channels[1].offer.channel_id
        still_serves(rig)


def test_a_data_path_that_is_not_there_is_refused_with_a_note(make_lying: Make) -> None:
    notes = io.StringIO()
    rig = make_lying(notes=notes)
    start_linux(rig.driver)
    assert rig.driver.ask(netvsc.SWITCH_DATA_PATH, struct.pack("<I", 0)) == b""
    assert notes.getvalue() == ""
    assert rig.driver.ask(netvsc.SWITCH_DATA_PATH, struct.pack("<I", 1)) == b""
    assert notes.getvalue() == "pyvmm: nic0: the guest asks for the data path of a device that isn't there\n"
    still_serves(rig)


def test_extended_queries_are_answered_with_not_supported(make_lying: Make) -> None:
    rig = make_lying()
    start_linux(rig.driver)
    answer = rig.driver.ask(netvsc.OID_QUERY_EX, struct.pack("<BBHI", 0x96, 1, 12, 0x00010101))
    assert struct.unpack_from("<III", answer) == (netvsc.OID_QUERY_EX_COMPLETE, 0xC00000BB, 0)


def test_completions_of_what_wants_none_are_ignored(make_lying: Make) -> None:
    rig = make_lying()
    start_linux(rig.driver)
    for payload in (b"", struct.pack("<I", netvsc.VF_ASSOCIATION).ljust(40, b"\0")):
        rig.driver.channel.send((PACKET_COMPLETION, 0, 1 << 63, b"", payload))
    still_serves(rig)


# Buffers ----------------------------------------------------------------------------------------------------


def prepared(make: Make) -> Rig:
    rig = make()
    rig.driver.negotiate()
    rig.driver.configure()
    return rig


def test_gpadls_that_are_not_the_nics_are_refused_and_the_guest_may_try_another(make_lying: Make) -> None:
    rig = prepared(make_lying)
    other = EchoVsp("other", 9)
    rig.bus.add_device(other)
    channel = rig.guest.open(rig.guest.next_offer())
    foreign = rig.guest.create_gpadl(channel.offer.channel_id, rig.guest.allocate(64))
    ring = rig.driver.channel.gpadl_id
    twice = rig.guest.send_gpadl(
        rig.offer.channel_id,
        [(32 * 4096, 0, rig.guest.allocate(32)), (32 * 4096, 0, rig.guest.allocate(32))],
    )
    assert rig.guest.gpadl_status(twice) == 0
    small = rig.guest.create_gpadl(rig.offer.channel_id, rig.guest.allocate(4))
    incomplete = rig.guest.send_gpadl(rig.offer.channel_id, [(64 * 4096, 0, rig.guest.allocate(64))], length=8000)
    for gpadl in (0, 0xDEAD, foreign, ring, channel.gpadl_id, twice, small, incomplete):
        assert rig.driver.tell_receive_buffer(gpadl) == netvsc.FAILURE
    for gpadl in (0, 0xDEAD, foreign, ring, twice, incomplete):
        answer = rig.driver.ask(netvsc.SEND_BUFFER, struct.pack("<IH", gpadl, 0))
        assert struct.unpack_from("<III", answer) == (netvsc.SEND_BUFFER_COMPLETE, netvsc.FAILURE, 0)
    assert rig.driver.lend_receive_buffer() == netvsc.SUCCESS
    assert rig.driver.lend_send_buffer() == netvsc.SUCCESS
    rig.driver.initialize()
    still_serves(rig)


def test_a_receive_buffer_cannot_share_pages_with_a_ring(make_lying: Make) -> None:
    rig = prepared(make_lying)
    pages = [*rig.guest.allocate(63), rig.driver.channel.incoming.numbers[2]]
    gpadl = rig.guest.send_gpadl(rig.offer.channel_id, [(64 * 4096, 0, pages)])
    assert rig.guest.gpadl_status(gpadl) != 0
    assert rig.driver.tell_receive_buffer(gpadl) == netvsc.FAILURE
    # Nor can the ring of a sub-channel lie in the receive buffer.
    rig = make_lying(subchannels=1)
    start_linux(rig.driver)
    rig.driver.ask(netvsc.SUB_CHANNEL, struct.pack("<II", 1, 1))
    offer = rig.guest.next_offer()
    gpadl = rig.guest.create_gpadl(offer.channel_id, rig.driver.receive_pages[:12])
    assert rig.guest.try_open(offer.channel_id, gpadl, 6) != 0
    still_serves(rig)


def test_buffers_that_begin_inside_a_page_are_served(make_lying: Make) -> None:
    rig = prepared(make_lying)
    driver = rig.driver
    # Its first page is the rest of a page, so that offsets in the buffer are 100 less than in the pages.
    pages = rig.guest.allocate(65)
    gpadl = rig.guest.send_gpadl(rig.offer.channel_id, [(64 * 4096, 100, pages)])
    assert rig.guest.gpadl_status(gpadl) == 0
    assert driver.tell_receive_buffer(gpadl) == netvsc.SUCCESS
    driver.receive_pages, driver.receive_offset = pages, 100
    driver.initialize()
    assert driver.query(netvsc.PERMANENT_ADDRESS).data == MAC


def test_a_gpadl_being_torn_down_is_not_used_again(make_lying: Make) -> None:
    rig = prepared(make_lying)
    assert rig.driver.lend_receive_buffer() == netvsc.SUCCESS
    rig.guest.teardown_gpadl(rig.offer.channel_id, rig.driver.receive_gpadl)
    assert rig.driver.tell_receive_buffer(rig.driver.receive_gpadl) == netvsc.FAILURE


# RNDIS ------------------------------------------------------------------------------------------------------


def query(oid: int = netvsc.PERMANENT_ADDRESS, size: int = 0, offset: int = 20, length: int | None = None) -> bytes:
    """RNDIS QUERY with whatever numbers."""
    return struct.pack("<7I", netvsc.QUERY, 28 if length is None else length, 77, oid, size, offset, 0)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        query()[:4],
        query()[:27],
        query(length=0),
        query(length=7),
        query(length=27),
        query(length=29),
        query(length=0xFFFFFFFF),
        query(size=1),
        query(size=0xFFFFFFFF),
        query(size=4, offset=0),
        query(size=4, offset=19, length=32) + bytes(4),
        query(size=4, offset=21, length=32) + bytes(4),
        query(size=4, offset=0xFFFFFFFE, length=32) + bytes(4),
        struct.pack("<III", netvsc.INITIALIZE, 24, 5) + bytes(12),  # for the second time
        struct.pack("<III", netvsc.INITIALIZE, 12, 5),
        struct.pack("<II", netvsc.KEEPALIVE, 8),
        struct.pack("<III", netvsc.INDICATE, 12, 5),
        struct.pack("<III", 9, 12, 5),
        struct.pack("<III", netvsc.QUERY | netvsc.DONE, 12, 5),
        struct.pack("<III", 0xFF000001, 12, 5),
        bytes(0x4001),
    ],
)
def test_malformed_control_messages_are_refused_with_a_status(make_lying: Make, message: bytes) -> None:
    notes = io.StringIO()
    rig = make_lying(notes=notes)
    start_linux(rig.driver)
    padded = len(message) > 4096
    if padded:
        pages = rig.guest.allocate(5)
        header = struct.pack("<IIII5Q", 0, 1, len(message), 0, *pages)
        payload = struct.pack("<IIII", netvsc.RNDIS_PACKET, 1, 0xFFFFFFFF, 0).ljust(40, b"\0")
        status = rig.driver.status(rig.driver.send(payload, PACKET_GPA_DIRECT, header))
    elif message:
        status = rig.driver.control(message)
    else:  # no pages at all
        payload = struct.pack("<IIII", netvsc.RNDIS_PACKET, 1, 0xFFFFFFFF, 0).ljust(40, b"\0")
        status = rig.driver.status(rig.driver.send(payload))
    assert status == netvsc.INVALID_RNDIS
    assert notes.getvalue().startswith("pyvmm: nic0: RNDIS ") and notes.getvalue().count("\n") == 1
    still_serves(rig)


@pytest.mark.parametrize(("section", "size"), [(10, 28), (0xFFFFFFFE, 28), (0, 6145), (9, 6200), (0, 0xFFFFFFFF)])
def test_control_messages_outside_the_send_buffer_are_refused(make_lying: Make, section: int, size: int) -> None:
    rig = make_lying()
    start_linux(rig.driver)  # with 10 sections
    payload = struct.pack("<IIII", netvsc.RNDIS_PACKET, 1, section, size).ljust(40, b"\0")
    assert rig.driver.status(rig.driver.send(payload)) == netvsc.INVALID_RNDIS
    still_serves(rig)


def test_control_messages_outside_guest_memory_end_the_channel(make_lying: Make) -> None:
    rig = make_lying()
    start_linux(rig.driver)
    payload = struct.pack("<IIII", netvsc.RNDIS_PACKET, 1, 0xFFFFFFFF, 0).ljust(40, b"\0")
    rig.driver.send(payload, PACKET_GPA_DIRECT, struct.pack("<IIIIQ", 0, 1, 28, 0, 1 << 40))
    assert "RAM" in rig.broken()


@pytest.mark.parametrize(
    "header",
    [
        b"",
        struct.pack("<II", 0, 1),
        struct.pack("<IIIIQ", 0, 2, 28, 0, 20),
        struct.pack("<IIIIQ", 0, 1, 28, 4096, 20),
        struct.pack("<IIIIQ", 0, 1, 8192, 0, 20),
        struct.pack("<IIIIQ", 0, 0xFFFFFFFF, 28, 0, 20),
    ],
)
def test_ranges_that_do_not_fit_their_packet_end_the_channel(make_lying: Make, header: bytes) -> None:
    rig = make_lying()
    start_linux(rig.driver)
    payload = struct.pack("<IIII", netvsc.RNDIS_PACKET, 1, 0xFFFFFFFF, 0).ljust(40, b"\0")
    rig.driver.send(payload, PACKET_GPA_DIRECT, header)
    assert "GPA-direct" in rig.broken()


def test_rndis_packets_of_an_unknown_channel_type_end_the_channel(make_lying: Make) -> None:
    rig = make_lying()
    start_linux(rig.driver)
    rig.driver.send(struct.pack("<IIII", netvsc.RNDIS_PACKET, 2, 0xFFFFFFFF, 0).ljust(40, b"\0"))
    assert "channel type 2" in rig.broken()


def test_a_guest_that_keeps_all_sections_and_asks_on_is_given_up(make_lying: Make) -> None:
    rig = make_lying()
    start_linux(rig.driver)
    rig.driver.gives_back = False
    for request in range(1000, 1200):
        message = struct.pack("<III", netvsc.KEEPALIVE, 12, request)
        rig.guest.memory.write(rig.driver.control_page * 4096 + 16, message)
        header = struct.pack("<IIIIQ", 0, 1, 12, 16, rig.driver.control_page)
        payload = struct.pack("<IIII", netvsc.RNDIS_PACKET, 1, 0xFFFFFFFF, 0).ljust(40, b"\0")
        packet = (PACKET_GPA_DIRECT, COMPLETION_REQUESTED, request, header, payload)
        if not rig.driver.channel.try_send(packet):
            break
        rig.driver.channel.incoming.read()
    assert rig.broken() == "the guest gives no sections of its receive buffer back"


def test_a_section_that_is_given_back_twice_ends_the_channel(make_lying: Make) -> None:
    rig = make_lying()
    start_linux(rig.driver)
    rig.driver.gives_back = False
    rig.port.arrive(INBOUND)
    rig.driver.frame()
    ((transaction_id, _),) = rig.driver.held
    rig.driver.give_back(transaction_id)
    rig.driver.give_back(transaction_id)
    assert "completion" in rig.broken()


def test_replayed_messages_are_answered_each_by_itself(make_lying: Make) -> None:
    rig = make_lying()
    start_linux(rig.driver)
    for _ in range(3):
        assert rig.driver.control(query()) == netvsc.SUCCESS
        assert rig.driver.answer(77) == (netvsc.QUERY | netvsc.DONE, struct.pack("<4I", 77, 0, 6, 16) + MAC)
    still_serves(rig)


# Anything ---------------------------------------------------------------------------------------------------


def test_random_messages_never_reach_anything_but_the_channel(make_lying: Make) -> None:
    chance = random.Random(5)
    numbers = [*protocol.REQUESTS, 0, 102, 108, 135]
    for _ in range(60):
        notes = io.StringIO()
        rig = make_lying(subchannels=chance.choice((0, 1)), notes=notes)
        if chance.random() < 0.8:
            start_linux(rig.driver)
        for _ in range(chance.randint(1, 20)):
            size = chance.choice((4, 8, 12, 16, 28, 40))
            body = bytes(chance.choice((0, 1, 2, 0xFF, chance.randrange(256))) for _ in range(size))
            payload = struct.pack("<I", chance.choice(numbers)) + body
            if chance.random() < 0.5:
                section = chance.choice((0, 1, 9, 0xFFFFFFFF))
                payload = struct.pack("<IIII", netvsc.RNDIS_PACKET, 1, section, size) + body
            kind = chance.choice((PACKET_INBAND, PACKET_INBAND, PACKET_GPA_DIRECT))
            header = b""
            if kind == PACKET_GPA_DIRECT:
                words = [chance.choice((0, 1, 2, 3, 4, 5, 20, 28, 0xFFFFFFFF, chance.randrange(64))) for _ in range(16)]
                words[:2] = [chance.choice((2, 3, 4, 5, 6, 8)), chance.choice((12, 24, 28, 64))]
                rig.memory.write(rig.driver.control_page * 4096, struct.pack("<16I", *words))
                header = struct.pack("<IIIIQ", 0, 1, chance.choice((12, 28, 64)), 0, rig.driver.control_page)
            if not rig.driver.channel.try_send((kind, COMPLETION_REQUESTED, 1, header, payload)):
                break
        rig.settle()
        rig.bus.reset()
        rig.ports.messages.clear()  # a rescind
        (rig.offer,) = rig.guest.connect()
        rig.driver = rig.open()
        start_linux(rig.driver)
        still_serves(rig)
