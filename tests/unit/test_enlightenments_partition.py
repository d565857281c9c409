"""A partition through its MSRs: values after reset, rules of writing, overlay pages, crash reports, saved state."""

from __future__ import annotations

import io
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enlightenments import catalog, hypercall_page
from enlightenments.selection import PROFILES
from pyvmm.core.trace import Tracer
from tests.fakes.partition import SIZE, TSC_KHZ, Vm

OS_ID, HYPERCALL, VP_INDEX, RESET = 0x40000000, 0x40000001, 0x40000002, 0x40000003
RUNTIME, REF_COUNT, REF_TSC, TSC_HZ, APIC_HZ = 0x40000010, 0x40000020, 0x40000021, 0x40000022, 0x40000023
APIC = (0x40000070, 0x40000071, 0x40000072)
REENLIGHTENMENT, TSC_EMULATION, TSC_EMULATED, TSC_INVARIANT = 0x40000106, 0x40000107, 0x40000108, 0x40000118
ASSIST, IDLE, CRASH_P0, CRASH_CTL = 0x40000073, 0x400000F0, 0x40000100, 0x40000105
NOTIFY, MESSAGE = 1 << 63, 1 << 62

LINUX = 0x8100_0000_0000_0000


@pytest.fixture
def vm() -> Vm:
    return Vm()


# Every MSR


def test_power_on_values(vm: Vm) -> None:
    zero = (OS_ID, HYPERCALL, RESET, REF_TSC, ASSIST, *range(CRASH_P0, CRASH_P0 + 5))
    assert {msr: vm.read(msr) for msr in zero} == dict.fromkeys(zero, 0)
    assert vm.read(CRASH_CTL) == NOTIFY | MESSAGE
    assert [vm.read(VP_INDEX, vp) for vp in (0, 1)] == [0, 1]
    assert vm.read(TSC_HZ) == TSC_KHZ * 1000
    assert vm.read(APIC_HZ) == 1_000_000_000


@pytest.mark.parametrize("msr", [VP_INDEX, RUNTIME, REF_COUNT, TSC_HZ, APIC_HZ, IDLE])
def test_read_only_msrs_fault_on_write(vm: Vm, msr: int) -> None:
    assert not vm.write(msr, 0)


@pytest.mark.parametrize("msr", [0x40000004, 0x40000074, 0x400001FF, 0x400000F1, 0x10, 0xC0000080, 0xFFFFFFFF])
def test_msrs_that_do_not_exist_fault(vm: Vm, msr: int) -> None:
    assert vm.read(msr) is None
    assert not vm.write(msr, 0)


def test_every_offered_msr_is_answered_by_python_or_c(vm: Vm) -> None:
    for name in PROFILES["full"].names:
        for msr in catalog.ENLIGHTENMENTS[name].msrs:
            in_c = vm.partition.synics[0].read_msr(msr) is not None or msr in (REF_COUNT, IDLE, *APIC)
            assert in_c != (vm.read(msr) is not None), f"{msr:#x}"


def test_runtime_counts_the_threads_time(vm: Vm) -> None:
    first = vm.read(RUNTIME)
    assert first is not None
    while (later := vm.read(RUNTIME)) == first:
        pass
    assert later is not None and later > first


def test_reset_by_msr_needs_its_bit(vm: Vm) -> None:
    assert vm.write(RESET, 0)
    assert vm.write(RESET, 2)
    assert vm.resets == 0
    assert vm.write(RESET, 1)
    assert vm.resets == 1
    assert vm.read(RESET) == 0


# The hypercall page


def test_the_hypercall_page_wants_an_identified_guest(vm: Vm) -> None:
    assert vm.write(HYPERCALL, 0x5000 | 1)
    assert vm.read(HYPERCALL) == 0x5000
    assert vm.page(0x5000) == bytes(4096)
    assert not vm.hypercalls_trap
    assert vm.write(OS_ID, LINUX)
    assert vm.read(OS_ID) == LINUX
    assert vm.write(HYPERCALL, 0x5000 | 1)
    assert vm.read(HYPERCALL) == 0x5000 | 1
    assert vm.page(0x5000) == hypercall_page.CONTENT
    assert vm.hypercalls_trap


def test_the_hypercall_page_gives_back_what_is_beneath_when_it_moves_or_goes(vm: Vm) -> None:
    vm.write(OS_ID, LINUX)
    vm.memory.write(0x5000, b"A" * 4096)
    vm.memory.write(0x6000, b"B" * 4096)
    vm.write(HYPERCALL, 0x5000 | 1)
    vm.write(HYPERCALL, 0x6000 | 1)
    assert (vm.page(0x5000), vm.page(0x6000)) == (b"A" * 4096, hypercall_page.CONTENT)
    vm.write(HYPERCALL, 0x6000 | 1)
    vm.write(HYPERCALL, 0x6000)
    assert vm.page(0x6000) == b"B" * 4096
    assert not vm.hypercalls_trap


