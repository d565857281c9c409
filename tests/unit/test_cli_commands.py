"""The commands beside ``run`` and ``ctl``: config, doctor, completion, help."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from pyvmm.cli import COMMANDS, doctor, main
from pyvmm.core.kvm.capabilities import CAPABILITIES
from pyvmm.core.kvm.errors import KvmError


@pytest.fixture
def vm_file(tmp_path: Path) -> Path:
    (tmp_path / "rom").write_bytes(bytes(4096))
    path = tmp_path / "vm.toml"
    path.write_text('firmware = "rom"\n[[disks]]\npath = "rom"\nreadonly = true\n')
    return path


def test_a_valid_vm_file_is_ok(vm_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "validate", str(vm_file)]) == 0
    assert capsys.readouterr().out == f"{vm_file}: ok\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "nothing to start"),
        ('firmware = "no"', "no such file"),
        ('firmware = "rom"\ncpus = 100', "cpus: expected int <= 64"),
        ('firmware = "rom"\n[[disks]]\npath = 1', "disks[0].path: expected str"),
    ],
)
def test_an_invalid_vm_file_is_one_line_with_its_name_and_status_2(
    vm_file: Path, capsys: pytest.CaptureFixture[str], text: str, why: str
) -> None:
    vm_file.write_text(text)
    assert main(["config", "validate", str(vm_file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pyvmm: error: {vm_file}: ")
    assert error.count("\n") == 1
    assert why in error


def test_show_resolves_paths_and_defaults(vm_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", str(vm_file), "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["firmware"] == str(vm_file.parent / "rom")
    assert shown["memory"] == "256MiB"
    assert main(["config", "show", str(vm_file)]) == 0
    again = vm_file.with_name("again.toml")
    again.write_text(capsys.readouterr().out)
    assert main(["config", "show", str(again), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == shown


def test_schema_prints_a_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert "VmConfig" in json.loads(capsys.readouterr().out)["$defs"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_completion_script_parses_and_knows_commands_and_options(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS, "--firmware", "add-disk", "remove-disk", "schema"):
        assert word in script
    assert ("_shtab_compgen_files" if shell == "bash" else "_files") in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script.encode(), check=True, timeout=60)


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS), ["ctl", "x", "reset", "-h"]])
def test_help_is_printed_for_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert "Usage: pyvmm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [[], ["walk"], ["config"], ["config", "show"], ["ctl"], ["ctl", "x"], ["ctl", "x", "y"], ["completion"]]
)
def test_an_incomplete_or_unknown_command_is_one_line_and_status_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("pyvmm: error: ")
    assert output.err.count("\n") == 1
    assert "--help'" in output.err


class FakeSystem:
    """A /dev/kvm that lacks the capability numbers in `absent`."""

    absent: frozenset[int] = frozenset()
    error: KvmError | None = None

    def __init__(self, device: str) -> None:
        if self.error is not None:
            raise self.error

    def __enter__(self) -> FakeSystem:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check_extension(self, number: int) -> int:
        return 0 if number in self.absent else 1


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> type[FakeSystem]:
    cls = type("FakeSystem", (FakeSystem,), {})
    monkeypatch.setattr(doctor, "System", cls)
    return cls


def diagnose(capsys: pytest.CaptureFixture[str], status: int) -> dict[str, object]:
    assert main(["doctor", "--json"]) == status
    findings: dict[str, object] = json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == status
    assert ("VMs can run here" if status == 0 else "VMs cannot run here") in capsys.readouterr().out
    return findings


def test_a_whole_kvm_can_run_vms(system: type[FakeSystem], capsys: pytest.CaptureFixture[str]) -> None:
    findings = diagnose(capsys, 0)
    rows = findings["capabilities"]
    assert isinstance(rows, list)
    assert [row["number"] for row in rows] == [row[1] for row in CAPABILITIES]
    assert not any(row["remedy"] for row in rows)


def test_a_missing_needed_capability_is_status_5_with_a_remedy(
    system: type[FakeSystem], capsys: pytest.CaptureFixture[str]
) -> None:
    needed = next(number for _, number, is_needed, _ in CAPABILITIES if is_needed)
    system.absent = frozenset([needed])
    rows = diagnose(capsys, 5)["capabilities"]
    assert isinstance(rows, list)
    assert [row["number"] for row in rows if row["remedy"]] == [needed]


def test_missing_optional_capabilities_do_not_matter(
    system: type[FakeSystem], capsys: pytest.CaptureFixture[str]
) -> None:
    system.absent = frozenset(number for _, number, needed, _ in CAPABILITIES if not needed)
    diagnose(capsys, 0)


def test_no_kvm_is_status_5_with_the_remedy(system: type[FakeSystem], capsys: pytest.CaptureFixture[str]) -> None:
    system.error = KvmError("opening /dev/kvm", errno.EACCES)
    kvm = diagnose(capsys, 5)["kvm"]
    assert isinstance(kvm, dict)
    assert not kvm["usable"]
    assert "group kvm" in kvm["error"]


def elf(*kinds: int) -> bytes:
    """A 64-bit ELF header with program headers of these types."""
    header = b"\x7fELF\x02\x01".ljust(32, b"\0") + struct.pack("<Q", 64)
    header = header.ljust(54, b"\0") + struct.pack("<HH", 56, len(kinds))
    return header.ljust(64, b"\0") + b"".join(struct.pack("<I", kind).ljust(56, b"\0") for kind in kinds)


@pytest.mark.parametrize(
    ("image", "static"),
    [(elf(1, 1), True), (elf(1, 3), False), (elf(1)[:-1], False), (b"#!/bin/sh", False), (b"", False)],
)
def test_a_program_is_static_when_it_names_no_dynamic_linker(tmp_path: Path, image: bytes, static: bool) -> None:
    path = tmp_path / "busybox"
    path.write_bytes(image)
    assert doctor.is_static(str(path)) is static
