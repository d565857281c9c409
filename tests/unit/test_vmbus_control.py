"""The control plane through a guest's eyes: contact, offers, channels, unload."""

from __future__ import annotations

import struct
import threading
from uuid import UUID

import pytest

from tests.fakes import vmbus_guest as vg
from tests.fakes.vmbus_host import EchoVsp, Rig, ShoutVsp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

VERSIONS = (0xD, 0x10001, 0x20004, 0x30000, 0x40000, 0x40001, 0x50000, 0x50001, 0x50002, 0x50003)


@pytest.fixture(name="rig")
def make_rig() -> Iterator[Rig]:
    with Rig(EchoVsp()) as rig:
        yield rig


def echo(rig: Rig) -> EchoVsp:
    device = rig.bus._devices["echo0"]
    assert isinstance(device, EchoVsp)
    return device


# Version negotiation -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_every_supported_version_connects_and_moves_packets(rig: Rig, version: int) -> None:
    (offer,) = rig.guest.connect(version)
    channel = rig.guest.open(offer, vp=1 if version >= vg.V2_4 else 0)
    for number in range(5):
        channel.send((6, 1, number, b"", b"8 bytes."))
        assert channel.receive() == [(11, 0, number, b"", b"8 bytes.")]
    channel.close()
    rig.guest.unload()
    assert rig.notes.getvalue() == ""


@pytest.mark.parametrize("version", [0x60000, 0x50004, 0x20003, 0, 0xFFFFFFFF])
def test_an_unknown_version_is_refused_with_zeros_and_the_next_one_taken(rig: Rig, version: int) -> None:
    assert rig.guest.contact(version) == (0, 0, 0)
    assert rig.guest.contact(vg.V5_3) == (1, 0, 4)


def test_a_maximum_version_makes_the_guest_go_down() -> None:
    with Rig(EchoVsp(), max_version=vg.V4_0) as rig:
        assert [rig.guest.contact(version)[0] for version in reversed(VERSIONS[:7])] == [0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("version", "answer"), [(vg.V4_1, vg.V4_1), (vg.V5_0, 4), (vg.V5_3, 4)])
def test_the_answer_holds_the_version_or_from_5_0_on_the_connection_to_post_to(
    rig: Rig, version: int, answer: int
) -> None:
    assert rig.guest.contact(version) == (1, 0, answer)


def test_a_5_3_guest_may_use_connection_1() -> None:
    with Rig(EchoVsp()) as rig:
        rig.guest.post_connection = 1
        rig.guest.post(vg.INITIATE_CONTACT, struct.pack("<IIQQQ", vg.V5_3, 0, 2, 0, 0))
        assert struct.unpack("<BBHI", rig.guest.expect(vg.VERSION_RESPONSE)) == (1, 0, 0, 1)


def test_messages_go_to_the_vp_named_from_3_0_on(rig: Rig) -> None:
    assert rig.guest.contact(vg.V5_3, vp=3)[0] == 1
    rig.guest.post(vg.INITIATE_CONTACT, struct.pack("<IIQQQ", vg.V2_4, 3, 0, 0, 0))
    rig.guest.vp = 0
    assert rig.guest.expect(vg.VERSION_RESPONSE)[0] == 1


@pytest.mark.parametrize(("target", "version"), [(5, vg.V5_0), (0x102, vg.V5_1)])
def test_other_sints_and_vtls_are_refused(rig: Rig, target: int, version: int) -> None:
    assert rig.guest.contact(version, target=target) == (0, 0, 0)


@pytest.mark.parametrize(("version", "answer"), [(vg.V5_3, (1, 2, 4)), (vg.V1_1, (0, 0, 0))])
def test_one_monitor_page_without_the_other_fails(rig: Rig, version: int, answer: tuple[int, int, int]) -> None:
    assert rig.guest.contact(version, monitor=(0x5000, 0)) == answer
    assert rig.guest.contact(version, monitor=(0, 0x5000)) == answer
    assert rig.guest.contact(version, monitor=(0x5000, 0x6000))[0:2] == (1, 0)


@pytest.mark.parametrize("page", [0x1234, 0xFFFF_F000, 16 << 20, 2**64 - 4096])
def test_an_interrupt_page_outside_ram_is_refused(rig: Rig, page: int) -> None:
    assert rig.guest.contact(vg.V0_13, target=page) == (0, 0, 0)
    assert "is not a page of guest RAM" in rig.notes.getvalue()


def test_a_second_contact_closes_everything_and_starts_again(rig: Rig) -> None:
    (offer,) = rig.guest.connect()
    rig.guest.open(offer)
    assert rig.guest.connect(vg.V4_0) == [offer]
    assert echo(rig).log[-2:] == ["open 0", "close 0"]
    rig.guest.open(offer)


