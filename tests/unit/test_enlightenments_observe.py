"""What is reported of a guest's use of its enlightenments, from counts and states at times of the test's choice."""

from __future__ import annotations

from typing import Any

import pytest

from enlightenments.catalog import ENLIGHTENMENTS
from enlightenments.observe import STORM, between, guest_os
from tests.fakes.observed import CALLS, LINUX_6_1, MASKED, READ, WRITE, ObservedGuest

AUTO_EOI = 1 << 17
HYPERCALL, VP_INDEX, REF_COUNT, SCONTROL, EOM = 0x40000001, 0x40000002, 0x40000020, 0x40000080, 0x40000084
POST, SIGNAL = 0x5C, 0x5D


@pytest.fixture
def guest() -> ObservedGuest:
    return ObservedGuest()


def entry(found: dict[str, Any], name: str) -> dict[str, Any]:
    shown: dict[str, Any] = next(entry for entry in found["enlightenments"] if entry["name"] == name)
    return shown


def states(found: dict[str, Any], name: str) -> tuple[Any, Any, Any]:
    shown = entry(found, name)
    return shown["offered"], shown["enabled"], shown["used"]


def warned(found: dict[str, Any], name: str) -> list[str]:
    return [warning["text"] for warning in found["warnings"] if warning["enlightenment"] == name]


def test_every_enlightenment_has_its_entry(guest: ObservedGuest) -> None:
    found = guest.report()
    assert [entry["name"] for entry in found["enlightenments"]] == list(ENLIGHTENMENTS)
    assert {entry["name"] for entry in found["enlightenments"] if entry["offered"]} == guest.offered


def test_hits_are_accesses_to_the_msrs_and_hypercalls_of_all_vps(guest: ObservedGuest) -> None:
    guest.count(WRITE, EOM, 30, vp=0)
    guest.count(WRITE, EOM, 10, vp=1)
    guest.count(READ, SCONTROL, 1)
    guest.count(CALLS, SIGNAL, 59)
    found = guest.report()
    synic = entry(found, "synic")
    assert synic["hits"] == 100
    assert synic["accesses"] == [
        {"name": "SCONTROL", "reads": 1, "writes": 0, "errors": 0},
        {"name": "EOM", "reads": 0, "writes": 40, "errors": 0},
        {"name": "HvSignalEvent", "calls": 59, "errors": 0},
    ]
    assert (found["exits"], synic["exit_share"], synic["hits_per_s"]) == (1100, 100 / 1100, 10.0)
    assert (found["uptime_s"], found["interval_s"], found["exits_per_s"]) == (10.0, 10.0, 110.0)
    assert entry(found, "vpindex")["hits"] == 0


def test_rates_between_two_times_are_of_that_time(guest: ObservedGuest) -> None:
    guest.count(WRITE, EOM, 40)
    earlier = guest.report()
    guest.seconds += 2
    guest.count(WRITE, EOM, 30)
    guest.count(READ, VP_INDEX, 70)
    later = between(earlier, guest.report())
    synic = entry(later, "synic")
    assert (synic["hits"], synic["hits_per_s"], synic["exit_share"]) == (70, 15.0, 0.3)
    assert (later["interval_s"], later["exits_per_s"], later["uptime_s"]) == (2.0, 50.0, 12.0)


def test_rates_start_again_with_another_vm_at_the_same_socket(guest: ObservedGuest) -> None:
    earlier = guest.report()
    other = ObservedGuest()
    other.seconds = 1.0
    other.count(READ, VP_INDEX, 5)
    assert entry(between(earlier, other.report()), "vpindex")["hits_per_s"] == 5.0


def test_a_vm_that_has_just_begun_has_no_rates(guest: ObservedGuest) -> None:
    guest.seconds = 0.0
    found = guest.report()
    assert (found["exits_per_s"], entry(found, "time")["hits_per_s"]) == (0.0, 0.0)


