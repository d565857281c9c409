"""``pyvmm enlightenments show`` of a running guest tells what the guest did."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.cli import main
from pyvmm.machine.control import Commands, ControlServer
from tests.fakes.rom import HYPERCALL_PAGE, SHOW_HYPERCALL_PAGE, ring
from tests.kvm.conftest import RunningVm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.kvm.conftest import Roms

pytestmark = pytest.mark.kvm

#: Turns SINT 2 of VP 0 and the SynIC on, tries an MSR's reserved bits, rings twice in vain, and reads the time 7 times.
BODY = f"""
    movw $fault, 4 * 13
    movw %cs, 4 * 13 + 2
    {SHOW_HYPERCALL_PAGE}
    movl $0x40000092, %ecx
    movl $0x200f3, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x40000080, %ecx
    movl $1, %eax
    wrmsr
    {ring(0x2001)}
    {ring(0x2002)}
    movw $7, %si
again:
    movl $0x40000020, %ecx
    rdmsr
    decw %si
    jnz again
    movl $0x40000001, %ecx
    movl $0x123, %eax
    xorl %edx, %edx
    wrmsr
    movl $1, 0x500
stop:
    hlt
    jmp stop
fault:
    movw %sp, %bp
    addw $2, (%bp)
    iret
    {HYPERCALL_PAGE}"""


@pytest.fixture
def show(roms: Roms, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Runs `BODY` with a specification as far as its end, and asks for the report."""
    servers: list[ControlServer] = []

    def run(spec: str) -> dict[str, Any]:
        machine = roms.machine(BODY, enlightenments=spec)
        path = str(tmp_path / f"control{len(servers)}")
        servers.append(ControlServer(path, Commands(machine, "rom")))
        servers[-1].start()
        vm = RunningVm(machine).start()
        vm.until(lambda: vm.word(0x500) == 1, "the guest's end")
        assert main(["enlightenments", "show", path, "-o", "json"]) == 0
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        report["by_name"] = {entry["name"]: entry for entry in report["enlightenments"]}
        return report

    yield run
    for server in servers:
        server.close()


def states(report: dict[str, Any], name: str) -> tuple[Any, ...]:
    entry = report["by_name"][name]
    return tuple(entry[key] for key in ("offered", "enabled", "used", "hits", "errors"))


def test_enabled_used_hits_and_errors_are_what_the_guest_did(show: Callable[[str], dict[str, Any]]) -> None:
    report = show("full")
    assert states(report, "base") == (True, True, True, 3, 1)
    assert states(report, "synic") == (True, True, True, 4, 2)
    assert states(report, "time") == (True, False, True, 7, 0)
    assert states(report, "stimer") == (True, False, False, 0, 0)
    assert states(report, "vpindex") == (True, None, False, 0, 0)
    assert states(report, "ipi") == (False, False, False, 0, 0)
    base, synic = (report["by_name"][name]["last_error"] for name in ("base", "synic"))
    assert (base["text"], base["vp"]) == ("wrmsr HYPERCALL = 0x123: #GP", 0)
    assert synic["text"] == "HvSignalEvent: invalid connection id"
    assert 0 <= base["seconds_ago"] < synic["seconds_ago"] < report["uptime_s"]
    accesses = {access["name"]: access for entry in report["enlightenments"] for access in entry["accesses"]}
    assert accesses["HvSignalEvent"] == {"name": "HvSignalEvent", "calls": 2, "errors": 2}
    assert accesses["TIME_REF_COUNT"] == {"name": "TIME_REF_COUNT", "reads": 7, "writes": 0, "errors": 0}
    assert accesses["HYPERCALL"] == {"name": "HYPERCALL", "reads": 0, "writes": 2, "errors": 1}
    assert report["exits"] >= 14
    assert report["signatures"] == {"0x40000000": "Microsoft Hv"}
    assert report["synic"]["auto_eoi"] == [{"vp": 0, "sint": 2}]
    warned = {warning["enlightenment"] for warning in report["warnings"]}
    assert warned == {"time", "avic"}  # the page is not used; SINT 2 asks for automatic EOI


def test_what_is_not_offered_is_told_with_what_the_guest_tried(show: Callable[[str], dict[str, Any]]) -> None:
    report = show("minimal,vendor-id=Me")
    assert states(report, "time") == (False, False, False, 7, 7)
    assert states(report, "synic") == (False, False, False, 4, 4)
    assert report["by_name"]["time"]["last_error"]["text"] == "rdmsr TIME_REF_COUNT: #GP"
    assert report["signatures"] == {"0x40000000": "Me"}
    warnings = {warning["enlightenment"]: warning["text"] for warning in report["warnings"]}
    assert warnings["time"] == "not offered, but the guest tries TIME_REF_COUNT; +time offers it"
    assert warnings["synic"] == "not offered, but the guest tries SCONTROL, SINT2, HvSignalEvent; +synic offers it"
    assert warnings["base"].startswith("the vendor in CPUID is 'Me'")