def test_a_guest_that_drops_its_identity_loses_the_hypercall_page(vm: Vm) -> None:
    vm.write(OS_ID, LINUX)
    vm.memory.write(0x5000, b"A" * 4096)
    vm.write(HYPERCALL, 0x5000 | 1)
    vm.write(OS_ID, 0)
    assert vm.page(0x5000) == b"A" * 4096
    assert vm.read(HYPERCALL) == 0x5000
    assert not vm.hypercalls_trap


@pytest.mark.parametrize("value", [SIZE | 1, 0xFFFFF000 | 1, 1 << 52 | 1, 0x5000 | 1 | 4, 0x5000 | 1 | 0x800])
def test_a_hypercall_page_that_cannot_be_faults_and_changes_nothing(vm: Vm, value: int) -> None:
    vm.write(OS_ID, LINUX)
    vm.write(HYPERCALL, 0x5000 | 1)
    assert not vm.write(HYPERCALL, value)
    assert vm.read(HYPERCALL) == 0x5000 | 1
    assert vm.page(0x5000) == hypercall_page.CONTENT
    assert vm.page(0xFFFFF000) == b"R" * 4096


def test_a_locked_hypercall_page_stays(vm: Vm) -> None:
    vm.write(OS_ID, LINUX)
    assert vm.write(HYPERCALL, 0x5000 | 2 | 1)
    for value in (0, 0x6000 | 1, 0x5000 | 2 | 1):
        assert not vm.write(HYPERCALL, value)
    assert vm.read(HYPERCALL) == 0x5000 | 2 | 1
    assert vm.hypercalls_trap
    vm.partition.reset()
    assert vm.write(HYPERCALL, 0)


# The reference TSC page and the VP assist pages


def test_the_reference_page_gives_reference_time(vm: Vm) -> None:
    vm.memory.write(0x7000, b"A" * 4096)
    assert vm.write(REF_TSC, 0x7000 | 1)
    page = vm.page(0x7000)
    sequence, scale = int.from_bytes(page[:4], "little"), int.from_bytes(page[8:16], "little")
    offset = int.from_bytes(page[16:24], "little", signed=True)
    reference = vm.partition.reference
    assert reference is not None
    assert sequence not in (0, 0xFFFFFFFF)
    assert (scale, offset) == (reference.scale, reference.offset)
    assert page[24:] == bytes(4096 - 24)
    assert vm.write(REF_TSC, 0x7000)
    assert vm.page(0x7000) == b"A" * 4096
    assert vm.read(REF_TSC) == 0x7000


@pytest.mark.parametrize("msr", [REF_TSC, ASSIST])
@pytest.mark.parametrize("gpa", [SIZE, 0xFFFFF000, 1 << 60])
def test_pages_outside_ram_fault_and_change_nothing(vm: Vm, msr: int, gpa: int) -> None:
    assert vm.write(msr, 0x7000 | 1)
    before = vm.page(0x7000)
    assert not vm.write(msr, gpa | 1)
    assert vm.read(msr) == 0x7000 | 1
    assert vm.page(0x7000) == before


def test_each_vp_has_its_own_assist_page_zeroed_when_it_is_set(vm: Vm) -> None:
    vm.memory.write(0x8000, b"A" * 0x2000)
    assert vm.write(ASSIST, 0x8000 | 1, vp=0)
    assert vm.write(ASSIST, 0x9000 | 1, vp=1)
    assert vm.page(0x8000) == vm.page(0x9000) == bytes(4096)
    assert [vm.read(ASSIST, vp) for vp in (0, 1)] == [0x8000 | 1, 0x9000 | 1]
    vm.memory.write(0x8000, b"state")
    assert vm.write(ASSIST, 0x8000 | 1)
    assert vm.memory.read(0x8000, 5) == b"state"


# Crash reports


def report(vm: Vm, control: int, *parameters: int) -> tuple[list[int], str]:
    for number, value in enumerate(parameters):
        assert vm.write(CRASH_P0 + number, value)
    assert vm.write(CRASH_CTL, control)
    return vm.crashes[-1]


def test_a_crash_is_reported_with_its_parameters(vm: Vm) -> None:
    values = [1, 1 << 63, 3, 4, 5]
    assert report(vm, NOTIFY, *values) == (values, "")
    assert [vm.read(CRASH_P0 + number) for number in range(5)] == values


def test_nothing_is_reported_without_the_notify_bit(vm: Vm) -> None:
    assert vm.write(CRASH_CTL, MESSAGE)
    assert vm.write(CRASH_CTL, 0)
    assert vm.crashes == []


