"""Four stock Debian guests on virtual switches of both data planes: VLANs, mirrors, guards, and what is left behind."""

from __future__ import annotations

import re
from typing import Any

import pytest

from guests import linux
from tests.lab import switch_session
from tests.lab.conftest import StartSession, guest_script
from tests.lab.test_network import FILES, PROGRAMS

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def found(lab_session: StartSession) -> dict[str, Any]:
    script = guest_script("network_guest.sh", "guest_shell.sh")
    images = linux.build(script, files=FILES, extra_modules=("8021q", "macvlan"), programs=PROGRAMS)
    session = lab_session("-m", "tests.lab.switch_session", str(images.vmlinux), str(images.initrd), timeout=800)
    report: dict[str, Any] = session.report("switch")
    return report


@pytest.fixture(scope="module", params=switch_session.PLANES)
def switch(request: pytest.FixtureRequest, found: dict[str, Any]) -> dict[str, Any]:
    steps: dict[str, Any] = found[request.param]
    return steps


def test_switches_of_both_planes_are_made(found: dict[str, Any]) -> None:
    assert [made["exit"] for made in found["create"]] == [0, 0], found["create"]


def test_guests_reach_those_of_their_vlan_and_the_trunk(switch: dict[str, Any]) -> None:
    pings = switch["vlans"]["pings"]
    for way in ("a to b", "b to a", "a to d", "d to a", "c to d", "d to c"):
        assert pings[way] == 3, (way, pings)


def test_nothing_leaks_into_another_vlan(switch: dict[str, Any]) -> None:
    vlans = switch["vlans"]
    for way in ("a to c", "c to a", "d to c, VLAN 10"):
        assert vlans["pings"][way] == 0, (way, vlans["pings"])
    assert vlans["seen by c"]["of a"] == []
    assert vlans["seen by c"]["of d"] > 0  # the capture did run
    assert vlans["mirror of c"]["of a"] == vlans["mirror of c"]["of b"] == 0, vlans["mirror of c"]


def test_mirror_shows_a_port_both_ways_with_the_tags_of_its_link(switch: dict[str, Any]) -> None:
    vlans = switch["vlans"]
    assert [mirror["exit"] for mirror in vlans["mirror"].values()] == [0, 0], vlans["mirror"]
    trunk, access = vlans["mirror of d"], vlans["mirror of c"]
    assert trunk["of a"] > 0 and trunk["of c"] > 0 and trunk["of d"] > 0, trunk
    assert trunk["VLAN 10"] > 0 and trunk["VLAN 20"] > 0, trunk
    assert access["of c"] > 0 and access["of d"] > 0, access
    assert access["VLAN 10"] == access["VLAN 20"] == 0, access


def test_foreign_source_addresses_pass_only_where_they_may(switch: dict[str, Any]) -> None:
    spoofing = switch["spoofing"]
    assert spoofing["off"]["set"] == spoofing["on"]["set"] == 0
    assert spoofing["off"]["seen"] == 0, spoofing
    assert spoofing["on"]["seen"] >= 3, spoofing
    assert sum(spoofing["off"]["port"]["statistics"]["dropped"].values()) >= 3, spoofing["off"]


def test_guarded_guest_gives_no_addresses_by_dhcp(switch: dict[str, Any]) -> None:
    dhcp = switch["dhcp"]
    assert (dhcp["on"]["leases"], dhcp["off"]["leases"]) == ("0", "1"), dhcp
    assert sum(dhcp["on"]["dropped"].values()) > 0


def test_four_guests_without_a_vlan_reach_each_other_and_transfer_at_once(switch: dict[str, Any]) -> None:
    together = switch["together"]
    assert together["set"] == [0] * 4
    assert set(together["pings"].values()) == {3}, together["pings"]
    for transfer in together["transfers"].values():
        assert transfer["exit"] == 0 and transfer["bytes"] > 0, transfer
    ports = {port["vm"]: port for port in together["show"]["reply"]["ports"]}
    assert set(ports) == set(switch_session.VLANS)
    for port in ports.values():
        assert port["statistics"]["received_bytes"] > 0 and port["statistics"]["sent_bytes"] > 0


def test_nat_gives_a_guest_its_address_and_the_ways_out_and_in(found: dict[str, Any]) -> None:
    nat = found["nat"]
    assert nat["create"]["exit"] == nat["add"]["exit"] == 0, nat
    assert re.fullmatch(r"10\.40\.0\.\d+", nat["lease"]), nat
    assert nat["ping"] == nat["ping world"] == "3", nat
    assert "nameserver 10.40.0.1" in nat["resolver"]
    assert nat["fetched inside"] == nat["fetched"] == "from the guest\n", nat
    assert nat["lease"] in [address for port in nat["show"]["reply"]["ports"] for address in port["addresses"]]
    assert nat["remove"]["exit"] == nat["delete"]["exit"] == 0, nat


def test_ports_go_with_their_vms_and_nothing_is_left_of_switches(found: dict[str, Any]) -> None:
    assert [shown["reply"]["ports"] for shown in found["shown"]] == [[], []]
    assert [deleted["exit"] for deleted in found["delete"]] == [0, 0], found["delete"]
    assert found["after"] == found["before"]


@pytest.mark.parametrize("guest", "bcd")
def test_guest_shuts_down_and_nothing_was_violated(found: dict[str, Any], guest: str) -> None:
    told = found["guests"][guest]
    assert told["exit"] == 0, told["stderr"]
    synthetic = told["report"]["synthetic"]
    assert synthetic["violations"] == 0, synthetic["last_violation"]
    assert all(channel["broken"] is None for channel in synthetic["channels"])
