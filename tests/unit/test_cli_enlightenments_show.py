"""``pyvmm enlightenments show`` against the control socket of a VM without a guest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.cli import enlightenments_show, main
from pyvmm.machine.control import Commands, ControlServer
from tests.fakes.machine import FakeMachine
from tests.fakes.observed import CALLS, WRITE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Output = pytest.CaptureFixture[str]
EOM, POST = 0x40000084, 0x5C


@pytest.fixture
def machine() -> FakeMachine:
    machine = FakeMachine()
    machine.observed.count(WRITE, EOM, 22)
    machine.observed.count(CALLS, POST, 44)
    machine.observed.fail("hypercall", POST, 4, at=9, value=0x12)
    return machine


@pytest.fixture
def server(machine: FakeMachine, tmp_path: Path) -> Iterator[ControlServer]:
    server = ControlServer(str(tmp_path / "c"), Commands(machine, "web01"))  # type: ignore[arg-type]
    server.start()
    yield server
    server.close()


@pytest.fixture
def vm(server: ControlServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "160")
    return str(tmp_path / "c")


def synic(report: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(entry for entry in report["enlightenments"] if entry["name"] == "synic")
    return entry


def test_the_report_is_json(vm: str, capsys: Output) -> None:
    assert main(["enlightenments", "show", vm, "-o", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert synic(report)["hits"] == 66
    assert synic(report)["last_error"] == {"text": "HvPostMessage: invalid connection id", "vp": 0, "seconds_ago": 2.0}
    assert (report["guest_os"], report["uptime_s"]) == ("Linux 6.1.0", 11.0)
    assert not {"ok", "version"} & set(report)


def test_the_report_is_a_table_with_warnings(vm: str, machine: FakeMachine, capsys: Output) -> None:
    machine.observed.partition["reference_page"] = None
    machine.observed.signatures["0x40000000"] = "[red]"
    assert main(["enlightenments", "show", vm]) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("synic ")]
    assert line.split() == [
        *("synic", "yes", "no", "yes", "66", "6.0", "6.2%", "4"),
        *("HvPostMessage:", "invalid", "connection", "id", "(2", "s", "ago)"),
    ]
    assert "Linux 6.1.0; VM of 11.0 s, 97 exits per second" in shown
    assert "time: the guest does not use the reference TSC page" in shown
    assert "base: the vendor in CPUID is '[red]'" in shown
    assert "KVM runs the timers" not in shown


def test_the_table_says_what_kvm_keeps_from_it(vm: str, machine: FakeMachine, capsys: Output) -> None:
    for synic in machine.observed.partition["synics"]:
        synic["kvm_timers"] = True
    assert main(["enlightenments", "show", vm]) == 0
    assert "KVM runs the timers: their ticks, and accesses of their COUNT, are not seen here" in capsys.readouterr().out


def test_a_vm_file_names_its_socket(vm: str, tmp_path: Path, capsys: Output) -> None:
    file = tmp_path / "vm.toml"
    file.write_text('kernel = "k"\ncontrol = "c"\n')
    assert main(["enlightenments", "show", str(file), "-o", "json"]) == 0
    assert synic(json.loads(capsys.readouterr().out))["hits"] == 66
    file.write_text('kernel = "k"\n')
    assert main(["enlightenments", "show", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"pyvmm: error: {file} names no control socket; add control = PATH, or give the socket\n"
    )


def test_without_a_vm_there_is_status_3(tmp_path: Path, capsys: Output) -> None:
    for watch in ([], ["--watch"]):
        assert main(["enlightenments", "show", str(tmp_path / "no"), *watch]) == 3
        assert "no VM listens at" in capsys.readouterr().err


@pytest.mark.parametrize("interval", ["0", "-1", "x", "nan"])
def test_an_interval_is_a_positive_number(interval: str, capsys: Output) -> None:
    assert main(["enlightenments", "show", "x", "--watch", "--interval", interval]) == 2
    assert "is not a positive number of seconds" in capsys.readouterr().err


class Sleep:
    """Stands in for the wait: counts, lets the guest do something, and ends after a while in one way or the other."""

    def __init__(self, machine: FakeMachine, server: ControlServer, by_hand: bool) -> None:
        self.waits: list[float] = []
        self._machine = machine
        self._server = server
        self._by_hand = by_hand

    def __call__(self, seconds: float) -> None:
        self.waits.append(seconds)
        self._machine.observed.count(WRITE, EOM, 10 * len(self.waits))
        if len(self.waits) == 3:
            if self._by_hand:
                raise KeyboardInterrupt
            self._server.close()


@pytest.mark.parametrize("output", ["json", "table"])
@pytest.mark.parametrize("by_hand", [True, False])
def test_watching_shows_rates_until_ctrl_c_or_the_vms_end(
    vm: str,
    machine: FakeMachine,
    server: ControlServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
    by_hand: bool,
    output: str,
) -> None:
    sleep = Sleep(machine, server, by_hand)
    monkeypatch.setattr(enlightenments_show, "sleep", sleep)
    assert main(["enlightenments", "show", vm, "--watch", "--interval", "0.25", "-o", output]) == 0
    shown = capsys.readouterr()
    assert sleep.waits == [0.25] * 3
    assert shown.err == ("" if by_hand else "pyvmm: the VM has ended\n")
    if output == "json":
        reports = [json.loads(line) for line in shown.out.splitlines()]
        assert [synic(report)["hits"] for report in reports] == [66, 76, 96]
        assert [synic(report)["hits_per_s"] for report in reports] == [6.0, 10.0, 20.0]
    else:
        (line,) = [line for line in shown.out.splitlines() if line.strip().startswith("synic ")]
        assert line.split()[4:6] == ["96", "20.0"]
