"""The synthetic NIC's cable: what the guest sees of it, and what moves."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from devices.synthetic.netvsp.link import GAP_NS, Link
from tests.fakes import netvsc
from tests.fakes.netvsc import CONNECT, DISCONNECT, start_linux
from tests.fakes.netvsp_rig import MAC, PEER, FakePort, frame
from tests.fakes.netvsp_rig import make as make

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fakes.netvsp_rig import Rig

    Make = Callable[..., Rig]

INBOUND = frame(to=MAC, source=PEER)
GAP_S = GAP_NS / 1e9


def told(rig: Rig) -> list[int]:
    """What the guest has been told of its cable until now."""
    rig.driver.query32(netvsc.CONNECT_STATUS)  # whose answer comes behind all that
    found = [status for status, _ in rig.driver.indications]
    rig.driver.indications.clear()
    return found


def connected(rig: Rig) -> bool:
    """Whether the cable is plugged in, by both objects that tell."""
    by_status = rig.driver.query32(netvsc.CONNECT_STATUS) == 0
    (state,) = struct.unpack_from("<I", rig.driver.query(netvsc.LINK_STATE).data, 4)
    assert state == (1 if by_status else 2)
    return by_status


def test_the_guest_is_told_that_the_cable_is_pulled_and_plugged_in(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    assert connected(rig) and told(rig) == []
    rig.vsp.set_link(False)
    assert not connected(rig) and told(rig) == [DISCONNECT]
    rig.advance(10)
    rig.vsp.set_link(True)
    assert connected(rig) and told(rig) == [CONNECT]


def test_nothing_moves_while_the_cable_is_pulled(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    rig.vsp.set_link(False)
    rig.port.arrive(INBOUND)
    assert rig.driver.transmit(frame(payload=b"lost")) == netvsc.SUCCESS
    rig.vsp.set_link(True)
    assert rig.driver.transmit(frame(payload=b"sent")) == netvsc.SUCCESS
    assert rig.port.sent()[1] == frame(payload=b"sent")
    rig.port.arrive(frame(to=MAC, source=PEER, payload=b"new"))
    assert rig.driver.frame().data == frame(to=MAC, source=PEER, payload=b"new")


def test_changes_are_told_no_faster_than_linux_takes_them(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    rig.vsp.set_link(False)
    rig.vsp.set_link(True)
    assert told(rig) == [DISCONNECT]
    rig.advance(GAP_S / 2)
    assert told(rig) == []
    rig.advance(GAP_S / 2)
    assert told(rig) == [CONNECT]
    # A change that is over when it could be told is not told.
    rig.vsp.set_link(False)
    rig.vsp.set_link(True)
    rig.advance(GAP_S)
    assert told(rig) == []


def test_a_cable_that_is_plugged_in_elsewhere_goes_down_and_up(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    other = FakePort(name="switch other")
    assert rig.vsp.connect(other) is rig.port
    assert told(rig) == [DISCONNECT]
    assert connected(rig)
    assert rig.driver.transmit(frame()) == netvsc.SUCCESS
    assert other.sent()[1] == frame()
    rig.advance(GAP_S)
    assert told(rig) == [CONNECT]
    rig.advance(10 * GAP_S)
    assert told(rig) == []
    assert other.offloads[-1] == rig.port.offloads[-1] != 0
    assert rig.vsp.connect(None) is other
    other.close()
    assert told(rig) == [DISCONNECT]


def test_a_nic_without_a_network_is_there_without_a_link(make: Make) -> None:
    rig = make(connect=False)
    start_linux(rig.driver)
    assert not connected(rig)
    assert rig.driver.transmit(frame()) == netvsc.SUCCESS
    assert rig.driver.query(netvsc.PERMANENT_ADDRESS).data == MAC
    assert rig.vsp.connect(rig.port) is None
    assert connected(rig) and told(rig) == [CONNECT]
    assert rig.driver.transmit(frame(payload=b"now")) == netvsc.SUCCESS
    assert rig.port.sent()[1] == frame(payload=b"now")


def test_a_pulled_cable_stays_pulled_on_another_network(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    rig.vsp.set_link(False)
    assert told(rig) == [DISCONNECT]
    other = FakePort()
    rig.vsp.connect(other)
    rig.advance(GAP_S)
    assert not connected(rig) and told(rig) == []
    rig.vsp.connect(None)
    other.close()


def test_a_guest_that_has_not_initialized_is_told_nothing(make: Make) -> None:
    rig = make()
    driver = rig.driver
    driver.handshake()
    rig.vsp.set_link(False)
    rig.advance(GAP_S)
    driver.initialize()
    assert not connected(rig) and told(rig) == []
    driver.halt()
    rig.vsp.set_link(True)
    rig.advance(GAP_S)
    driver.initialize()
    assert connected(rig) and told(rig) == []


def test_links_come_and_go_before_the_nic_has_a_bus_and_after(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    rig.bus.remove_device(rig.vsp, 0)
    rig.vsp.set_link(False)
    assert rig.vsp.connect(None) is rig.port
    assert rig.vsp.inspect()["network"] is None


def test_what_is_told_follows_the_cable_whatever_happens() -> None:
    # Any changes: what is told alternates, is spaced, and ends with what is.
    for seed in range(2000):
        link = Link()
        link.change(bool(seed & 1))
        link.begin()
        known, last, now = link.up, -GAP_NS, 0
        state = seed + 1
        for _ in range(40):
            state = state * 1103515245 + 12345 & 0x7FFFFFFF
            match state >> 16 & 3:
                case 0:
                    link.change(bool(state >> 18 & 1))
                case 1:
                    link.change(link.up, replugged=True)
                case _:
                    now += (state >> 18) % GAP_NS
            due = link.due()
            if due is not None and now >= due:
                assert now - last >= GAP_NS
                assert link.tell(now) is not known
                known, last = not known, now
        for _ in range(3):
            now += GAP_NS
            if link.due() is not None:
                known = link.tell(now)
        assert link.due() is None and known == link.up
