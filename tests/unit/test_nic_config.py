"""NICs of a VM's configuration: on the command line, in VM files, and their MAC addresses."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.network import settings
from pyvmm.machine import config_file, nic_config
from pyvmm.machine.config import ConfigError, VmConfig, validate
from pyvmm.machine.nic_config import (
    NicConfig,
    change_nic,
    check_nic,
    check_nics,
    format_rate,
    make_mac,
    parse_mac,
    parse_nic,
    parse_rate,
)


def said(nic: NicConfig) -> dict[str, Any]:
    """What differs from a NIC without a cable."""
    fields = {name: getattr(nic, name) for name in NicConfig.__annotations__}
    return {name: value for name, value in fields.items() if value != getattr(NicConfig, name)}


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("none", {}),
        ("user", {"user": True}),
        ("tap=tap0,type=legacy", {"tap": "tap0", "type": "legacy"}),
        ("switch=lan,vlan=10,mac=00-15-5D-AA-00-01", {"switch": "lan", "vlan": 10, "mac": "00:15:5d:aa:00:01"}),
        ("switch=lan,trunk=10,20,30,native=5", {"switch": "lan", "trunk": (10, 20, 30), "native": 5}),
        ("switch=lan,bandwidth=100M,link=down", {"switch": "lan", "bandwidth": 100_000_000, "link": False}),
        (
            "switch=lan,mac_spoofing,dhcp_guard,router_guard=off",
            {"switch": "lan", "mac_spoofing": True, "dhcp_guard": True},
        ),
        (
            "user,forward=tcp:8080:80,forward=udp:[::1]:53:53,forward=tcp:127.0.0.1:8080:80",
            {"user": True, "forward": ("tcp:8080:80", "udp:[::1]:53:53", "tcp:127.0.0.1:8080:80")},
        ),
    ],
)
def test_a_nic_is_a_network_and_its_options(text: str, fields: dict[str, Any]) -> None:
    assert said(parse_nic(text)) == fields


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "begin with switch=NAME"),
        ("lan", "begin with switch=NAME"),
        ("vlan=10,switch=lan", "begin with switch=NAME"),
        ("switch=", "unknown option 'switch='"),
        ("tap=", "unknown option 'tap='"),
        ("switch=lan,user", "'user' comes first"),
        ("switch=lan,10", "unknown option '10'"),
        ("switch=lan,trunk=10,vlan_x,20", "unknown option 'vlan_x'"),
        ("switch=lan,trunk=10,mac_spoofing,20", "unknown option '20'"),
        ("switch=lan,trunk=", "unknown option 'trunk='"),
        ("switch=lan,vlan=4095", "vlan 4095 is not 1 to 4094"),
        ("switch=lan,vlan=0", "vlan 0 is not 1 to 4094"),
        ("switch=lan,trunk=10,5000", "vlan 5000 is not"),
        ("switch=lan,trunk=10,native=4095", "vlan 4095 is not"),
        ("switch=lan,native=5", "native is for a trunk only"),
        ("switch=lan,vlan=5,trunk=6", "vlan or trunk, not both"),
        ("user,vlan=5", "vlan is for a switch only"),
        ("tap=t,bandwidth=1M", "bandwidth is for a switch only"),
        ("none,dhcp_guard", "dhcp_guard is for a switch only"),
        ("switch=lan,forward=tcp:1:1", "forward is for user only"),
        ("user,forward=tcp:80", "write tcp:"),
        ("user,forward=sctp:80:80", "write tcp:"),
        ("user,forward=tcp:80:65536", "ports are 1 to 65535"),
        ("user,forward=tcp:8080:80,forward=tcp:8080:81", "leads elsewhere already"),
        ("switch=lan,bandwidth=63999", "less than 64K bits/s"),
        ("switch=lan,bandwidth=fast", "no rate"),
        ("switch=lan,bandwidth=M", "no rate"),
        ("switch=lan,mac=00:15:5d:00:00", "no MAC address"),
        ("switch=lan,mac=01:15:5d:00:00:00", "the first byte is odd"),
        ("switch=lan,mac=00:00:00:00:00:00", "it is zero"),
        ("switch=lan,type=virtio", "choose synthetic or legacy"),
        ("switch=lan,link=maybe", "unknown option"),
        ("tap=a/b", "no interface's name"),
        ("tap=interface-of-16-x", "no interface's name"),
    ],
)
def test_a_nic_that_cannot_be_is_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        parse_nic(text)
    assert "\n" not in str(caught.value)


@given(st.text(st.sampled_from("switch=user,tap none10:M.[]\0é")) | st.text())
def test_any_text_is_a_nic_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        check_nic(parse_nic(text))


@given(st.integers(0, 10**14))
def test_a_formatted_rate_reads_back_exactly(rate: int) -> None:
    assert parse_rate(format_rate(rate)) == rate


def test_a_change_keeps_what_it_does_not_name() -> None:
    nic = parse_nic("switch=lan,vlan=10,bandwidth=1M,mac=00:15:5d:00:00:01")
    assert said(change_nic(nic, "link=down,vlan=20")) == said(nic) | {"link": False, "vlan": 20}
    assert said(change_nic(nic, "switch=other")) == said(nic) | {"switch": "other"}
    assert said(change_nic(nic, "vlan=none,trunk=1,2,bandwidth=none")) == {
        "switch": "lan", "trunk": (1, 2), "mac": "00:15:5d:00:00:01",
    }  # fmt: skip
    assert said(nic)["vlan"] == 10


def test_on_another_network_the_settings_of_the_one_before_are_gone() -> None:
    on_switch = parse_nic("switch=lan,vlan=10,dhcp_guard,mac=00:15:5d:00:00:01")
    on_user = change_nic(on_switch, "user,forward=tcp:8080:80")
    assert said(on_user) == {"user": True, "mac": "00:15:5d:00:00:01", "forward": ("tcp:8080:80",)}
    assert said(change_nic(on_user, "none")) == {"mac": "00:15:5d:00:00:01"}


def test_a_vm_has_up_to_eight_synthetic_and_four_legacy_nics() -> None:
    check_nics([parse_nic("none")] * 8 + [parse_nic("none,type=legacy")] * 4)
    with pytest.raises(ConfigError, match="more than 8 synthetic NICs"):
        check_nics([parse_nic("none")] * 9)
    with pytest.raises(ConfigError, match="more than 4 legacy NICs"):
        check_nics([parse_nic("none,type=legacy")] * 5)


def test_two_nics_of_a_vm_share_neither_mac_nor_tap() -> None:
    same_mac = parse_nic("none,mac=00:15:5d:00:00:01")
    with pytest.raises(ConfigError, match="MAC address 00:15:5d:00:00:01"):
        check_nics([same_mac, same_mac])
    with pytest.raises(ConfigError, match="TAP t"):
        check_nics([parse_nic("tap=t"), parse_nic("tap=t")])


def test_a_synthetic_nic_needs_vmbus() -> None:
    with pytest.raises(ConfigError, match="enlightenment vmbus"):
        validate(VmConfig(kernel="k", enlightenments="none", nics=[parse_nic("none")]))
    validate(VmConfig(kernel="k", enlightenments="none", nics=[parse_nic("none,type=legacy")]))


def test_macs_are_stable_distinct_and_in_hyper_vs_range() -> None:
    macs = [make_mac("web01", number, set()) for number in range(12)]
    assert len(set(macs)) == 12
    assert all(mac.startswith("00:15:5d:") and parse_mac(mac) == mac for mac in macs)
    assert make_mac("web01", 3, set()) == macs[3] != make_mac("web02", 3, set())
    assert make_mac("web01", 3, {macs[3]}) not in macs


def test_the_limits_are_those_of_the_switch() -> None:
    assert (nic_config.MIN_VLAN, nic_config.MAX_VLAN) == (settings.MIN_VLAN, settings.MAX_VLAN)
    assert nic_config.MIN_BANDWIDTH == settings.MIN_BANDWIDTH


def parse(text: str) -> VmConfig:
    return config_file.parse(text.encode(), "/vms/a.toml")


def test_a_vm_file_has_the_same_keys() -> None:
    config = parse(
        '[[nics]]\nswitch = "lan"\ntrunk = [10, 20]\nbandwidth = "100M"\nmac = "00-15-5D-00-00-01"\n'
        '[[nics]]\nuser = true\nforward = ["tcp:8080:80"]\nlink = false\n[[nics]]\ntype = "legacy"'
    )
    texts = ("switch=lan,trunk=10,20,bandwidth=100M,mac=00:15:5d:00:00:01", "user,forward=tcp:8080:80,link=down")
    assert [said(nic) for nic in config.nics] == [said(parse_nic(text)) for text in (*texts, "none,type=legacy")]
    assert [said(nic) for nic in parse(config_file.to_toml(config)).nics] == [said(nic) for nic in config.nics]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("vlan = 4095", r"a.toml: nics\[0\].vlan: expected int <= 4094"),
        ("trunk = [1, 0]", r"a.toml: nics\[0\].trunk\[1\]: expected int >= 1"),
        ("trunk = 1", r"a.toml: nics\[0\].trunk: expected array"),
        ("bandwidth = '1X'", r"a.toml: nics\[0\].bandwidth: '1X' is no rate"),
        ("mac = 'x'", r"a.toml: nics\[0\].mac: 'x' is no MAC"),
        ("type = 'virtio'", r"a.toml: nics\[0\].type: invalid enum"),
        ("network = 'x'", r"a.toml: nics\[0\]: object contains unknown field network"),
    ],
)
def test_an_error_in_a_vm_file_is_told_with_its_place(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse(f"[[nics]]\n{text}")


def test_a_cable_leads_to_one_network() -> None:
    (nic,) = parse('[[nics]]\nswitch = "lan"\nuser = true').nics
    with pytest.raises(ConfigError, match="one of switch, tap and user"):
        validate(VmConfig(kernel="k", nics=[nic]))
