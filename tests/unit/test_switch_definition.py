"""What a switch may be, and its file."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from devices.network import definition, places, planes
from devices.network.definition import Forward, PlaneChoice, SwitchDefinition, SwitchType
from devices.network.errors import SwitchError
from tests.fakes.switch_service import use_folders

NAT = SwitchDefinition(
    name="net",
    type=SwitchType.NAT,
    addresses=("192.168.77.1/24", "fd00:77::1/64"),
    plane=PlaneChoice.PROCESS,
    mtu=9000,
    forwards=("tcp:8080:web01:80", "udp:10.0.0.1:53:a:b:53"),
)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_folders(tmp_path, monkeypatch)


def refusal(**values: Any) -> str:
    with pytest.raises(SwitchError) as refused:
        definition.check(SwitchDefinition(**{"name": "lan", **values}))
    assert refused.value.kind == "usage" and "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("made", [SwitchDefinition(name="a"), NAT])
def test_a_definition_is_read_as_it_was_written(made: SwitchDefinition) -> None:
    definition.store(made)
    assert definition.load(made.name) == made
    assert definition.names() == [made.name] and definition.load_all() == [made]
    assert os.listdir(os.path.dirname(places.definition("a"))) == [f"{made.name}.toml"]


def test_a_switch_is_never_replaced_and_is_gone_once_removed() -> None:
    definition.store(NAT)
    with pytest.raises(SwitchError, match="there is a switch net already"):
        definition.store(SwitchDefinition(name="net"))
    assert definition.load("net") == NAT
    definition.remove("net")
    assert definition.names() == []
    for action in (definition.load, definition.remove):
        with pytest.raises(SwitchError) as refused:
            action("net")
        assert refused.value.kind == "missing"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "a\n", "ä", "x" * 33, "a\0"])
def test_names_that_are_no_file_of_ours_are_refused(name: str) -> None:
    assert "switch name" in refusal(name=name)
    with pytest.raises(SwitchError):
        definition.load(name)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"type": SwitchType.EXTERNAL}, "needs the host's interface"),
        ({"interface": "eth0"}, "only an external switch has an interface"),
        ({"type": SwitchType.EXTERNAL, "interface": "a/b"}, "no interface's name"),
        ({"type": SwitchType.EXTERNAL, "interface": "x" * 16}, "no interface's name"),
        ({"addresses": ("10.0.0.1/8",)}, "only internal and nat"),
        ({"type": SwitchType.NAT}, "one IPv4 address"),
        ({"type": SwitchType.NAT, "addresses": ("10.0.0.1/8", "10.1.0.1/16")}, "one IPv4 address"),
        ({"type": SwitchType.INTERNAL, "addresses": ("10.0.0.1",)}, "say the network's size"),
        ({"type": SwitchType.INTERNAL, "addresses": ("10.0.0.1/31",)}, "leave room"),
        ({"type": SwitchType.INTERNAL, "addresses": ("10.0.0.0/24",)}, "not the network's"),
        ({"type": SwitchType.INTERNAL, "addresses": ("10.0.0.255/24",)}, "not the network's"),
        ({"type": SwitchType.INTERNAL, "addresses": ("127.0.0.1/8",)}, "no address that a host can have"),
        ({"type": SwitchType.INTERNAL, "addresses": ("ff02::1/64",)}, "no address that a host can have"),
        ({"type": SwitchType.INTERNAL, "addresses": ("ten/24",)}, "is no address"),
        ({"type": SwitchType.INTERNAL, "addresses": ("10.0.0.1/8",) * 17}, "more than 16 addresses"),
        ({"mtu": 575}, "mtu 575 is not 576 to 9000"),
        ({"mtu": 9001}, "mtu 9001"),
        ({"type": SwitchType.INTERNAL, "addresses": ("fd00::1/64",), "mtu": 1279}, "not 1280 to 9000"),
        ({"forwards": ("tcp:80:a:80",)}, "only nat switches"),
        ({"type": SwitchType.NAT, "addresses": ("10.0.0.1/8",), "forwards": ("tcp:80",)}, "write tcp:"),
        ({"type": SwitchType.NAT, "addresses": ("10.0.0.1/8",), "forwards": ("sctp:80:a:80",)}, "write tcp:"),
        ({"type": SwitchType.NAT, "addresses": ("10.0.0.1/8",), "forwards": ("tcp:0:a:80",)}, "0 is no port"),
        ({"type": SwitchType.NAT, "addresses": ("10.0.0.1/8",), "forwards": ("tcp:1.2.3:80:a:80",)}, "is no address"),
        (
            {"type": SwitchType.NAT, "addresses": ("10.0.0.1/8",), "forwards": ("tcp:80:a:80", "tcp:80:b:81")},
            "leads elsewhere already",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(values: dict[str, Any], why: str) -> None:
    assert why in refusal(**values)


def test_forwards_may_name_an_address_and_vms_with_colons() -> None:
    assert [definition.parse_forward(text) for text in NAT.forwards] == [
        Forward("tcp", None, 8080, "web01", 80),
        Forward("udp", "10.0.0.1", 53, "a:b", 53),
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('name = "other"', "it says 'other'"),
        ('name = "lan"\ntype = "fast"', "type"),
        ('name = "lan"\nmtu = "many"', "mtu: expected int, got str"),
        ('name = "lan"\ncolour = "red"', "colour"),
        ('name = "lan"\nmtu = 5', "mtu 5 is not"),
        ("name = ", "not TOML"),
    ],
)
def test_a_broken_file_is_refused_in_one_line_and_hides_no_other_switch(text: str, why: str) -> None:
    definition.store(NAT)
    Path(places.definition("lan")).write_text(text)
    with pytest.raises(SwitchError, match=why):
        definition.load("lan")
    assert definition.names() == ["lan", "net"] and definition.load_all() == [NAT]


def test_host_interfaces_have_names_that_the_kernel_takes() -> None:
    names = [SwitchDefinition(name=name).host_interface for name in ("lan", "a" * 12, "a" * 13, "a" * 12 + "b")]
    assert names[:2] == ["pv-lan", "pv-" + "a" * 12]
    assert all(len(name) <= 15 for name in names) and len(set(names)) == 4


def test_a_free_network_overlaps_neither_routes_nor_other_switches(tmp_path: Path) -> None:
    routes = tmp_path / "route"
    head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
    row = "eth0\t{}\t00000000\t0001\t0\t0\t0\t{}\t0\t0\t0\n"
    # The default route, 192.168.100.0/24, and 192.168.102.0/23.
    routes.write_text(
        head
        + row.format("00000000", "00000000")
        + row.format("0064A8C0", "00FFFFFF")
        + row.format("0066A8C0", "00FEFFFF")
    )
    other = SwitchDefinition(name="b", type=SwitchType.INTERNAL, addresses=("192.168.101.7/25", "fd00::1/64"))
    assert definition.free_network([other], str(routes)) == "192.168.104.1/24"
    assert definition.free_network([], str(routes)) == "192.168.101.1/24"
    assert definition.free_network([], str(tmp_path / "none")) == "192.168.100.1/24"
    all_of_it = msgspec.structs.replace(other, addresses=("192.168.0.1/16",))
    with pytest.raises(SwitchError, match="give an address"):
        definition.free_network([all_of_it], str(routes))


def test_places_of_root_and_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYVMM_STATE_DIR", "PYVMM_RUNTIME_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/eve")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert (places.state_dir(), places.runtime_dir()) == ("/var/lib/pyvmm", "/run/pyvmm")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SwitchError, match="set XDG_RUNTIME_DIR"):
        places.runtime_dir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert (places.state_dir(), places.runtime_dir()) == ("/home/eve/.local/state/pyvmm", "/run/user/1000/pyvmm")
    assert places.running("lan", "sock") == "/run/user/1000/pyvmm/switches/lan.sock"


def test_folders_are_made_for_their_user_alone_and_refused_if_others_may_write() -> None:
    path = places.running("lan", "sock")
    places.make_folder(path)
    folder = os.path.dirname(path)
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    os.chmod(folder, 0o770)
    with pytest.raises(SwitchError, match="others may write there"):
        places.make_folder(path)


def test_a_lock_is_held_once_and_not_on_a_file_that_was_removed() -> None:
    first = places.lock("lan")
    assert first is not None
    assert places.lock("lan") is None
    places.tidy("lan")  # there is no such switch
    assert not os.path.exists(places.running("lan", "lock"))
    second = places.lock("lan")
    assert second is not None
    os.close(first)
    assert places.lock("lan") is None
    os.close(second)
    third = places.lock("lan")
    assert third is not None
    os.close(third)


def offers(**missing: str) -> dict[str, planes.Offer]:
    names = ("tun", "net_admin", "net_raw", "vlan_filtering", "nft", "dnsmasq", "passt", "haproxy")
    return {name: planes.Offer(name, missing.get(name, ""), "") for name in names}


def switch(kind: SwitchType, plane: PlaneChoice = PlaneChoice.AUTO) -> SwitchDefinition:
    return SwitchDefinition(name="lan", type=kind, plane=plane)


@pytest.mark.parametrize("kind", list(SwitchType))
def test_the_kernels_plane_is_taken_where_the_host_has_all_of_it(kind: SwitchType) -> None:
    assert planes.plane_for(switch(kind), offers())[0] == "kernel"
    assert planes.plane_for(switch(kind, PlaneChoice.PROCESS), offers()) == ("process", "asked for")
    assert planes.plane_for(switch(kind, PlaneChoice.KERNEL), offers()) == ("kernel", "asked for")


@pytest.mark.parametrize("kind", list(SwitchType))
def test_without_vlan_filtering_the_process_carries_frames_and_says_why(kind: SwitchType) -> None:
    host = offers(vlan_filtering="bridge VLAN filtering")
    assert planes.plane_for(switch(kind), host) == ("process", "the kernel's needs bridge VLAN filtering")
    with pytest.raises(SwitchError, match="the kernel's data plane needs bridge VLAN filtering") as refused:
        planes.plane_for(switch(kind, PlaneChoice.KERNEL), host)
    assert refused.value.kind == "host"


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        (SwitchType.INTERNAL, "net_admin"),
        (SwitchType.INTERNAL, "tun"),
        (SwitchType.EXTERNAL, "net_raw"),
        (SwitchType.NAT, "dnsmasq"),
        (SwitchType.NAT, "nft"),
    ],
)
def test_what_a_type_of_switch_needs_is_named_and_private_ones_do_without(kind: SwitchType, missing: str) -> None:
    host = offers(**{missing: "SOMETHING (run as root)"})
    with pytest.raises(SwitchError, match=rf"{kind} switches need SOMETHING \(run as root\)") as refused:
        planes.plane_for(switch(kind), host)
    assert refused.value.kind == "host"
    planes.plane_for(switch(SwitchType.PRIVATE), host)


def test_the_host_is_examined_without_a_trace() -> None:
    before = os.listdir("/sys/class/net")
    found = planes.examine()
    assert set(found) == set(offers())
    assert os.listdir("/sys/class/net") == before
    assert all(offer.purpose and (offer.there or offer.why) for offer in found.values())


def test_an_interface_with_addresses_stays_the_hosts_unless_the_switch_shares_it() -> None:
    outside = SwitchDefinition(name="lan", type=SwitchType.EXTERNAL, interface="lo")
    plane, why = planes.plane_for(outside, offers())
    assert plane == "process" and "lo has addresses" in why
    assert planes.plane_for(msgspec.structs.replace(outside, share=True), offers())[0] == "kernel"
    assert planes.plane_for(msgspec.structs.replace(outside, interface="eth77"), offers())[0] == "kernel"