def test_a_crash_message_is_read_from_the_guest(vm: Vm) -> None:
    vm.memory.write(0xA000, b"kernel panic\nin two lines\0\0\0")
    assert report(vm, NOTIFY | MESSAGE, 0, 0, 0, 0xA000, 28)[1] == "kernel panic\nin two lines"


def test_a_crash_message_cannot_reach_the_terminal(vm: Vm) -> None:
    vm.memory.write(0xA000, b"\x1b]0;owned\x07\x9b31m\r\xff tab\t")
    message = report(vm, NOTIFY | MESSAGE, 0, 0, 0, 0xA000, 21)[1]
    assert "owned" in message
    assert all(character.isprintable() or character in "\n\t" for character in message)


@pytest.mark.parametrize(("gpa", "length"), [(SIZE - 8, 9), (1 << 63, 1), ((1 << 64) - 1, (1 << 64) - 1)])
def test_a_crash_message_outside_memory_is_still_a_report(vm: Vm, gpa: int, length: int) -> None:
    assert "cannot be read" in report(vm, NOTIFY | MESSAGE, 0, 0, 0, gpa, length)[1]


def test_a_crash_message_is_at_most_a_page(vm: Vm) -> None:
    vm.memory.write(0xA000, b"x" * 0x3000)
    assert len(report(vm, NOTIFY | MESSAGE, 0, 0, 0, 0xA000, (1 << 64) - 1)[1]) == 4096


# What is offered


def test_ports_lead_from_the_guest_to_the_host(vm: Vm) -> None:
    taken: list[Any] = []

    def port(kind: int, payload: bytes) -> bool:
        taken.append((kind, payload))
        return True

    vm.partition.connect_message_port(1, port)
    vm.memory.write(0xB000, b"\1\0\0\0\0\0\0\0\5\0\0\0\2\0\0\0hi")
    assert vm.call(0x5C, 0xB000) == 0
    assert vm.partition.forward(1, 6, b"again")
    assert taken == [(5, b"hi"), (6, b"again")]
    with pytest.raises(ValueError, match="connection id 0x1 is taken"):
        vm.partition.connect_message_port(1, port)
    vm.partition.disconnect_message_port(1)
    vm.partition.disconnect_message_port(1)
    assert not vm.partition.forward(1, 6, b"")
    assert vm.call(0x5C, 0xB000) == 0x12


def test_event_ports_lead_to_eventfds(vm: Vm) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    vm.partition.connect_event_port(0x2001, fd)
    assert vm.partition.doorbells.signal(0x2001, 0) == 0
    assert os.eventfd_read(fd) == 1
    vm.partition.disconnect_event_port(0x2001)
    assert vm.partition.doorbells.signal(0x2001, 0) == 0x12
    os.close(fd)


def test_traces_tell_the_access_and_its_end() -> None:
    stream = io.StringIO()
    vm = Vm(tracer=Tracer(["msr", "hypercall", "synic"], stream))
    assert vm.vps[0].trace_msr and vm.vps[0].trace_hypercall
    vm.partition.trace_msr(1, True, OS_ID, 5, True)
    vm.partition.trace_msr(1, False, 0x40000004, 0, False)
    vm.partition.trace_hypercall(0, 0x1005C, 0x1000, 3)
    vm.partition.post_message(0, 2, 1, b"abc")
    vm.partition.signal_event(1, 2, 7)
    lines = [line.split("] ")[1] for line in stream.getvalue().splitlines()]
    assert lines == [
        "msr: vp1 wrmsr GUEST_OS_ID = 0x5",
        "msr: vp1 rdmsr 0x40000004 = 0x0 -> #GP",
        "hypercall: vp0 HvPostMessage control 0x1005c input 0x1000: invalid hypercall input",
        "synic: vp0 sint2 message type 0x1, 3 bytes",
        "synic: vp1 sint2 event flag 7",
    ]


# The TSC


def test_the_tsc_msrs_keep_what_they_know(vm: Vm) -> None:
    for msr, value in ((REENLIGHTENMENT, 1 << 32 | 1 << 16 | 0xEE), (TSC_EMULATION, 1), (TSC_INVARIANT, 1)):
        assert vm.read(msr) == 0
        assert vm.write(msr, value)
        assert vm.read(msr) == value
    assert vm.write(TSC_EMULATED, 0)


@pytest.mark.parametrize(
    ("msr", "value"),
    [
        (REENLIGHTENMENT, 1 << 8),
        (REENLIGHTENMENT, 1 << 17),
        (REENLIGHTENMENT, 2 << 32 | 1 << 16 | 0xEE),  # there is no VP 2
        (REENLIGHTENMENT, 1 << 16 | 15),
        (TSC_EMULATION, 2),
        (TSC_EMULATED, 1),
        (TSC_INVARIANT, 3),
    ],
)
def test_the_tsc_msrs_fault_on_what_makes_no_sense(vm: Vm, msr: int, value: int) -> None:
    assert not vm.write(msr, value)
    assert vm.read(msr) == 0


