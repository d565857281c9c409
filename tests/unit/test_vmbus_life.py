"""Reset, pause, save and restore of a bus with open channels."""

from __future__ import annotations

import json
import struct

import pytest

from tests.fakes import vmbus_guest as vg
from tests.fakes.ring import IN, GuestRing
from tests.fakes.vmbus_guest import FakeGuest, GuestChannel
from tests.fakes.vmbus_host import EchoVsp, Rig, ShoutVsp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any


@pytest.fixture(name="rig")
def make_rig() -> Iterator[Rig]:
    with Rig(EchoVsp()) as rig:
        yield rig


def echo(rig: Rig) -> EchoVsp:
    device = rig.bus._devices["echo0"]
    assert isinstance(device, EchoVsp)
    return device


def move_to(old: Rig, new: Rig) -> FakeGuest:
    """Save the old bus and restore the new one; return the guest as it finds itself there."""
    old.bus.pause()
    saved = old.bus.save()
    for gpa, size in old.memory.ram_ranges():
        new.memory.write(gpa, old.memory.view(gpa, size))
    new.bus.pause()
    new.bus.restore(saved)
    guest = new.guest
    guest.version, guest.vp, guest.post_connection = old.guest.version, old.guest.vp, old.guest.post_connection
    guest.interrupt_page = old.guest.interrupt_page
    guest._next_page, guest._next_gpadl = old.guest._next_page, old.guest._next_gpadl
    return guest


def moved(channel: GuestChannel, guest: FakeGuest) -> GuestChannel:
    """The guest's end of a channel in its new memory."""
    outgoing, incoming = (GuestRing(guest.memory, ring.numbers) for ring in (channel.outgoing, channel.incoming))
    return GuestChannel(guest, channel.offer, channel.gpadl_id, channel.vp, outgoing, incoming)


def test_pause_stops_the_rings_and_resume_starts_them(rig: Rig) -> None:
    guest = rig.guest.open(rig.guest.connect()[0])
    rig.bus.pause()
    assert echo(rig).log[-1] == "pause"
    guest.send((6, 1, 1, b"", b"12345678"))
    guest.signal()
    assert rig.ports.hv_post_message(4, struct.pack("<III", vg.CLOSE_CHANNEL, 0, 1)) is True
    assert guest.outgoing.used == 32
    assert rig.bus.inspect()["queued_messages"]["incoming"] == 1
    rig.bus.resume()
    rig.settle()
    assert echo(rig).log[-2:] == ["resume", "close 0"]


def test_reset_forgets_the_guest(rig: Rig) -> None:
    rig.guest.open(rig.guest.connect()[0])
    rig.bus.reset()
    assert echo(rig).log[-2:] == ["close 0", "reset"]
    assert rig.bus.inspect()["protocol"] is None
    assert rig.ports.event_ports == {}
    assert len(rig.guest.connect()) == 1


def test_reset_works_while_paused(rig: Rig) -> None:
    rig.guest.open(rig.guest.connect()[0])
    rig.bus.pause()
    rig.bus.reset()
    rig.bus.resume()
    assert len(rig.guest.connect()) == 1


@pytest.mark.parametrize("version", [vg.V0_13, vg.V2_4, vg.V5_3])
def test_open_channels_go_on_after_restore(rig: Rig, version: int) -> None:
    channel = rig.guest.open(rig.guest.connect(version)[0])
    for number in range(40):
        channel.send((6, 1, number, b"", bytes(100)))
        channel.receive()
    with Rig(EchoVsp()) as new:
        rig.bus.pause()
        channel.send((6, 1, 77, b"", b"in ring!"))
        guest = move_to(rig, new)
        twin = moved(channel, guest)
        assert echo(new).log[-1] == "reattach 0"
        new.bus.resume()
        assert twin.receive() == [(11, 0, 77, b"", b"in ring!")]
        twin.send((6, 1, 78, b"", b"12345678"))
        assert twin.receive()[0][2] == 78
        twin.close()
        assert guest.connect(version)


def test_waiting_packets_and_messages_are_saved(rig: Rig) -> None:
    channel = rig.guest.open(rig.guest.connect()[0], out_pages=2, in_pages=2)
    assert echo(rig).channels[0].send([(6, 0, number, b"", bytes(1000)) for number in range(10)])
    rig.bus.pause()
    assert rig.ports.hv_post_message(4, struct.pack("<III", 22, 0, 1) + struct.pack("<I", 2))
    with Rig(EchoVsp()) as new:
        guest = move_to(rig, new)
        twin = moved(channel, guest)
        new.bus.resume()
        received: list[int] = []
        twin.vp = 2
        assert struct.unpack("<Ii", guest.expect(24)) == (1, 0)
        while len(received) < 10:
            packets, signal = twin.incoming.read(2)
            received += [packet[2] for packet in packets]
            if signal:
                twin.signal()
        assert received == list(range(10))


