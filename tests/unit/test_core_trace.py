"""Tracing and the notes about guests."""

from __future__ import annotations

import io

import pytest

from pyvmm.core.trace import CATEGORIES, GuestLog, Tracer
from tests.fakes.board import ManualClock


class BrokenStream(io.StringIO):
    """The other end of the pipe is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_only_the_chosen_categories_are_on() -> None:
    tracer = Tracer(["msr", "io"], io.StringIO())
    assert {name for name in CATEGORIES if getattr(tracer, name)} == {"msr", "io"}
    assert not any(getattr(Tracer(), name) for name in CATEGORIES)
    assert all(getattr(Tracer(["all"]), name) for name in CATEGORIES)


def test_an_unknown_category_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown trace category 'nonsense'.*hypercall"):
        Tracer(["msr", "nonsense"])


def test_a_line_has_the_time_since_the_start_and_the_category() -> None:
    stream, clock = io.StringIO(), ManualClock()
    tracer = Tracer(["msr"], stream, clock)
    clock.advance(1_234_567_000)
    tracer.line("msr", "vp0 rdmsr 0x40000000")
    assert stream.getvalue() == "[   1.234567] msr: vp0 rdmsr 0x40000000\n"


def test_notes_are_limited_in_each_period_and_the_rest_is_counted() -> None:
    stream, clock = io.StringIO(), ManualClock()
    log = GuestLog(stream, clock, burst=2, period_ns=1000)
    for _ in range(5):
        log.warn("scsi0", "bad packet")
    assert stream.getvalue() == "pyvmm: scsi0: bad packet\n" * 2
    assert log.dropped == 3
    clock.advance(999)
    log.warn("scsi0", "bad packet")
    assert log.dropped == 4
    clock.advance(1)
    log.warn("scsi0", "again")
    assert stream.getvalue().splitlines()[2:] == [
        "pyvmm: 4 notes like the ones above were dropped",
        "pyvmm: scsi0: again",
    ]
    clock.advance(1000)
    log.warn("scsi0", "later")
    assert stream.getvalue().splitlines()[4:] == ["pyvmm: scsi0: later"]


def test_a_reader_that_is_gone_does_not_end_the_guest() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (BrokenStream(), closed):
        Tracer(["io"], stream).line("io", "text")
        GuestLog(stream).warn("uart0", "text")
