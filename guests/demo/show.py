"""The demo's findings for people: tables and panels, and a progress line that lives on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from guests.bare.report import Finding, Report
from guests.demo.verdict import Guest, Problem
from guests.probe.report import expectation

_WIDTH_ELSEWHERE = 100
_LOG_LINES = 25


def _hex_words(text: str) -> str:
    """The ASCII text in little-endian hexadecimal words."""
    return b"".join(int(word, 16).to_bytes(4, "little") for word in text.split(",")).rstrip(b"\0").decode("ascii")


def _decimal(text: str) -> str:
    return str(int(text, 16))


def _hertz(text: str) -> str:
    return f"{int(text, 16) / 1e9:.3f} GHz"


#: Findings worth seeing though they are good: how to put each, and how to read its value.
_NOTABLE: dict[str, tuple[str, Callable[[str], str]]] = {
    "cpuid.vendor": ("{!r}", str),
    "cpuid.leaf1": ("interface {!r}", _hex_words),
    "cpuid.leaf0": ("leaves up to 0x{}", lambda text: text.split(",")[0]),
    "msr.tsc_frequency": ("TSC {}", _hertz),
    "msr.apic_frequency": ("APIC timer {}", _hertz),
    "hypercall.unknown_code": ("status: unknown code {}", str),
    "hypercall.post_misaligned": ("misaligned {}", str),
    "hypercall.post_bad_connection": ("bad connection {}", str),
    "synic.timer_message": ("timer message {}", str),
    "synic.periodic_ticks": ("{} periodic ticks", _decimal),
    "smp.started": ("{} more VPs started", _decimal),
    "smp.timer_messages": ("{} had a timer message of their own", _decimal),
    "vmbus.version": ("protocol {}", str),
    "vmbus.offers": ("{} offers", _decimal),
    "storage.inquiry": ("{!r}", lambda text: " ".join(text.split())),
    "storage.sector0": ("sector 0 begins {!r}", lambda text: bytes.fromhex(text).decode("ascii")),
}
_SUBJECTS = {
    "cpuid": "hypervisor leaves",
    "msr": "synthetic MSRs",
    "hypercall": "hypercalls",
    "synic": "SynIC and timers",
    "smp": "several VPs",
    "vmbus": "VMBus",
    "storage": "disk on VMBus",
}


def console() -> Console:
    """The terminal, or a page of fixed width."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH_ELSEWHERE, highlight=False)


class Steps:
    """Says what is going on, in a line with a clock on a terminal and in plain lines elsewhere."""

    def __init__(self, console: Console, first: str) -> None:
        self._console = console
        self._live = None
        if console.is_terminal:
            columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
            self._live = Progress(*columns, console=console, transient=True)
            self._task = self._live.add_task(first)
        else:
            self.step(first)

    def step(self, text: str) -> None:
        """Go on to the next step."""
        if self._live:
            self._live.update(self._task, description=plain(text))
        else:
            self._console.print(Text(f"... {plain(text)}"))

    def __enter__(self) -> Steps:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()


def plain(text: str) -> str:
    """Text from a guest, without what could steer a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def probe_table(report: Report) -> Table:
    """A row for each topic, then each bad finding in full."""
    table = Table(header_style="bold")
    table.add_column("topic", no_wrap=True)
    for heading, style in (("ok", "green"), ("bad", "bold red")):
        table.add_column(heading, justify="right", style=style)
    table.add_column("found")
    by_topic: dict[str, list[Finding]] = {}
    for finding in report.findings:
        by_topic.setdefault(finding.topic, []).append(finding)
    for topic, findings in by_topic.items():
        bad = sum(not finding.ok for finding in findings)
        row = _SUBJECTS.get(topic, topic), str(len(findings) - bad), str(bad or ""), _notable(topic, findings)
        table.add_row(*map(Text, row))
    if report.failed:
        table.add_section()
    for finding in report.failed:
        wanted = ": ".join(filter(None, (finding.note, expectation(finding.full_name))))
        row = finding.full_name, "", "1", plain(f"{finding.value}, expected {wanted}")
        table.add_row(*map(Text, row))
    return table


def guest_view(guest: Guest) -> RenderableType:
    """What Linux said of Hyper-V, its devices on VMBus, and the letter."""
    kernel = _lines([*guest.dmesg, f"clocksource: {guest.clocksource}"])
    # Without padding at its edges it fits into 80 columns.
    devices = Table(title="devices on the guest's VMBus", title_justify="left", header_style="bold", pad_edge=False)
    for heading in ("interface", "device", "channels", "driver"):
        devices.add_column(heading, justify="right" if heading == "channels" else "left", no_wrap=True)
    for channel in guest.channels:
        driver = Text(plain(channel.driver), "green") if channel.driver else Text("none", "bold red")
        devices.add_row(*map(Text, map(plain, (channel.name, channel.device, str(channel.count)))), driver)
    sums = [
        "SHA-256 as the guest read it, and of the file in the image:",
        guest.letter_sum or "none",
        guest.sum_on_disk,
    ]
    letter = Group(_lines(guest.letter.splitlines()), _lines(sums, "dim"))
    return Group(
        Panel(kernel, title=Text(f"Linux {plain(guest.kernel)}, dmesg"), title_align="left"),
        devices,
        Panel(letter, title=Text(f"/letter on {plain(guest.disk)}"), title_align="left"),
    )


def problems_view(problems: Sequence[Problem], logs: dict[str, str]) -> RenderableType:
    """What was expected and what was found instead; then the end of each log that isn't empty."""
    lines = Text()
    for problem in problems:
        lines.append(f"{problem.what}\n", "bold red")
        for label, text in (("expected", problem.expected), ("found", problem.found)):
            told = plain(" / ".join(text.strip().splitlines()))
            lines.append(f"  {label:8} {told or 'nothing'}\n")
    views: list[RenderableType] = [lines]
    for name, text in logs.items():
        if text.strip():
            end = _lines(text.strip().splitlines()[-_LOG_LINES:])
            views.append(Panel(end, title=f"the end of {name}", title_align="left", border_style="red"))
    return Group(*views)


def _notable(topic: str, findings: Sequence[Finding]) -> str:
    known = {finding.full_name: finding.value for finding in findings if finding.ok}
    said = []
    for name, (form, read) in _NOTABLE.items():
        if name in known and name.startswith(f"{topic}."):
            try:
                said.append(form.format(read(known[name])))
            except (ValueError, OverflowError):
                said.append(f"{name} {known[name]}")
    return plain(", ".join(said))


def _lines(lines: Sequence[str], style: str = "") -> Text:
    return Text("\n".join(plain(line.rstrip()) for line in lines), style)