def test_what_has_a_switch_is_enabled_by_it(guest: ObservedGuest) -> None:
    guest.offered |= {"vapic"}
    found = guest.report()
    assert states(found, "base") == states(found, "time") == (True, True, True)
    for name in ("synic", "stimer", "stimer-direct", "tsc-invariant", "reenlightenment", "vapic", "vmbus"):
        assert states(found, name) == (True, False, False), name
    guest.partition |= {"hypercall_page": None, "reference_page": None, "tsc_invariant": 1, "reenlightenment": 1 << 16}
    guest.partition["assist_pages"] = [0, 0x5001]
    guest.partition["synics"][1] |= {"scontrol": 1, "timers": [[0, 0, 0]] * 3 + [[0x3_0001, 9, 9]]}
    guest.vmbus = True
    found = guest.report()
    assert states(found, "base") == states(found, "time") == (True, False, False)
    for name in ("synic", "stimer", "tsc-invariant", "reenlightenment", "vapic", "vmbus"):
        assert states(found, name) == (True, True, True), name
    assert states(found, "stimer-direct") == (True, False, False)
    guest.partition["synics"][1]["timers"] = [[0x3_0008, 0, 0]] * 4  # its next COUNT enables it
    assert states(guest.report(), "stimer") == (True, True, True)
    guest.partition["synics"][0]["timers"] = [[1 << 12 | 0x31, 9, 9]] * 4
    assert states(guest.report(), "stimer-direct") == (True, True, True)


def test_what_has_no_switch_is_used_or_unknown(guest: ObservedGuest) -> None:
    assert states(guest.report(), "vpindex") == (True, None, False)
    guest.count(READ, VP_INDEX, 1)
    assert states(guest.report(), "vpindex") == (True, None, True)
    assert states(guest.report(), "relaxed") == (True, None, None)


def test_the_last_error_is_the_latest_of_all_vps_and_kinds(guest: ObservedGuest) -> None:
    assert entry(guest.report(), "synic")["last_error"] is None
    guest.fail("msr_read", EOM, 1, at=2, value=0)
    guest.fail("hypercall", POST, 3, at=8.5, value=0x12, vp=1)
    guest.fail("msr_write", 0x40000092, 2, at=4, value=0x30003)
    guest.fail("msr_write", HYPERCALL, 1, at=9, value=0x123)
    found = guest.report()
    assert entry(found, "synic")["last_error"] == {
        "text": "HvPostMessage: invalid connection id",
        "vp": 1,
        "seconds_ago": 1.5,
    }
    assert entry(found, "base")["last_error"]["text"] == "wrmsr HYPERCALL = 0x123: #GP"
    guest.fail("msr_read", EOM, 2, at=9, value=0)
    assert entry(guest.report(), "synic")["last_error"]["text"] == "rdmsr EOM: #GP"


def test_errors_are_counted_where_they_were(guest: ObservedGuest) -> None:
    guest.count(CALLS, POST, 5)
    guest.count(CALLS, POST, 5, vp=1)
    guest.fail("hypercall", POST, 3, at=1, value=0x12)
    guest.fail("hypercall", POST, 1, at=1, value=0x12, vp=1)
    synic = entry(guest.report(), "synic")
    assert synic["errors"] == 4
    assert synic["accesses"] == [{"name": "HvPostMessage", "calls": 10, "errors": 4}]


def test_what_belongs_to_no_enlightenment_is_told_apart(guest: ObservedGuest) -> None:
    guest.count(READ, 0x400001F0, 2)
    guest.fail("msr_read", 0x400001F0, 2, at=1, value=0)
    guest.count(CALLS, 0x46, 1)
    guest.vps[1]["hypercalls_unknown"] = 7
    assert guest.report()["unknown"] == [
        {"name": "0x400001f0", "reads": 2, "writes": 0, "errors": 2},
        {"name": "0x46", "calls": 1, "errors": 0},
        {"name": "other hypercalls", "calls": 7, "errors": 7},
    ]


# Warnings


def test_a_guest_that_does_well_gives_no_warning(guest: ObservedGuest) -> None:
    guest.partition["synics"][0] |= {"scontrol": 1, "sint": [MASKED] * 2 + [0xF3] + [MASKED] * 13}
    assert guest.report()["warnings"] == []


def test_without_enlightenments_there_is_nothing_to_warn_of() -> None:
    guest = ObservedGuest("none")
    guest.partition |= {"guest_os_id": "0x0", "hypercall_page": None, "reference_page": None}
    guest.signatures = {}
    assert guest.report()["warnings"] == []


