"""Doorbells: HvSignalEvent through the hypercall page, as far as the eventfd."""

from __future__ import annotations

import ctypes
import json
import os
import time
from typing import TYPE_CHECKING

import pytest

from guests.bench.build import build
from guests.bench.run import Workload, measure, pyvmm_command, write_image
from tests.fakes.rom import HYPERCALL_PAGE, SHOW_HYPERCALL_PAGE, ring
from tests.kvm.conftest import PATIENCE_S, RunningVm

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kvm.conftest import Roms

pytestmark = pytest.mark.kvm

CONNECTION = 0x2001


def test_rings_arrive_while_all_of_python_is_held_up(roms: Roms) -> None:
    body = f"{SHOW_HYPERCALL_PAGE}\nagain:\n{ring(CONNECTION)}\n jmp again\n{HYPERCALL_PAGE}"
    machine = roms.machine(body)
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    machine.partition.connect_event_port(CONNECTION, bell)

    def rung() -> int:
        return machine.partition.doorbells.inspect()[CONNECTION]

    vm = RunningVm(machine).start()
    vm.until(lambda: rung() > 0, "the first ring")
    usleep = ctypes.PyDLL(None).usleep  # keeps the GIL
    deadline = time.monotonic() + PATIENCE_S
    while True:
        before = rung()
        usleep(100_000)
        if rung() - before > 100:
            break
        assert time.monotonic() < deadline, "rings wait for Python"
    machine.stop(0)
    vm.wait()
    assert os.eventfd_read(bell) == rung()
    machine.partition.disconnect_event_port(CONNECTION)
    os.close(bell)


def test_the_status_of_a_ring_comes_back_in_edx_eax(roms: Roms) -> None:
    body = f"""{SHOW_HYPERCALL_PAGE}
    movl $0x12345678, %ebp
    {ring(CONNECTION)}
    movl %eax, 0x500
    movl %edx, 0x504
    movl %ebp, 0x508
    EXIT 1
    {HYPERCALL_PAGE}"""
    vm = roms.start(body)
    assert vm.wait().kind == "exit"
    assert [vm.word(gpa) for gpa in (0x500, 0x504, 0x508)] == [0x12, 0, 0x12345678]  # no such connection


@pytest.mark.parametrize("traced", [False, True], ids=["untraced", "traced"])
def test_a_64_bit_guest_rings_without_an_exit_unless_hypercalls_are_traced(tmp_path: Path, traced: bool) -> None:
    write_image(tmp_path / "disk.img", 1 << 20)
    console, report = tmp_path / "com1", tmp_path / "report"
    command = pyvmm_command(build(), console, tmp_path / "disk.img", "storvsc", [Workload("randread", 4096, 1, 100)])
    command += ["--report", str(report), *(["--trace", "hypercall"] if traced else [])]
    rings = measure(command, console)["randread_4096_1"].kicks
    calls = json.loads(report.read_text())["hypercalls"]
    assert rings > 0
    assert calls["HvPostMessage"] > 0
    assert calls.get("HvSignalEvent", 0) >= rings if traced else "HvSignalEvent" not in calls
