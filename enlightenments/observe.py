"""What a guest makes of its enlightenments: a report from counts and states, as plain data.

Pure functions. Rules behind the warnings: TLFS v6.0b, chapters 2.6, 11 and 12; Linux
``arch/x86/kernel/cpu/mshyperv.c`` and ``arch/x86/kernel/cpu/hypervisor.c``.
"""

from __future__ import annotations

from enlightenments.catalog import ENLIGHTENMENTS
from enlightenments.tlfs import (
    HYPERCALL_NAMES,
    MSR_NAMES,
    MSR_REFERENCE_TSC,
    MSR_TIME_REF_COUNT,
    hypercall_name,
    msr_name,
    status_name,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

#: More reads of TIME_REF_COUNT than this, per second, are called a storm.
STORM = 1000
HYPER_V = "Microsoft Hv"
KVM = "KVMKVMKVM"
_TICKS_PER_S = 10_000_000

_SINT_MASKED = 1 << 16
_SINT_AUTO_EOI = 1 << 17
_TIMER_ENABLED = 1 << 0 | 1 << 3  # or to be enabled by the next COUNT
_TIMER_DIRECT = 1 << 12


def report(sample: dict[str, Any]) -> dict[str, Any]:
    """What a guest has used since its VM began.

    `sample` has ``offered`` (names), ``vps`` (what `_hot.Vp.counts` returns, of each), ``partition`` (what
    `Partition.inspect` returns), ``signatures`` (CPUID leaf to text, of the leaves that the VPs were given) and
    ``vmbus`` (whether the guest has spoken to it). The result is JSON; rates and shares are since the beginning.
    """
    partition = sample["partition"]
    uptime = partition["reference_time"] / _TICKS_PER_S
    counters = _Counters(sample["vps"])
    result = {
        "uptime_s": uptime,
        "exits": counters.exits,
        "guest_os_id": partition["guest_os_id"],
        "guest_os": guest_os(int(partition["guest_os_id"], 16)),
        "signatures": sample["signatures"],
        "synic": _synic(partition["synics"]),
        "enlightenments": [
            _entry(name, name in sample["offered"], _enabled(name, partition, sample["vmbus"]), counters, uptime)
            for name in ENLIGHTENMENTS
        ],
        "unknown": counters.unknown(),
    }
    return _with_rates(result, None)


def between(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """`later` with the rates, shares and warnings of the time since `earlier`, an older report of the same VM."""
    same_vm = later["uptime_s"] > earlier["uptime_s"] and later["exits"] >= earlier["exits"]
    return _with_rates(later, earlier if same_vm else None)


def guest_os(os_id: int) -> str:
    """What a guest says of itself in the guest OS id. TLFS 2.6; Linux ``include/asm-generic/mshyperv.h``."""
    if not os_id:
        return ""
    if os_id >> 63:
        kind = {1: "Linux", 2: "FreeBSD", 3: "Xen", 4: "Illumos"}.get(os_id >> 56 & 0x7F, "an open-source system")
        version = os_id >> 16 & 0xFFFF_FFFF
        return f"{kind} {version >> 16}.{version >> 8 & 0xFF}.{version & 0xFF}" if kind == "Linux" else kind
    if os_id >> 48 & 0x7FFF == 1:
        kind = {4: "Windows", 5: "Windows CE"}.get(os_id >> 40 & 0xFF, "a system of Microsoft")
        return f"{kind} {os_id >> 32 & 0xFF}.{os_id >> 24 & 0xFF}.{os_id & 0xFFFF}"
    return "an unknown system"


class _Counters:
    """What all VPs counted, together."""

    def __init__(self, vps: list[dict[str, Any]]) -> None:
        self.exits = sum(sum(counts["exits"].values()) for counts in vps)
        self.reads = _sum(counts["msr_reads"] for counts in vps)
        self.writes = _sum(counts["msr_writes"] for counts in vps)
        self.calls = _sum(counts["hypercalls"] for counts in vps)
        self.unknown_calls = sum(counts["hypercalls_unknown"] for counts in vps)
        #: Kind, number, how many, reference time and value of the last, VP.
        self.errors: list[tuple[str, int, int, int, int, int]] = [
            (kind, number, *errors, vp)
            for vp, counts in enumerate(vps)
            for kind in ("msr_read", "msr_write", "hypercall")
            for number, errors in counts[f"{kind}_errors"].items()
        ]

    def accesses(self, msrs: Iterable[int], calls: Iterable[int]) -> list[dict[str, Any]]:
        """Those that there were, of some MSRs and hypercalls."""
        found: list[dict[str, Any]] = []
        for msr in msrs:
            reads, writes = self.reads.get(msr, 0), self.writes.get(msr, 0)
            if reads or writes:
                errors = self._errors(("msr_read", "msr_write"), msr)
                found.append({"name": msr_name(msr), "reads": reads, "writes": writes, "errors": errors})
        for code in calls:
            if code in self.calls:
                errors = self._errors(("hypercall",), code)
                found.append({"name": hypercall_name(code), "calls": self.calls[code], "errors": errors})
        return found

    def _errors(self, kinds: tuple[str, ...], number: int) -> int:
        return sum(count for kind, of, count, *_ in self.errors if kind in kinds and of == number)

    def last_error(self, msrs: Iterable[int], calls: Iterable[int], uptime: float) -> dict[str, Any] | None:
        """The last that went wrong with some MSRs and hypercalls."""
        numbers = {"msr_read": set(msrs), "msr_write": set(msrs), "hypercall": set(calls)}
        ours = [error for error in self.errors if error[1] in numbers[error[0]]]
        if not ours:
            return None
        kind, number, _, ticks, value, vp = max(ours, key=lambda error: error[3])
        if kind == "hypercall":
            text = f"{hypercall_name(number)}: {status_name(value)}"
        elif kind == "msr_read":
            text = f"rdmsr {msr_name(number)}: #GP"
        else:
            text = f"wrmsr {msr_name(number)} = {value:#x}: #GP"
        return {"text": text, "vp": vp, "seconds_ago": max(0.0, uptime - ticks / _TICKS_PER_S)}

    def unknown(self) -> list[dict[str, Any]]:
        """Accesses to what no enlightenment offers."""
        msrs = sorted((self.reads.keys() | self.writes.keys()) - MSR_NAMES.keys())
        found = self.accesses(msrs, sorted(self.calls.keys() - HYPERCALL_NAMES.keys()))
        if self.unknown_calls:
            found.append({"name": "other hypercalls", "calls": self.unknown_calls, "errors": self.unknown_calls})
        return found


def _sum(dicts: Iterable[dict[int, int]]) -> dict[int, int]:
    total: dict[int, int] = {}
    for counts in dicts:
        for number, count in counts.items():
            total[number] = total.get(number, 0) + count
    return total


def _entry(name: str, offered: bool, enabled: bool | None, counters: _Counters, uptime: float) -> dict[str, Any]:
    entry = ENLIGHTENMENTS[name]
    accesses = counters.accesses(entry.msrs, entry.hypercalls)
    hits = sum(_hits(access) for access in accesses)
    return {
        "name": name,
        "offered": offered,
        "enabled": enabled if offered else False,
        # Some have nothing to count: these are used once they are enabled, and whether they are may be unknown.
        "used": offered and (hits > 0 or bool(enabled)) if entry.msrs or entry.hypercalls else offered and enabled,
        "hits": hits,
        "errors": sum(access["errors"] for access in accesses),
        "last_error": counters.last_error(entry.msrs, entry.hypercalls, uptime),
        "accesses": accesses,
    }


def _hits(access: dict[str, Any]) -> int:
    return int(access["calls"] if "calls" in access else access["reads"] + access["writes"])


#: By name: whether the guest has switched it on, from what `Partition.inspect` returns. The others have no switch.
_SWITCHES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "base": lambda partition: partition["hypercall_page"] is not None,
    "time": lambda partition: partition["reference_page"] is not None,
    "tsc-invariant": lambda partition: bool(partition["tsc_invariant"] & 1),
    "reenlightenment": lambda partition: bool(partition["reenlightenment"] & 1 << 16),
    "synic": lambda partition: any(synic["scontrol"] & 1 for synic in partition["synics"]),
    "stimer": lambda partition: _timers(partition, _TIMER_ENABLED),
    "stimer-direct": lambda partition: _timers(partition, _TIMER_DIRECT),
    "vapic": lambda partition: any(page & 1 for page in partition["assist_pages"]),
}


def _timers(partition: dict[str, Any], bit: int) -> bool:
    return any(config & bit for synic in partition["synics"] for config, _, _ in synic["timers"])


def _enabled(name: str, partition: dict[str, Any], vmbus: bool) -> bool | None:
    if name == "vmbus":
        return vmbus
    switch = _SWITCHES.get(name)
    return switch(partition) if switch is not None else None


def _synic(synics: list[dict[str, Any]]) -> dict[str, Any]:
    enabled = [vp for vp, synic in enumerate(synics) if synic["scontrol"] & 1]
    return {
        "enabled_vps": enabled,
        "kvm_timers": any(synic["kvm_timers"] for synic in synics),
        "masked_vps": [vp for vp in enabled if all(sint & _SINT_MASKED for sint in synics[vp]["sint"])],
        "auto_eoi": [
            {"vp": vp, "sint": number}
            for vp in enabled
            for number, sint in enumerate(synics[vp]["sint"])
            if sint & _SINT_AUTO_EOI and not sint & _SINT_MASKED
        ],
    }


# Rates and warnings ----------------------------------------------------------------------------------


def _with_rates(later: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    interval = later["uptime_s"] - (earlier["uptime_s"] if earlier else 0.0)
    exits = later["exits"] - (earlier["exits"] if earlier else 0)
    before = {entry["name"]: entry for entry in earlier["enlightenments"]} if earlier else {}
    entries = []
    for entry in later["enlightenments"]:
        hits = entry["hits"] - (before[entry["name"]]["hits"] if earlier else 0)
        entries.append({**entry, "hits_per_s": _ratio(hits, interval), "exit_share": _ratio(hits, exits)})
    reads = _time_reads(later) - (_time_reads(earlier) if earlier else 0)
    result = {
        **later,
        "interval_s": interval,
        "exits_per_s": _ratio(exits, interval),
        "enlightenments": entries,
    }
    return {**result, "warnings": _warnings(result, _ratio(reads, interval))}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _time_reads(found: dict[str, Any]) -> int:
    accesses = _find(found, "time")["accesses"]
    return sum(access["reads"] for access in accesses if access["name"] == MSR_NAMES[MSR_TIME_REF_COUNT])


def _find(found: dict[str, Any], name: str) -> dict[str, Any]:
    entry: dict[str, Any] = next(entry for entry in found["enlightenments"] if entry["name"] == name)
    return entry


def _warnings(found: dict[str, Any], time_reads_per_s: float) -> list[dict[str, str]]:
    """What users trip over, a sentence each."""
    entries = {entry["name"]: entry for entry in found["enlightenments"]}
    if not any(entry["offered"] for entry in entries.values()):
        return []
    texts = [("base", text) for text in _identity_warnings(found)]
    page = entries["time"]["enabled"]
    if time_reads_per_s > STORM:
        instead = (
            "although it has enabled the reference TSC page"
            if page
            else f"and has not enabled the reference TSC page ({MSR_NAMES[MSR_REFERENCE_TSC]}), which needs no exit"
        )
        texts.append(("time", f"the guest reads TIME_REF_COUNT {time_reads_per_s:.0f} times a second, {instead}"))
    elif entries["time"]["offered"] and not page and found["guest_os"]:
        texts.append(("time", "the guest does not use the reference TSC page that it is offered"))
    synic = found["synic"]
    if synic["masked_vps"]:
        vps = ", ".join(map(str, synic["masked_vps"]))
        texts.append(("synic", f"enabled on VP {vps}, where every SINT is masked: no message and no event arrives"))
    if synic["auto_eoi"] and entries["avic"]["offered"]:
        sints = ", ".join(f"SINT{at['sint']} of VP {at['vp']}" for at in synic["auto_eoi"])
        texts.append(("avic", f"automatic EOI, against the advice in CPUID, for {sints}"))
    for name, entry in entries.items():
        if entry["hits"] and not entry["offered"]:
            tried = ", ".join(access["name"] for access in entry["accesses"])
            texts.append((name, f"not offered, but the guest tries {tried}; +{name} offers it"))
    return [{"enlightenment": name, "text": text} for name, text in texts]


def _identity_warnings(found: dict[str, Any]) -> Iterable[str]:
    kvm = [leaf for leaf, text in found["signatures"].items() if text.startswith(KVM)]
    vendor = next(iter(found["signatures"].values()), "")
    if kvm:
        yield f"the guest has KVM's signature in CPUID leaf {kvm[0]}: Linux prefers that to Hyper-V's"
    elif vendor != HYPER_V:
        yield f"the vendor in CPUID is {vendor!r}: Linux takes nothing but {HYPER_V!r} for Hyper-V"
    if not found["guest_os"]:
        yield "the guest has not told its OS id, so it has not recognised Hyper-V, or not yet"