# Offers --------------------------------------------------------------------------------------------


def test_offers_are_sorted_and_numbered_the_same_at_every_connection() -> None:
    devices = [EchoVsp("echo0", 9), ShoutVsp("shout"), EchoVsp("echo1", 3), EchoVsp("first", 7)]
    devices[0].offer_order = 1
    with Rig(*devices) as rig:
        offers = rig.guest.connect()
        assert [offer.instance_id for offer in offers] == [UUID(int=0x5408), *(UUID(int=n) for n in (3, 7, 9))]
        assert [offer.channel_id for offer in offers] == [1, 2, 3, 4]
        assert [offer.connection_id for offer in offers] == [0x2001, 0x2002, 0x2003, 0x2004]
        assert {(offer.monitor_allocated, offer.is_dedicated) for offer in offers} == {(0, 1)}
        assert offers[0].flags == 0x11
        assert offers[0].user_defined == struct.pack("<I", 4).ljust(120, b"\0")
        assert offers[1].user_defined == b"echo".ljust(120, b"\0")
        rig.guest.unload()
        assert rig.guest.connect() == offers


def test_asking_for_offers_twice_is_noted_and_ignored(rig: Rig) -> None:
    rig.guest.connect()
    rig.guest.post(vg.REQUEST_OFFERS)
    rig.guest.unload()
    assert "REQUEST_OFFERS for the second time" in rig.notes.getvalue()


def test_a_device_added_later_is_offered_at_once(rig: Rig) -> None:
    rig.guest.connect()
    rig.bus.add_device(EchoVsp("echo1", 2))
    offer = rig.guest.next_offer()
    assert (offer.channel_id, offer.instance_id) == (2, UUID(int=2))
    channel = rig.guest.open(offer)
    channel.send((6, 0, 0, b"", b"12345678"))
    assert channel.receive() == [(6, 0, 0, b"", b"12345678")]


def test_a_device_added_before_request_offers_is_listed_once(rig: Rig) -> None:
    rig.guest.contact()
    rig.bus.add_device(EchoVsp("echo1", 2))
    assert [offer.channel_id for offer in rig.guest.request_offers()] == [1, 2]


def test_the_same_device_is_not_taken_twice(rig: Rig) -> None:
    with pytest.raises(ValueError, match="exists already"):
        rig.bus.add_device(EchoVsp("echo0", 5))
    with pytest.raises(ValueError, match="exists already"):
        rig.bus.add_device(EchoVsp("echo5", 1))


def test_removing_a_device_waits_for_the_guest_which_may_finish_its_work(rig: Rig) -> None:
    (offer,) = rig.guest.connect()
    channel = rig.guest.open(offer)
    released: list[bool] = []
    remover = threading.Thread(target=lambda: released.append(rig.bus.remove_device(echo(rig), 10)))
    remover.start()
    assert rig.guest.expect(vg.RESCIND) == struct.pack("<I", 1)
    channel.send((6, 1, 5, b"", b"the last"))
    assert channel.receive() == [(11, 0, 5, b"", b"the last")]
    channel.close()
    rig.guest.post(vg.REL_ID_RELEASED, struct.pack("<I", 1))
    remover.join(10)
    assert released == [True]
    rig.bus.add_device(EchoVsp("echo1", 4))
    assert rig.guest.next_offer().channel_id == 1


def test_a_guest_that_does_not_let_go_loses_the_channel_but_keeps_the_id(rig: Rig) -> None:
    (offer,) = rig.guest.connect()
    rig.guest.open(offer)
    device = echo(rig)
    assert rig.bus.remove_device(device, 0.05) is False
    assert device.log[-1] == "close 0"
    rig.bus.add_device(EchoVsp("echo1", 4))
    assert rig.guest.expect(vg.RESCIND) == struct.pack("<I", 1)
    assert rig.guest.next_offer().channel_id == 2
    rig.guest.post(vg.OPEN_CHANNEL, struct.pack("<IIIII120x", 1, 77, 5, 0, 4))
    assert struct.unpack("<IIi", rig.guest.expect(vg.OPEN_RESULT))[2] < 0


def test_removing_a_device_that_no_guest_has_seen_is_immediate(rig: Rig) -> None:
    assert rig.bus.remove_device(echo(rig), 0) is True
    assert rig.guest.connect() == []


# Channels ------------------------------------------------------------------------------------------


def test_a_channel_can_be_closed_and_opened_again(rig: Rig) -> None:
    (offer,) = rig.guest.connect()
    for _ in range(3):
        channel = rig.guest.open(offer)
        channel.send((6, 0, 0, b"", b"12345678"))
        channel.receive()
        channel.close()
    assert echo(rig).log.count("open 0") == echo(rig).log.count("close 0") == 3
    assert rig.ports.event_ports == {}


