"""A VM as `enlightenments.observe` sees it: counters and states that a test sets, and a time of its choice."""

from __future__ import annotations

import json
from typing import Any

from enlightenments.observe import report
from enlightenments.selection import PROFILES

LINUX_6_1 = 0x8100_0006_0100_0000
MASKED = 1 << 16
READ, WRITE, CALLS = "msr_reads", "msr_writes", "hypercalls"


class ObservedGuest:
    """A VM of two VPs as its counters and states show it."""

    def __init__(self, profile: str = "full") -> None:
        self.seconds = 10.0
        self.offered = PROFILES[profile].names
        self.vps: list[dict[str, Any]] = [
            {"exits": {2: 500}, READ: {}, WRITE: {}, CALLS: {}, "hypercalls_unknown": 0}
            | {"msr_read_errors": {}, "msr_write_errors": {}, "hypercall_errors": {}}
            for _ in range(2)
        ]
        self.partition: dict[str, Any] = {
            "guest_os_id": f"{LINUX_6_1:#x}",
            "hypercall_page": 0x1000,
            "reference_page": 0x2000,
            "tsc_invariant": 0,
            "reenlightenment": 0,
            "assist_pages": [0, 0],
            "synics": [
                {"scontrol": 0, "sint": [MASKED] * 16, "timers": [[0, 0, 0]] * 4, "kvm_timers": False} for _ in range(2)
            ],
        }
        self.signatures = {"0x40000000": "Microsoft Hv"}
        self.vmbus = False

    def count(self, kind: str, number: int, times: int, vp: int = 0) -> None:
        self.vps[vp][kind][number] = self.vps[vp][kind].get(number, 0) + times
        self.vps[vp]["exits"][2] += times

    def fail(self, kind: str, number: int, times: int, at: float, value: int, vp: int = 0) -> None:
        self.vps[vp][f"{kind}_errors"][number] = (times, int(at * 1e7), value)

    def report(self) -> dict[str, Any]:
        sample = {
            "offered": self.offered,
            "vps": self.vps,
            "partition": self.partition | {"reference_time": int(self.seconds * 1e7)},
            "signatures": self.signatures,
            "vmbus": self.vmbus,
        }
        found = report(sample)
        assert json.loads(json.dumps(found)) == found, "it is not JSON"
        return found
