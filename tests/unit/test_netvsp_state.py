"""The synthetic NIC paused, saved, and restored on another bus under a guest that goes on."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes import netvsc
from tests.fakes.netvsc import start_ipxe, start_linux
from tests.fakes.netvsp_rig import GROUP, MAC, PEER, FakePort, frame
from tests.fakes.netvsp_rig import make as make

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fakes.netvsp_rig import Rig

    Make = Callable[..., Rig]

INBOUND = frame(to=MAC, source=PEER)


def move(rig: Rig, change: Callable[[dict[str, Any]], object] = lambda state: None) -> dict[str, Any]:
    """Pause, save, and go on with a new bus, NIC and port; return what was saved."""
    rig.bus.pause()
    saved = rig.bus.save()
    rig.vsp.connect(None)
    rig.port.close()
    rig.port = FakePort()
    change(saved["devices"]["nic0"])
    rig.vsp = rig.plug()
    rig.bus.pause()
    rig.bus.restore(saved)
    rig.vsp.connect(rig.port)
    rig.bus.resume()
    rig.guest.ports = rig.ports
    state: dict[str, Any] = saved["devices"]["nic0"]
    return state


def move_frames(rig: Rig) -> None:
    assert rig.driver.transmit(frame()) == netvsc.SUCCESS
    assert rig.port.sent()[1] == frame()
    rig.port.arrive(INBOUND)
    assert rig.driver.frame().data == INBOUND


@pytest.mark.parametrize("start", [start_linux, start_ipxe])
def test_a_guest_goes_on_after_a_restore(make: Make, start: Callable[[netvsc.NetVsc], object]) -> None:
    rig = make()
    start(rig.driver)
    move_frames(rig)
    before = rig.vsp.inspect()
    move(rig)
    after = rig.vsp.inspect()
    for name in ("protocol", "ndis", "operational", "frame_size", "filter", "offloads", "rss_entries"):
        assert after[name] == before[name], name
    move_frames(rig)
    assert rig.driver.query(netvsc.PERMANENT_ADDRESS).data == MAC
    rig.driver.halt()
    rig.driver.revoke()
    rig.driver.channel.close()
    rig.driver = rig.open()
    start(rig.driver)
    move_frames(rig)


def test_sections_that_the_guest_holds_stay_its_own(make: Make) -> None:
    rig = make(receive_pages=16)  # 36 sections, 20 of them for frames
    driver = rig.driver
    driver.handshake()
    driver.initialize()
    assert driver.set(netvsc.FILTER, struct.pack("<I", netvsc.DIRECTED)) == 0
    driver.gives_back = False
    for index in range(15):
        rig.port.arrive(frame(to=MAC, source=PEER, payload=b"held %d" % index))
    while len(driver.frames) < 15:
        driver.pump()
    held = [driver.read(driver.receive_pages, at * driver.section_size, 200) for at in range(driver.sections)]
    move(rig)
    for index in range(5):
        rig.port.arrive(frame(to=MAC, source=PEER, payload=b"new %d" % index))
    while len(driver.frames) < 20:
        driver.pump()
    payloads = [found.data[14:].rstrip(b"\0") for found in driver.frames]
    assert payloads == [b"held %d" % index for index in range(15)] + [b"new %d" % index for index in range(5)]
    now = [driver.read(driver.receive_pages, at * driver.section_size, 200) for at in range(driver.sections)]
    assert sum(a != b for a, b in zip(held[16:], now[16:], strict=True)) == 5  # the first ones are for control messages
    # And all are given back in the end.
    for transaction_id, channel in driver.held:
        driver.give_back(transaction_id, channel)
    driver.gives_back = True
    driver.frames.clear()
    for index in range(30):
        rig.port.arrive(frame(to=MAC, source=PEER, payload=b"later %d" % index))
        assert driver.frame().data[14:].rstrip(b"\0") == b"later %d" % index


def test_sub_channels_and_their_spreading_survive(make: Make) -> None:
    rig = make(subchannels=1)
    start_linux(rig.driver, channels=2)
    rig.driver.notices.clear()
    move(rig)
    assert rig.vsp.inspect()["open_channels"] == [0, 1]
    for channel in (0, 1):
        assert rig.driver.transmit(frame(), channel=channel) == netvsc.SUCCESS
        assert rig.port.sent()[1] == frame()
    assert rig.driver.notices == []


def test_offloads_and_tags_are_as_before(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    told = rig.port.offloads[-1]
    move(rig)
    assert rig.port.offloads[-1] == told != 0
    rig.port.arrive(frame(to=MAC, source=PEER, kind=b"\x81\x00\x00\x0a\x88\xb5"))
    assert rig.driver.frame().ppis == {netvsc.VLAN_PPI: 10 << 4}


def test_the_list_of_groups_is_as_before(make: Make) -> None:
    rig = make()
    netvsc.start_windows(rig.driver)
    move(rig)
    rig.port.arrive(frame(to=bytes.fromhex("01005e0000fe"), source=PEER))
    rig.port.arrive(frame(to=GROUP, source=PEER))
    assert rig.driver.frame().data == frame(to=GROUP, source=PEER)


def test_a_link_that_changed_meanwhile_is_told(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    rig.vsp.set_link(False)
    assert rig.driver.indication()[0] == netvsc.DISCONNECT
    move(rig)  # to where it is up
    rig.advance(10)
    assert rig.driver.indication()[0] == netvsc.CONNECT
    assert rig.driver.query32(netvsc.CONNECT_STATUS) == 0


@pytest.mark.parametrize("steps", range(5))
def test_a_handshake_goes_on_where_it_was(make: Make, steps: int) -> None:
    rig = make()
    driver = rig.driver
    todo: list[Callable[[], object]] = [
        driver.negotiate,
        driver.configure,
        driver.lend_receive_buffer,
        driver.lend_send_buffer,
        driver.initialize,
    ]
    for step in todo[:steps]:
        step()
    move(rig)
    for step in todo[steps:]:
        step()
    assert driver.set(netvsc.FILTER, struct.pack("<I", netvsc.DIRECTED)) == 0
    move_frames(rig)


def test_a_state_that_does_not_fit_is_refused_in_one_line(make: Make) -> None:
    changes: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda state: state.update(version=2), "version"),
        (lambda state: state.update(mac=b"\0\x15\x5d\0\0\1"), "00:15:5d:00:00:01"),
        (lambda state: state.pop("adapter"), "damaged"),
        (lambda state: state["agreement"].update(ndis_major="six"), "damaged"),
        (lambda state: state["agreement"].update(protocol=None), "damaged"),
        (lambda state: state["agreement"].update(subchannels=9), "damaged"),
        (lambda state: state["adapter"].update(rss=[]), "damaged"),
        (lambda state: state["adapter"].update(groups=[b"short"]), "damaged"),
        (lambda state: state["adapter"].update(filter="all"), "damaged"),
    ]
    for change, reason in changes:
        rig = make()
        start_linux(rig.driver)
        with pytest.raises(ValueError, match=reason) as caught:
            move(rig, change)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("nic0: ")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["buffers"].update(receive=0xDEAD),
        lambda state: state["buffers"].update(send=0xDEAD),
        lambda state: state["buffers"].pop("device"),
        lambda state: state["buffers"]["device"].update(held=[[0, [1 << 20]]]),
    ],
)
def test_buffers_that_make_no_sense_cost_the_guest_its_channel(
    make: Make, change: Callable[[dict[str, Any]], object]
) -> None:
    rig = make()
    start_linux(rig.driver)
    move(rig, change)
    assert rig.broken() is not None
    assert rig.vsp.inspect()["protocol"] is None


def test_nothing_moves_while_the_bus_is_paused(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    rig.bus.pause()
    rig.vsp.set_link(False)
    rig.vsp.set_link(True)
    rig.port.arrive(INBOUND)
    pages = b"".join(rig.memory.read(page * 4096, 4096) for page in rig.driver.receive_pages)
    assert pages == b"".join(rig.memory.read(page * 4096, 4096) for page in rig.driver.receive_pages)
    assert rig.driver.channel.incoming.used == 0
    rig.bus.resume()
    while not rig.driver.frames:
        rig.driver.pump()
    assert rig.driver.frame().data == INBOUND
