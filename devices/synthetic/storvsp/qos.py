"""Limits of a disk's rate: token buckets without threads or clocks of their own."""

from __future__ import annotations

#: What an idle disk may do at once before its limit bites, in seconds' worth of the limit.
BURST_S = 0.1


class Bucket:
    """Fills at `rate` tokens per second up to `BURST_S` seconds' worth; times are nanoseconds of any clock."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._burst_ns = int(BURST_S * 1e9)
        self._paid_until = 0

    def take(self, now: int, tokens: int) -> int:
        """Take `tokens`; return when whoever takes them may go on, which may be `now` or later."""
        # What was taken puts off the next taker, not the taker itself, so nothing is too large for a bucket.
        paid = max(self._paid_until, now)
        self._paid_until = paid + tokens * 1_000_000_000 // self.rate
        return max(now, paid - self._burst_ns)


class Limits:
    """The limits of one disk: commands and bytes per second, None for none. Callers take turns."""

    def __init__(self, iops: int | None = None, bandwidth: int | None = None) -> None:
        self.iops = Bucket(iops) if iops is not None else None
        self.bandwidth = Bucket(bandwidth) if bandwidth is not None else None

    def take(self, now: int, length: int) -> int:
        """Count a command that moves `length` bytes; return when it may start."""
        start = now
        if self.iops is not None:
            start = self.iops.take(now, 1)
        if self.bandwidth is not None:
            start = max(start, self.bandwidth.take(now, length))
        return start

    def inspect(self) -> dict[str, int | None]:
        """The limits, as plain JSON data."""
        return {
            "iops": self.iops.rate if self.iops is not None else None,
            "bandwidth": self.bandwidth.rate if self.bandwidth is not None else None,
        }
