"""The benchmarks' guests do what is measured, and each figure has its samples. How long they take is not tested."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.bench import exits
from tests.bench.idle import build_tick_guest
from tests.kvm.conftest import run_cli

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.bench.figures import Figure

pytestmark = pytest.mark.kvm


@pytest.mark.parametrize(
    "measure", [exits.pio, exits.doorbell, exits.msr, exits.hypercall], ids=lambda measure: measure.__name__
)
def test_loops_leave_the_guest_as_often_as_they_should(
    measure: Callable[[Path, int], list[Figure]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "_EXITS", 80)
    monkeypatch.setattr(exits, "_RINGS", 20)
    figures = measure(tmp_path, 2)
    assert len(figures) > 1
    for figure in figures:
        assert all(value > 0 for value in figure.ours.values)
        assert figure.rival is None or len(figure.rival.values) == len(figure.ours.values) == 2


def test_reference_time_by_the_page_needs_no_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "_EXITS", 80)
    (figure,) = exits.page(tmp_path, 1)
    assert figure.ours.values == (0,)
    assert figure.rival is not None and figure.rival.values == (80,)


@pytest.mark.parametrize("messages", [False, True], ids=["direct", "message"])
def test_the_idle_guest_takes_all_its_ticks_and_no_sooner(tmp_path: Path, messages: bool) -> None:
    kernel = build_tick_guest(tmp_path / "guest", messages=messages, ticks=25)
    console, report = tmp_path / "com1", tmp_path / "report"
    done = run_cli("--kernel", str(kernel), "--com1", f"file:{console}", "--report", str(report))
    assert done.returncode == 1, done.stderr
    idle, ended = console.read_text().splitlines()
    assert idle == "idle"
    assert int(ended.removeprefix("done "), 16) >= 25 * 40_000
    assert json.loads(report.read_text())["partition"]["synics"][0]["interrupts"] >= 25
