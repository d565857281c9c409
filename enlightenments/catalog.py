"""The enlightenments: each one's CPUID bits, MSRs and hypercalls in one place, and the profiles made of them.

Names are those of QEMU's ``hv-*`` properties where it has one. Bits and numbers: TLFS v6.0b, chapter 2 and
appendices; Linux ``include/asm-generic/hyperv-tlfs.h`` and ``arch/x86/include/asm/hyperv-tlfs.h``.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: CPUID leaves with bits of features and of recommendations.
FEATURES = 0x4000_0003
RECOMMENDATIONS = 0x4000_0004

MSR_GUEST_OS_ID = 0x4000_0000
MSR_HYPERCALL = 0x4000_0001
MSR_VP_INDEX = 0x4000_0002
MSR_RESET = 0x4000_0003
MSR_VP_RUNTIME = 0x4000_0010
MSR_TIME_REF_COUNT = 0x4000_0020
MSR_REFERENCE_TSC = 0x4000_0021
MSR_TSC_FREQUENCY = 0x4000_0022
MSR_APIC_FREQUENCY = 0x4000_0023
MSR_VP_ASSIST_PAGE = 0x4000_0073
MSR_SCONTROL = 0x4000_0080
MSR_SINT0 = 0x4000_0090
MSR_STIMER0_CONFIG = 0x4000_00B0
MSR_GUEST_IDLE = 0x4000_00F0
MSR_CRASH_P0 = 0x4000_0100
MSR_CRASH_CTL = 0x4000_0105

MSR_BASE = 0x4000_0000
MSR_COUNT = 0x200

HVCALL_POST_MESSAGE = 0x5C
HVCALL_SIGNAL_EVENT = 0x5D


class Enlightenment:
    """One switchable part of the interface.

    `bits` are (leaf, register, bit) of CPUID; `needs` names enlightenments without which it makes no sense.
    """

    __slots__ = ("bits", "hypercalls", "msrs", "name", "needs", "purpose")

    def __init__(
        self,
        name: str,
        purpose: str,
        bits: tuple[tuple[int, str, int], ...] = (),
        msrs: Iterable[int] = (),
        hypercalls: tuple[int, ...] = (),
        needs: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.purpose = purpose
        self.bits = bits
        self.msrs = tuple(msrs)
        self.hypercalls = hypercalls
        self.needs = needs


_ALL = (
    Enlightenment(
        "base",
        "guest OS id, hypercall page and VP assist page: what makes a hypervisor Hyper-V to its guest",
        bits=((FEATURES, "eax", 5),),
        # Linux sets the VP assist page without asking whether it is offered (arch/x86/hyperv/hv_init.c).
        msrs=(MSR_GUEST_OS_ID, MSR_HYPERCALL, MSR_VP_ASSIST_PAGE),
    ),
    Enlightenment("vpindex", "the VP's number", ((FEATURES, "eax", 6),), (MSR_VP_INDEX,), needs=("base",)),
    Enlightenment("reset", "reset by MSR", ((FEATURES, "eax", 7),), (MSR_RESET,), needs=("base",)),
    Enlightenment("runtime", "time that the VP ran", ((FEATURES, "eax", 0),), (MSR_VP_RUNTIME,), needs=("base",)),
    Enlightenment(
        "time",
        "reference time by MSR and by the reference TSC page",
        ((FEATURES, "eax", 1), (FEATURES, "eax", 9)),
        (MSR_TIME_REF_COUNT, MSR_REFERENCE_TSC),
        needs=("base",),
    ),
    Enlightenment(
        "frequencies",
        "TSC and APIC frequency, so that the guest need not measure them",
        ((FEATURES, "eax", 11), (FEATURES, "edx", 8)),
        (MSR_TSC_FREQUENCY, MSR_APIC_FREQUENCY),
        needs=("base",),
    ),
    Enlightenment(
        "synic",
        "synthetic interrupts, messages and event flags",
        ((FEATURES, "eax", 2), (FEATURES, "ebx", 4), (FEATURES, "ebx", 5), (RECOMMENDATIONS, "eax", 9)),
        (*range(MSR_SCONTROL, MSR_SCONTROL + 5), *range(MSR_SINT0, MSR_SINT0 + 16)),
        (HVCALL_POST_MESSAGE, HVCALL_SIGNAL_EVENT),
        needs=("base", "vpindex"),
    ),
    Enlightenment(
        "stimer",
        "four synthetic timers a VP",
        ((FEATURES, "eax", 3),),
        range(MSR_STIMER0_CONFIG, MSR_STIMER0_CONFIG + 8),
        needs=("synic", "time"),
    ),
    Enlightenment(
        "stimer-direct",
        "synthetic timers that interrupt without a message",
        ((FEATURES, "edx", 19),),
        needs=("stimer",),
    ),
    Enlightenment(
        "idle",
        "idling by MSR until an interrupt comes",
        ((FEATURES, "eax", 10), (FEATURES, "edx", 5)),
        (MSR_GUEST_IDLE,),
        needs=("base",),
    ),
    Enlightenment(
        "crash",
        "crash report by MSR",
        ((FEATURES, "edx", 10),),
        range(MSR_CRASH_P0, MSR_CRASH_CTL + 1),
        needs=("base",),
    ),
    Enlightenment("relaxed", "no watchdog panics on a busy host", ((RECOMMENDATIONS, "eax", 5),), needs=("base",)),
    Enlightenment("vmbus", "the VMBus and its synthetic devices", needs=("synic",)),
)

ENLIGHTENMENTS: dict[str, Enlightenment] = {entry.name: entry for entry in _ALL}

#: Named sets to start from.
PROFILES: dict[str, frozenset[str]] = {
    "full": frozenset(ENLIGHTENMENTS),
    "minimal": frozenset({"base", "vpindex"}),
    "none": frozenset(),
    # Hyper-V of Windows Server 2008: no reference TSC consumers, no frequencies, no direct timers, no crash report.
    "windows-2008": frozenset({"base", "vpindex", "reset", "runtime", "time", "synic", "stimer", "relaxed", "vmbus"}),
}


def parse_spec(spec: str) -> frozenset[str]:
    """Turn ``PROFILE[,+NAME|,-NAME]...`` into the set of enlightenments; the first word may also be left out (full).

    Raises ValueError that says what is unknown or contradictory.
    """
    chosen: set[str] | None = None
    for word in filter(None, (part.strip() for part in spec.split(","))):
        if word[0] not in "+-":
            if chosen is not None:
                raise ValueError(f"enlightenments {spec!r}: {word!r} is not the first word; write +NAME or -NAME")
            if word not in PROFILES:
                raise ValueError(f"unknown enlightenment profile {word!r}; choose from {', '.join(PROFILES)}")
            chosen = set(PROFILES[word])
            continue
        if chosen is None:
            chosen = set(PROFILES["full"])
        if word[1:] not in ENLIGHTENMENTS:
            raise ValueError(f"unknown enlightenment {word[1:]!r}; choose from {', '.join(ENLIGHTENMENTS)}")
        if word[0] == "+":
            chosen.add(word[1:])
        else:
            chosen.discard(word[1:])
            _discard_dependents(chosen, word[1:])
    if chosen is None:
        raise ValueError("the enlightenments are empty; write 'none' for none")
    for name in chosen:
        for need in ENLIGHTENMENTS[name].needs:
            if need not in chosen:
                raise ValueError(f"enlightenments {spec!r}: {name} needs {need}; add +{need}")
    return frozenset(chosen)


def _discard_dependents(chosen: set[str], name: str) -> None:
    for other in [other for other in chosen if name in ENLIGHTENMENTS[other].needs]:
        chosen.discard(other)
        _discard_dependents(chosen, other)


def msr_bitmap(chosen: frozenset[str]) -> bytes:
    """The MSRs that `chosen` offers, a bit each from `MSR_BASE`."""
    bitmap = bytearray(MSR_COUNT // 8)
    for name in chosen:
        for msr in ENLIGHTENMENTS[name].msrs:
            bitmap[(msr - MSR_BASE) // 8] |= 1 << (msr - MSR_BASE) % 8
    return bytes(bitmap)
