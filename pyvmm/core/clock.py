"""Time, injected wherever it is needed so that tests can hold it still."""

from __future__ import annotations

import time


class Clock:
    """The host's clocks."""

    def now_ns(self) -> int:
        """Monotonic nanoseconds since an arbitrary start."""
        return time.monotonic_ns()

    def utc_ns(self) -> int:
        """Nanoseconds of UTC since 1970."""
        return time.time_ns()
