"""The catalogue of enlightenments and its profiles."""

from __future__ import annotations

from enlightenments.catalog import ENLIGHTENMENTS, msr_bitmap
from enlightenments.selection import PROFILES
from enlightenments.tlfs import (
    FEATURES,
    HYPERCALL_NAMES,
    MSR_BASE,
    MSR_COUNT,
    MSR_NAMES,
    RECOMMENDATIONS,
    hypercall_name,
    msr_name,
    status_name,
)

#: Recommends the calls with sparse VP sets; flushes and IPIs both have some.
EX_MASKS = (RECOMMENDATIONS, "eax", 11)


def test_every_profile_has_what_its_members_need() -> None:
    for title, profile in PROFILES.items():
        for name in profile.names:
            assert set(ENLIGHTENMENTS[name].needs) <= profile.names, f"{name} in {title}"


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


def test_the_bitmap_has_a_bit_for_each_offered_msr() -> None:
    for profile in PROFILES.values():
        chosen = profile.names
        bitmap = msr_bitmap(chosen)
        offered = {MSR_BASE + bit for bit in range(MSR_COUNT) if bitmap[bit // 8] >> bit % 8 & 1}
        assert offered == {msr for name in chosen for msr in ENLIGHTENMENTS[name].msrs}
        assert len(bitmap) == MSR_COUNT // 8


def test_everything_offered_has_a_name_of_its_own() -> None:
    msrs = [msr for entry in ENLIGHTENMENTS.values() for msr in entry.msrs]
    calls = [code for entry in ENLIGHTENMENTS.values() for code in entry.hypercalls]
    assert len({MSR_NAMES[msr] for msr in msrs}) == len(msrs)
    assert len({HYPERCALL_NAMES[code] for code in calls}) == len(calls)
    assert (msr_name(0x40000090), msr_name(0x400000B7), msr_name(0x40000104)) == ("SINT0", "STIMER3_COUNT", "CRASH_P4")
    assert (msr_name(0x40000000), msr_name(0x400001FF), msr_name(0x200)) == ("GUEST_OS_ID", "0x400001ff", "0x200")
    assert (hypercall_name(0x5C), hypercall_name(0x4FF)) == ("HvPostMessage", "0x4ff")
    assert (status_name(0x0001_0000_0005), status_name(0x78)) == ("invalid parameter", "status 0x78")
