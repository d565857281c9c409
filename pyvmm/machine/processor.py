"""A VP of the machine: its thread, its CPUID and its registers at the start."""

from __future__ import annotations

import threading
from collections import deque

from pyvmm.boot.entry import CODE_SELECTOR, DATA_SELECTOR
from pyvmm.core.kvm import abi, capabilities

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.boot.entry import EntryState
    from pyvmm.core import _hot
    from pyvmm.core.kvm.system import System
    from pyvmm.core.kvm.vp import Vp

_CR0_PE, _CR0_NE, _CR0_PG = 1 << 0, 1 << 5, 1 << 31
_CR0_ET, _CR0_MP = 1 << 4, 1 << 1
_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_RFLAGS_RESERVED = 2
#: How often a VP that waits for another looks whether the other waits for it.
_LOOK_ROUND_S = 0.001


class _Request:
    """Something that one VP's thread asks of another's."""

    __slots__ = ("action", "done", "result")

    def __init__(self, action: Callable[[], int]) -> None:
        self.action = action
        self.done = threading.Event()
        self.result = 0


class Processor:
    """One VP and the thread that runs it.

    `on_exit` gets the processor and the KVM exit reason of an exit that ends the guest, `on_error` what a device
    or handler raised; both on the VP's thread, which parks itself afterwards.
    """

    def __init__(
        self,
        vp: Vp,
        hot: _hot.Vp,
        on_exit: Callable[[Processor, int], None],
        on_error: Callable[[Processor, BaseException], None],
    ) -> None:
        self.vp = vp
        self.hot = hot
        self._on_exit = on_exit
        self._on_error = on_error
        self._changed = threading.Condition()  # guards and tells of the three below
        self._go = False
        self._parked = True
        self._ending = False
        self._requests: deque[_Request] = deque()  # of other VPs' threads
        self._thread = threading.Thread(target=self._main, name=f"vp{vp.index}", daemon=True)

    def enter(self, entry: EntryState) -> None:
        """Set the registers as `entry` asks; the VP is the one that boots and is in its power-on state."""
        if entry.mode == "reset":
            return
        long_mode = entry.mode == "long64"
        sregs = self.vp.get_sregs()
        code = abi.Segment(
            base=0,
            limit=0xFFFF_FFFF,
            selector=CODE_SELECTOR,
            type=11,
            present=1,
            dpl=0,
            db=not long_mode,
            s=1,
            l=long_mode,
            g=1,
        )
        data = abi.Segment(
            base=0, limit=0xFFFF_FFFF, selector=DATA_SELECTOR, type=3, present=1, dpl=0, db=1, s=1, l=0, g=1
        )
        sregs.cs = code
        sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = data
        sregs.gdt.base, sregs.gdt.limit = entry.gdt_base, entry.gdt_limit
        sregs.idt.base, sregs.idt.limit = 0, 0
        sregs.cr0 = _CR0_NE | _CR0_ET | _CR0_MP | _CR0_PE
        sregs.cr3 = entry.cr3
        if long_mode:
            sregs.cr0 |= _CR0_PG
            sregs.cr4 = _CR4_PAE
            sregs.efer = _EFER_LME | _EFER_LMA
        self.vp.set_sregs(sregs)
        registers = {name: getattr(entry, name) for name in ("rax", "rbx", "rip", "rsi", "rsp")}
        self.vp.set_regs(abi.Regs(**registers, rflags=_RFLAGS_RESERVED))

    def start(self) -> None:
        """Start the thread, parked."""
        self._thread.start()

    def release(self) -> None:
        """Let the guest run."""
        with self._changed:
            self._go = True
            self._changed.notify_all()

    def halt(self) -> None:
        """Make the guest stop soon; any thread, also the VP's own."""
        with self._changed:
            self._go = False
        self.hot.stop()

    def ask(self, other: Processor, action: Callable[[], int]) -> int | None:
        """Have `action` done on the thread of `other`, outside the guest; on this VP's own thread, from within `run`.

        What others ask of this one is done meanwhile, so that two VPs can ask each other. None if `other` ends instead.
        """
        request = _Request(action)
        other._requests.append(request)
        other.hot.stop()
        with other._changed:
            other._changed.notify_all()
        while not request.done.wait(_LOOK_ROUND_S):
            if other._ending:
                return None
            self._do_requests()
        return request.result

    def _do_requests(self) -> None:
        while self._requests:
            request = self._requests.popleft()
            request.result = request.action()
            request.done.set()

    def wait_parked(self) -> None:
        """Return once the thread is out of the guest and of every device. Never on the VP's own thread."""
        with self._changed:
            while not self._parked:
                self._changed.wait()

    def end(self) -> None:
        """End the thread."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self.halt()
        if self._thread.ident is not None:
            self._thread.join()

    def registers(self) -> dict[str, str]:
        """Where the guest is, for people; only while the thread is parked."""
        regs, sregs = self.vp.get_regs(), self.vp.get_sregs()
        return {
            **{name: f"{getattr(regs, name):#x}" for name in ("rip", "rsp", "rflags")},
            **{name: f"{getattr(sregs, name):#x}" for name in ("cr2", "cr3")},
            "gs_base": f"{sregs.gs.base:#x}",
            "mp_state": str(self.vp.get_mp_state()),
        }

    def _main(self) -> None:
        while self._may_run():
            try:
                self._do_requests()
                reason = self.hot.run()
                if reason != abi.EXIT_INTR:
                    self._forbid()
                    self._on_exit(self, reason)
            except BaseException as error:  # noqa: BLE001 - handed to the machine
                self._forbid()
                self._on_error(self, error)

    def _may_run(self) -> bool:
        with self._changed:
            while not self._go and not self._ending:
                self._do_requests()
                self._parked = True
                self._changed.notify_all()
                self._changed.wait()
            self._parked = self._ending
            self._changed.notify_all()
            return not self._ending

    def _forbid(self) -> None:
        with self._changed:
            self._go = False


def host_features(system: System, supported: list[abi.CpuidEntry]) -> set[str]:
    """Which of `enlightenments.catalog.HOST_FEATURES` this host has; `supported` are the CPUID leaves of its KVM."""
    features = set()
    if system.check_extension(capabilities.HYPERV):
        features.add("kvm-hyperv")
    if any(leaf.function == 0x8000_0007 and leaf.edx >> 8 & 1 for leaf in supported):
        features.add("invariant-tsc")
    return features


def guest_cpuid(
    supported: list[abi.CpuidEntry], hypervisor: dict[int, tuple[int, int, int, int]], vp: int, vp_count: int
) -> list[abi.CpuidEntry]:
    """The CPUID leaves of one VP: the host's without KVM's own, its place in the topology, and Hyper-V's leaves.

    All VPs are cores of one package with one thread each; the APIC id is the VP's index.
    Sources: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.
    """
    core_bits = (vp_count - 1).bit_length()
    leaves: list[abi.CpuidEntry] = []
    for source in supported:
        if 0x4000_0000 <= source.function <= 0x4FFF_FFFF:
            continue  # Linux would prefer a KVM signature to Hyper-V's
        entry = abi.CpuidEntry.from_buffer_copy(source)
        if entry.function == 0x1:
            entry.ebx = entry.ebx & 0xFFFF | vp_count << 16 | vp << 24
            entry.ecx = entry.ecx | 1 << 31 if hypervisor else entry.ecx & ~(1 << 31)
            entry.edx = entry.edx | 1 << 28 if vp_count > 1 else entry.edx & ~(1 << 28)
        elif entry.function == 0x4 and entry.eax & 0x1F:
            shared = (vp_count - 1 if entry.eax >> 5 & 7 == 3 else 0) << 14  # only the last level is shared
            entry.eax = entry.eax & 0x3FFF | shared | (vp_count - 1) << 26
        elif entry.function in (0xB, 0x1F):
            continue  # made below
        elif entry.function == 0x8000_0008:
            entry.ecx = core_bits << 12 | vp_count - 1
        elif entry.function == 0x8000_001D and entry.eax & 0x1F:
            shared = (vp_count - 1 if entry.eax >> 5 & 7 == 3 else 0) << 14
            entry.eax = entry.eax & 0x3FFF | shared
        elif entry.function == 0x8000_001E:
            entry.eax, entry.ebx, entry.ecx = vp, vp, 0
        leaves.append(entry)
    if any(entry.function == 0 and entry.eax >= 0xB for entry in leaves):
        for index, (shift, count, kind) in enumerate(((0, 1, 1), (core_bits, vp_count, 2), (0, 0, 0))):
            leaves.append(
                abi.CpuidEntry(
                    function=0xB,
                    index=index,
                    flags=abi.CPUID_FLAG_SIGNIFICANT_INDEX,
                    eax=shift,
                    ebx=count,
                    ecx=kind << 8 | index,
                    edx=vp,
                )
            )
    for number, (eax, ebx, ecx, edx) in hypervisor.items():
        leaves.append(abi.CpuidEntry(function=number, eax=eax, ebx=ebx, ecx=ecx, edx=edx))
    return leaves


def signatures(leaves: list[abi.CpuidEntry]) -> dict[str, str]:
    """The hypervisors that CPUID `leaves` tell of: by leaf, what stands in EBX, ECX and EDX. Every 0x100 leaves there
    may be one (Linux ``arch/x86/include/asm/processor.h``, hypervisor_cpuid_base)."""
    return {
        f"{leaf.function:#x}": b"".join(part.to_bytes(4, "little") for part in (leaf.ebx, leaf.ecx, leaf.edx))
        .rstrip(b"\0")
        .decode("latin-1")
        for leaf in leaves
        if 0x4000_0000 <= leaf.function <= 0x4FFF_FFFF and not leaf.function & 0xFF
    }


def power_on_states(vps: list[Processor], msr_indices: list[int]) -> list[dict[str, Any]]:
    """The VPs' states right after they were made, to come back to at a reset."""
    return [processor.vp.get_state(msr_indices) for processor in vps]
