"""Raw firmware on /dev/kvm by the command line: every way for a guest to end, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fakes.rom import PROTECTED_MODE

if TYPE_CHECKING:
    from tests.kvm.conftest import Roms
from tests.kvm.conftest import PATIENCE_S, ROOT

pytestmark = pytest.mark.kvm

ON_PVM = Path("/sys/module/kvm_pvm").exists()

POWEROFF = """
    movw $0x604, %dx
    movw $0x3400, %ax
    outw %ax, %dx
    EXIT 0x7f
"""
RESETS = {
    "0xcf9": "movw $0xcf9, %dx\n movb $6, %al\n outb %al, %dx\n",
    "i8042": "movb $0xfe, %al\n outb %al, $0x64\n",
    "port 92": "inb $0x92, %al\n orb $1, %al\n outb %al, $0x92\n",
    "msr": "movl $0x40000003, %ecx\n xorl %edx, %edx\n movl $1, %eax\n wrmsr\n",
}


@pytest.mark.parametrize(("value", "status"), [(0, 1), (0x21, 0x43), (0x7F, 0xFF), (0x80, 1)])
def test_the_debug_exit_gives_the_status(roms: Roms, value: int, status: int) -> None:
    result = roms.cli(f"EXIT {value}")
    assert (result.returncode, result.stderr) == (status, "")


def test_without_testdev_the_port_is_nobodys(roms: Roms) -> None:
    machine = roms.machine(f"movb $1, %al\n outb %al, $0xf4\n{POWEROFF}", testdev=False)
    assert machine.run().kind == "poweroff"


def test_powering_off_is_success(roms: Roms) -> None:
    result = roms.cli(POWEROFF)
    assert (result.returncode, result.stderr) == (0, "")


def test_another_sleep_state_does_not_power_off(roms: Roms) -> None:
    assert roms.cli("movw $0x604, %dx\n movw $0x2000, %ax\n outw %ax, %dx\n EXIT 2").returncode == 5


@pytest.mark.parametrize("way", RESETS)
def test_a_reset_ends_the_run_where_reboots_are_off(roms: Roms, way: str) -> None:
    result = roms.cli(RESETS[way] + "EXIT 0x7f", "--no-reboot")
    assert result.returncode == 3, result.stderr


@pytest.mark.parametrize("way", RESETS)
def test_a_reset_starts_again_with_fresh_devices_and_old_ram(roms: Roms, way: str) -> None:
    body = f"""
    movw $0x3fb, %dx
    inb %dx, %al
    testb %al, %al
    jnz stale
    movb $0x1b, %al
    outb %al, %dx
    incb 0x500
    cmpb $3, 0x500
    jne again
    EXIT 0x15
stale:
    EXIT 0x16
again:
    {RESETS[way]}
    EXIT 0x17
    """
    result = roms.cli(body)
    assert result.returncode == 0x15 << 1 | 1, result.stderr


def test_a_guest_that_resets_without_end_does_not_outrun_its_timeout(roms: Roms) -> None:
    assert roms.cli(RESETS["port 92"] + "EXIT 1", seconds=0.3).returncode == 124


@pytest.mark.parametrize("body", ["jmp .", "cli\n hlt\n jmp ."])
def test_a_guest_that_never_ends_is_stopped_in_time(roms: Roms, body: str) -> None:
    result = roms.cli(body, seconds=0.3)
    assert result.returncode == 124
    assert result.stderr == "pyvmm: stopped after 0.3 s\n"


def test_a_reader_that_takes_no_output_does_not_keep_a_guest_from_its_timeout(roms: Roms) -> None:
    rom = roms.build("movw $0x3f8, %dx\nagain:\n outb %al, %dx\n jmp again")
    command = [sys.executable, "-m", "pyvmm", "run", "--firmware", str(rom), "--com1", "stdio", "--timeout", "0.5"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.wait(PATIENCE_S) == 124
        assert process.stdout is not None
        assert len(process.stdout.read()) >= 4096


def test_a_triple_fault_is_a_crash_with_its_story(roms: Roms) -> None:
    result = roms.cli(PROTECTED_MODE + "lidtl 0xf0000 + empty\n ud2\nempty: .word 0\n .long 0")
    assert result.returncode == 4
    assert "VP 0: triple fault" in result.stderr
    assert "rip=" in result.stderr
    if ON_PVM:  # AMD processors lose the state, and KVM resets the VP
        assert "mode: 32-bit protected mode" in result.stderr
        assert "ud2" in result.stderr


@pytest.mark.skipif(not ON_PVM, reason="only kvm_pvm lacks these instructions")
@pytest.mark.parametrize(("body", "text"), [("fwait", "wait"), ("popcntw %ax, %ax", "popcnt ax, ax")])
def test_an_instruction_that_kvm_lacks_is_shown_with_the_way_out(roms: Roms, body: str, text: str) -> None:
    result = roms.cli(body)
    assert result.returncode == 4
    assert "KVM cannot emulate the instruction" in result.stderr
    assert "mode: real mode" in result.stderr
    assert text in result.stderr
    assert "python -m guests.lab" in result.stderr


def test_the_report_tells_what_the_guest_did(roms: Roms, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = roms.cli("movl $0x40000002, %ecx\n rdmsr\n rdmsr\n inb $0x77, %al\n EXIT 3", "--report", str(report))
    assert result.returncode == 7
    tree = json.loads(report.read_text())
    assert tree["state"] == "stopped"
    assert tree["msrs"]["msr_reads"] == {"VP_INDEX": 2}
    assert tree["exits"]["rdmsr"] == 2
    assert tree["exits"]["io"] == 2
    assert tree["board"]["pio"]["unclaimed"] == {"0x77": 1}


def test_a_trace_has_a_line_for_each_access(roms: Roms) -> None:
    result = roms.cli("movl $0x40000002, %ecx\n rdmsr\n inb $0x77, %al\n EXIT 3", "--trace", "msr,io")
    lines = [line.split("] ")[1] for line in result.stderr.splitlines()]
    assert lines == [
        "msr: vp0 rdmsr VP_INDEX = 0x0",
        "io: pio read 0x77 size 1 = 0xff",
        "io: pio write 0xf4 size 1 = 0x3",
    ]


@pytest.mark.parametrize(
    "options",
    [
        ["--firmware", "/nonexistent/rom"],
        ["--firmware", "/dev/null"],
        ["--firmware", "/"],
        ["--enlightenments", "telepathy"],
        ["--enlightenments", "full,-base,+synic"],
        ["--disk", "/nonexistent/disk"],
        ["--disk", "/dev/zero", "--enlightenments", "minimal"],
        ["--memory", "12K"],
        ["--cpus", "0"],
        ["--trace", "nonsense"],
    ],
)
def test_what_cannot_be_is_refused_in_one_line(roms: Roms, options: list[str]) -> None:
    result = roms.cli("EXIT 1", *options)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) <= 2, result.stderr  # argparse adds a line of usage
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
