"""When KVM is to run synthetic timers, and what it is told of reference time. That it does run them, the lab shows."""

from __future__ import annotations

from typing import Any

import pytest

from enlightenments.selection import parse_spec
from pyvmm.boot.layout import KVM_REFERENCE_TIME_ADDRESS
from pyvmm.core import _hot
from pyvmm.core.kvm import capabilities
from pyvmm.core.memory import PAGE_SIZE, GuestMemory
from pyvmm.core.trace import Tracer
from pyvmm.machine import kvm_timers

PAGE = b"time".ljust(PAGE_SIZE, b"\0")
COUNTS = [0x4000_00B1, 0x4000_00B3, 0x4000_00B5, 0x4000_00B7]


class FakeSystem:
    def __init__(self, *features: int) -> None:
        self.features = features

    def check_extension(self, number: int) -> int:
        return int(number in self.features)


class FakeVp:
    """A VP whose TSC, as KVM knows it, is `late` units of 100 ns behind the real one."""

    def __init__(self, reference: _hot.ReferenceTime, late: int = 0) -> None:
        self.reference = reference
        self.late = late
        self.written: list[tuple[int, int]] = []

    def get_msr(self, index: int) -> int:
        assert index == 0x10
        elapsed = self.reference.now() - self.late - self.reference.offset
        return ((elapsed + 1) << 64) // self.reference.scale

    def set_msrs(self, values: list[tuple[int, int]]) -> int:
        self.written += values
        return len(values)


@pytest.mark.parametrize(
    ("features", "spec", "trace", "wanted"),
    [
        ((capabilities.HYPERV_SYNIC2,), "full", (), True),
        ((capabilities.HYPERV_SYNIC2,), "full", ("vmbus",), True),
        ((capabilities.HYPERV_SYNIC2,), "full", ("msr",), False),
        ((capabilities.HYPERV_SYNIC2,), "full,-stimer-direct,-stimer", (), False),
        ((capabilities.HYPERV,), "full", (), False),
    ],
)
def test_kvm_runs_timers_that_are_offered_if_it_can_and_nobody_traces_them(
    features: tuple[int, ...], spec: str, trace: tuple[str, ...], wanted: bool
) -> None:
    system: Any = FakeSystem(*features)
    assert kvm_timers.wanted(system, parse_spec(spec), Tracer(trace)) is wanted


def test_only_counts_go_past_us() -> None:
    assert list(kvm_timers.COUNT_MSRS) == COUNTS


def share(late: int) -> tuple[bool, bytes, list[tuple[int, int]]]:
    memory = GuestMemory(16 * PAGE_SIZE)
    kvm_timers.reserve_page(memory)
    reference = _hot.ReferenceTime(2_000_000, 0)
    vp: Any = FakeVp(reference, late)
    done = kvm_timers.share_reference_time(memory, vp, reference, PAGE)
    return done, memory.read(KVM_REFERENCE_TIME_ADDRESS, PAGE_SIZE), vp.written


def test_kvm_is_given_reference_time_as_that_of_an_emulated_tsc() -> None:
    assert share(late=0) == (True, PAGE, [(0x4000_0107, 1), (0x4000_0021, KVM_REFERENCE_TIME_ADDRESS | 1)])


def test_kvm_is_given_nothing_if_its_tsc_is_another() -> None:
    assert share(late=10_000) == (False, bytes(PAGE_SIZE), [])
