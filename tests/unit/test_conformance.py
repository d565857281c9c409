"""The conformance kit's sources and build: each test names its section, and KVM's emulator knows the instructions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from guests.bare.build import BuildError
from guests.bare.report import parse
from guests.bare.run import Run
from guests.conformance import tests as kit
from guests.conformance.build import SOURCE, WIDTHS, build
from tests.fakes.objdump import lacking_instructions
from tests.lab import conformance_differences as differences

ROOT = Path(__file__).parents[2]

#: The last section of each TLFS v6.0b chapter that the kit names.
LAST_SECTION = {2: 6, 3: 14, 4: 3, 5: 2, 7: 10, 8: 13, 9: 4, 10: 5, 11: 11, 12: 7, 13: 3, 14: 5, 16: 14}


def test_every_test_names_a_section_of_the_specification() -> None:
    for name, section in kit.sections().items():
        chapter, number, *rest = section.split(".")
        assert int(number) <= LAST_SECTION[int(chapter)], f"{name}: {section}"
        assert all(part.isdigit() for part in rest), f"{name}: {section}"


def test_no_test_is_without_a_section() -> None:
    names: set[str] = set()
    for path in SOURCE.glob("*.c"):
        names |= set(re.findall(r'"((?:kit|' + "|".join(kit.topics()) + r')\.\w\w+)"', path.read_text()))
    assert names == set(kit.sections())


def test_a_test_stands_in_the_file_of_its_topic() -> None:
    for topic in kit.topics():
        assert f'"{topic}.' in (SOURCE / f"{topic}.c").read_text()
    assert {name.split(".")[0] for name in kit.sections()} == {"kit", *kit.topics()}


def test_a_skipped_test_is_no_problem_and_is_counted() -> None:
    report = parse("kit", "kit: start\nkit: time.runtime = - skip 7.9.1 not offered\nkit: done 0 0 1\n")
    assert report.problem is None
    assert [finding.note for finding in report.of("skip")] == ["7.9.1 not offered"]
    assert parse("kit", "kit: done 0 0 1\n").problem == "the kit counted 0 good, 0 bad and 1 skipped, 0 arrived"


def test_each_explained_difference_is_one_of_the_kits_and_stands_in_the_documentation() -> None:
    assert set(differences.explained()) <= set(kit.sections())
    assert sum(len(entry.tests) for entry in differences.DIFFERENCES) == len(differences.explained())
    assert {entry.right for entry in differences.DIFFERENCES} <= {"both", "pyvmm", "QEMU"}
    assert differences.table() in (ROOT / "docs/conformance.md").read_text()


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_kit_is_a_32_bit_file_and_uses_no_instruction_that_kvms_emulator_lacks(tmp_path: Path, bits: int) -> None:
    elf = build(bits, tmp_path)
    assert elf.read_bytes()[:5] == b"\x7fELF\x01"
    assert lacking_instructions(elf, bits) == set()


def test_without_a_linker_tool_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None if name == "objcopy" else "/bin/true")
    with pytest.raises(BuildError, match=r"objcopy is needed.*apt-get install"):
        build(64, tmp_path)


def test_a_good_report_of_a_run_that_ended_otherwise_is_a_problem() -> None:
    report = parse("kit", "kit: cpuid.interface = 0x31237648 ok 2.4.2\nkit: done 1 0 0\n")
    assert Run(report, 1, "", 0.1, good_status=1).problem is None
    assert Run(report, 124, "", 0.1, good_status=1).problem == "the run ended with status 124, not 1"
