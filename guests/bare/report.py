"""Reads what a bare-metal guest wrote to COM1.

The guest judges its findings itself: ``NAME: topic.name = value ok``, ``... bad`` or ``... skip``, and a note after
that; ``NAME: done PASSED FAILED`` is the last line, with the number of skipped ones if the guest skips any.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_FINDING = re.compile(
    r"(?P<topic>[a-z0-9-]+)\.(?P<name>\w+) = (?P<value>.*?) (?P<verdict>ok|bad|skip)(?: (?P<note>.*))?"
)
_DONE = re.compile(r"done (\d+) (\d+)(?: (\d+))?")


@dataclass(frozen=True)
class Finding:
    """One thing that a guest looked at. `verdict` is ``ok``, ``bad`` or ``skip``; `note` is what stands after it."""

    topic: str
    name: str
    value: str
    verdict: str
    note: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.topic}.{self.name}"

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"


@dataclass
class Report:
    """A whole report of the guest `name`. `notes` are its other lines, such as an exception it died of."""

    name: str
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    totals: tuple[int, int, int] | None = None

    def of(self, verdict: str) -> list[Finding]:
        """The findings with that verdict."""
        return [finding for finding in self.findings if finding.verdict == verdict]

    @property
    def failed(self) -> list[Finding]:
        return self.of("bad")

    @property
    def problem(self) -> str | None:
        """In one line, why the report is not all as expected; None if it is."""
        if self.failed:
            return f"{len(self.failed)} of {len(self.findings)} findings are not as expected"
        if self.totals is None:
            last = self.notes[-1] if self.notes else "nothing"
            return f"the {self.name} did not finish; its last note: {last}"
        good, bad, skipped = self.totals
        if self.totals != (len(self.of("ok")), 0, len(self.of("skip"))):
            return f"the {self.name} counted {good} good, {bad} bad and {skipped} skipped, {len(self.findings)} arrived"
        return None


def parse(name: str, text: str) -> Report:
    """Read COM1's text; lines that are not the guest's are skipped."""
    report = Report(name)
    for line in text.splitlines():
        line = line.strip("\r\0")
        if not line.startswith(f"{name}: "):
            continue
        line = line.removeprefix(f"{name}: ")
        if match := _FINDING.fullmatch(line):
            topic, finding, value, verdict, note = match.groups()
            report.findings.append(Finding(topic, finding, value, verdict, note or ""))
        elif match := _DONE.fullmatch(line):
            report.totals = int(match[1]), int(match[2]), int(match[3] or 0)
        else:
            report.notes.append(line)
    return report
