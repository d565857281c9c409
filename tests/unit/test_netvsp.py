"""The synthetic NIC with guests that behave: handshakes, frames, MTU, sub-channels, and beginning again."""

from __future__ import annotations

import io
import itertools
import struct
from typing import TYPE_CHECKING

import pytest

from devices.network.port import OFFLOAD_CHECKSUM, OFFLOAD_TSO4, OFFLOAD_TSO6, OFFLOAD_TSO_ECN
from devices.synthetic.netvsp.vsp import NetVsp, subchannels_for
from tests.fakes import netvsc
from tests.fakes.netvsc import start_ipxe, start_linux, start_windows
from tests.fakes.netvsp_rig import BROADCAST_MAC, GROUP, MAC, PEER, FakePort, frame
from tests.fakes.netvsp_rig import make as make
from tests.fakes.vmbus_guest import REL_ID_RELEASED, RESCIND, V0_13, V4_0, V5_3

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fakes.netvsp_rig import Rig

    Make = Callable[..., Rig]

INBOUND = frame(to=MAC, source=PEER)


def move_frames(rig: Rig) -> None:
    """A frame each way."""
    assert rig.driver.transmit(frame()) == netvsc.SUCCESS
    assert rig.port.sent()[1] == frame()
    rig.port.arrive(INBOUND)
    assert rig.driver.frame().data == INBOUND


# Guests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", netvsc.LINUX_VERSIONS)
def test_linux_brings_the_nic_up_under_every_version(make: Make, version: int) -> None:
    rig = make(max_version=version)
    start_linux(rig.driver)
    assert rig.driver.version == version
    move_frames(rig)
    rig.port.arrive(frame(to=BROADCAST_MAC, source=PEER))
    assert rig.driver.frame().data == frame(to=BROADCAST_MAC, source=PEER)


def test_windows_brings_the_nic_up(make: Make) -> None:
    rig = make()
    start_windows(rig.driver)
    move_frames(rig)
    # It gets the groups on its list, and no others.
    rig.port.arrive(frame(to=bytes.fromhex("01005e0000fe"), source=PEER))
    rig.port.arrive(frame(to=GROUP, source=PEER))
    assert rig.driver.frame().data == frame(to=GROUP, source=PEER)


def test_ipxe_brings_the_nic_up_and_gets_plain_frames(make: Make) -> None:
    rig = make(vmbus=V0_13, receive_pages=16)
    start_ipxe(rig.driver)
    move_frames(rig)
    # Its completions are empty, and give sections back all the same.
    for _ in range(2 * rig.driver.sections):
        rig.port.arrive(INBOUND)
        assert rig.driver.frame().data == INBOUND
    # It knows neither partial checksums nor tags beside the frame.
    assert set(rig.port.offloads) == {0}
    tagged = frame(to=MAC, source=PEER, kind=b"\x81\x00\x00\x0a\x88\xb5")
    rig.port.arrive(tagged)
    assert rig.driver.frame() == (tagged, {})


def test_versions_that_nobody_knows_are_refused_and_the_guest_asks_for_another(make: Make) -> None:
    driver = make().driver
    assert driver.negotiate((0x70000, 0x60002, 3, netvsc.V5)) == netvsc.V5


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (netvsc.V6_1, OFFLOAD_CHECKSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6 | OFFLOAD_TSO_ECN),
        (netvsc.V6, OFFLOAD_CHECKSUM),  # RSC came with 6.1
        (netvsc.V4, 0),  # without checksums of UDP
    ],
)
def test_the_port_is_told_what_the_guest_takes(make: Make, version: int, expected: int) -> None:
    rig = make(max_version=version)
    start_linux(rig.driver)
    assert rig.port.offloads[-1] == expected
    rig.driver.channel.close()
    assert rig.port.offloads[-1] == 0


