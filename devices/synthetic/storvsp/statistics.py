"""What a logical unit has done so far, and how long it took."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

#: Kinds of commands whose latencies are told apart.
READ, WRITE, FLUSH = "read", "write", "flush"
#: Bucket n of a histogram counts latencies from 2**(n-1) to below 2**n microseconds; the last one also all longer ones.
BUCKETS = 32


class Statistics:
    """Counters and latency histograms of one logical unit; any thread.

    A latency is the time from the guest's packet to its completion, waiting included.
    """

    COUNTERS = ("commands", "reads", "writes", "bytes_read", "bytes_written", "flushes", "discards", "errors")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(self.COUNTERS, 0)
        self._latency = {kind: [0] * BUCKETS for kind in (READ, WRITE, FLUSH)}

    def count(self, kind: str | None, latency_ns: int, **counts: int) -> None:
        """Note one command: what it adds to the counters, and its latency if it is of a `kind`."""
        with self._lock:
            self._counts["commands"] += 1
            for name, number in counts.items():
                self._counts[name] += number
            if kind is not None:
                self._latency[kind][min((latency_ns // 1000).bit_length(), BUCKETS - 1)] += 1

    def add(self, kind: str, commands: int, moved: int, latency: Sequence[int]) -> None:
        """Take over reads, writes or flushes that were counted elsewhere, with the bytes they moved in all."""
        with self._lock:
            self._counts["commands"] += commands
            self._counts["flushes" if kind == FLUSH else f"{kind}s"] += commands
            if kind == READ:
                self._counts["bytes_read"] += moved
            elif kind == WRITE:
                self._counts["bytes_written"] += moved
            for bucket, number in enumerate(latency):
                self._latency[kind][bucket] += number

    def inspect(self) -> dict[str, Any]:
        """Return the counters, and the histograms as {upper bound in microseconds: commands}, as plain JSON data."""
        with self._lock:
            latency = {
                kind: {str(1 << bucket): number for bucket, number in enumerate(buckets) if number}
                for kind, buckets in self._latency.items()
            }
            return {**self._counts, "latency_us": latency}
