"""What the VPs counted, by name."""

from __future__ import annotations

from enlightenments.tlfs import hypercall_name, msr_name
from pyvmm.core.kvm import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def total_counts(vps: list[dict[str, Any]]) -> dict[str, Any]:
    """Exits, MSR accesses and hypercalls of all VPs together; `vps` are what `_hot.Vp.counts` returns."""
    return {
        "exits": _sum(vps, "exits", _exit_name),
        "msrs": {key: _sum(vps, key, msr_name) for key in ("msr_reads", "msr_writes")},
        "hypercalls": {
            **_sum(vps, "hypercalls", hypercall_name),
            "unknown": sum(counts["hypercalls_unknown"] for counts in vps),
        },
    }


def exits_by_name(counts: dict[str, Any]) -> dict[str, int]:
    """The exits of one VP."""
    return {_exit_name(reason): count for reason, count in counts["exits"].items()}


def _exit_name(reason: int) -> str:
    return abi.EXIT_NAMES.get(reason, str(reason))


def _sum(vps: list[dict[str, Any]], key: str, name_of: Callable[[int], str]) -> dict[str, int]:
    """What all VPs counted under `key`, in the order of the numbers."""
    total: dict[int, int] = {}
    for counts in vps:
        for number, count in counts[key].items():
            total[number] = total.get(number, 0) + count
    return {name_of(number): total[number] for number in sorted(total)}
