"""A stock Debian guest uses two legacy NICs by its own driver, and so does iPXE, in the lab."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from guests import linux
from tests.lab.conftest import guest_script, told

if TYPE_CHECKING:
    from tests.lab.conftest import Session, StartSession

pytestmark = [pytest.mark.lab, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def session(lab_session: StartSession) -> Session:
    images = linux.build(
        guest_script("tulip_guest.sh"),
        flavour="generic",  # the cloud one has no tulip
        extra_modules=("af_packet", "tulip", "8021q"),
        programs=("ethtool",),
    )
    return lab_session("-m", "tests.lab.tulip_session", str(images.vmlinux), str(images.initrd), timeout=360)


@pytest.fixture(scope="module")
def report(session: Session) -> dict[str, Any]:
    """What the Debian guest and its VM told."""
    found: dict[str, Any] = session.report("tulip")
    return found


def test_both_are_found_as_functions_of_one_device(report: dict[str, Any]) -> None:
    for number in range(2):
        assert told(report, f"eth{number}_driver") == "tulip"
        assert told(report, f"eth{number}_place") == f"0000:00:0a.{number}"
        assert told(report, f"eth{number}_mac") == f"00:15:5d:00:00:0{number + 1}"
    assert [told(report, f"eth{number}_irq") for number in range(2)] == ["10", "11"]
    assert "driver: tulip|" in told(report, "ethtool") and "bus-info: 0000:00:0a.0|" in told(report, "ethtool")


def test_the_driver_says_what_it_says_on_hyper_v(report: dict[str, Any]) -> None:
    log = told(report, "log")
    assert "Digital DS21140 Tulip rev 32 at" in log
    assert "Using EEPROM-set media 100baseTx-FDX" in log
    for complaint in ("timed out", "nobody cared", "invalid", "Missing", "Old style"):
        assert complaint not in log


def test_it_gets_an_address_and_reaches_the_host(report: dict[str, Any]) -> None:
    assert told(report, "address") in ("10.77.0.50", "10.77.0.51")
    assert told(report, "ping") == "5 packets received"
    assert told(report, "large_ping") == "2 packets received"
    assert told(report, "promiscuous") == "1"


@pytest.mark.parametrize("way", ["download", "uploaded"])
def test_what_is_transferred_arrives_as_it_was(report: dict[str, Any], way: str) -> None:
    assert told(report, way) == report["sums"][way]


def test_full_frames_with_a_vlan_tag_pass(report: dict[str, Any]) -> None:
    assert told(report, "vlan_ping") == "2 packets received"


def test_the_guest_sees_the_cable_go_and_come(report: dict[str, Any]) -> None:
    assert told(report, "no_cable") == "1"
    assert [step["exit"] for step in report["steps"]] == [0, 0], report["steps"]
    assert told(report, "unplugged") == told(report, "plugged") == "1"
    assert told(report, "ping_again") == "3 packets received"
    assert told(report, "ping_reopened") == "3 packets received"


def test_the_guest_ends_well(report: dict[str, Any]) -> None:
    told(report, "end")
    assert report["exit"] == 0, report["stderr"]
    pci = report["report"]["board"]["devices"]["pci"]
    assert pci["0a.0"]["sent"] and pci["0a.0"]["received"]
    assert pci["0a.1"]["sent"] == pci["0a.1"]["received"] == 0


def test_ipxe_boots_from_the_network(session: Session) -> None:
    found = session.report("ipxe")
    nic = found["report"]["board"]["devices"]["pci"]["0a.0"]
    assert found["asked"][-2:] == ["/script", "/fetched-by-00-15-5d-00-00-03"], nic
    assert found["exit"] == 0, found["stderr"]
