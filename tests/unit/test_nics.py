"""A machine's NICs and their cables, without a machine."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any, cast

import msgspec
import pytest

from devices.network.errors import SwitchError
from devices.network.settings import VlanMode
from pyvmm.core.clock import Clock
from pyvmm.core.trace import GuestLog
from pyvmm.machine import cable
from pyvmm.machine.config import ConfigError, VmConfig
from pyvmm.machine.nic_config import parse_nic
from pyvmm.machine.nics import Nics, Slot
from pyvmm.machine.outcome import MachineError
from tests.fakes.nics import FakeNetworks, FakeNic, FakePort


class Bus:
    """Stands in for SyntheticDevices."""

    def __init__(self) -> None:
        self.nics: dict[int, FakeNic] = {}
        self.refuses = False

    def plug_nic(self, slot: Slot) -> None:
        if self.refuses:
            raise RuntimeError("no room on the bus")
        nic = self.nics[slot.number] = FakeNic(slot.mac)
        slot.attach(nic)

    def unplug_nic(self, slot: Slot) -> None:
        assert slot.nic is self.nics[slot.number]
        port = self.nics.pop(slot.number).port
        assert port is None or not cast("FakePort", port).closed  # usable while the guest lets go


class Rig:
    """NICs of one VM named ``web01`` on fake networks."""

    def __init__(self, networks: FakeNetworks) -> None:
        self.networks = networks
        self.bus = Bus()
        self.log = io.StringIO()
        self.errors: list[BaseException] = []
        self.made: list[Nics] = []

    def make(self, *texts: str) -> Nics:
        """NICs as on the command line, with their devices."""
        configs = [parse_nic(text) for text in texts]
        synthetic = cast("Callable[[], Any]", lambda: self.bus)
        config = VmConfig(name="web01", nics=configs)
        nics = Nics(config, synthetic, GuestLog(self.log), Clock(), self.errors.append)
        self.made.append(nics)
        for slot in nics.slots("synthetic"):
            self.bus.plug_nic(slot)
        return nics

    def port(self, number: int) -> FakePort:
        """Where the cable of a NIC leads to."""
        port = self.bus.nics[number].port
        assert isinstance(port, FakePort)
        return port


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(cable, "_RETRY_NS", 1_000_000)
    rig = Rig(FakeNetworks(monkeypatch))
    yield rig
    for nics in rig.made:
        nics.close()
    assert rig.networks.open == []
    assert rig.errors == []


def test_each_nic_is_plugged_in_where_its_cable_leads(rig: Rig) -> None:
    nics = rig.make("switch=lan,vlan=10", "tap=tap0", "user", "none", "tap=tap1,type=legacy")
    assert [port.name for port in rig.networks.open] == ["switch lan", "tap tap0", "user", "tap tap1"]
    assert [nic.up for nic in rig.bus.nics.values()] == [True, True, True, False]
    assert [slot.number for slot in nics.slots("legacy")] == [4]
    assert [(nic["nic"], nic["type"], nic["network"], nic["link"]) for nic in nics.inspect()] == [
        (0, "synthetic", "switch=lan", True),
        (1, "synthetic", "tap=tap0", True),
        (2, "synthetic", "user", True),
        (3, "synthetic", "none", False),
        (4, "legacy", "tap=tap1", True),
    ]


def test_a_switch_gets_the_ports_settings(rig: Rig) -> None:
    rig.make("switch=lan,trunk=10,20,native=5,bandwidth=1M,dhcp_guard,mac=00:15:5d:00:00:07,link=down", "switch=lan")
    settings = rig.port(0).settings
    assert (settings.vm, settings.nic, settings.mac) == ("web01", "nic0", "00:15:5d:00:00:07")
    assert (settings.mode, settings.allowed, settings.native) == (VlanMode.TRUNK, (10, 20), 5)
    assert (settings.bandwidth, settings.dhcp_guard, settings.router_guard, settings.link) == (
        10**6,
        True,
        False,
        False,
    )
    assert rig.bus.nics[0].up is False
    assert rig.port(1).settings.mode is VlanMode.UNTAGGED


def test_addresses_are_the_same_each_time_and_no_two_nics_share_one(rig: Rig) -> None:
    first = [nic["mac"] for nic in rig.make("none", "none").inspect()]
    assert len(set(first)) == 2
    again = [nic["mac"] for nic in rig.make("none", f"none,mac={first[0]}").inspect()]
    assert again[1] == first[0] != again[0]


@pytest.mark.parametrize(("kind", "status"), [("host", 5), ("usage", 2), ("missing", 2), ("refused", 1)])
def test_a_network_that_cannot_be_had_ends_the_start(rig: Rig, kind: str, status: int) -> None:
    rig.networks.refusal = SwitchError("tap tap0: no", kind)
    with pytest.raises(MachineError, match="tap tap0: no") as caught:
        rig.make("none", "tap=tap0")
    assert caught.value.exit_code == status


def test_a_port_that_is_lost_is_found_again_with_the_settings_that_it_had(rig: Rig) -> None:
    rig.make("switch=lan,vlan=10")
    nic, port = rig.bus.nics[0], rig.port(0)
    port.settings = msgspec.structs.replace(port.settings, vlan=30)  # as pyvmm switch port does
    rig.networks.refusal = SwitchError("switch lan: its service does not start")
    port.on_lost()
    nic.wait_for("connect", None)
    nic.wait_for("link", False)
    for _ in range(4):  # the first one opened it
        assert rig.networks.asked.get(timeout=20) == "switch lan"
    assert port.closed
    assert rig.made[0].inspect()[0]["lost"] is not None
    rig.networks.refusal = None
    nic.wait_for("connect", "switch lan")
    nic.wait_for("link", True)
    assert rig.port(0).settings.vlan == 30
    assert rig.made[0].inspect()[0]["lost"] is None
    assert rig.log.getvalue() == (
        "pyvmm: nic0: switch=lan is lost: its other end has gone; looking for it again\n"
        "pyvmm: nic0: switch=lan is there again\n"
    )


def test_a_cable_that_was_moved_is_not_looked_for_where_it_was(rig: Rig) -> None:
    nics = rig.make("switch=lan")
    port = rig.port(0)
    assert nics.change(0, "switch=other")["network"] == "switch=other"
    assert port.closed
    port.on_lost()  # said before it was closed
    assert nics.change(0, "tap=tap0")["link"] is True
    assert [port.name for port in rig.networks.open] == ["tap tap0"]


def test_a_network_tells_of_its_link(rig: Rig) -> None:
    rig.make("switch=lan")
    nic, port = rig.bus.nics[0], rig.port(0)
    nic.wait_for("link", True)
    for up in (False, True):
        port.link = up
        port.settings = msgspec.structs.replace(port.settings, link=up)
        port.on_link(up)
        nic.wait_for("link", up)


def test_changes_of_a_port_leave_it_connected(rig: Rig) -> None:
    nics = rig.make("switch=lan,vlan=10,bandwidth=1M")
    port = rig.port(0)
    nics.change(0, "vlan=20,link=down")
    assert rig.port(0) is port
    assert (port.settings.vlan, port.settings.bandwidth, port.settings.link) == (20, 10**6, False)
    assert rig.bus.nics[0].up is False
    port.settings = msgspec.structs.replace(port.settings, vlan=30)  # as pyvmm switch port does
    nics.change(0, "link=up")
    assert port.settings.vlan == 30
    assert rig.bus.nics[0].up is True


def test_the_link_of_a_nic_without_a_switch_can_be_cut_too(rig: Rig) -> None:
    nics = rig.make("tap=tap0")
    port = rig.port(0)
    assert nics.change(0, "link=down")["link"] is False
    assert rig.bus.nics[0].up is False
    assert nics.change(0, "link=up")["link"] is True
    assert rig.port(0) is port


def test_a_change_that_is_refused_changes_nothing(rig: Rig) -> None:
    nics = rig.make("switch=lan,vlan=10", "tap=tap0")
    before = nics.inspect()
    rig.networks.refusal = SwitchError("no such switch", "missing")
    for text in ("switch=other", "vlan=20", "user"):
        with pytest.raises(SwitchError, match="no such switch"):
            nics.change(0, text)
    for text, why in (
        ("vlan=5000", "not 1 to 4094"),
        ("type=legacy", "stay as they are"),
        ("mac=00:15:5d:00:00:01", "stay as they are"),
        ("tap=tap0", "another NIC of the VM has TAP tap0"),
        ("nonsense", "unknown option"),
    ):
        with pytest.raises(ConfigError, match=why):
            nics.change(0, text)
    with pytest.raises(ConfigError, match="the VM has no nic 7; it has 0, 1"):
        nics.change(7, "link=down")
    assert nics.inspect() == before


def test_forwards_change_though_old_and_new_have_a_port_in_common(rig: Rig) -> None:
    nics = rig.make("user,forward=tcp:8080:80", "user,forward=udp:53:53")
    nics.change(0, "forward=tcp:8081:81")
    assert rig.port(0).forwards == ("tcp:8081:81",)  # type: ignore[attr-defined]
    nics.change(0, "forward=tcp:8081:82,forward=tcp:8080:80")
    with pytest.raises(SwitchError, match="in use"):
        nics.change(0, "forward=udp:53:53")
    for _ in range(4):  # at first, at the changes, and after the one that was refused
        rig.bus.nics[0].wait_for("connect", "user")
    assert rig.port(0).forwards == ("tcp:8081:82", "tcp:8080:80")  # type: ignore[attr-defined]
    assert rig.log.getvalue() == ""
    nics.change(0, "forward=none")
    assert rig.port(0).forwards == ()  # type: ignore[attr-defined]


def test_synthetic_nics_come_and_go_while_the_vm_runs(rig: Rig) -> None:
    nics = rig.make("switch=lan", "tap=tap0,type=legacy")
    told = nics.add(parse_nic("switch=lan,vlan=10"))
    assert (told["nic"], told["network"], told["link"]) == (2, "switch=lan", True)
    assert nics.remove(0)["nic"] == 0
    assert nics.add(parse_nic("user"))["nic"] == 0
    assert sorted(rig.bus.nics) == [0, 2]
    assert [port.name for port in rig.networks.open] == ["tap tap0", "switch lan", "user"]
    with pytest.raises(ConfigError, match="legacy NIC, which stays"):
        nics.remove(1)
    with pytest.raises(ConfigError, match="there from the start"):
        nics.add(parse_nic("none,type=legacy"))
    with pytest.raises(ConfigError, match="has no nic 9; it has 0, 1, 2"):
        nics.remove(9)


def test_a_nic_that_cannot_be_added_leaves_nothing(rig: Rig) -> None:
    nics = rig.make(*["none"] * 7)
    mac = nics.inspect()[0]["mac"]
    with pytest.raises(ConfigError, match=f"another NIC of the VM has MAC address {mac}"):
        nics.add(parse_nic(f"none,mac={mac}"))
    rig.networks.refusal = SwitchError("switch lan: missing", "missing")
    with pytest.raises(SwitchError, match="missing"):
        nics.add(parse_nic("switch=lan"))
    rig.networks.refusal = None
    rig.bus.refuses = True
    with pytest.raises(RuntimeError, match="no room"):
        nics.add(parse_nic("switch=lan"))
    assert rig.networks.open == []
    rig.bus.refuses = False
    assert nics.add(parse_nic("none"))["nic"] == 7
    with pytest.raises(ConfigError, match="more than 8 synthetic NICs"):
        nics.add(parse_nic("none"))


def test_a_nic_is_no_longer_looked_after_once_it_is_removed(rig: Rig) -> None:
    nics = rig.make("switch=lan")
    port = rig.port(0)
    rig.networks.refusal = SwitchError("gone", "missing")
    port.on_lost()
    rig.bus.nics[0].wait_for("connect", None)
    nics.remove(0)
    rig.networks.refusal = None
    rig.made[0].add(parse_nic("none"))
    assert rig.networks.open == []
