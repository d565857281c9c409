"""The enlightenments: each one's CPUID bits, MSRs and hypercalls in one place.

All else follows from these entries: the CPUID leaves, which MSRs and hypercalls answer, the help texts, the
documentation's table and the JSON schema. Names are those of QEMU's ``hv-*`` properties where it has one. Bits and
numbers: TLFS v6.0b, chapter 2 and appendices; Linux ``include/asm-generic/hyperv-tlfs.h`` and
``arch/x86/include/asm/hyperv-tlfs.h``.
"""

from __future__ import annotations

from enlightenments.tlfs import (
    FEATURES,
    HVCALL_EXT_QUERY_CAPABILITIES,
    HVCALL_FLUSH_LIST,
    HVCALL_FLUSH_LIST_EX,
    HVCALL_FLUSH_SPACE,
    HVCALL_FLUSH_SPACE_EX,
    HVCALL_GET_VP_REGISTERS,
    HVCALL_LONG_SPIN_WAIT,
    HVCALL_POST_MESSAGE,
    HVCALL_SEND_IPI,
    HVCALL_SEND_IPI_EX,
    HVCALL_SET_VP_REGISTERS,
    HVCALL_SIGNAL_EVENT,
    HVCALL_START_VP,
    HVCALL_VP_INDEX_FROM_APIC_ID,
    MSR_APIC_FREQUENCY,
    MSR_BASE,
    MSR_COUNT,
    MSR_CRASH_CTL,
    MSR_CRASH_P0,
    MSR_EOI,
    MSR_EOM,
    MSR_GUEST_IDLE,
    MSR_GUEST_OS_ID,
    MSR_HYPERCALL,
    MSR_ICR,
    MSR_REENLIGHTENMENT_CONTROL,
    MSR_REFERENCE_TSC,
    MSR_RESET,
    MSR_SCONTROL,
    MSR_SINT0,
    MSR_STIMER0_CONFIG,
    MSR_TIME_REF_COUNT,
    MSR_TPR,
    MSR_TSC_EMULATION_CONTROL,
    MSR_TSC_EMULATION_STATUS,
    MSR_TSC_FREQUENCY,
    MSR_TSC_INVARIANT_CONTROL,
    MSR_VP_ASSIST_PAGE,
    MSR_VP_INDEX,
    MSR_VP_RUNTIME,
    RECOMMENDATIONS,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class Enlightenment:
    """One switchable part of the interface.

    `purpose` says what it is and `gain` what a guest has from it. `bits` are (leaf, register, bit) of CPUID; `needs`
    names enlightenments without which it makes no sense; `host` names what the host must have beside KVM's usual
    (a key of `HOST_FEATURES`). `source` is where it is described.
    """

    __slots__ = ("bits", "gain", "host", "hypercalls", "msrs", "name", "needs", "purpose", "source")

    def __init__(
        self,
        name: str,
        purpose: str,
        *,
        gain: str,
        source: str,
        bits: tuple[tuple[int, str, int], ...] = (),
        msrs: Iterable[int] = (),
        hypercalls: tuple[int, ...] = (),
        needs: tuple[str, ...] = (),
        host: str | None = None,
    ) -> None:
        self.name = name
        self.purpose = purpose
        self.gain = gain
        self.source = source
        self.bits = bits
        self.msrs = tuple(msrs)
        self.hypercalls = hypercalls
        self.needs = needs
        self.host = host


#: What some enlightenments need of the host, and what that is.
HOST_FEATURES = {
    "kvm-hyperv": "a KVM built with CONFIG_KVM_HYPERV, to write the LAPIC's registers",
    "invariant-tsc": "a TSC of constant rate (CPUID 0x80000007 EDX bit 8)",
}

_ALL = (
    Enlightenment(
        "base",
        "guest OS id, hypercall page and VP assist page",
        gain="what makes a hypervisor Hyper-V to its guest",
        source="TLFS 2.6, 3.13, 7.8.7",
        bits=((FEATURES, "eax", 5), (FEATURES, "edx", 18)),
        # Linux sets the VP assist page without asking whether it is offered (arch/x86/hyperv/hv_init.c).
        msrs=(MSR_GUEST_OS_ID, MSR_HYPERCALL, MSR_VP_ASSIST_PAGE),
    ),
    Enlightenment(
        "vpindex",
        "the VP's number",
        gain="interrupts and hypercalls name VPs by it; Linux and Windows want it",
        source="TLFS 7.2, 7.8.1",
        bits=((FEATURES, "eax", 6),),
        msrs=(MSR_VP_INDEX,),
        needs=("base",),
    ),
    Enlightenment(
        "reset",
        "reset by MSR",
        gain="a restart that needs no keyboard controller or ACPI",
        source="TLFS appendix F; Linux hyperv-tlfs.h",
        bits=((FEATURES, "eax", 7),),
        msrs=(MSR_RESET,),
        needs=("base",),
    ),
    Enlightenment(
        "runtime",
        "time that the VP ran",
        gain="accounting that knows of stolen time",
        source="TLFS 7.9.1",
        bits=((FEATURES, "eax", 0),),
        msrs=(MSR_VP_RUNTIME,),
        needs=("base",),
    ),
    Enlightenment(
        "time",
        "reference time by MSR and by the reference TSC page",
        gain="a clock that needs no exit and no calibration",
        source="TLFS 12.4, 12.7",
        bits=((FEATURES, "eax", 1), (FEATURES, "eax", 9)),
        msrs=(MSR_TIME_REF_COUNT, MSR_REFERENCE_TSC),
        needs=("base",),
    ),
    Enlightenment(
        "frequencies",
        "TSC and APIC frequency",
        gain="the guest need not measure them",
        source="TLFS 2.4.4; Linux arch/x86/kernel/cpu/mshyperv.c",
        bits=((FEATURES, "eax", 11), (FEATURES, "edx", 8)),
        msrs=(MSR_TSC_FREQUENCY, MSR_APIC_FREQUENCY),
        needs=("base",),
    ),
    Enlightenment(
        "tsc-invariant",
        "the guest's word that it trusts the TSC",
        gain="Linux takes the TSC for stable",
        source="TLFS 8.7; Linux arch/x86/kernel/cpu/mshyperv.c",
        bits=((FEATURES, "eax", 15),),
        msrs=(MSR_TSC_INVARIANT_CONTROL,),
        needs=("base",),
        host="invariant-tsc",
    ),
    Enlightenment(
        "reenlightenment",
        "an interrupt when the TSC's rate has changed, as after a move to another host",
        gain="a guest that passes time on, to its own guests say, hears of the change",
        source="TLFS 12.7.3; Linux arch/x86/hyperv/hv_init.c",
        bits=((FEATURES, "eax", 13),),
        msrs=(MSR_REENLIGHTENMENT_CONTROL, MSR_TSC_EMULATION_CONTROL, MSR_TSC_EMULATION_STATUS),
        needs=("time", "frequencies"),
    ),
    Enlightenment(
        "synic",
        "synthetic interrupts, messages and event flags",
        gain="VMBus and synthetic timers stand on it",
        source="TLFS 11",
        bits=((FEATURES, "eax", 2), (FEATURES, "ebx", 4), (FEATURES, "ebx", 5), (FEATURES, "edx", 17)),
        msrs=(*range(MSR_SCONTROL, MSR_EOM + 1), *range(MSR_SINT0, MSR_SINT0 + 16)),
        hypercalls=(HVCALL_POST_MESSAGE, HVCALL_SIGNAL_EVENT),
        needs=("base", "vpindex"),
    ),
    Enlightenment(
        "avic",
        "advice against SINTs that need no EOI",
        gain="a guest that writes the EOI itself gets its interrupts sooner",
        source="TLFS 2.4.5",
        bits=((RECOMMENDATIONS, "eax", 9),),
        needs=("synic",),
    ),
    Enlightenment(
        "stimer",
        "four synthetic timers a VP",
        gain="timers by reference time; an idle Windows has far fewer exits",
        source="TLFS 12.1.3, 12.5",
        bits=((FEATURES, "eax", 3),),
        msrs=range(MSR_STIMER0_CONFIG, MSR_STIMER0_CONFIG + 8),
        needs=("synic", "time"),
    ),
    Enlightenment(
        "stimer-direct",
        "synthetic timers that interrupt without a message",
        gain="a timer tick without message and EOM",
        source="TLFS 12.2",
        bits=((FEATURES, "edx", 19),),
        needs=("stimer",),
    ),
    Enlightenment(
        "idle",
        "idling by MSR until an interrupt comes",
        gain="a spinning VP can wait with interrupts off",
        source="TLFS 7.5",
        bits=((FEATURES, "eax", 10), (FEATURES, "edx", 5)),
        msrs=(MSR_GUEST_IDLE,),
        needs=("base",),
    ),
    Enlightenment(
        "vapic",
        "EOI, ICR and TPR by MSR, and EOIs that the VP assist page saves",
        gain="most interrupts end without an exit",
        source="TLFS 10.2.3, 10.3.5",
        bits=((FEATURES, "eax", 4), (RECOMMENDATIONS, "eax", 3)),
        msrs=(MSR_EOI, MSR_ICR, MSR_TPR),
        needs=("base",),
        host="kvm-hyperv",
    ),
    Enlightenment(
        "spinlocks",
        "word from a guest that spins for a lock",
        gain="the host lets somebody else run, perhaps the lock's holder",
        source="TLFS 14.3.1, 14.5.1",
        hypercalls=(HVCALL_LONG_SPIN_WAIT,),
        needs=("base",),
    ),
    Enlightenment(
        "tlbflush",
        "TLB flushes of other VPs by hypercall",
        gain="one call instead of an interrupt and an EOI for each target",
        source="TLFS 9.4.2 to 9.4.5",
        bits=((RECOMMENDATIONS, "eax", 2), (RECOMMENDATIONS, "eax", 11)),
        hypercalls=(HVCALL_FLUSH_SPACE, HVCALL_FLUSH_LIST, HVCALL_FLUSH_SPACE_EX, HVCALL_FLUSH_LIST_EX),
        needs=("vpindex",),
    ),
    Enlightenment(
        "tlbflush-ext",
        "ranges of large pages in lists of flushes",
        gain="shorter lists",
        source="TLFS 9.4.5",
        bits=((FEATURES, "edx", 14),),
        needs=("tlbflush",),
    ),
    Enlightenment(
        "ipi",
        "interrupts to many VPs by one hypercall",
        gain="one exit instead of one for each target",
        source="TLFS 10.5.2, 10.5.3",
        bits=((RECOMMENDATIONS, "eax", 10), (RECOMMENDATIONS, "eax", 11)),
        hypercalls=(HVCALL_SEND_IPI, HVCALL_SEND_IPI_EX),
        needs=("vpindex",),
    ),
    Enlightenment(
        "xmm-input",
        "hypercall input in XMM registers",
        gain="longer inputs without memory",
        source="TLFS 3.7.2",
        bits=((FEATURES, "edx", 4),),
        needs=("base",),
    ),
    Enlightenment(
        "vp-registers",
        "synthetic registers by hypercall",
        gain="several registers at once, by name",
        source="TLFS 7.10.1, 7.10.2",
        bits=((FEATURES, "ebx", 17),),
        hypercalls=(HVCALL_GET_VP_REGISTERS, HVCALL_SET_VP_REGISTERS),
        needs=("vpindex",),
    ),
    Enlightenment(
        "start-vp",
        "starting a VP where it is wanted, in any mode",
        gain="no INIT, no SIPI, no real-mode trampoline",
        source="TLFS 7.10.3, 7.10.4",
        bits=((FEATURES, "ebx", 21),),
        hypercalls=(HVCALL_START_VP, HVCALL_VP_INDEX_FROM_APIC_ID),
        needs=("vpindex",),
    ),
    Enlightenment(
        "ext-hypercalls",
        "the query for extended hypercalls, of which there are none",
        gain="a guest that asks gets an answer",
        source="TLFS 3.14.1",
        bits=((FEATURES, "ebx", 20),),
        hypercalls=(HVCALL_EXT_QUERY_CAPABILITIES,),
        needs=("base",),
    ),
    Enlightenment(
        "crash",
        "crash report by MSR",
        gain="the host learns why a guest died",
        source="TLFS 4.3",
        bits=((FEATURES, "edx", 10),),
        msrs=range(MSR_CRASH_P0, MSR_CRASH_CTL + 1),
        needs=("base",),
    ),
    Enlightenment(
        "relaxed",
        "no deadlines for interrupts",
        gain="no watchdog panics on a busy host",
        source="TLFS 2.4.5",
        bits=((RECOMMENDATIONS, "eax", 5),),
        needs=("base",),
    ),
    Enlightenment(
        "vmbus",
        "the VMBus and its synthetic devices",
        gain="disks and services by the guest's own Hyper-V drivers",
        source="Linux drivers/hv",
        needs=("synic",),
    ),
)

ENLIGHTENMENTS: dict[str, Enlightenment] = {entry.name: entry for entry in _ALL}


def msr_bitmap(names: Iterable[str]) -> bytes:
    """The MSRs that enlightenments offer, a bit each from `MSR_BASE`."""
    bitmap = bytearray(MSR_COUNT // 8)
    for name in names:
        for msr in ENLIGHTENMENTS[name].msrs:
            bitmap[(msr - MSR_BASE) // 8] |= 1 << (msr - MSR_BASE) % 8
    return bytes(bitmap)


def hypercalls_of(names: Iterable[str]) -> frozenset[int]:
    """The call codes that enlightenments offer."""
    return frozenset(code for name in names for code in ENLIGHTENMENTS[name].hypercalls)