def test_closing_the_channel_disconnects_its_event_port(rig: Rig) -> None:
    (offer,) = rig.guest.connect()
    channel = rig.guest.open(offer)
    assert set(rig.ports.event_ports) == {offer.connection_id}
    channel.close()
    assert rig.ports.hv_signal_event(offer.connection_id) is False


def test_a_device_may_refuse(rig: Rig) -> None:
    (offer,) = rig.guest.connect()
    echo(rig).refuse_open = True
    gpadl = rig.guest.create_gpadl(1, rig.guest.allocate(8))
    assert rig.guest.try_open(1, gpadl, 4) < 0
    assert rig.ports.event_ports == {}
    echo(rig).refuse_open = False
    rig.guest.open(offer)


def test_the_device_gets_the_open_messages_data(rig: Rig) -> None:
    (offer,) = rig.guest.connect()
    rig.guest.open(offer, vp=2, user_data=b"what I want")
    channel = echo(rig).channels[0]
    assert (channel.id, channel.target_vp, channel.user_data) == (1, 2, b"what I want".ljust(120, b"\0"))


@pytest.mark.parametrize("version", [vg.V5_2, vg.V5_3])
def test_modify_channel_moves_the_interrupt_and_is_answered_from_5_3_on(rig: Rig, version: int) -> None:
    (offer,) = rig.guest.connect(version)
    channel = rig.guest.open(offer, vp=1)
    rig.guest.post(22, struct.pack("<II", 1, 3))
    if version == vg.V5_3:
        assert struct.unpack("<Ii", rig.guest.expect(24)) == (1, 0)
    channel.vp = 3
    channel.send((6, 0, 0, b"", b"12345678"))
    assert channel.receive()


def test_modify_channel_to_a_missing_vp_fails(rig: Rig) -> None:
    (offer,) = rig.guest.connect()
    rig.guest.open(offer, vp=1)
    for channel_id, vp in ((1, 4), (9, 0)):
        rig.guest.post(22, struct.pack("<II", channel_id, vp))
        assert struct.unpack("<Ii", rig.guest.expect(24))[1] < 0


def test_sub_channels_appear_on_request_and_vanish_with_the_primary(rig: Rig) -> None:
    (offer,) = rig.guest.connect()
    primary = rig.guest.open(offer)
    primary.send((6, 0, 0, b"", b"subs2..."))
    subs = [rig.guest.next_offer(), rig.guest.next_offer()]
    assert [(sub.subchannel_index, sub.channel_id) for sub in subs] == [(1, 2), (2, 3)]
    assert {sub.instance_id for sub in subs} == {offer.instance_id}
    first = rig.guest.open(subs[0], vp=1)
    first.send((6, 1, 9, b"", b"12345678"))
    assert first.receive() == [(11, 0, 9, b"", b"12345678")]
    primary.close(teardown=False)
    assert [rig.guest.expect(vg.RESCIND) for _ in subs] == [struct.pack("<I", sub.channel_id) for sub in subs]
    assert sorted(echo(rig).log[-2:]) == ["close 0", "close 1"]
    for sub in subs:
        rig.guest.post(vg.REL_ID_RELEASED, struct.pack("<I", sub.channel_id))
    rig.guest.teardown_gpadl(1, primary.gpadl_id)
    rig.guest.open(offer).send((6, 0, 0, b"", b"subs1..."))
    assert rig.guest.next_offer().channel_id == 2


def test_asking_again_for_sub_channels_offers_only_the_missing_ones(rig: Rig) -> None:
    (offer,) = rig.guest.connect()
    channel = rig.guest.open(offer)
    for text, index in ((b"subs1...", 1), (b"subs1...", 0), (b"subs2...", 2)):
        channel.send((6, 0, 0, b"", text))
        channel.receive()
        if index:
            assert rig.guest.next_offer().subchannel_index == index
    rig.settle()
    assert not rig.ports.messages[0, 2]


def test_more_sub_channels_than_the_device_has_is_a_bug_of_the_device() -> None:
    with Rig(EchoVsp()) as rig, pytest.raises(ValueError, match="9 sub-channels of at most 8"):
        echo(rig).request_subchannels(9)


def test_a_pipe_device_sends_and_receives_whole_messages() -> None:
    with Rig(ShoutVsp("shout")) as rig:
        (offer,) = rig.guest.connect()
        channel = rig.guest.open(offer)
        assert channel.receive() == [(6, 0, 0, b"", struct.pack("<II", 1, 5) + b"hello\0\0\0")]
        channel.send((6, 0, 0, b"", struct.pack("<II", 1, 3) + b"abcdefgh"))
        assert channel.receive() == [(6, 0, 0, b"", struct.pack("<II", 1, 3) + b"ABC\0\0\0\0\0")]


