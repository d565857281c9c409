"""The demo: reading what its guests said, judging it, and showing it to people."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from guests import lab
from guests.demo import __main__ as demo
from guests.demo import place, session, show, verdict
from guests.demo.place import Place, SessionError
from guests.demo.verdict import Channel, Guest
from guests.probe.report import parse

LETTER = "Dear host,\nthis is Linux\n"
CONSOLE = f"""booting\r
RESULT kernel=6.1.0-9-cloud-amd64\r
RESULT clocksource=hyperv_clocksource_tsc_page\r
RESULT dmesg_1=[    0.000000] Hypervisor detected: Microsoft Hyper-V\r
RESULT dmesg_2=[    5.710354] hv_vmbus: Vmbus version:5.3\r
RESULT channel_a=ba6163d9-04a1-4d29-b605-72e2ffb1dc7f 4 hv_storvsc\r
RESULT channel_b=0e0b6031-5213-4934-818b-38d90ced39db 1 hv_utils\r
RESULT channel_c=57164f39-9115-4e78-ab55-382f3bd5422d 1 hv_utils\r
RESULT channel_d=9527e630-d0ae-497b-adce-e80ab0175caf 1 hv_utils\r
RESULT disk=/dev/sda, 'Msft Virtual Disk', 64 MiB\r
RESULT letter_1=Dear host,\r
RESULT letter_2=this is Linux\r
RESULT sum={hashlib.sha256(LETTER.encode()).hexdigest()}\r
"""
SHUTDOWN = {"exit": 0, "reply": {"ok": True, "obeyed": True, "message": "the guest is shutting down"}, "stderr": ""}


def found(**changes: Any) -> dict[str, Any]:
    return {"exit": 0, "stderr": "", "console": CONSOLE, "shutdown": SHUTDOWN, **changes}


def read(letter: str = LETTER, **changes: Any) -> Guest:
    return verdict.guest(found(**changes), letter.encode())


def shown(view: RenderableType) -> str:
    page = io.StringIO()
    Console(file=page, width=100).print(view)
    return page.getvalue()


def test_a_good_guest_is_read_and_has_no_problem() -> None:
    guest = read()
    assert guest.kernel == "6.1.0-9-cloud-amd64"
    assert guest.channels[0] == Channel("a", "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f", 4, "hv_storvsc")
    assert guest.channels[0].name == "SCSI controller"
    assert guest.letter == LETTER
    assert guest.sum_on_disk == guest.letter_sum
    assert guest.obeyed
    assert verdict.problems(guest) == []


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("Microsoft Hyper-V", "KVM", "hypervisor that Linux detected"),
        ("version:5.3", "version:4.0", "VMBus protocol"),
        ("=hyperv_clocksource_tsc_page", "=tsc", "clocksource"),
        (" 4 hv_storvsc", " 4 ", "devices and drivers on VMBus"),
        ("RESULT channel_d", "RESULT nothing", "devices and drivers on VMBus"),
        ("RESULT sum=", "RESULT sum=0", "SHA-256 of the letter, as the guest reads it"),
        ("=this is Linux", "=this is", "letter on the disk, as the host reads it"),
    ],
)
def test_each_difference_in_the_guest_is_a_problem(old: str, new: str, what: str) -> None:
    assert old in CONSOLE
    assert [problem.what for problem in verdict.problems(read(console=CONSOLE.replace(old, new)))] == [what]


def test_a_letter_that_the_host_does_not_find_is_a_problem() -> None:
    whats = [problem.what for problem in verdict.problems(read(letter=""))]
    assert whats == ["letter on the disk, as the host reads it", "SHA-256 of the letter, as the guest reads it"]


def test_an_empty_letter_is_a_problem_even_if_both_sides_agree() -> None:
    guest = replace(read(), letter="", letter_on_disk=b"", letter_sum=hashlib.sha256(b"").hexdigest())
    assert [problem.what for problem in verdict.problems(guest)] == ["letter, as the guest reads it back"]


@pytest.mark.parametrize(
    ("shutdown", "told"),
    [
        (None, "never asked, as the guest did not get that far"),
        ({"exit": 1, "reply": {"ok": True, "obeyed": False, "message": "no answer"}, "stderr": ""}, "no answer"),
        ({"exit": 1, "reply": {"ok": False, "error": "it is paused"}, "stderr": ""}, "it is paused"),
        ({"exit": 3, "reply": None, "stderr": "no VM listens\n"}, "no VM listens"),
    ],
)
def test_a_shutdown_that_was_not_obeyed_is_a_problem_that_says_why(shutdown: Any, told: str) -> None:
    (problem,) = verdict.problems(read(shutdown=shutdown))
    assert (problem.what, problem.found) == ("shutdown by the integration service", told)


def test_the_exit_status_of_pyvmm_counts() -> None:
    (problem,) = verdict.problems(read(exit=124))
    assert (problem.expected, problem.found) == ("0", "124")


def test_a_silent_guest_is_all_problems_and_no_exception() -> None:
    guest = verdict.guest(found(console="panic\n", shutdown=None, exit=4), b"")
    assert len(verdict.problems(guest)) == 8
    assert "│ none  " in shown(show.guest_view(guest))


def test_a_file_is_read_out_of_an_ext4_image(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "letter").write_text(LETTER)
    image = tmp_path / "disk.img"
    make = ["/sbin/mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image), "4M"]
    subprocess.run(make, check=True, capture_output=True)
    assert verdict.file_in_image(image, "letter") == LETTER.encode()
    assert verdict.file_in_image(image, "other") == b""


def test_probe_table_has_a_row_for_each_topic_with_notable_values() -> None:
    text = shown(
        show.probe_table(
            parse(
                "probe: cpuid.vendor = Microsoft Hv ok\n"
                "probe: cpuid.leaf1 = 31237648,00000000,00000000,00000000 ok\n"
                "probe: vmbus.offers = 0x4 ok\n"
                "probe: storage.sector0 = 7079 ok\n"
                "probe: vmbus.version = 5.3 ok\n"
            )
        )
    )
    assert [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")] == [
        *("hypervisor leaves", "VMBus", "disk on VMBus")
    ]
    assert "'Microsoft Hv', interface 'Hv#1'" in text
    assert "protocol 5.3, 4 offers" in text
    assert "sector 0 begins 'py'" in text


def test_probe_table_shows_bad_findings_in_full() -> None:
    text = shown(show.probe_table(parse("probe: vmbus.version = 4.0 bad 5.3 or so\nprobe: vmbus.offers = 0x4 ok\n")))
    assert "vmbus.version" in text
    assert "4.0, expected 5.3 or so: 5.3" in text


@pytest.mark.parametrize("value", ["zz", "123456789a,0"])
def test_values_that_cannot_be_read_are_shown_as_they_are(value: str) -> None:
    assert f"cpuid.leaf1 {value}" in shown(show.probe_table(parse(f"probe: cpuid.leaf1 = {value} ok\n")))


def test_a_guest_cannot_steer_the_terminal() -> None:
    console = CONSOLE.replace("=Dear host,", "=\x1b[2J[red]Dear[/red][/]").replace("=/dev/sda,", "=[/]\x1b]0;x\x07")
    text = shown(show.guest_view(read(console=console.replace(" 4 hv_storvsc", " 4 \x1b[31m"))))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]Dear[/red][/]" in text


def test_problems_tell_what_was_expected_and_the_end_of_the_log() -> None:
    log = "".join(f"line {number}\n" for number in range(100))
    text = shown(show.problems_view(verdict.problems(read(exit=4)), {"the console": log, "stderr": " \n"}))
    assert "expected 0" in text
    assert "found    4" in text
    assert "the end of the console" in text
    assert "line 99" in text
    assert "line 60 " not in text
    assert "stderr" not in text


def test_steps_are_plain_lines_off_a_terminal() -> None:
    page = io.StringIO()
    with show.Steps(Console(file=page, width=100), "first") as steps:
        steps.step("[b]second\x1b")
    assert page.getvalue() == "... first\n... [b]second\N{REPLACEMENT CHARACTER}\n"


def test_steps_leave_no_line_on_a_terminal() -> None:
    page = io.StringIO()
    with show.Steps(Console(file=page, width=100, force_terminal=True), "first") as steps:
        steps.step("second")
    assert "second" in page.getvalue()
    assert page.getvalue().endswith("\x1b[2K")  # erases the line


@pytest.mark.parametrize("kind", ["kvm_amd", "kvm_intel"])
def test_an_ordinary_kvm_runs_both_guests(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "kvm_kind", lambda: kind)
    assert place.place_for_linux(None) == Place(False, f"/dev/kvm is {kind}, an ordinary one")
    assert not place.place_for_probe(None).in_lab


@pytest.mark.parametrize("kind", ["kvm_pvm", "unknown"])
def test_other_kvms_run_the_probe_only(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "kvm_kind", lambda: kind)
    assert place.place_for_linux(None).in_lab
    assert kind.removeprefix("kvm_") in place.place_for_linux(None).why
    assert not place.place_for_probe(None).in_lab


def test_without_kvm_both_guests_run_in_the_lab() -> None:
    expected = Place(True, "no KVM: load it")
    assert place.place_for_linux("no KVM: load it") == place.place_for_probe("no KVM: load it") == expected


def test_a_session_in_the_lab_hands_over_steps_by_the_line_and_its_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], *, on_stdout: Callable[[bytes], object], results: Path, **_: Any) -> lab.Result:
        assert command[-3:] == [str(tmp_path), "linux", "x"]
        for data in (b"fi", b"rst\nse", b"cond\n"):
            on_stdout(data)
        (results / "linux.json").write_text('{"exit": 0}')
        return lab.Result(0, 1.0, 2.0)

    monkeypatch.setattr(lab, "run", run)
    steps: list[str] = []
    assert place.run_session(Place(True, ""), tmp_path, "linux", "x", on_step=steps.append) == {"exit": 0}
    assert steps == ["first", "second"]


def test_a_lab_that_fails_shows_its_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> lab.Result:
        raise lab.LabTimeout("too late", "Kernel panic")

    monkeypatch.setattr(lab, "run", run)
    with pytest.raises(SessionError, match="too late") as caught:
        place.run_session(Place(True, ""), tmp_path, "linux", on_step=print)
    assert "Kernel panic" in caught.value.log


def test_a_session_here_that_fails_shows_its_log(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="status 1 and without findings") as caught:
        place.run_session(Place(False, ""), tmp_path, "linux", on_step=print)
    assert "TypeError" in caught.value.log


def _pyvmm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put a stand-in for pyvmm into the session: Python code with its arguments in `arguments`."""
    program = tmp_path / "pyvmm.py"
    program.write_text(f"import json, pathlib, sys, time\narguments = sys.argv[1:]\n{body}")
    monkeypatch.setattr(session, "_PYVMM", [sys.executable, str(program)])


