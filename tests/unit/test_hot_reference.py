"""Reference time: 100 ns units off the TSC."""

from __future__ import annotations

import time

import pytest

from pyvmm.core._hot import ReferenceTime


def host_tsc_khz() -> int:
    """The TSC's rate, measured: reference time of a 1 GHz TSC gives its ticks."""
    gigahertz = ReferenceTime(1_000_000, 0)
    start_ticks, start = gigahertz.now(), time.monotonic_ns()
    while time.monotonic_ns() - start < 20_000_000:
        pass
    ticks, passed = (gigahertz.now() - start_ticks) * 100, time.monotonic_ns() - start
    return ticks * 1_000_000 // passed


def test_it_counts_100_ns_units_of_the_hosts_time() -> None:
    reference = ReferenceTime(host_tsc_khz(), 0)
    start, start_ns = reference.now(), time.monotonic_ns()
    while time.monotonic_ns() - start_ns < 20_000_000:
        pass
    passed, passed_ns = reference.now() - start, time.monotonic_ns() - start_ns
    assert passed * 100 == pytest.approx(passed_ns, rel=0.02)


@pytest.mark.parametrize("tsc_offset", [0, 1, (1 << 64) - 12345, 1 << 63])
def test_it_starts_at_what_has_elapsed_whatever_the_guests_tsc(tsc_offset: int) -> None:
    second = 10_000_000
    assert 0 <= ReferenceTime(2_000_000, tsc_offset).now() < second
    assert 0 <= ReferenceTime(2_000_000, tsc_offset, 1000 * second).now() - 1000 * second < second


@pytest.mark.parametrize("khz", [1_000_000, 1_996_800, 2_599_997, 5_000_000])
def test_the_scale_is_the_binary_fraction_that_the_guest_multiplies_with(khz: int) -> None:
    reference = ReferenceTime(khz, 0)
    assert reference.scale == (10_000 << 64) // khz
    an_hour_of_ticks = khz * 1000 * 3600
    assert abs((an_hour_of_ticks * reference.scale >> 64) - 3600 * 10_000_000) <= 1


def test_it_never_goes_back() -> None:
    reference = ReferenceTime(2_000_000, 0)
    times = [reference.now() for _ in range(10_000)]
    assert times == sorted(times)


@pytest.mark.parametrize("khz", [0, 1, 10_000])
def test_a_tsc_too_slow_for_the_fraction_is_refused(khz: int) -> None:
    with pytest.raises(ValueError, match="too slow"):
        ReferenceTime(khz, 0)
