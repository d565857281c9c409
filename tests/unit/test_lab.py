"""The lab's host side, against a QEMU that only plays the session's part."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from guests import initramfs, lab, packages
from guests.lab import machine

_FAKE_QEMU = """#!{python}
import os, sys, time
arguments = sys.argv[1:]
out, err, reports = (
    int(word.split(",")[0].removeprefix("fd=")) for flag, word in zip(arguments, arguments[1:]) if flag == "-add-fd"
)
console = next(word for word in arguments if word.startswith("file,id=console,path="))
console = console.removeprefix("file,id=console,path=").split(",append")[0]
settings = {{
    word.split(",file=")[0]: open(word.split(",file=")[1]).read()
    for flag, word in zip(arguments, arguments[1:]) if flag == "-fw_cfg"
}}
{behaviour}
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH for a qemu-system-x86_64 of the test's, and a lab kernel that is never booted."""
    kernel = packages.KernelPackage("6.1.0", tmp_path / "vmlinuz", tmp_path / "modules")
    monkeypatch.setattr(packages, "kernel", lambda flavour: kernel)
    monkeypatch.setattr(initramfs, "unpacked_kernel", lambda image: image)
    monkeypatch.setattr(machine, "_initrd", lambda kernel: tmp_path / "initrd")
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def _qemu(folder: Path, behaviour: str) -> None:
    program = folder / "qemu-system-x86_64"
    program.write_text(_FAKE_QEMU.format(python=sys.executable, behaviour=behaviour))
    program.chmod(0o755)


def _run(
    *command: str, timeout: float | None = 30, results: Path | None = None, environment: dict[str, str] | None = None
) -> tuple[lab.Result, bytes, bytes]:
    out, err = bytearray(), bytearray()
    ended = lab.run(
        command,
        timeout=timeout,
        results=results,
        environment=environment,
        on_stdout=out.extend,
        on_stderr=err.extend,
    )
    return ended, bytes(out), bytes(err)


def test_output_streams_and_exit_status_are_passed_through(fake: Path) -> None:
    _qemu(
        fake,
        'os.write(reports, b"running\\n"); os.write(out, bytes(range(256)))\n'
        'os.write(err, b"oops"); os.write(reports, b"exit 42\\n")',
    )
    ended, out, err = _run("true")
    assert ended.returncode == 42
    assert out == bytes(range(256))
    assert err == b"oops"
    assert 0 < ended.boot_seconds <= ended.seconds


def test_exit_status_counts_even_when_power_off_hangs(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_POWER_OFF_SECONDS", 0.2)
    _qemu(fake, 'os.write(reports, b"running\\nexit 0\\n"); time.sleep(100)')
    assert _run("true")[0].returncode == 0


@pytest.mark.parametrize(
    ("said", "place"), [("", "the lab's own boot"), ('os.write(reports, b"running\\n"); ', "the command")]
)
def test_timeout_ends_the_lab_and_says_where_it_was(fake: Path, said: str, place: str) -> None:
    _qemu(fake, f"{said}time.sleep(100)")
    with pytest.raises(lab.LabTimeout) as caught:
        _run("true", timeout=1)
    assert str(caught.value) == f"the lab's time of 1 s ran out during {place}"


def test_a_lab_that_dies_shows_its_console(fake: Path) -> None:
    _qemu(fake, 'open(console, "a").write("Kernel panic\\n"); os.write(reports, b"running\\n")')
    with pytest.raises(lab.LabError, match="went down during the command") as caught:
        _run("true")
    assert caught.value.console == "Kernel panic"


def test_a_refusal_by_qemu_is_shown(fake: Path) -> None:
    _qemu(fake, 'sys.exit("qemu: no such machine")')
    with pytest.raises(lab.LabError, match="went down during the lab's own boot") as caught:
        _run("true")
    assert caught.value.console == "qemu: no such machine"


def test_missing_qemu_names_the_remedy(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fake))
    with pytest.raises(lab.LabError, match="make setup"):
        _run("true")


def test_job_runs_as_given_in_the_callers_folder_and_environment(fake: Path, tmp_path: Path) -> None:
    _qemu(
        fake,
        'open(os.path.join(settings["opt/org.pyvmm/results"], "job"), "w").write(settings["opt/org.pyvmm/job"])\n'
        'os.write(reports, b"running\\nexit 0\\n")',
    )
    program = 'import os, sys; print(os.getcwd(), sys.argv[1:], os.environ["VALUE"], os.environ["PYVMM_LAB"])'
    environment = {"VALUE": 'it\'s\n"$HOME"', "BASH_FUNC_x%%": "() { :; }"}
    _run(sys.executable, "-c", program, "a b", "$(c)", "", results=tmp_path, environment=environment)
    job = tmp_path / "job"
    ended = subprocess.run(["sh", str(job)], capture_output=True, text=True, check=True)
    assert ended.stdout == f"{os.getcwd()} ['a b', '$(c)', ''] {environment['VALUE']} 1\n"


def test_settings_may_hold_secrets_so_only_the_owner_reads_them(fake: Path) -> None:
    _qemu(
        fake,
        'job = [w for w in arguments if w.startswith("opt/org.pyvmm/job")][0].split(",file=")[1]\n'
        'os.write(out, b"%o" % os.stat(os.path.dirname(job)).st_mode); os.write(reports, b"running\\nexit 0\\n")',
    )
    assert stat.S_IMODE(int(_run("true")[1], 8)) == 0o700


def test_command_line_reports_failures_in_one_line(fake: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "guests.lab", "--timeout", "5", "--", "true"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/nonexistent"},
    )
    assert ended.returncode == 125
    assert ended.stderr == "lab: qemu-system-x86_64 is missing; `make setup` installs it\n"