def test_session_shuts_the_guest_down_once_it_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = """
if arguments[0] == "run":
    mark = pathlib.Path(arguments[arguments.index("--control") + 1])
    pathlib.Path(arguments[arguments.index("--disk") + 1]).write_bytes(b"disk")
    print("RESULT step=Linux is up\\r\\nRESULT ready=shutdown\\r", flush=True)
    while not mark.exists():
        time.sleep(0.01)
    print("bye")
    sys.exit("stopped")
pathlib.Path(arguments[1]).touch()
print(json.dumps({"obeyed": True, "command": arguments[2]}))
"""
    _pyvmm(tmp_path, monkeypatch, body)
    left = session.linux("vmlinux", "initrd", "quiet", image=tmp_path / "copy.img")
    assert left["shutdown"] == {"exit": 0, "reply": {"obeyed": True, "command": "shutdown"}, "stderr": ""}
    assert left["exit"] == 1
    assert left["stderr"] == "stopped\n"
    assert left["console"].endswith("bye\n")
    assert (tmp_path / "copy.img").read_bytes() == b"disk"
    assert capsys.readouterr().out == "Linux is up\npyvmm asks the guest to shut down\n"


def test_session_of_a_guest_that_dies_early_never_asks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pyvmm(tmp_path, monkeypatch, "print('Kernel panic')\nsys.exit(4)")
    left = session.linux("vmlinux", "initrd", "quiet", image=tmp_path / "copy.img")
    assert (left["exit"], left["shutdown"], left["console"]) == (4, None, "Kernel panic\n")
    assert json.loads(json.dumps(left)) == left


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for the demo's parts, which return the phrases in this list; one that begins with FAIL fails."""
    phrases = ["3 findings", "Linux"]

    def part(number: int) -> Callable[[Console, Place], str]:
        def run(console: Console, place: Place) -> str:
            if phrases[number].startswith("FAIL"):
                raise demo.Failed(phrases[number])
            return phrases[number]

        return run

    monkeypatch.setattr(demo, "show_probe", part(0))
    monkeypatch.setattr(demo, "show_linux", part(1))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return phrases


def test_demo_ends_with_one_line_and_status_0(parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "demo: all as expected in 0 s: 3 findings, Linux"


@pytest.mark.parametrize("number", [0, 1])
def test_demo_fails_if_one_part_does(parts: list[str], number: int, capsys: pytest.CaptureFixture[str]) -> None:
    parts[number] = "FAIL of it"
    assert demo.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "demo: FAILED after 0 s: FAIL of it"