def test_a_guest_that_wants_no_interrupts_gets_none(rig: Rig) -> None:
    (offer,) = rig.guest.connect()
    channel = rig.guest.open(offer, vp=0xFFFFFFFF)
    channel.send((6, 0, 0, b"", b"12345678"))
    for _ in range(1000):
        rig.bus._devices["echo0"].workers[0].run(lambda: None)
        if channel.incoming.used:
            break
    assert channel.incoming.read()[0]
    assert not rig.ports.signals


# Unload, reserved channels, hvsock -------------------------------------------------------------------


def test_unload_closes_channels_and_releases_gpadls_before_it_is_answered(rig: Rig) -> None:
    (offer,) = rig.guest.connect()
    rig.guest.open(offer)
    rig.guest.create_gpadl(1, rig.guest.allocate(100))
    rig.guest.unload()
    assert echo(rig).log[-1] == "close 0"
    tree = rig.bus.inspect()
    assert (tree["protocol"], tree["channels"], tree["gpadls"]) == (None, [], {"count": 0, "pages": 0})
    rig.guest.open(rig.guest.connect()[0])


def test_ipxe_asks_at_3_0_unloads_and_comes_back_at_0_13(rig: Rig) -> None:
    assert rig.guest.contact(vg.V3_0) == (1, 0, vg.V3_0)
    rig.guest.unload()
    (offer,) = rig.guest.connect(vg.V0_13)
    channel = rig.guest.open(offer, out_pages=2, in_pages=2)
    channel.send((6, 0, 0, b"", b"12345678"))
    channel.wait_signal()
    assert channel.receive()
    assert set(rig.ports.signals) == {(0, 2, 0)}
    rig.guest.unload()
    assert rig.ports.event_ports == {}


def test_messages_before_contact_are_noted_and_ignored(rig: Rig) -> None:
    rig.guest.post(vg.REQUEST_OFFERS)
    rig.guest.post(vg.UNLOAD)
    rig.guest.connect()
    assert rig.notes.getvalue().count("without a connection") == 2


def test_reserved_channels_are_refused_and_their_close_is_answered(rig: Rig) -> None:
    rig.guest.connect()
    rig.guest.post(18, struct.pack("<IIIII", 1, 2, 5, 9, 4))
    number, _, channel, _, status = struct.unpack("<IIIIi", rig.ports.take_message(2, 5))
    assert (number, channel, status < 0) == (6, 1, True)
    rig.guest.post(19, struct.pack("<III", 1, 2, 5))
    assert struct.unpack("<III", rig.ports.take_message(2, 5)) == (20, 0, 1)
    for vp, sint in ((4, 2), (0, 16)):
        rig.guest.post(19, struct.pack("<III", 1, vp, sint))
    rig.guest.unload()
    assert rig.notes.getvalue().count("reserved channel for SINT") == 2


@pytest.mark.parametrize(("version", "answered"), [(vg.V4_0, False), (vg.V4_1, True), (vg.V5_3, True)])
def test_tl_connect_is_refused(rig: Rig, version: int, answered: bool) -> None:
    rig.guest.connect(version)
    ids = bytes(range(32))
    rig.guest.post(21, ids + bytes(16))
    if answered:
        assert rig.guest.expect(23) == ids + struct.pack("<I", 0xC0000236)
    rig.guest.unload()


@pytest.mark.parametrize("number", [1, 2, 4, 6, 10, 12, 15, 17, 20, 23, 24, 25, 26, 27, 28, 29, 30, 0, 0xFFFFFFFF])
def test_messages_that_are_not_the_guests_to_send_are_noted_and_ignored(rig: Rig, number: int) -> None:
    rig.guest.connect()
    rig.guest.post(number, bytes(200))
    rig.guest.unload()
    assert rig.notes.getvalue().count("\n") == 1


@pytest.mark.parametrize(("number", "version"), [(22, vg.V4_0), (21, vg.V3_0), (18, vg.V3_0), (19, vg.V3_0)])
def test_messages_of_later_versions_are_noted_and_ignored(rig: Rig, number: int, version: int) -> None:
    rig.guest.connect(version)
    rig.guest.post(number, bytes(200))
    rig.guest.unload()
    assert "at protocol" in rig.notes.getvalue()


def test_the_trace_shows_both_directions(rig: Rig) -> None:
    rig.guest.connect()
    trace = rig.trace.getvalue()
    assert "vmbus: guest: INITIATE_CONTACT version=5.3" in trace
    assert "vmbus: host: VERSION_RESPONSE supported=1" in trace
    assert "vmbus: host: ALL_OFFERS_DELIVERED" in trace