def test_tags_travel_beside_the_frame_if_the_guest_knows_them(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    tagged = frame(to=MAC, source=PEER, kind=b"\x81\x00\x60\x0a\x88\xb5")
    rig.port.arrive(tagged)
    assert rig.driver.frame() == (INBOUND[:12] + tagged[16:], {netvsc.VLAN_PPI: 3 | 10 << 4})
    assert rig.driver.transmit(frame(), netvsc.vlan_ppi(10, 3)) == netvsc.SUCCESS
    assert rig.port.sent()[1] == frame()[:12] + b"\x81\x00\x60\x0a" + frame()[12:]


def test_a_guest_without_a_send_buffer_is_served(make: Make) -> None:
    rig = make()
    driver = rig.driver
    driver.negotiate()
    driver.configure()
    assert driver.lend_receive_buffer() == netvsc.SUCCESS
    driver.initialize()
    assert driver.set(netvsc.FILTER, struct.pack("<I", netvsc.DIRECTED)) == 0
    move_frames(rig)


def test_frames_and_control_messages_may_come_through_the_send_buffer(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    assert rig.driver.transmit(frame(), section=3) == netvsc.SUCCESS
    assert rig.port.sent()[1] == frame()
    message = struct.pack("<7I", netvsc.QUERY, 28, 99, netvsc.PERMANENT_ADDRESS, 0, 0, 0)
    assert rig.driver.control_by_section(message, section=2) == netvsc.SUCCESS
    assert rig.driver.answer(99) == (netvsc.QUERY | netvsc.DONE, struct.pack("<4I", 99, 0, 6, 16) + MAC)


# The filter -------------------------------------------------------------------------------------------------


def test_what_the_filter_does_not_name_is_not_received(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    stranger = frame(to=bytes.fromhex("00155dffffff"), source=PEER)
    for chosen, expected in (
        (netvsc.DIRECTED, [INBOUND]),
        (netvsc.DIRECTED | netvsc.BROADCAST, [INBOUND, frame(to=BROADCAST_MAC, source=PEER)]),
        (netvsc.ALL_MULTICAST, [frame(to=GROUP, source=PEER)]),
        (netvsc.PROMISCUOUS, [stranger, INBOUND, frame(to=GROUP, source=PEER), frame(to=BROADCAST_MAC, source=PEER)]),
    ):
        assert rig.driver.set(netvsc.FILTER, struct.pack("<I", chosen)) == 0
        assert rig.driver.query32(netvsc.FILTER) == chosen
        for to in (stranger[:6], MAC, GROUP, BROADCAST_MAC):
            rig.port.arrive(frame(to=to, source=PEER))
        assert [rig.driver.frame().data for _ in expected] == expected
    assert not rig.driver.frames


def test_nothing_is_received_with_an_empty_filter(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    assert rig.driver.set(netvsc.FILTER, struct.pack("<I", 0)) == 0
    rig.port.arrive(INBOUND)
    rig.driver.query32(netvsc.CONNECT_STATUS)
    assert rig.driver.set(netvsc.FILTER, struct.pack("<I", netvsc.DIRECTED)) == 0
    # What came in while there was no filter is old by now.
    rig.port.arrive(frame(to=MAC, source=PEER, payload=b"new"))
    assert rig.driver.frame().data == frame(to=MAC, source=PEER, payload=b"new")


# MTU --------------------------------------------------------------------------------------------------------


def test_frames_of_9014_bytes_pass_if_the_guest_wants_them(make: Make) -> None:
    rig = make(receive_pages=128)
    assert start_linux(rig.driver, mtu=9000) == 9000
    assert rig.driver.section_size == 9014 + 256 + 36
    large = frame(to=MAC, source=PEER, payload=bytes(range(256)) * 36)[:9014]
    rig.port.arrive(large)
    assert rig.driver.frame().data == large
    assert rig.driver.query32(netvsc.MAX_FRAME_SIZE) == 9014


@pytest.mark.parametrize(("asked", "port", "given"), [(9000, 1500, 1500), (65521, 9000, 9000), (1400, 9000, 1500)])
def test_the_mtu_is_bounded_by_the_network_and_by_us(make: Make, asked: int, port: int, given: int) -> None:
    rig = make(receive_pages=128, mtu=port)
    assert start_linux(rig.driver, mtu=asked) == min(asked, given)
    assert rig.driver.query32(netvsc.FRAME_SIZE) == given


def test_a_network_of_a_smaller_mtu_limits_what_the_guest_sends(make: Make) -> None:
    rig = make(receive_pages=128)
    start_linux(rig.driver, mtu=4000)
    small = FakePort(mtu=1500)
    assert rig.vsp.connect(small) is rig.port
    rig.port.close()
    rig.port = small
    too_large = frame(payload=bytes(2000))
    rig.driver.transmit(too_large)
    assert rig.driver.transmit(frame()) == netvsc.SUCCESS
    assert small.sent()[1] == frame()
    small.arrive(frame(to=MAC, source=PEER, payload=bytes(2000)))
    small.arrive(INBOUND)
    assert rig.driver.frame().data == INBOUND


def test_the_guest_changes_its_mtu_by_beginning_again(make: Make) -> None:
    rig = make(receive_pages=128)
    start_linux(rig.driver)
    for mtu in (9000, 1500, 4000):
        rig.driver.halt()
        rig.driver.revoke()
        rig.driver.channel.close()
        rig.driver = rig.open()
        assert start_linux(rig.driver, mtu=mtu) == mtu
        move_frames(rig)


# Sub-channels -----------------------------------------------------------------------------------------------


def test_frames_are_spread_over_the_sub_channels(make: Make) -> None:
    rig = make(subchannels=3)
    start_linux(rig.driver, channels=4)
    # The last one that opens brings the table by which the guest shall spread what it sends.
    (notice,) = rig.driver.notices
    number, count, offset = struct.unpack_from("<III", notice)
    assert (number, count) == (netvsc.INDIRECTION_TABLE, 16)
    assert struct.unpack_from("<16I", notice, offset) == (0, 1, 2, 3) * 4
    for index in range(4):
        assert rig.driver.transmit(frame(), channel=index) == netvsc.SUCCESS
        assert rig.port.sent()[1] == frame()
    flows: dict[int, list[bytes]] = {index: [] for index in range(4)}
    sent = []
    for port in range(64):
        addresses = bytes((192, 0, 2, 1, 192, 0, 2, 2))
        ip = bytes((0x45, 0)) + (40).to_bytes(2, "big") + bytes((0, 0, 0, 0, 64, 6, 0, 0)) + addresses
        tcp = struct.pack(">HHIIBBHHH", 1000 + port, 80, 1, 1, 0x50, 0x10, 100, 0, 0)
        sent.append(frame(to=MAC, source=PEER, payload=ip + tcp, kind=b"\x08\x00"))
        rig.port.arrive(sent[-1])
    rig.vsp.workers[0].run(lambda: None)
    while sum(map(len, flows.values())) < len(sent):
        for index in range(4):
            for packet in rig.driver.channels[index].incoming.read()[0]:
                rig.driver._take(packet, index)
            flows[index] += [found.data for found in rig.driver.frames]
            rig.driver.frames.clear()
    assert sorted(itertools.chain(*flows.values())) == sorted(sent)
    assert all(flows.values()), "a channel without any of 64 flows"


def test_a_guest_gets_no_more_sub_channels_than_there_are(make: Make) -> None:
    rig = make(subchannels=2)
    driver = rig.driver
    driver.handshake()
    driver.initialize()
    answer = driver.ask(netvsc.SUB_CHANNEL, struct.pack("<II", 1, 63))
    assert struct.unpack_from("<III", answer) == (netvsc.SUB_CHANNEL, netvsc.SUCCESS, 2)
    assert [rig.guest.next_offer().subchannel_index for _ in range(2)] == [1, 2]
    # Once is enough, and there is no other operation.
    for operation, count in ((1, 1), (0, 1), (2, 1)):
        answer = driver.ask(netvsc.SUB_CHANNEL, struct.pack("<II", operation, count))
        assert struct.unpack_from("<III", answer) == (netvsc.SUB_CHANNEL, netvsc.FAILURE, 0)


def test_sub_channels_go_with_the_primary_channel_and_come_back(make: Make) -> None:
    rig = make(subchannels=1)
    for _ in range(2):
        start_linux(rig.driver, channels=2)
        assert rig.vsp.inspect()["open_channels"] == [0, 1]
        rig.driver.halt()
        rig.driver.revoke()
        sub = rig.driver.channels[1]
        rig.driver.channel.close(teardown=False)
        rig.guest.expect(RESCIND)
        rig.guest.teardown_gpadl(rig.offer.channel_id, rig.driver.channel.gpadl_id)
        rig.guest.post(REL_ID_RELEASED, struct.pack("<I", sub.offer.channel_id))
        rig.driver = rig.open()
    start_linux(rig.driver, channels=2)


@pytest.mark.parametrize(("vps", "count"), [(1, 0), (4, 3), (64, 7)])
def test_there_are_as_many_channels_as_vps_up_to_eight(vps: int, count: int) -> None:
    assert subchannels_for(vps) == count


# Beginning again, and letting go ----------------------------------------------------------------------------


def buffer_bytes(rig: Rig, pages: list[int]) -> bytes:
    return b"".join(rig.memory.read(page * 4096, 4096) for page in pages)


@pytest.mark.parametrize("vmbus", [V5_3, V4_0])
@pytest.mark.parametrize("orderly", [True, False])
def test_a_closed_channel_leaves_nothing_behind(make: Make, vmbus: int, orderly: bool) -> None:
    rig = make(vmbus=vmbus)
    for _ in range(3):
        driver = rig.driver
        start_linux(driver)
        move_frames(rig)
        if orderly:
            driver.halt()
            driver.revoke()
        driver.channel.close()
        for gpadl in (driver.receive_gpadl, driver.send_gpadl):
            rig.guest.teardown_gpadl(rig.offer.channel_id, gpadl)
        before = buffer_bytes(rig, driver.receive_pages)
        rig.port.arrive(INBOUND)
        state = rig.vsp.inspect()
        assert (state["protocol"], state["operational"], state["open_channels"]) == (None, False, [])
        assert buffer_bytes(rig, driver.receive_pages) == before
        rig.driver = rig.open()


def test_the_nic_lets_go_of_a_receive_buffer_that_the_guest_takes_back_while_in_use(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    move_frames(rig)
    before = buffer_bytes(rig, rig.driver.receive_pages)
    rig.guest.teardown_gpadl(rig.offer.channel_id, rig.driver.receive_gpadl)
    rig.port.arrive(INBOUND)
    assert rig.driver.transmit(frame()) == netvsc.SUCCESS
    assert rig.port.sent()[1] == frame()
    assert buffer_bytes(rig, rig.driver.receive_pages) == before


def test_a_revoked_receive_buffer_is_not_written_and_another_may_follow(make: Make) -> None:
    rig = make()
    driver = rig.driver
    start_linux(driver)
    driver.halt()
    driver.revoke()
    assert driver.transmit(frame()) == netvsc.SUCCESS  # served after the revocation
    before = buffer_bytes(rig, driver.receive_pages)
    rig.port.arrive(INBOUND)
    rig.guest.teardown_gpadl(rig.offer.channel_id, driver.receive_gpadl)
    assert buffer_bytes(rig, driver.receive_pages) == before
    driver.receive_pages = rig.guest.allocate(64)
    assert driver.lend_receive_buffer() == netvsc.SUCCESS
    driver.initialize()
    assert driver.set(netvsc.FILTER, struct.pack("<I", netvsc.DIRECTED)) == 0
    rig.port.arrive(INBOUND)
    assert driver.frame().data == INBOUND


def test_a_guest_that_unloads_or_starts_another_kernel_begins_anew(make: Make) -> None:
    rig = make(subchannels=1)
    start_linux(rig.driver, channels=2)
    rig.guest.unload()
    (rig.offer,) = rig.guest.connect()
    rig.driver = rig.open()
    start_linux(rig.driver, channels=2)
    move_frames(rig)
    # And without a word: the new kernel only makes contact.
    (rig.offer,) = rig.guest.connect()
    rig.driver = rig.open()
    start_linux(rig.driver)
    move_frames(rig)


def test_reset_of_the_machine_forgets_the_guest_and_keeps_the_port(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    rig.bus.reset()
    assert rig.vsp.inspect()["protocol"] is None
    (rig.offer,) = rig.guest.connect()
    rig.driver = rig.open()
    start_linux(rig.driver)
    move_frames(rig)


def test_a_guest_may_halt_and_initialize_again_on_the_same_channel(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    rig.driver.halt()
    assert rig.driver.query(netvsc.PERMANENT_ADDRESS).status == 0xC0010011
    rig.driver.initialize()
    assert rig.driver.query32(netvsc.FILTER) == 0
    assert rig.driver.set(netvsc.FILTER, struct.pack("<I", netvsc.DIRECTED)) == 0
    move_frames(rig)


def test_a_nic_is_added_and_removed_while_the_guest_runs(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    second = NetVsp(1, bytes.fromhex("00155d0a0b99"))
    port = FakePort()
    second.connect(port)
    rig.bus.add_device(second)
    offer = rig.guest.next_offer()
    assert offer.interface_id == rig.offer.interface_id
    assert offer.instance_id == NetVsp.instance_of(1) != rig.offer.instance_id
    driver = netvsc.NetVsc(rig.guest, rig.guest.open(offer))
    start_linux(driver)
    assert driver.query(netvsc.PERMANENT_ADDRESS).data == second.mac
    assert driver.transmit(frame(source=second.mac)) == netvsc.SUCCESS
    assert port.sent()[1] == frame(source=second.mac)
    assert rig.bus.remove_device(second, 0) is False  # the guest didn't let go at once
    assert second.connect(None) is port
    port.close()
    move_frames(rig)


# What people see --------------------------------------------------------------------------------------------


def test_the_trace_tells_of_control_messages_but_not_of_frames(make: Make) -> None:
    trace = io.StringIO()
    rig = make(trace=trace)
    start_linux(rig.driver)
    move_frames(rig)
    rig.driver.query(0x12345)
    rig.driver.halt()
    lines = [line.split("netvsp: ", 1)[1] for line in trace.getvalue().splitlines()]
    assert lines[0].startswith("nic0.0 INIT 0x60001 0x60001 -> 02000000 ")
    assert "nic0.0 SEND_NDIS_VERSION 0x6 0x1e -> done" in lines
    assert "nic0.0 RNDIS INITIALIZE" in lines
    assert "nic0.0 RNDIS QUERY ETH_PERMANENT_ADDRESS -> SUCCESS 00 15 5d 0a 0b 0c" in lines
    assert "nic0.0 RNDIS SET GEN_CURRENT_PACKET_FILTER 0d 00 00 00 -> SUCCESS" in lines
    assert lines[-2:] == ["nic0.0 RNDIS QUERY OID 0x12345 -> NOT_SUPPORTED", "nic0.0 RNDIS HALT"]
    assert not any("RNDIS_PACKET" in line for line in lines)


def test_inspect_shows_what_was_agreed_and_counted(make: Make) -> None:
    rig = make(subchannels=1)
    assert rig.vsp.inspect()["protocol"] is None
    start_linux(rig.driver, channels=2)
    move_frames(rig)
    state = rig.vsp.inspect()
    assert state["mac"] == "00:15:5d:0a:0b:0c"
    assert (state["protocol"], state["ndis"], state["frame_size"]) == ("6.1", "6.30", 1514)
    assert state["filter"] == ["directed", "all_multicast", "broadcast"]
    assert "LSO4" in state["offloads"] and "RSC6" in state["offloads"]
    assert (state["network"], state["link"], state["open_channels"]) == ("switch test", True, [0, 1])
    assert (state["sent_frames"], state["received_frames"], state["rss_entries"]) == (1, 1, 128)
