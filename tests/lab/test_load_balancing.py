"""Load balancing over stock Debian guests that serve the web."""

from __future__ import annotations

from typing import Any

import pytest

from guests import linux
from tests.lab.conftest import StartSession, guest_script, told

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def found(lab_session: StartSession) -> dict[str, Any]:
    images = linux.build(guest_script("balancer_guest.sh"))
    session = lab_session("-m", "tests.lab.balancer_session", str(images.vmlinux), str(images.initrd), timeout=700)
    report: dict[str, Any] = session.report("balancer")
    assert report["switch"]["exit"] == 0, report["switch"]["stderr"]
    for vm in report["vms"].values():
        assert told(vm, "ready") == "hv_netvsc"
    assert report["create"]["exit"] == 0, report["create"]["stderr"]
    return report


def test_guests_are_found_by_their_switch_and_get_requests_as_weighted(found: dict[str, Any]) -> None:
    assert found["up"] and found["weighted"] == {"web1": 30, "web2": 10}


def test_a_drained_guest_ends_its_transfer_and_gets_nothing_new(found: dict[str, Any]) -> None:
    drain = found["drain"]
    (other,) = {"web1", "web2"} - {drain["source"]}
    assert drain["drain"] == drain["undrain"] == 0 and drain["drained"] and drain["back"]
    assert drain["others"] == {other: 20}
    assert drain["sum"] == told(found["vms"][drain["source"]], "sum")


def test_a_killed_guest_costs_no_request_once_that_is_noticed(found: dict[str, Any]) -> None:
    assert found["noticed"] and found["after"] == {"web1": 40}


def test_what_was_done_is_counted_by_guest(found: dict[str, Any]) -> None:
    one, two = found["shown"]["backends"]
    assert one["connections_total"] >= 70 and two["connections_total"] >= 11
    assert one["address"] == "192.168.77.11" and two["state"] != "up"


def test_nothing_is_left_of_it(found: dict[str, Any]) -> None:
    assert found["delete"]["exit"] == found["end"]["exit"] == 0, found["end"]["stderr"]
    assert "192.168.77." not in found["left"]