def test_sub_channels_gpadls_and_rescinded_offers_are_saved() -> None:
    with Rig(EchoVsp("echo0", 1), EchoVsp("echo1", 2)) as rig:
        offers = rig.guest.connect()
        primary = rig.guest.open(offers[0])
        primary.send((6, 0, 0, b"", b"subs1..."))
        sub = rig.guest.open(rig.guest.next_offer())
        rig.guest.send_gpadl(1, [(8192, 0, [200, 201])], length=24)
        rig.guest.send_gpadl(2, [(8192, 0, [300])], length=24)  # its second page comes later
        rig.guest.expect(vg.GPADL_CREATED)
        assert rig.bus.remove_device(rig.bus._devices["echo1"], 0) is False
        rig.guest.expect(vg.RESCIND)
        with Rig(EchoVsp("echo0", 1)) as new:
            guest = move_to(rig, new)
            twin = moved(sub, guest)
            new.bus.resume()
            twin.send((6, 1, 4, b"", b"12345678"))
            assert twin.receive()
            guest.post(vg.GPADL_BODY, struct.pack("<IIQ", 1, guest._next_gpadl - 1, 301))
            assert guest.gpadl_status(guest._next_gpadl - 1) == 0
            assert [(o["device"], o["state"]) for o in new.bus.inspect()["offers"]] == [
                ("echo0", "open"),
                ("echo1", "rescinded"),
                ("echo0", "open"),
            ]
            guest.post(vg.REL_ID_RELEASED, struct.pack("<I", 2))
            new.settle()
            assert len(new.bus.inspect()["offers"]) == 2


def test_state_of_other_devices_or_versions_is_refused(rig: Rig) -> None:
    rig.bus.pause()
    saved = rig.bus.save()
    with Rig(ShoutVsp("shout")) as new:
        new.bus.pause()
        with pytest.raises(ValueError, match=r"devices \['echo0'\], not \['shout'\]"):
            new.bus.restore(saved)
        with pytest.raises(ValueError, match="has version 2"):
            new.bus.restore({**saved, "version": 2})


def test_state_that_points_outside_ram_is_refused(rig: Rig) -> None:
    rig.guest.open(rig.guest.connect()[0])
    rig.bus.pause()
    saved = rig.bus.save()
    saved["server"]["gpadls"][0]["ranges"][0][2][0] = 1 << 30
    with Rig(EchoVsp()) as new:
        new.bus.pause()
        with pytest.raises(ValueError, match="is not in guest RAM"):
            new.bus.restore(saved)
        new.bus.reset()


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["server"].pop("offers"),
        lambda state: state["server"]["connection"].update(version=7),
        lambda state: state["server"]["connection"].update(target_vp=4),
        lambda state: state["server"]["connection"].update(interrupt_page=5),
        lambda state: state["server"]["offers"][0].update(channel_id=5),
        lambda state: state["server"]["offers"][0].update(channel_id=2048),
        lambda state: state["server"]["offers"][0].update(state="ajar"),
        lambda state: state["server"]["offers"][0]["opened"].update(target_vp=9),
        lambda state: state["server"]["offers"][0]["opened"].update(downstream=100),
        lambda state: state["server"]["gpadls"][0].update(range_count=0),
        lambda state: state["server"]["gpadls"].clear(),
        lambda state: state.update(incoming=[5]),
        lambda state: state.update(pending=None),
    ],
)
def test_damaged_state_is_refused(rig: Rig, damage: Callable[[dict[str, Any]], None]) -> None:
    rig.guest.open(rig.guest.connect()[0])
    rig.bus.pause()
    saved = rig.bus.save()
    damage(saved)
    with Rig(EchoVsp()) as new:
        new.bus.pause()
        with pytest.raises(ValueError):
            new.bus.restore(saved)
        new.bus.reset()


def test_a_ring_that_is_broken_at_restore_costs_its_channel_only(rig: Rig) -> None:
    channel = rig.guest.open(rig.guest.connect()[0])
    rig.bus.pause()
    channel.outgoing.set_word(IN, 3)
    with Rig(EchoVsp()) as new:
        guest = move_to(rig, new)
        new.bus.resume()
        assert guest.expect(vg.RESCIND) == struct.pack("<I", 1)
        assert "write index 3" in new.bus.inspect()["offers"][0]["broken"]


def test_inspect_is_json_and_shows_rings(rig: Rig) -> None:
    channel = rig.guest.open(rig.guest.connect()[0], vp=3)
    channel.send((6, 1, 1, b"", b"12345678"))
    channel.receive()
    tree = json.loads(json.dumps(rig.bus.inspect()))
    assert tree["protocol"] == "5.3"
    assert tree["offers"] == [{"device": "echo0", "subchannel": 0, "channel_id": 1, "state": "open", "broken": None}]
    (shown,) = tree["channels"]
    assert (shown["target_vp"], shown["packets_in"], shown["packets_out"]) == (3, 1, 1)
    assert shown["incoming"]["in"] == shown["incoming"]["out"] == 32
    assert shown["outgoing"]["free"] == 3 * 4096 - 8
    assert tree["gpadls"] == {"count": 1, "pages": 9}


def test_devices_are_in_their_power_on_state_before_the_guest_sees_them() -> None:
    with Rig(EchoVsp()) as rig:
        assert echo(rig).log == ["reset", "reset"]
