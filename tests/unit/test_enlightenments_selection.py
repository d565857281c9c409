"""Specifications of enlightenments: profiles, changes, settings, custom profiles, and what hosts lack."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enlightenments.catalog import ENLIGHTENMENTS, HOST_FEATURES
from enlightenments.selection import PROFILES, SPINLOCKS_NEVER, Selection, parse_spec

if TYPE_CHECKING:
    from pathlib import Path

FULL = PROFILES["full"].names
ALL = frozenset(ENLIGHTENMENTS)
NAMES = st.sets(st.sampled_from(sorted(ALL)))


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        *((title, profile.names) for title, profile in PROFILES.items()),
        ("minimal,+time", {"base", "vpindex", "time"}),
        ("none,+base", {"base"}),
        (" full , -crash ", FULL - {"crash"}),
        ("-crash", FULL - {"crash"}),
        ("+ipi", FULL | {"ipi"}),
        ("spinlocks=9", FULL),
        ("full,-stimer", FULL - {"stimer", "stimer-direct"}),
        ("full,-time", FULL - {"time", "stimer", "stimer-direct", "reenlightenment"}),
        ("full,-synic", FULL - {"synic", "avic", "stimer", "stimer-direct", "vmbus"}),
        ("full,-base", set()),
        ("minimal,+synic,+stimer,+time", {"base", "vpindex", "synic", "stimer", "time"}),
    ],
)
def test_a_specification_starts_from_a_profile(spec: str, names: set[str]) -> None:
    assert parse_spec(spec).names == names


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("", "empty"),
        (",", "empty"),
        ("everything", "unknown enlightenment profile 'everything'; choose from full, minimal"),
        ("windows-2008", "unknown enlightenment profile 'windows-2008'; did you mean windows-server-2008"),
        ("full,+telepathy", "unknown enlightenment 'telepathy'; choose from base, vpindex"),
        ("full,+stmer", "unknown enlightenment 'stmer'; did you mean stimer"),
        ("full,-tlb-flush", "unknown enlightenment 'tlb-flush'; did you mean tlbflush"),
        ("full,none", "'none' is not the first word; write"),
        ("full,x.toml", "'x.toml' is not the first word; write"),
        ("full,+", "unknown enlightenment ''"),
        ("none,+synic", r"synic needs (base|vpindex); add that too"),
        ("minimal,+stimer", "stimer needs synic; add that too"),
        ("full,+ipi,-ipi", "ipi cannot be added: it is removed too"),
        ("full,-ipi,+ipi", "ipi cannot be added: it is removed too"),
        ("full,-synic,+stimer", "stimer cannot be added: it needs synic, which is removed"),
        ("full,+stimer-direct,-base", "stimer-direct cannot be added: it needs base, which is removed"),
        ("full,spinlock=4", "unknown setting 'spinlock'; did you mean spinlocks"),
        ("full,colour=red", "unknown setting 'colour'; choose from spinlocks, vendor-id, version"),
        ("full,version=1.2.3,version=1.2.3", "version is set twice"),
        ("minimal,spinlocks=4", "the setting spinlocks needs the enlightenment spinlocks"),
        ("none,vendor-id=Me", "without enlightenments no guest sees"),
        *(
            (f"spinlocks={value}", "is neither a number")
            for value in ("", "0", "-1", "many", "0x100000000", "1_0", "+1")
        ),
        *((f"vendor-id={value}", "is not 1 to 12 printable") for value in ("", "thirteen char", "\u00e9", "a\x07b")),
        *(
            (f"version={value}", "is not MAJOR.MINOR.BUILD")
            for value in ("", "10", "1.2.3.4", "a.b.c", "1..2", "-1.0.0")
        ),
        *((f"version={value}", "16, 16 and 32") for value in ("65536.0.0", "0.65536.0", "0.0.4294967296")),
    ],
)
def test_a_wrong_specification_is_explained_in_one_line(spec: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        parse_spec(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "tries"),
    [
        ("full", 4095),
        ("minimal", SPINLOCKS_NEVER),
        ("spinlocks=8191", 8191),
        ("full,spinlocks=0xFFF", 4095),
        ("full,spinlocks=0xffffffff", SPINLOCKS_NEVER),
        ("spinlocks=never", SPINLOCKS_NEVER),
        ("minimal,+spinlocks,spinlocks=1", 1),
    ],
)
def test_the_number_of_tries_for_a_lock(spec: str, tries: int) -> None:
    assert parse_spec(spec).spinlocks == tries


def test_vendor_and_version_are_set_for_cpuid() -> None:
    chosen = parse_spec("linux,vendor-id=Microsoft Hv,version=6.3.9600")
    assert (chosen.vendor_id, chosen.version) == (b"Microsoft Hv", (9600, 6, 3))
    assert parse_spec("vendor-id=Me").vendor_id == b"Me".ljust(12, b"\0")
    assert parse_spec("version=65535.65535.4294967295").version == (0xFFFFFFFF, 0xFFFF, 0xFFFF)


def test_a_profile_may_bring_its_version() -> None:
    assert parse_spec("windows-server-2008").version == (6001, 6, 0)
    assert parse_spec("windows-server-2008,version=6.1.7600").version == (7600, 6, 1)


def test_what_is_slower_through_user_space_is_in_no_profile() -> None:
    slower = {"tlbflush", "tlbflush-ext", "ipi", "vapic"}
    assert slower == ALL - FULL
    assert all(profile.names.isdisjoint(slower) for profile in PROFILES.values())


@given(st.text(alphabet="+-,=.x0123456789abcdefghijklmnopqrstuvwyz /", max_size=40))
def test_any_text_is_a_specification_or_refused(spec: str) -> None:
    try:
        chosen = parse_spec(spec)
    except ValueError:
        return
    assert chosen.names <= ALL


@given(st.sampled_from(sorted(PROFILES)), NAMES, NAMES)
def test_what_is_accepted_is_complete_and_as_asked(title: str, plus: set[str], minus: set[str]) -> None:
    words = [title, *(f"+{name}" for name in sorted(plus)), *(f"-{name}" for name in sorted(minus))]
    try:
        chosen = parse_spec(",".join(words))
    except ValueError:
        return
    for name in chosen.names:
        assert set(ENLIGHTENMENTS[name].needs) <= chosen.names
    assert not chosen.names & minus
    assert plus <= chosen.names <= PROFILES[title].names | plus
    assert chosen.wanted == plus


# Hosts


def test_what_the_host_lacks_is_left_out() -> None:
    lacking = {name for name, entry in ENLIGHTENMENTS.items() if entry.host == "kvm-hyperv"}
    chosen = parse_spec("full,-crash,spinlocks=77,vendor-id=Me,version=1.2.3").on_host({"invariant-tsc"})
    assert chosen.names == FULL - lacking - {"crash"}
    assert (chosen.spinlocks, chosen.vendor_id[:2], chosen.version) == (77, b"Me", (3, 1, 2))
    assert parse_spec("full").on_host(HOST_FEATURES).names == FULL


@pytest.mark.parametrize(("name", "host"), [(name, e.host) for name, e in ENLIGHTENMENTS.items() if e.host])
def test_what_was_asked_for_by_name_and_the_host_lacks_is_an_error(name: str, host: str) -> None:
    features = set(HOST_FEATURES) - {host}
    with pytest.raises(ValueError, match=f"the enlightenment {name} needs "):
        parse_spec(f"full,+{name}").on_host(features)
    assert name not in parse_spec("full").on_host(features)
    assert (
        parse_spec(f"full,-{name}").on_host(features).names == parse_spec(f"full,-{name}").on_host(HOST_FEATURES).names
    )


# Custom profiles


def custom(folder: Path, text: str, changes: str = "") -> Selection:
    path = folder / "mine.toml"
    path.write_text(text)
    return parse_spec(f"{path}{changes}")


def test_a_custom_profile_has_a_base_changes_and_settings(tmp_path: Path) -> None:
    text = """
        base = "minimal"
        add = ["time", "spinlocks", "synic"]
        remove = ["crash"]
        spinlocks = 0x1000
        vendor_id = "Me"
        version = "10.0.14393"
    """
    chosen = custom(tmp_path, text)
    assert chosen.names == {"base", "vpindex", "time", "spinlocks", "synic"}
    assert chosen.wanted == {"time", "spinlocks", "synic"}
    assert (chosen.spinlocks, chosen.vendor_id.rstrip(b"\0"), chosen.version) == (0x1000, b"Me", (14393, 10, 0))
    changed = custom(tmp_path, text, ",+stimer-direct,+stimer,version=1.2.3")
    assert changed.names == chosen.names | {"stimer", "stimer-direct"}
    assert (changed.spinlocks, changed.version) == (0x1000, (3, 1, 2))
    less = custom(tmp_path, text, ",-spinlocks,-time")
    assert less.names == {"base", "vpindex", "synic"}
    assert less.wanted == {"synic"}
    assert less.spinlocks == SPINLOCKS_NEVER


def test_an_empty_custom_profile_is_the_full_one(tmp_path: Path) -> None:
    assert custom(tmp_path, "").names == FULL
    assert custom(tmp_path, 'spinlocks = "never"').spinlocks == SPINLOCKS_NEVER


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("base = 'ful'", "base: unknown enlightenment profile 'ful'; did you mean full"),
        ("base = 5", "base: expected str, got int"),
        ("add = ['stmer']", "add: unknown enlightenment 'stmer'; did you mean stimer"),
        ("remove = ['x']", "remove: unknown enlightenment 'x'"),
        ("add = [1]", r"add\[0\]: expected str, got int"),
        ("base = 'minimal'\nadd = ['stimer']", "stimer needs synic; add that too"),
        ("add = ['stimer']\nremove = ['synic']", "stimer cannot be added: it needs synic, which is removed"),
        ("spinlocks = -1", "spinlocks: spinlocks '-1' is neither"),
        ("spinlocks = 1.5", "spinlocks: expected int . str . null, got float"),
        ("base = 'minimal'\nspinlocks = 9", "the setting spinlocks needs the enlightenment spinlocks"),
        ("vendor_id = ''", "vendor_id: vendor-id '' is not 1 to 12"),
        ("version = '10'", "version: version '10' is not MAJOR"),
        ("colour = 'red'", "object contains unknown field colour"),
        ("add = [", "not TOML"),
    ],
)
def test_a_wrong_custom_profile_is_explained_with_file_and_key(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"mine.toml: {why}") as caught:
        custom(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_custom_profile_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.toml: No such file"):
        parse_spec(f"{tmp_path}/no.toml")


def test_a_profile_by_name_needs_no_parser() -> None:
    """Start-up time: what checks TOML is only loaded for a custom profile, difflib only for an error."""
    code = (
        "import sys; from enlightenments.selection import parse_spec; parse_spec('full,-crash,spinlocks=9');"
        "print(sorted({'msgspec', 'tomllib', 'difflib', 're'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
