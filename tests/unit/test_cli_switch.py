"""``pyvmm switch``, as a user calls it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from devices.network import client, definition, places, planes
from pyvmm.cli import main
from tests.fakes.switch_service import nic, serving, use_folders

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fakes.network import FakePlane


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_folders(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def plane() -> Iterator[FakePlane]:
    with serving() as plane:
        yield plane


@pytest.fixture
def port(plane: FakePlane) -> Iterator[client.SwitchPort]:
    port = client.plug("lan", nic())
    yield port
    port.close()


def switch(*words: str) -> int:
    return main(["switch", *words])


def tree(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert switch(*words, "-o", "json") == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    capsys.readouterr()
    assert switch(*words) == status
    error = capsys.readouterr().err
    assert error.startswith("pyvmm: error: ") and error.count("\n") == 1
    return error


def test_a_private_switch_is_made_shown_listed_and_deleted(capsys: pytest.CaptureFixture[str]) -> None:
    made = tree(capsys, "create", "lan", "--mtu", "9000", "--plane", "process")
    assert (made["name"], made["type"], made["mtu"], made["state"]) == ("lan", "private", 9000, "stopped")
    assert tree(capsys, "show", "lan") == made
    assert tree(capsys, "list") == [made]
    assert "already" in refused(capsys, 1, "create", "lan")
    assert switch("list") == 0
    assert "lan" in capsys.readouterr().out
    assert switch("delete", "lan") == 0
    assert tree(capsys, "list") == []
    assert not os.path.exists(places.running("lan", "lock"))


def test_running_and_stopped_switches_are_shown_with_the_same_keys(
    port: client.SwitchPort, capsys: pytest.CaptureFixture[str]
) -> None:
    assert switch("create", "other") == 0
    other, lan = sorted(tree(capsys, "list"), key=lambda row: str(row["state"]), reverse=True)
    assert list(other) == list(lan)
    assert (other["state"], lan["state"], lan["plane"]) == ("stopped", "running", "process")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["create", "a/b"], "switch name"),
        (["create", "lan", "--type", "external"], "needs the host's interface"),
        (["create", "lan", "--address", "10.0.0.1/8"], "only internal and nat"),
        (["create", "lan", "--mtu", "9001"], "9001"),
        (["create", "lan", "--mtu", "many"], "--mtu"),
        (["create", "lan", "--type", "nat", "--forward", "tcp:80"], "write tcp:"),
        (["create", "lan", "--type", "fast"], "--type"),
        (["create"], "NAME"),
        ([], "ACTION"),
    ],
)
def test_what_cannot_be_a_switch_is_status_2(capsys: pytest.CaptureFixture[str], words: list[str], why: str) -> None:
    assert why in refused(capsys, 2, *words)
    assert definition.names() == []


@pytest.mark.parametrize(
    "words", [["show", "lan"], ["delete", "lan"], ["delete", "lan", "--force"], ["port", "lan", "a"]]
)
def test_a_switch_that_is_not_there_is_status_3(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert "no switch lan" in refused(capsys, 3, *words)


def test_a_host_that_lacks_something_is_status_5_and_no_switch_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = planes.examine()
    lacking["net_admin"] = planes.Offer("net_admin", "CAP_NET_ADMIN (run as root)", "")
    monkeypatch.setattr(planes, "examine", lambda: lacking)
    error = refused(capsys, 5, "create", "lan", "--type", "internal")
    assert "internal switches need CAP_NET_ADMIN (run as root); private switches and --nic user do without" in error
    assert definition.names() == []


def test_a_broken_definition_is_told_of_and_hides_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert switch("create", "lan") == 0
    Path(places.definition("broken")).write_text("name = 1")
    capsys.readouterr()
    assert switch("list", "-o", "json") == 1
    shown = capsys.readouterr()
    assert [row["name"] for row in json.loads(shown.out)] == ["lan"]
    assert "broken.toml: name: expected str, got int" in shown.err and shown.err.count("\n") == 1
    assert switch("delete", "broken") == 0
    assert definition.names() == ["lan"]


def test_a_switch_with_vms_on_it_is_deleted_only_by_force(
    plane: FakePlane, port: client.SwitchPort, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "1 port in use: end the VMs first, or use --force" in refused(capsys, 1, "delete", "lan")
    assert definition.names() == ["lan"] and 1 in plane.ports
    assert switch("delete", "lan", "--force") == 0
    assert definition.names() == [] and plane.closed and not plane.ports


def test_a_port_is_shown(port: client.SwitchPort, capsys: pytest.CaptureFixture[str]) -> None:
    found = tree(capsys, "port", "lan", "web01")
    assert (found["vm"], found["nic"], found["mac"], found["mode"]) == ("web01", "nic0", nic().mac, "untagged")
    assert switch("port", "lan", "web01:nic0") == 0
    shown = capsys.readouterr().out
    assert "VLAN: untagged\n" in shown and "dropped: vlan 2\n" in shown
    assert "web02 has no port there" in refused(capsys, 3, "port", "lan", "web02")
    assert switch("show", "lan") == 0
    assert nic().mac in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "fields", "shown"),
    [
        (["--vlan", "10"], {"mode": "access", "vlan": 10}, "VLAN: 10"),
        (["--trunk", "10,20"], {"mode": "trunk", "allowed": [10, 20], "native": 0}, "VLAN: trunk 10,20"),
        (["--trunk", "10", "--native", "5"], {"allowed": [10], "native": 5}, "VLAN: trunk 10 native 5"),
        (["--mac-spoofing", "on", "--dhcp-guard", "on"], {"mac_spoofing": True, "dhcp_guard": True}, "DHCP guard: on"),
        (["--router-guard", "on", "--link", "down"], {"router_guard": True, "link": False}, "link: down"),
        (["--bandwidth", "100M"], {"bandwidth": 100_000_000}, "bandwidth: 100Mbit/s"),
    ],
)
def test_a_port_is_set_and_set_back(
    port: client.SwitchPort,
    plane: FakePlane,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    fields: dict[str, Any],
    shown: str,
) -> None:
    found = tree(capsys, "port", "lan", "web01", *words)
    assert {name: found[name] for name in fields} == fields
    assert switch("port", "lan", "web01") == 0
    assert shown + "\n" in capsys.readouterr().out
    back = ["--untagged", "--mac-spoofing", "off", "--dhcp-guard", "off", "--router-guard", "off"]
    assert switch("port", "lan", "web01", *back, "--link", "up", "--bandwidth", "none") == 0
    assert plane.ports[1] == nic()


def test_a_native_vlan_alone_changes_a_trunk(port: client.SwitchPort, capsys: pytest.CaptureFixture[str]) -> None:
    assert switch("port", "lan", "web01", "--trunk", "10,20") == 0
    found = tree(capsys, "port", "lan", "web01", "--native", "7")
    assert (found["mode"], found["allowed"], found["native"]) == ("trunk", [10, 20], 7)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--vlan", "0"], "vlan 0 is not 1 to 4094"),
        (["--vlan", "4095"], "vlan 4095"),
        (["--trunk", "10,x"], "write VLANs"),
        (["--trunk", ""], "write VLANs"),
        (["--trunk", "10", "--vlan", "10"], "not allowed with"),
        (["--vlan", "10", "--native", "5"], "--native is for a trunk"),
        (["--bandwidth", "fast"], "no rate"),
        (["--bandwidth", "1K"], "less than 64000"),
        (["--link", "sideways"], "--link"),
    ],
)
def test_settings_that_make_no_port_are_status_2(
    port: client.SwitchPort, plane: FakePlane, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    assert why in refused(capsys, 2, "port", "lan", "web01", *words)
    assert plane.ports[1] == nic()


def test_a_mirror_goes_to_a_file_beside_the_user(
    port: client.SwitchPort, plane: FakePlane, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tree(capsys, "port", "lan", "web01", "--mirror", "a.pcap")["mirror"] == str(tmp_path / "a.pcap")
    assert plane.mirrors == {1: str(tmp_path / "a.pcap")}
    assert tree(capsys, "port", "lan", "web01", "--mirror", "none")["mirror"] is None


def test_completion_knows_switches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "--router-guard" in script and "switch" in script


def test_the_doctor_says_which_plane_switches_use_and_what_networks_lack(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    network = json.loads(capsys.readouterr().out)["network"]
    assert network["plane"] in ("kernel", "process") and network["plane_reason"]
    assert [row["name"] for row in network["offers"]] == list(planes.examine())
    assert all(row["usable"] is not bool(row["missing"]) for row in network["offers"])
    main(["doctor"])
    assert f"Switches use the {network['plane']} data plane" in " ".join(capsys.readouterr().out.split())
