"""Short runs of the fuzzers that need no KVM, always from the same seeds; `make fuzz` goes on from others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import native, partition, vhdx


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native.build(tmp_path_factory.mktemp("fuzz"))


def test_nothing_that_kvm_and_guest_do_breaks_the_extension(harness: Path) -> None:
    assert "100 lives" in native.run(harness, 1, 0, lives=100)


def test_a_seed_repeats_a_run(harness: Path) -> None:
    first, second = (native.run(harness, 7, 0, lives=3).split(" in ")[0] for _ in range(2))
    assert first == second
    assert "3 lives" in first


def test_any_order_of_accesses_leaves_a_partition_consistent() -> None:
    assert "seeds 1 to 1" in partition.run(1, 0, examples=60)


def test_any_vhdx_image_is_refused_or_of_use() -> None:
    assert "images" in vhdx.run(1, 3)


@pytest.mark.parametrize("words", [["nothing"], ["--seconds", "long"]])
def test_bad_usage_is_status_2(words: list[str]) -> None:
    command = [sys.executable, "-m", "tests.fuzz", *words]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m tests.fuzz")
