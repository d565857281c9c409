"""NICs of both kinds under a stock Debian guest, on TAPs: addresses, transfers, offloads, channels, ups and downs.

PYVMM_TRANSFER_MIB sets how much goes to the guest and back by TCP.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import pytest

from guests import linux
from tests.lab import network_session
from tests.lab.conftest import Session, StartSession, guest_script

_MIB = int(os.environ.get("PYVMM_TRANSFER_MIB", "128"))

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900 + 2 * _MIB)]

PROGRAMS = ("iperf3", "ethtool", "ping", "tcpdump", "dmesg")
FILES: dict[str, Path | bytes] = {
    "bin/udhcpc.script": Path(__file__).with_name("udhcpc.script"),
    "etc/passwd": b"root:x:0:0:root:/:/bin/sh\n",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data"
    file.write_bytes(os.urandom(_MIB << 20))
    return file


@pytest.fixture(scope="module")
def session(lab_session: StartSession, data: Path) -> Session:
    script = guest_script("network_guest.sh", "guest_shell.sh")
    images = linux.build(script, flavour="generic", files=FILES, extra_modules=("tulip",), programs=PROGRAMS)
    return lab_session(
        *("-m", "tests.lab.network_session", str(images.vmlinux), str(images.initrd), str(data)),
        timeout=700 + 2 * _MIB,
    )


@pytest.fixture(scope="module")
def found(session: Session) -> dict[str, Any]:
    report: dict[str, Any] = session.report("network")
    return report


def counted(said: str, direction: str) -> dict[str, int]:
    """Packets by queue, as ``ethtool -S`` told."""
    return {queue: int(count) for queue, count in re.findall(rf"{direction}_queue_(\d+)_packets: (\d+)", said)}


def feature(found: dict[str, Any], name: str) -> str:
    match = re.search(rf"^\s*{name}: (\w+)", found["queues"]["features"], re.MULTILINE)
    assert match, found["queues"]
    return match[1]


def test_guest_binds_its_own_drivers_to_the_addresses_that_were_given(found: dict[str, Any]) -> None:
    # The script finds NICs by their MACs.
    assert found["addresses"]["named"] == found["legacy"]["named"] == [0, ""], found["console"]
    assert found["addresses"]["driver"] == "hv_netvsc" and found["addresses"]["state"] == "up"
    assert found["legacy"]["driver"] == "tulip"


def test_guest_gets_an_address_by_dhcp_and_pings_pass_both_ways(found: dict[str, Any]) -> None:
    addresses = found["addresses"]
    assert re.fullmatch(r"10\.9\.0\.(1\d\d|200)", addresses["lease"])
    assert addresses["ping_out"] == addresses["ping_in"] == 3


def test_guest_gets_an_ipv6_address_by_router_advertisement_and_pings_pass_both_ways(found: dict[str, Any]) -> None:
    addresses = found["addresses"]
    assert addresses["slaac"] == "fd09::215:5dff:fe01:203"  # made from the MAC (RFC 4291, appendix A)
    assert addresses["ping6_out"] == addresses["ping6_in"] == 3


def test_file_arrives_and_returns_unchanged(found: dict[str, Any], session: Session, data: Path) -> None:
    transfers = found["transfers"]
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    assert transfers["there"] == transfers["back"] == [0, ""], transfers
    assert transfers["guest_sum"] == digest
    assert hashlib.sha256((session.results / "returned").read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    "name",
    [
        "rx-checksumming",
        "tx-checksum-ipv4",
        "tx-checksum-ipv6",
        "scatter-gather",
        "tx-tcp-segmentation",
        "tx-tcp6-segmentation",
        "large-receive-offload",
        "receive-hashing",
        "rx-vlan-offload",
        "tx-vlan-offload",
    ],
)
def test_guest_has_the_offload(found: dict[str, Any], name: str) -> None:
    assert feature(found, name) == "on"


def test_flows_are_spread_over_a_channel_for_each_processor(found: dict[str, Any]) -> None:
    queues = found["queues"]
    assert re.findall(r"Combined:\s+(\d+)", queues["channels"]) == [str(network_session.VPS)] * 2
    assert "toeplitz: on" in queues["link"] and "Link detected: yes" in queues["link"]
    for direction, way in (("rx", "in"), ("tx", "out")):
        assert queues[way]["error"] is None and queues[way]["bytes"] > 0, queues[way]
        before, after = counted(queues["before"], direction), counted(queues["after"], direction)
        busy = [queue for queue in after if after[queue] - before[queue] > 50]
        assert len(busy) >= 2, (before, after)  # eight streams take all four but for bad luck
    assert re.search(r"rx_comp_busy: 0\n", queues["after"])


def test_both_kinds_of_nic_work_in_one_guest(found: dict[str, Any]) -> None:
    legacy = found["legacy"]
    assert legacy["out"] == legacy["in"] == 3, legacy
    for way in ("tcp", "tcp_back"):
        assert legacy[way]["error"] is None and legacy[way]["bytes"] > 0, legacy[way]


def test_guest_sees_the_cable_pulled_and_plugged(found: dict[str, Any]) -> None:
    flap = found["flap"]
    assert flap["down"]["exit"] == flap["up"]["exit"] == 0, flap
    assert flap["down_seen"] == "0" and flap["down_pings"] == 0
    assert flap["up_seen"] == "1" and flap["up_pings"] == 3


def test_nics_come_and_go_under_load(found: dict[str, Any]) -> None:
    hot = found["hot"]
    for step in hot["rounds"]:
        assert step["add"]["exit"] == step["remove"]["exit"] == 0, step
        assert step["named"] == [0, ""] and step["pings"] == 3 and step["gone"] == ""
    assert hot["load_alive"] and hot["load"] > 0, hot


def test_frames_of_9000_bytes_pass_both_ways(found: dict[str, Any]) -> None:
    jumbo = found["jumbo"]
    assert jumbo["set"] == [0, ""]
    assert jumbo["out"] == jumbo["in"] == 3
    assert jumbo["tcp"]["error"] is None and jumbo["tcp"]["bytes"] > 0


def test_drivers_have_nothing_to_complain_of(found: dict[str, Any]) -> None:
    assert found["taint"] == "0"
    assert not re.findall(r".*(?:hv_netvsc|hv_vmbus|tulip).*", found["messages"])


def test_guest_shuts_down_and_nothing_was_violated(found: dict[str, Any]) -> None:
    assert found["shutdown"]["reply"]["obeyed"] is True
    assert found["exit"] == 0, found["stderr"]
    synthetic = found["report"]["synthetic"]
    assert synthetic["violations"] == 0, synthetic["last_violation"]
    assert all(channel["broken"] is None for channel in synthetic["channels"])
