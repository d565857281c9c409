"""What a benchmark finds: samples, and their ratio to those of a rival measured in turn with them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one quantity, in the order in which they were taken."""

    name: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def summary(self) -> dict[str, Any]:
        """Name, median, extremes and count."""
        return {
            "name": self.name,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "count": len(self.values),
        }


@dataclass(frozen=True)
class Figure:
    """One line of the result. Smaller values are better; `limit` is the ratio of medians that is aimed at."""

    title: str
    unit: str
    ours: Samples
    rival: Samples | None = None
    limit: float | None = None

    @property
    def ratio(self) -> float | None:
        """Our median divided by the rival's."""
        return self.ours.median / self.rival.median if self.rival else None

    @property
    def pair_ratio(self) -> float | None:
        """The median of the ratios of neighbours in time, which a change of the host's load disturbs least."""
        if self.rival is None:
            return None
        return statistics.median(a / b for a, b in zip(self.ours.values, self.rival.values, strict=True))

    @property
    def rates(self) -> tuple[float, float] | None:
        """How often a second ours and the rival's happen, of a figure that has a rival and is in microseconds each."""
        if self.rival is None or self.unit != "us":
            return None
        return 1e6 / self.ours.median, 1e6 / self.rival.median

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "title": self.title,
            "unit": self.unit,
            "ours": self.ours.summary(),
            "rival": self.rival.summary() if self.rival else None,
            "ratio": self.ratio,
            "pair_ratio": self.pair_ratio,
            "per_second": self.rates,
            "limit": self.limit,
        }
