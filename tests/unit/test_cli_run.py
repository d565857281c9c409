"""``pyvmm run`` over a fake VM: what reaches the VM, how its end becomes an exit status, and start-up cost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.cli import main
from pyvmm.cli.ctl import request
from pyvmm.machine.outcome import MachineError, Outcome
from tests.fakes import machine as fakes
from tests.fakes.machine import FakeMachine

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def rom(tmp_path: Path) -> str:
    path = tmp_path / "rom"
    path.write_bytes(bytes(65536))
    return str(path)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> type[FakeMachine]:
    cls = fakes.install(monkeypatch)
    cls.script = lambda _: Outcome("poweroff", 0)
    return cls


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The line on standard error, when there is just one and nothing on standard output."""
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("pyvmm: error: ")
    return output.err


def test_every_option_reaches_the_vm(machine: type[FakeMachine], rom: str, tmp_path: Path) -> None:
    disk = tmp_path / "d"
    disk.write_bytes(b"")
    words = ["--kernel", rom, "--initrd", rom, "--cmdline", "a b", "--cpus", "4", "--memory", "1GiB", "--huge-pages"]
    words += ["--disk", f"{disk},readonly", "--disk", f"{disk},controller=1", "--enlightenments", "full,-crash"]
    words += ["--com1", "none", "--timeout", "1.5", "--no-reboot", "--testdev", "--trace", "msr,io"]
    assert main(["run", *words]) == 0
    config = machine.last.config
    assert (config.kernel, config.initrd, config.cmdline, config.cpus) == (rom, rom, "a b", 4)
    assert (config.memory, config.huge_pages, config.enlightenments) == (1 << 30, True, "full,-crash")
    assert [(d.path, d.readonly, d.controller) for d in config.disks] == [(str(disk), True, 0), (str(disk), False, 1)]
    assert (config.com1, config.timeout, config.reboot, config.testdev) == ("none", 1.5, False, True)
    assert machine.last.tracer.msr
    assert machine.last.tracer.io
    assert not machine.last.tracer.vmbus
    assert machine.last.closed


