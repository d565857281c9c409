"""The conformance kit on /dev/kvm, in both modes and under several profiles: every test is good, and none is missed."""

from __future__ import annotations

from pathlib import Path

import pytest

from guests.bare.run import Run
from guests.conformance.build import WIDTHS, build
from guests.conformance.run import pyvmm_command, run_command

pytestmark = pytest.mark.kvm


def run_kit(work: Path, bits: int, cpus: int, topics: str = "", enlightenments: str = "full") -> Run:
    console = work / "com1.txt"
    command = pyvmm_command(build(bits), console, cpus=cpus, topics=topics, enlightenments=enlightenments)
    return run_command(command, console)


def assert_good(result: Run) -> None:
    if result.problem is not None:
        bad = "\n".join(f"{f.full_name} = {f.value} {f.note}" for f in result.report.failed)
        pytest.fail(f"{result.problem}\n{bad}\n{result.stderr}", pytrace=False)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("cpus", [1, 4])
def test_all_that_is_offered_conforms(tmp_path: Path, bits: int, cpus: int) -> None:
    result = run_kit(tmp_path, bits, cpus)
    assert_good(result)
    if cpus > 1:
        skipped = {finding.full_name for finding in result.report.of("skip")}
        assert skipped <= {"autoeoi.held_by_service"}  # which kvm_pvm's local APIC cannot show


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    "enlightenments", ["full,+tlbflush,+tlbflush-ext,+ipi", "windows-server-2008", "full,-stimer", "minimal", "none"]
)
def test_each_profile_offers_what_works_and_no_more(tmp_path: Path, bits: int, enlightenments: str) -> None:
    assert_good(run_kit(tmp_path, bits, 2, enlightenments=enlightenments))


def test_topics_can_be_chosen(tmp_path: Path) -> None:
    result = run_kit(tmp_path, 64, 1, topics="synic,time")
    assert_good(result)
    assert {finding.topic for finding in result.report.findings} == {"kit", "synic", "time"}