@pytest.mark.parametrize(("enable", "told"), [(1, [0xEE]), (0, [])])
def test_a_guest_that_asked_hears_of_another_tsc_rate_after_restore(vm: Vm, enable: int, told: list[int]) -> None:
    vm.write(REENLIGHTENMENT, 1 << 32 | enable << 16 | 0xEE)
    same, faster = Vm(), Vm()
    same.partition.restore(vm.partition.save())
    faster.partition.restore({**vm.partition.save(), "tsc_khz": TSC_KHZ + 1})
    assert [synic.take_interrupts() for synic in same.partition.synics] == [[], []]
    assert [synic.take_interrupts() for synic in faster.partition.synics] == [[], told]


# Reset, save, restore


def set_up(vm: Vm) -> None:
    vm.memory.write(0x5000, b"A" * 4096)
    vm.memory.write(0x7000, b"B" * 4096)
    vm.write(OS_ID, LINUX)
    vm.write(HYPERCALL, 0x5000 | 1)
    vm.write(REF_TSC, 0x7000 | 1)
    vm.write(ASSIST, 0x9000 | 1, vp=1)
    vm.write(CRASH_P0 + 4, 77)
    vm.partition.synics[1].write_msr(0x40000080, 1, 0)
    vm.partition.post_message(1, 2, 1, b"waits")


def test_reset_brings_back_the_power_on_state(vm: Vm) -> None:
    fresh = vm.partition.save()
    set_up(vm)
    vm.partition.reset()
    assert vm.partition.save() == fresh
    assert not vm.hypercalls_trap
    assert vm.page(0x5000) == hypercall_page.CONTENT, "memory is not the partition's any more"


def test_a_restored_partition_goes_on_where_the_saved_one_was(vm: Vm) -> None:
    set_up(vm)
    other = Vm()
    other.memory.write(0, vm.memory.read(0, SIZE))
    other.partition.restore(vm.partition.save())
    assert other.partition.save() == vm.partition.save()
    assert other.hypercalls_trap
    other.write(HYPERCALL, 0)
    other.write(REF_TSC, 0)
    assert (other.page(0x5000), other.page(0x7000)) == (b"A" * 4096, b"B" * 4096)
    assert other.partition.inspect()["synics"][1]["messages_queued"] == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2},
        {"synics": []},
        {"assist": [0]},
        {"crash": [0]},
        {"crash": [0, 0, 0, 0, "x"]},
        {"guest_os_id": -1},
        {"hypercall": 1 << 64},
        {"hypercall_page": {"gpa": 0x5000, "beneath": b"short"}},
        {"hypercall_page": {"gpa": SIZE, "beneath": bytes(4096)}},
        {"reference_page": {}},
        {"synics": [{}, {}]},
    ],
)
def test_saved_state_that_does_not_fit_is_refused(vm: Vm, damage: dict[str, Any]) -> None:
    set_up(vm)
    state = {**vm.partition.save(), **damage}
    with pytest.raises(ValueError, match="saved"):
        Vm().partition.restore(state)


def test_inspect_is_plain_data(vm: Vm) -> None:
    import json

    set_up(vm)
    found = json.loads(json.dumps(vm.partition.inspect()))
    assert found["guest_os_id"] == "0x8100000000000000"
    assert found["hypercall_page"] == 0x5000
    assert len(found["synics"]) == 2


_ADDRESSES = st.one_of(st.sampled_from([0x5000, 0x6000, SIZE, 0xFFFFF000]), st.integers(0, (1 << 52) - 1))
_VALUES = st.one_of(
    st.tuples(_ADDRESSES, st.integers(0, 7)).map(lambda p: p[0] & ~0xFFF | p[1]), st.integers(0, (1 << 64) - 1)
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(OS_ID, OS_ID + 0x10F), st.integers(0, 1), _VALUES), max_size=40))
def test_any_writes_leave_a_consistent_partition(writes: list[tuple[int, int, int]]) -> None:
    vm = Vm()
    for msr, vp, value in writes:
        vm.write(msr, value, vp)
        vm.read(msr, vp) if msr != IDLE else None
    assert vm.hypercalls_trap == bool((vm.read(HYPERCALL) or 0) & 1)
    if vm.hypercalls_trap:
        assert vm.read(OS_ID)
    assert vm.page(0xFFFFF000) == b"R" * 4096
    state = vm.partition.save()
    other = Vm()
    other.partition.restore(state)
    assert other.partition.save() == state