def test_a_storm_of_time_reads_is_told_by_its_rate(guest: ObservedGuest) -> None:
    guest.count(READ, REF_COUNT, 10 * STORM)
    earlier = guest.report()
    assert warned(earlier, "time") == []
    guest.seconds += 1
    guest.count(READ, REF_COUNT, STORM + 1)
    (text,) = warned(between(earlier, guest.report()), "time")
    assert f"{STORM + 1} times a second, although" in text
    guest.partition["reference_page"] = None
    (text,) = warned(between(earlier, guest.report()), "time")
    assert "not enabled the reference TSC page (REFERENCE_TSC), which needs no exit" in text


def test_an_unused_reference_tsc_page_is_told_once_there_is_a_guest(guest: ObservedGuest) -> None:
    guest.partition["reference_page"] = None
    assert warned(guest.report(), "time") == ["the guest does not use the reference TSC page that it is offered"]
    guest.partition["guest_os_id"] = "0x0"
    assert warned(guest.report(), "time") == []
    guest.partition["guest_os_id"] = "0x1"
    guest.offered -= {"time"}
    assert warned(guest.report(), "time") == []


def test_a_guest_without_os_id_has_not_recognised_hyper_v(guest: ObservedGuest) -> None:
    guest.partition["guest_os_id"] = "0x0"
    (text,) = warned(guest.report(), "base")
    assert "not recognised Hyper-V" in text


@pytest.mark.parametrize(
    ("signatures", "text"),
    [
        ({"0x40000000": "Linux KVM Hv"}, "the vendor in CPUID is 'Linux KVM Hv': Linux takes nothing but"),
        ({"0x40000000": "Microsoft Hv", "0x40000100": "KVMKVMKVM"}, "KVM's signature in CPUID leaf 0x40000100"),
        ({"0x40000000": "KVMKVMKVM"}, "KVM's signature in CPUID leaf 0x40000000"),
        ({}, "the vendor in CPUID is ''"),
    ],
)
def test_what_hides_hyper_v_from_linux_is_told(guest: ObservedGuest, signatures: dict[str, str], text: str) -> None:
    guest.signatures = signatures
    (found,) = warned(guest.report(), "base")
    assert text in found


def test_a_synic_without_open_sint_is_told(guest: ObservedGuest) -> None:
    guest.partition["synics"][1]["scontrol"] = 1
    assert warned(guest.report(), "synic") == [
        "enabled on VP 1, where every SINT is masked: no message and no event arrives"
    ]


def test_automatic_eoi_against_advice_is_told(guest: ObservedGuest) -> None:
    guest.partition["synics"][1] |= {"scontrol": 1, "sint": [MASKED] * 2 + [AUTO_EOI | 0xF3] + [MASKED] * 13}
    assert warned(guest.report(), "avic") == ["automatic EOI, against the advice in CPUID, for SINT2 of VP 1"]
    guest.offered -= {"avic"}
    assert warned(guest.report(), "avic") == []
    guest.offered |= {"avic"}
    guest.partition["synics"][1]["sint"][2] |= MASKED
    assert warned(guest.report(), "avic") == []


def test_tries_of_what_is_not_offered_are_told(guest: ObservedGuest) -> None:
    guest.offered -= {"frequencies"}
    guest.count(READ, 0x40000022, 3)
    guest.fail("msr_read", 0x40000022, 3, at=1, value=0)
    found = guest.report()
    assert states(found, "frequencies") == (False, False, False)
    assert warned(found, "frequencies") == [
        "not offered, but the guest tries TSC_FREQUENCY; +frequencies offers it",
    ]


@pytest.mark.parametrize(
    ("os_id", "name"),
    [
        (0, ""),
        (LINUX_6_1, "Linux 6.1.0"),
        (0x8100_0005_0A69_0000, "Linux 5.10.105"),
        (0x8200_0000_0000_0000, "FreeBSD"),
        (0xFF00_0000_0000_0000, "an open-source system"),
        (1 << 48 | 4 << 40 | 10 << 32 | 26100, "Windows 10.0.26100"),
        (1 << 48 | 4 << 40 | 6 << 32 | 3 << 24 | 9600, "Windows 6.3.9600"),
        (1 << 48 | 9 << 40, "a system of Microsoft 0.0.0"),
        (1, "an unknown system"),
    ],
)
def test_a_guest_names_itself_in_its_os_id(os_id: int, name: str) -> None:
    assert guest_os(os_id) == name
