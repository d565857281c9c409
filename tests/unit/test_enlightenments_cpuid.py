"""The CPUID leaves of the interface. Numbers: TLFS v6.0b, chapter 2."""

from __future__ import annotations

import pytest

from enlightenments.catalog import ENLIGHTENMENTS
from enlightenments.cpuid import hypervisor_leaves
from enlightenments.selection import PROFILES, parse_spec

REGISTERS = ("eax", "ebx", "ecx", "edx")


def leaves(spec: str = "full", vp_count: int = 4, bits: int = 46) -> dict[int, tuple[int, int, int, int]]:
    return hypervisor_leaves(parse_spec(spec), vp_count, bits)


def test_without_enlightenments_there_are_no_leaves() -> None:
    assert leaves("none") == {}


def test_a_guest_recognises_hyper_v() -> None:
    found = leaves("minimal")
    assert list(found) == [0x40000000 + number for number in range(7)]
    last, *vendor = found[0x40000000]
    assert last == 0x40000006
    assert b"".join(value.to_bytes(4, "little") for value in vendor) == b"Microsoft Hv"
    assert found[0x40000001][0].to_bytes(4, "little") == b"Hv#1"


def test_the_full_profile_has_exactly_these_feature_bits() -> None:
    eax, ebx, ecx, edx = leaves()[0x40000003]
    # Runtime, reference counter, SynIC, timers, hypercalls, VP index, reset, reference TSC, idle, frequencies,
    # re-enlightenment, TSC invariant control.
    assert eax == sum(1 << bit for bit in (0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 15))
    # Post messages, signal events, VP registers, extended hypercalls, start VP.
    assert ebx == sum(1 << bit for bit in (4, 5, 17, 20, 21))
    assert ecx == 0
    # XMM input, idle, frequencies, crash, SINT polling, hypercall MSR lock, direct timers.
    assert edx == sum(1 << bit for bit in (4, 5, 8, 10, 17, 18, 19))


def test_the_minimal_profile_has_hypercalls_and_vp_index_only() -> None:
    assert leaves("minimal")[0x40000003] == (1 << 5 | 1 << 6, 0, 0, 1 << 18)


@pytest.mark.parametrize("name", [name for name, entry in ENLIGHTENMENTS.items() if entry.bits and name != "base"])
def test_an_enlightenment_shows_its_bits_and_hides_them(name: str) -> None:
    needs = "".join(f",+{need}" for need in ENLIGHTENMENTS[name].needs)
    for profile, shown in ((f"full{needs},+{name}", True), (f"full,-{name}", False)):
        found = leaves(profile)
        for leaf, register, bit in ENLIGHTENMENTS[name].bits:
            assert bool(found[leaf][REGISTERS.index(register)] >> bit & 1) is shown


def test_recommendations_and_limits() -> None:
    eax, ebx, ecx, _ = leaves(vp_count=3, bits=46)[0x40000004]
    assert eax == 1 << 5 | 1 << 9  # relaxed timing, no automatic EOI
    assert ebx == 4095  # tries before a spin wait is reported
    assert ecx == 46
    assert leaves(vp_count=3)[0x40000005][:2] == (3, 3)


def test_every_profile_gives_values_of_32_bits() -> None:
    for profile in PROFILES:
        for values in leaves(profile).values():
            assert all(0 <= value < 1 << 32 for value in values)