def test_options_override_the_vm_file_and_the_rest_of_it_stays(
    machine: type[FakeMachine], rom: str, tmp_path: Path
) -> None:
    file = tmp_path / "vm.toml"
    file.write_text(f'firmware = "{rom}"\ncpus = 2\nmemory = "64M"\ntestdev = true\n')
    assert main(["run", str(file), "--cpus", "3", "--com1", "none"]) == 0
    config = machine.last.config
    assert (config.firmware, config.cpus, config.memory, config.testdev) == (rom, 3, 64 << 20, True)


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome("poweroff", 0),
        Outcome("reset", 3, "the guest reset"),
        Outcome("crash", 4, "triple fault\nrip=0"),
        Outcome("timeout", 124, "stopped after 5 s"),
        Outcome("exit", 35),
    ],
    ids=lambda outcome: outcome.kind,
)
def test_the_exit_status_and_message_are_the_outcomes(
    machine: type[FakeMachine], rom: str, capfd: pytest.CaptureFixture[str], outcome: Outcome
) -> None:
    machine.script = lambda _: outcome
    assert main(["run", "--firmware", rom, "--com1", "none"]) == outcome.exit_code
    assert capfd.readouterr().err == (f"pyvmm: {outcome.message}\n" if outcome.message else "")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "nothing to start"),
        (["--firmware", "ROM", "--kernel", "ROM"], "not both"),
        (["--firmware", "/nowhere/rom"], "no such file"),
        (["--kernel", "ROM", "--initrd", "/nowhere/initrd"], "initrd /nowhere/initrd: no such file"),
        (["--firmware", "ROM", "--disk", "/nowhere/d"], "disk /nowhere/d: no such file"),
        (["--firmware", "ROM", "--disk", "d,rw"], "unknown option 'rw'"),
        (["--firmware", "ROM", "--cpus", "0"], "cpus"),
        (["--firmware", "ROM", "--cpus", "many"], "argument --cpus"),
        (["--firmware", "ROM", "--memory", "1Z"], "not a size"),
        (["--firmware", "ROM", "--enlightenments", "much"], "unknown enlightenment profile 'much'"),
        (["--firmware", "ROM", "--disk", "d", "--enlightenments", "none"], "a disk needs the enlightenment vmbus"),
        (["--firmware", "ROM", "--timeout", "-1"], "timeout"),
        (["--firmware", "ROM", "--trace", "msr,nothing"], "unknown trace category 'nothing'"),
        (["--firmware", "ROM", "--com1", "pty"], "com1 'pty'"),
        (["--firmware", "ROM", "--com1", "file:/nowhere/log"], "com1 file /nowhere/log: No such file"),
        (["--firmware", "ROM", "--com1", "unix:/nowhere/c"], "com1 socket /nowhere/c: No such file"),
        (["--firmware", "ROM", "--com1", "none", "--control", "/nowhere/c"], "control socket /nowhere/c"),
        (["--firmware", "ROM", "--com1", "none", "--control", "/tmp/" + "x" * 120], "longer than the 107 bytes"),
        (["--firmware", "ROM", "--report", "/nowhere/r"], "report /nowhere/r"),
        (["--firm", "ROM"], "unrecognized arguments"),
        (["--firmware"], "expected one argument"),
        (["/nowhere/vm.toml"], "VM file /nowhere/vm.toml: No such file"),
        (["ROM"], "not TOML"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    machine: type[FakeMachine], rom: str, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    assert main(["run", *(rom if word == "ROM" else word for word in words)]) == 2
    assert why in one_line(capsys)


def test_a_host_that_lacks_something_is_one_line_and_status_5(
    machine: type[FakeMachine], rom: str, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.construction_error = MachineError("opening /dev/kvm failed:\n load the module", 5)
    assert main(["run", "--firmware", rom]) == 5
    assert "load the module" in one_line(capsys)


def test_a_bug_is_one_line_without_traceback_unless_asked_for(
    machine: type[FakeMachine], rom: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.construction_error = ZeroDivisionError("oops")
    monkeypatch.delenv("PYVMM_DEBUG", raising=False)
    assert main(["run", "--firmware", rom]) == 1
    assert "internal error: ZeroDivisionError: oops" in one_line(capsys)
    monkeypatch.setenv("PYVMM_DEBUG", "1")
    assert main(["run", "--firmware", rom]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_report_is_the_inspection_tree_of_the_end(machine: type[FakeMachine], rom: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert main(["run", "--firmware", rom, "--com1", "none", "--report", str(report)]) == 0
    assert json.loads(report.read_text()) == machine.last.inspect()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_stops_the_vm_and_gives_128_and_its_number(
    machine: type[FakeMachine], rom: str, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    def script(vm: FakeMachine) -> Outcome:
        os.kill(os.getpid(), number)
        assert vm.stopped.wait(10)
        assert vm.outcome is not None
        return vm.outcome

    machine.script = script
    assert main(["run", "--firmware", rom, "--com1", "none"]) == 128 + number
    assert capsys.readouterr().err == f"pyvmm: stopped by {number.name}\n"
    assert machine.last.closed
    assert signal.getsignal(number) is before


def test_quitting_at_the_console_stops_the_vm_with_status_130(machine: type[FakeMachine], rom: str) -> None:
    def script(vm: FakeMachine) -> Outcome:
        vm.console.on_quit()
        assert vm.outcome is not None
        return vm.outcome

    machine.script = script
    assert main(["run", "--firmware", rom, "--com1", "none"]) == 130


def test_the_control_socket_lives_as_long_as_the_vm(machine: type[FakeMachine], rom: str, tmp_path: Path) -> None:
    path = tmp_path / "vm.sock"
    seen: list[object] = []

    def script(vm: FakeMachine) -> Outcome:
        seen.append(path.stat().st_mode & 0o777)
        seen.append(request(str(path), {"command": "status"}, 10)["state"])
        return Outcome("poweroff", 0)

    machine.script = script
    assert main(["run", "--firmware", rom, "--com1", "none", "--control", str(path)]) == 0
    assert seen == [0o600, "running"]
    assert not path.exists()


def test_the_way_to_the_guest_imports_nothing_heavy(rom: str) -> None:
    program = (
        "import sys\n"
        "from pyvmm.cli.parser import build_parser\n"
        f"args = build_parser(['run']).parse_args(['run', '--firmware', {rom!r}, '--testdev'])\n"
        "from pyvmm.cli.run import resolve\n"
        "resolve(args)\n"
        "import pyvmm.machine.machine\n"
        "print(*sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, check=True, timeout=60
    ).stdout
    loaded = set(output.decode().split())
    assert {"pyvmm.machine.console", "pyvmm.machine.machine"} <= loaded
    heavy = {"asyncio", "capstone", "construct", "dataclasses", "inspect", "json", "logging", "msgspec", "pathlib"}
    heavy |= {"rich", "rich_argparse", "shtab", "shutil", "socket", "termios", "tomllib", "typing"}
    heavy |= {"pyvmm.cli.ctl", "pyvmm.cli.doctor", "pyvmm.machine.control", "pyvmm.machine.config_file"}
    assert not loaded & heavy


def test_the_module_is_the_command(tmp_path: Path) -> None:
    missing = str(tmp_path / "rom")
    command = [sys.executable, "-m", "pyvmm", "run", "--firmware", missing]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"pyvmm: error: firmware {missing}: no such file\n"
