"""``pyvmm enlightenments``: the catalogue, the profiles and the schema of custom profiles."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from enlightenments.catalog import ENLIGHTENMENTS, HOST_FEATURES
from enlightenments.custom_profile import CustomProfile
from enlightenments.describe import cpuid_text, describe, short_list
from enlightenments.selection import PROFILES, parse_spec
from pyvmm.cli import enlightenments, main

if TYPE_CHECKING:
    from collections.abc import Callable

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[str] | None], None]:
    """Says what the host has; at first all."""

    def has(features: set[str] | None) -> None:
        monkeypatch.setattr(enlightenments, "_host_features", lambda device: features)

    has(set(HOST_FEATURES))
    return has


def listed(capsys: Output, *words: str) -> dict[str, dict[str, Any]]:
    assert main(["enlightenments", "list", "-o", "json", *words]) == 0
    return {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["enlightenments"]}


def test_the_list_has_all_of_the_catalogue_with_names_and_numbers(capsys: Output) -> None:
    found = listed(capsys)
    assert list(found) == list(ENLIGHTENMENTS)
    for name, entry in ENLIGHTENMENTS.items():
        shown = found[name]
        for key in ("purpose", "gain", "source", "name"):
            assert shown[key] == getattr(entry, key)
        assert shown["needs"] == list(entry.needs)
        assert [int(msr["number"], 16) for msr in shown["msrs"]] == list(entry.msrs)
        assert [int(call["code"], 16) for call in shown["hypercalls"]] == list(entry.hypercalls)
        bits = [(int(bit["leaf"], 16), bit["register"], bit["bit"]) for bit in shown["cpuid"]]
        assert bits == list(entry.bits)
        assert shown["profiles"] == [title for title, profile in PROFILES.items() if name in profile.names]
    assert found["time"]["msrs"][0] == {"number": "0x40000020", "name": "TIME_REF_COUNT"}
    assert found["synic"]["hypercalls"][0] == {"code": "0x5c", "name": "HvPostMessage"}


@pytest.mark.parametrize(
    ("features", "available"), [({"kvm-hyperv"}, True), ({"invariant-tsc"}, False), (set(), False), (None, None)]
)
def test_the_list_tells_whether_the_host_has_what_is_needed(
    host: Callable[[set[str] | None], None], capsys: Output, features: set[str] | None, available: bool | None
) -> None:
    host(features)
    found = listed(capsys)
    expected = {"feature": "kvm-hyperv", "description": HOST_FEATURES["kvm-hyperv"], "available": available}
    assert found["vapic"]["host"] == expected
    assert found["base"]["host"] is None
    assert main(["enlightenments", "list"]) == 0
    shown = capsys.readouterr().out
    assert ("not known here" in shown) is (available is None)


def test_the_list_can_be_of_what_a_specification_selects(capsys: Output) -> None:
    assert set(listed(capsys, "--profile", "minimal,+time")) == {"base", "vpindex", "time"}
    assert main(["enlightenments", "list", "--profile", "linux,-crash", "-o", "name"]) == 0
    assert set(capsys.readouterr().out.split()) == parse_spec("linux,-crash").names
    assert main(["enlightenments", "list", "--profile", "linux,+crsh"]) == 2
    error = capsys.readouterr().err
    assert error == "pyvmm: error: enlightenments 'linux,+crsh': unknown enlightenment 'crsh'; did you mean crash?\n"


def test_a_host_without_kvm_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert enlightenments._host_features("/dev/null/kvm") is None


def test_the_tables_name_everything(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["enlightenments", "list"]) == 0
    shown = capsys.readouterr().out
    for entry in describe(set(ENLIGHTENMENTS), None):
        assert entry["name"] in shown
        assert all(f"{call['code']} {call['name']}" in shown for call in entry["hypercalls"])
        assert all(text in shown for text in (*cpuid_text(entry["cpuid"]), *short_list(entry["msrs"])))
    assert "0x40000090 SINT0..SINT15" in shown
    assert main(["enlightenments", "profiles"]) == 0
    shown = capsys.readouterr().out
    assert all(title in shown for title in PROFILES)
    assert "6.0.6001" in shown


def test_the_profiles_have_reason_and_source(capsys: Output) -> None:
    assert main(["enlightenments", "profiles", "-o", "json"]) == 0
    profiles = json.loads(capsys.readouterr().out)["profiles"]
    assert [entry["name"] for entry in profiles] == list(PROFILES)
    for entry in profiles:
        assert entry["reason"]
        assert entry["source"]
        assert frozenset(entry["enlightenments"]) == PROFILES[entry["name"]].names
    assert {entry["name"]: entry["version"] for entry in profiles}["windows-server-2008"] == "6.0.6001"
    assert main(["enlightenments", "profiles", "-o", "name"]) == 0
    assert capsys.readouterr().out.split() == list(PROFILES)


def test_the_schema_describes_custom_profiles(capsys: Output) -> None:
    assert main(["enlightenments", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)["$defs"]["CustomProfile"]
    assert list(schema["properties"]) == list(msgspec.structs.asdict(CustomProfile()))
    assert all(field["description"] for field in schema["properties"].values())
    assert schema["properties"]["base"]["enum"] == list(PROFILES)
    assert schema["properties"]["add"]["items"]["enum"] == list(ENLIGHTENMENTS)
    assert schema["additionalProperties"] is False
