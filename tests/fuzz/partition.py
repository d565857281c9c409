"""Any order of MSR accesses, hypercalls and the host's own acts on a partition without KVM, and what always holds."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from enlightenments import catalog, tlfs
from enlightenments.hypercalls import LAYOUTS
from tests.fakes.partition import SIZE, VP_COUNT, Vm

ROM, PAGE = 0xFFFF_F000, 4096
STEPS = 50

_SPECS = ["full,+tlbflush,+tlbflush-ext,+ipi", "full,+tlbflush,+tlbflush-ext,+ipi", "full", "windows-server-2008"]
_CODES = [layout[0] for layout in LAYOUTS]
_PAGE_MSRS = (
    *(tlfs.MSR_HYPERCALL, tlfs.MSR_REFERENCE_TSC, tlfs.MSR_VP_ASSIST_PAGE),
    *(tlfs.MSR_SIMP, tlfs.MSR_SIEFP),
)
_TIMERS = range(tlfs.MSR_STIMER0_CONFIG, tlfs.MSR_STIMER0_CONFIG + 8)

_words = st.integers(0, (1 << 64) - 1)
_vps = st.integers(0, VP_COUNT - 1)
#: Few pages, so that overlays meet.
_pages = st.one_of(st.sampled_from([PAGE * i for i in range(1, 7)]), st.sampled_from([SIZE - PAGE, SIZE, ROM]))
_gpas = st.one_of(st.builds(lambda page, at: page + 8 * at, _pages, st.integers(0, 511)), _words)
_values = st.one_of(
    st.builds(lambda page, low: page | low, _pages, st.integers(0, 3)),
    st.integers(0, 0x1FFF),
    st.builds(lambda sint, low: sint << 16 | low, st.integers(0, 15), st.integers(0, 0x1FFF)),
    st.integers(0, 1 << 27),
    _words,
)
_msrs = st.one_of(
    st.sampled_from([tlfs.MSR_SCONTROL, tlfs.MSR_GUEST_OS_ID, tlfs.MSR_EOM, *_PAGE_MSRS, *_TIMERS]),
    st.sampled_from(sorted(tlfs.MSR_NAMES)),
    st.integers(tlfs.MSR_BASE, tlfs.MSR_BASE + tlfs.MSR_COUNT - 1),
)
_controls = st.one_of(
    st.builds(
        lambda code, fast, words, count, start: code | fast << 16 | words << 17 | count << 32 | start << 48,
        st.sampled_from(_CODES),
        st.integers(0, 1),
        st.sampled_from([0, 0, 0, 1, 2, 511]),
        st.sampled_from([0, 0, 1, 2, 5, 300]),
        st.sampled_from([0, 0, 0, 1, 4]),
    ),
    _words,
)
#: Input blocks that get past the first checks: partition and VP of the caller, sets of VPs, register names.
_inputs = st.one_of(
    st.binary(max_size=320),
    st.lists(
        st.sampled_from([(1 << 64) - 1, 0xFFFF_FFFE, 0, 1, 2, 0x9_0002, 0xA_0010, 0xB_0000, 0x40, 240 << 32 | 1]),
        max_size=40,
    ).map(lambda words: b"".join(word.to_bytes(8, "little") for word in words)),
)


class PartitionMachine(RuleBasedStateMachine):
    """One partition; the fake around it has no KVM, and keeps interrupts."""

    @initialize(spec=st.sampled_from(_SPECS))
    def power_on(self, spec: str) -> None:
        self.spec = spec
        self.vm = Vm(spec)
        self.now = 1000
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        offered = catalog.msr_bitmap(self.vm.partition.chosen.names)
        self.offered = {i + tlfs.MSR_BASE for i in range(tlfs.MSR_COUNT) if offered[i // 8] >> i % 8 & 1}
        self.expected = self._ram()

    def teardown(self) -> None:
        if hasattr(self, "bell"):
            os.close(self.bell)

    def _ram(self) -> bytes:
        return self.vm.memory.read(0, SIZE)

    def _named_pages(self) -> set[int]:
        """The pages that MSRs name."""
        pages = {self.vm.read(msr, vp) or 0 for msr in _PAGE_MSRS[:3] for vp in range(VP_COUNT)}
        pages |= {synic.read_msr(msr) or 0 for msr in _PAGE_MSRS[3:] for synic in self.vm.partition.synics}
        overlays = (self.vm.partition.inspect()[name] or 0 for name in ("hypercall_page", "reference_page"))
        return {page & ~0xFFF for page in (*pages, *overlays)}

    def _only_named_pages_changed(self, before: set[int], *written: int) -> None:
        """Compare RAM with what it was before the step; `before` are the pages that were named then."""
        ram, pages = self._ram(), before | self._named_pages() | {gpa & ~0xFFF for gpa in written}
        if ram != self.expected:
            changed = {at for at in range(0, SIZE, PAGE) if ram[at : at + PAGE] != self.expected[at : at + PAGE]}
            assert changed <= pages, f"pages {changed - pages} have changed, which nobody named"
        self.expected = ram

    # The guest

    @rule(msr=_msrs, vp=_vps, value=_values)
    def write_msr(self, msr: int, vp: int, value: int) -> None:
        if msr not in self.offered:
            return  # the run loop faults before
        before, synic = self._named_pages(), self.vm.partition.synics[vp]
        known = synic.read_msr(msr) is not None
        valid = synic.write_msr(msr, value, self.now) if known else self.vm.write(msr, value, vp)
        assert valid in (True, False)
        if known:
            self._scan(vp)
        self._only_named_pages_changed(before)

    @rule(msr=_msrs, vp=_vps)
    def read_msr(self, msr: int, vp: int) -> None:
        for value in (self.vm.partition.synics[vp].read_msr(msr), self.vm.read(msr, vp)):
            assert value is None or 0 <= value < 1 << 64
        assert self._ram() == self.expected

    @rule(control=_controls, vp=_vps, block=_inputs, source=_gpas, output=_gpas, registers=st.booleans())
    def hypercall(self, control: int, vp: int, block: bytes, source: int, output: int, registers: bool) -> None:
        xmm = block[16:112].ljust(96, b"\0")
        if registers:
            source, output = (int.from_bytes(block[at : at + 8].ljust(8, b"\0"), "little") for at in (0, 8))
        elif source % PAGE + len(block) <= PAGE and source + len(block) <= SIZE:
            self.vm.memory.write(source, block)
        self.expected, before = self._ram(), self._named_pages()
        result = self.vm.call(control, source, output, xmm, vp)
        assert result & 0xFFFF_FFFF in tlfs.STATUS_NAMES
        assert result >> 32 <= control >> 32 & 0xFFF
        self._only_named_pages_changed(before, output)

    @rule(gpa=_pages, at=st.integers(0, PAGE - 64), content=st.binary(max_size=64))
    def write_memory(self, gpa: int, at: int, content: bytes) -> None:
        if gpa < SIZE:
            self.vm.memory.write(gpa + at, content)
            self.expected = self._ram()

    @rule(page=_pages)
    def free_slots(self, page: int) -> None:
        if page < SIZE:
            for slot in range(16):
                self.vm.memory.write(page + 256 * slot, bytes(4))
            self.expected = self._ram()

    @rule(vp=_vps, passed=st.one_of(st.integers(0, 100_000), st.integers(0, 1 << 50)))
    def time_passes(self, vp: int, passed: int) -> None:
        self.now += passed
        before = self._named_pages()
        self._scan(vp)
        self._only_named_pages_changed(before)

    def _scan(self, vp: int) -> None:
        deadline = self.vm.partition.synics[vp].scan(self.now)
        assert deadline == 0 or deadline > self.now

    # The host

    @rule(vp=_vps, sint=st.integers(0, 15), kind=st.integers(1, (1 << 32) - 1), payload=st.binary(max_size=240))
    def post_message(self, vp: int, sint: int, kind: int, payload: bytes) -> None:
        self.vm.partition.post_message(vp, sint, kind, payload)
        assert self._ram() == self.expected  # only the VP's own scan writes slots

    @rule(vp=_vps, sint=st.integers(0, 15), flag=st.integers(0, 2047))
    def signal_event(self, vp: int, sint: int, flag: int) -> None:
        before = self._named_pages()
        self.vm.partition.signal_event(vp, sint, flag)
        self._only_named_pages_changed(before)

    @rule(vp=_vps, sint=st.integers(0, 15))
    def raise_sint(self, vp: int, sint: int) -> None:
        self.vm.partition.raise_sint(vp, sint)

    @rule(connection=st.integers(0, 3), message=st.booleans(), connect=st.booleans())
    def change_port(self, connection: int, message: bool, connect: bool) -> None:
        partition = self.vm.partition
        if not connect:
            (partition.disconnect_message_port if message else partition.disconnect_event_port)(connection)
            return
        with suppress(ValueError):  # taken
            if message:
                partition.connect_message_port(connection, lambda kind, payload: kind != 2 and len(payload) <= 240)
            else:
                partition.connect_event_port(connection, self.bell)

    @rule()
    def take_interrupts(self) -> None:
        for synic in self.vm.partition.synics:
            assert all(0 <= vector <= 255 for vector in synic.take_interrupts())

    @rule()
    def reset(self) -> None:
        before = self._named_pages()
        self.vm.partition.reset()
        self._only_named_pages_changed(before)
        assert not self.vm.hypercalls_trap

    @rule()
    def go_on_elsewhere(self) -> None:
        """Save, restore in a new machine, and go on there."""
        state, other = self.vm.partition.save(), Vm(self.spec)
        other.memory.write(0, self.expected)
        other.partition.restore(state)
        assert other.partition.save() == state
        assert other.memory.read(0, SIZE) == self.expected
        self.vm = other

    # Always

    @invariant()
    def rom_stays(self) -> None:
        if hasattr(self, "vm"):
            assert self.vm.memory.read(ROM, PAGE) == b"R" * PAGE

    @invariant()
    def hypercalls_are_those_of_an_identified_guest(self) -> None:
        if hasattr(self, "vm"):
            enabled = (self.vm.read(tlfs.MSR_HYPERCALL) or 0) & 1
            assert self.vm.hypercalls_trap == bool(enabled)
            assert not enabled or self.vm.read(tlfs.MSR_GUEST_OS_ID)

    @invariant()
    def queues_are_bounded(self) -> None:
        if hasattr(self, "vm"):
            for synic in self.vm.partition.synics:
                assert synic.inspect()["messages_queued"] <= 16 * 32


def run(first_seed: int, seconds: float, examples: int = 200) -> str:
    """Fuzz in rounds of `examples`, each with its own seed, until the time is up; return what was done.

    What a machine raises comes out, after Hypothesis has shown the steps that lead there.
    """
    chosen = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    started, rounds = time.monotonic(), 0
    while not rounds or time.monotonic() - started < seconds:
        machine = seed(first_seed + rounds)(type("PartitionMachine", (PartitionMachine,), {}))
        try:
            run_state_machine_as_test(machine, settings=chosen)
        except BaseException:
            print(f"partition: repeat with --seed {first_seed + rounds}")
            raise
        rounds += 1
    took = time.monotonic() - started
    return (
        f"seeds {first_seed} to {first_seed + rounds - 1}: {rounds * examples} lives of {STEPS} steps in {took:.1f} s"
    )
