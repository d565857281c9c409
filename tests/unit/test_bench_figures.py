"""Figures of benchmarks: medians and the two ratios, and the command line around them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.figures import Figure, Samples

REPOSITORY = Path(__file__).parents[2]


def test_ratios_are_of_the_medians_and_of_neighbours() -> None:
    figure = Figure("f", "ms", Samples("pyvmm", (1, 2, 30)), Samples("QEMU", (2, 8, 20)), 1.0)
    assert figure.ratio == 2 / 8
    assert figure.pair_ratio == 1 / 2


def test_microseconds_against_a_rival_are_rates_too() -> None:
    figure = Figure("f", "us", Samples("pyvmm", (8, 8, 9)), Samples("bare C", (4, 5, 6)), 1.3)
    assert figure.rates == (125_000, 200_000)
    assert Figure("f", "ms", figure.ours, figure.rival).rates is None


def test_a_figure_without_rival_has_no_ratio() -> None:
    figure = Figure("f", "us", Samples("pyvmm", (3, 1)))
    assert (figure.ratio, figure.pair_ratio, figure.rates) == (None, None, None)
    assert json.loads(json.dumps(figure.as_dict()))["ours"] == {
        "name": "pyvmm",
        "median": 2,
        "min": 1,
        "max": 3,
        "count": 2,
    }


@pytest.mark.parametrize("words", [["nothing"], ["--rounds", "0"], ["-o", "xml"]])
def test_bad_usage_is_status_2(words: list[str]) -> None:
    command = [sys.executable, "-m", "tests.bench", *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m tests.bench")
