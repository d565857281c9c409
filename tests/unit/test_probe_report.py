"""The probe's report: parsing, verdicts, and that every finding the probe can print is explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from guests.bare.build import BuildError
from guests.bare.report import Finding
from guests.probe import build, report
from guests.probe.report import EXPECTATIONS, expectation, parse
from tests.fakes.objdump import lacking_instructions

GOOD = """probe: start
probe: cpuid.vendor = Microsoft Hv ok
probe: msr.sversion = 0x1 ok
probe: done 2 0
"""


def _names_in_sources() -> set[str]:
    names: set[str] = set()
    for path in build.SOURCE.glob("*.c"):
        names |= set(re.findall(r'"((?:cpuid|msr|hypercall|synic|smp|vmbus|storage)\.\w+)"', path.read_text()))
    return names


def test_a_good_report_has_no_problem() -> None:
    parsed = parse(GOOD)
    assert parsed.findings == [
        Finding("cpuid", "vendor", "Microsoft Hv", "ok"),
        Finding("msr", "sversion", "0x1", "ok"),
    ]
    assert parsed.notes == ["start"]
    assert parsed.problem is None


def test_a_bad_finding_keeps_what_the_probe_expected() -> None:
    parsed = parse("probe: synic.periodic_time = 0x2 bad 3 periods of 3 ms or more\nprobe: done 0 1\n")
    assert parsed.failed == [Finding("synic", "periodic_time", "0x2", "bad", "3 periods of 3 ms or more")]
    assert parsed.problem == "1 of 1 findings are not as expected"


def test_carriage_returns_and_strangers_lines_are_skipped() -> None:
    parsed = parse("SeaBIOS\r\nprobe: msr.sversion = 0x1 ok\r\n\r\nprobe: done 1 0\r\n")
    assert parsed.problem is None
    assert parsed.notes == []


def test_an_unfinished_report_is_a_problem_that_names_the_last_note() -> None:
    parsed = parse("probe: start\nprobe: msr.sversion = 0x1 ok\nprobe: exception 14 error 0x0 ip 0x200000\n")
    assert parsed.problem == "the probe did not finish; its last note: exception 14 error 0x0 ip 0x200000"


def test_silence_is_a_problem() -> None:
    assert parse("").problem == "the probe did not finish; its last note: nothing"


@pytest.mark.parametrize("cut", [0, 1])
def test_a_lost_finding_is_noticed_by_the_totals(cut: int) -> None:
    lines = GOOD.splitlines()
    del lines[1 + cut]
    assert parse("\n".join(lines)).problem == "the probe counted 2 good, 0 bad and 0 skipped, 1 arrived"


def test_half_a_line_is_not_a_finding() -> None:
    assert parse("probe: msr.sversion = 0x1\n").findings == []


def test_every_finding_of_the_sources_is_explained_and_nothing_else() -> None:
    assert _names_in_sources() == set(EXPECTATIONS)


def test_numbered_findings_are_explained_by_their_stem() -> None:
    assert expectation("vmbus.offer17") == report.EXPECTATIONS["vmbus.offer"]
    assert expectation("cpuid.leaf6") == report.EXPECTATIONS["cpuid.leaf6"]
    assert expectation("vmbus.nothing") is None


def test_the_probe_is_built_once(tmp_path: Path) -> None:
    elf = build.build(tmp_path)
    assert elf.read_bytes()[:5] == b"\x7fELF\x02"
    made = elf.stat().st_mtime_ns
    assert build.build(tmp_path) == elf
    assert elf.stat().st_mtime_ns == made
    assert [path.name for path in elf.parent.iterdir()] == ["probe.elf"]


def test_without_a_compiler_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(BuildError, match=r"gcc is needed.*apt-get install"):
        build.build(tmp_path)


def test_the_probe_uses_no_instruction_that_kvms_emulator_lacks(tmp_path: Path) -> None:
    assert lacking_instructions(build.build(tmp_path), 64) == set()
