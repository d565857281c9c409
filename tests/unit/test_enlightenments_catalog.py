"""The catalogue of enlightenments, its profiles and specifications."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enlightenments.catalog import ENLIGHTENMENTS, msr_bitmap
from enlightenments.selection import PROFILES, parse_spec
from enlightenments.tlfs import FEATURES, MSR_BASE, MSR_COUNT, RECOMMENDATIONS

FULL = PROFILES["full"]
ALL = frozenset(ENLIGHTENMENTS)
#: Recommends the calls with sparse VP sets; flushes and IPIs both have some.
EX_MASKS = (RECOMMENDATIONS, "eax", 11)


def test_every_profile_has_what_its_members_need() -> None:
    for profile, names in PROFILES.items():
        for name in names:
            assert set(ENLIGHTENMENTS[name].needs) <= names, f"{name} in {profile}"


def test_needs_name_enlightenments_that_exist() -> None:
    for entry in ENLIGHTENMENTS.values():
        assert set(entry.needs) <= set(ENLIGHTENMENTS), entry.name


def test_no_two_enlightenments_share_an_msr_a_bit_or_a_hypercall() -> None:
    entries = ENLIGHTENMENTS.values()
    for what in (
        [msr for entry in entries for msr in entry.msrs],
        [bit for entry in entries for bit in entry.bits if bit != EX_MASKS],
        [call for entry in entries for call in entry.hypercalls],
    ):
        assert len(what) == len(set(what))


def test_bits_and_msrs_lie_where_the_interface_has_them() -> None:
    for entry in ENLIGHTENMENTS.values():
        for leaf, register, bit in entry.bits:
            assert leaf in (FEATURES, RECOMMENDATIONS)
            assert register in ("eax", "ebx", "ecx", "edx")
            assert 0 <= bit < 32
        assert all(MSR_BASE <= msr < MSR_BASE + MSR_COUNT for msr in entry.msrs)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("full", FULL),
        ("none", set()),
        ("minimal", {"base", "vpindex"}),
        ("minimal,+time", {"base", "vpindex", "time"}),
        ("none,+base", {"base"}),
        (" full , -crash ", FULL - {"crash"}),
        ("-crash", FULL - {"crash"}),
        ("full,-stimer", FULL - {"stimer", "stimer-direct"}),
        ("full,-time", FULL - {"time", "stimer", "stimer-direct", "reenlightenment"}),
        ("full,-synic", FULL - {"synic", "avic", "stimer", "stimer-direct", "vmbus"}),
        ("full,-base", set()),
        ("minimal,-vpindex,+vpindex", {"base", "vpindex"}),
    ],
)
def test_a_specification_starts_from_a_profile(spec: str, names: set[str]) -> None:
    assert parse_spec(spec).names == names


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("", "empty"),
        (",", "empty"),
        ("everything", "unknown enlightenment profile 'everything'"),
        ("full,+telepathy", "unknown enlightenment 'telepathy'"),
        ("full,-telepathy", "unknown enlightenment 'telepathy'"),
        ("full,none", "not the first word"),
        ("full,+", "unknown enlightenment ''"),
        ("none,+synic", r"synic needs (base|vpindex); add \+(base|vpindex)"),
        ("minimal,+stimer", "stimer needs"),
    ],
)
def test_a_wrong_specification_is_explained_in_one_line(spec: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        parse_spec(spec)
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="+-,abcdefghijklmnopqrstuvwxyz0123456789 ", max_size=40))
def test_any_text_is_a_specification_or_refused(spec: str) -> None:
    try:
        chosen = parse_spec(spec).names
    except ValueError:
        return
    assert chosen <= ALL


@given(st.sets(st.sampled_from(sorted(ALL))), st.sets(st.sampled_from(sorted(ALL))))
def test_what_is_accepted_is_complete(plus: set[str], minus: set[str]) -> None:
    words = ["minimal", *(f"+{name}" for name in sorted(plus)), *(f"-{name}" for name in sorted(minus))]
    try:
        chosen = parse_spec(",".join(words)).names
    except ValueError:
        return
    for name in chosen:
        assert set(ENLIGHTENMENTS[name].needs) <= chosen
    assert not chosen & minus


def test_the_bitmap_has_a_bit_for_each_offered_msr() -> None:
    for chosen in (FULL, PROFILES["minimal"], PROFILES["none"]):
        bitmap = msr_bitmap(chosen)
        offered = {MSR_BASE + bit for bit in range(MSR_COUNT) if bitmap[bit // 8] >> bit % 8 & 1}
        assert offered == {msr for name in chosen for msr in ENLIGHTENMENTS[name].msrs}
        assert len(bitmap) == MSR_COUNT // 8
