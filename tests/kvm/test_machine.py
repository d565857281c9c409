"""The machine in this process, on /dev/kvm: exits, life cycle, errors, and what is left afterwards."""

from __future__ import annotations

import gc
import os
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.core.bus import BusHandler
from pyvmm.core.device import GuestViolation
from pyvmm.core.kvm.vp import Vp
from pyvmm.machine.config import DiskConfig
from pyvmm.machine.machine import Machine
from pyvmm.machine.nic_config import parse_nic
from pyvmm.machine.outcome import MachineError
from tests.fakes.rom import HYPERCALL_PAGE, PROTECTED_MODE, SHOW_HYPERCALL_PAGE, ring

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.kvm.conftest import Roms, RunningVm

pytestmark = pytest.mark.kvm

PORT = 0x5A0
MMIO = 0xD000_0000

COUNT = """
count:
    incl 0x500
    jmp count
"""


class Recorder(BusHandler):
    """Remembers writes, answers reads with bytes that count up, and does `on_access` each time."""

    def __init__(self, on_access: Callable[[], None] = lambda: None) -> None:
        self.writes: list[tuple[int, int, int]] = []
        self.reads: list[tuple[int, int]] = []
        self._next = 1
        self._on_access = on_access

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        value = bytes((self._next + i) & 0xFF for i in range(size))
        self._next += size
        self._on_access()
        return int.from_bytes(value, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))
        self._on_access()


def counting(vm: RunningVm) -> None:
    """Return once the guest is seen to count."""
    start = vm.word(0x500)
    vm.until(lambda: vm.word(0x500) != start, "the guest counts")


# Exits


@pytest.mark.parametrize("interrupted", [False, True])
def test_string_io_hands_over_every_element_once(roms: Roms, interrupted: bool) -> None:
    """Also where the VP is stopped, and goes on, after each of them."""
    machine = roms.machine(
        f"""
    movw $0x5453, 0x600
    movw $0x4952, 0x602
    movw $0x474e, 0x604
    movw $0x600, %si
    movw ${PORT}, %dx
    movw $6, %cx
    rep outsb
    movw $0x600, %si
    movw $3, %cx
    rep outsw
    movw $0x700, %di
    movw $5, %cx
    rep insb
    movw $2, %cx
    rep insl
    EXIT 1
    """
    )
    recorder = Recorder((lambda: machine.processors[0].hot.stop()) if interrupted else lambda: None)
    machine.board.pio.register(PORT, 4, recorder, "recorder")
    assert machine.run().exit_code == 3
    assert recorder.writes[:6] == [(0, 1, byte) for byte in b"STRING"]
    assert recorder.writes[6:] == [(0, 2, word) for word in (0x5453, 0x4952, 0x474E)]
    assert recorder.reads == [(0, 1)] * 5 + [(0, 4)] * 2
    assert machine.memory.read(0x700, 14) == bytes(range(1, 14)) + b"\0"


@pytest.mark.parametrize("interrupted", [False, True])
def test_mmio_of_every_shape_hands_over_every_part_once(roms: Roms, interrupted: bool) -> None:
    machine = roms.machine(
        PROTECTED_MODE
        + f"""
    movl ${MMIO}, %ebx
    movb $0x11, (%ebx)
    movw $0x2222, 2(%ebx)
    movl $0x33333333, 4(%ebx)
    movl $0x44444444, 0xffe(%ebx)
    movl $0x600, %esi
    movl $0x11223344, 0x600
    movl $0x55667788, 0x604
    leal 0x10(%ebx), %edi
    movl $2, %ecx
    rep movsl
    movl $0x700, %edi
    leal 0x20(%ebx), %esi
    movl $3, %ecx
    rep movsl
    movl 0xffe(%ebx), %eax
    movl %eax, 0x70c
    EXIT 1
    """
    )
    recorder = Recorder((lambda: machine.processors[0].hot.stop()) if interrupted else lambda: None)
    machine.board.mmio.register(MMIO, 0x2000, recorder, "recorder")
    assert machine.run().exit_code == 3
    # An access over the end of a page comes in two parts.
    assert recorder.writes == [
        (0, 1, 0x11),
        (2, 2, 0x2222),
        (4, 4, 0x33333333),
        (0xFFE, 2, 0x4444),
        (0x1000, 2, 0x4444),
        (0x10, 4, 0x11223344),
        (0x14, 4, 0x55667788),
    ]
    assert recorder.reads == [(0x20, 4), (0x24, 4), (0x28, 4), (0xFFE, 2), (0x1000, 2)]
    assert machine.memory.read(0x700, 16) == bytes(range(1, 17))


@pytest.mark.parametrize("msr", [0x40000004, 0x400001FF, 0x40000074, 0xDEAD0001])
@pytest.mark.parametrize("instruction", ["rdmsr", "wrmsr"])
def test_an_msr_that_does_not_exist_faults(roms: Roms, msr: int, instruction: str) -> None:
    machine = roms.machine(
        f"""
    movw $fault, 4 * 13
    movw %cs, 4 * 13 + 2
    movl ${msr}, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    {instruction}
    EXIT 2
fault:
    EXIT 1
    """
    )
    assert machine.run().exit_code == 3


def test_an_msr_that_exists_gives_its_value_to_both_registers(roms: Roms) -> None:
    vm = roms.machine(
        """
    movl $0x40000000, %ecx
    movl $0x11223344, %eax
    movl $0x81000000, %edx
    wrmsr
    xorl %eax, %eax
    xorl %edx, %edx
    rdmsr
    movl %eax, 0x600
    movl %edx, 0x604
    EXIT 1
    """
    )
    assert vm.run().exit_code == 3
    assert vm.memory.read(0x600, 8) == (0x81000000_11223344).to_bytes(8, "little")
    found = vm.inspect()
    assert found["msrs"] == {"msr_reads": {"GUEST_OS_ID": 1}, "msr_writes": {"GUEST_OS_ID": 1}}
    assert found["partition"]["guest_os_id"] == "0x8100000011223344"


def test_what_goes_wrong_for_the_guest_is_counted_with_the_last_time_and_value(roms: Roms) -> None:
    machine = roms.machine(
        f"""
    movw $fault, 4 * 13
    movw %cs, 4 * 13 + 2
    movl $0x40000001, %ecx
    movl $0x123, %eax
    movl $5, %edx
    wrmsr
    movl $0x40000074, %ecx
    rdmsr
    rdmsr
    {SHOW_HYPERCALL_PAGE}
    {ring(0x2001)}
    {ring(0x2002)}
    movl $0x8002, %eax
    call hypercall_page
    EXIT 1
fault:
    movw %sp, %bp
    addw $2, (%bp)
    iret
    {HYPERCALL_PAGE}"""
    )
    assert machine.run().exit_code == 3
    counts = machine.processors[0].hot.counts()
    assert counts["hypercalls"] == {0x5D: 2, 0x8002: 1}
    write, read = counts["msr_write_errors"], counts["msr_read_errors"]
    assert {number: (count, value) for number, (count, _, value) in write.items()} == {0x40000001: (1, 0x5_00000123)}
    assert {number: (count, value) for number, (count, _, value) in read.items()} == {0x40000074: (2, 0)}
    calls = counts["hypercall_errors"]
    assert {code: (count, value) for code, (count, _, value) in calls.items()} == {0x5D: (2, 0x12), 0x8002: (1, 2)}
    assert machine.partition.reference is not None
    times = [write[0x40000001][1], read[0x40000074][1], calls[0x5D][1], calls[0x8002][1]]
    assert 0 < times[0] < times[1] < times[2] < times[3] < machine.partition.reference.now()


def test_hypercalls_are_answered_once_the_page_is_on(roms: Roms) -> None:
    """32-bit callers: status in EDX:EAX, and the port is nobody's before."""
    machine = roms.machine(
        PROTECTED_MODE
        + """
    movl $0xffff, %eax
    xorl %edx, %edx
    outb %al, $0xeb
    movl %eax, 0x600
    movl $0x40000000, %ecx
    movl $1, %eax
    wrmsr
    movl $0x40000001, %ecx
    movl $0x9001, %eax
    wrmsr
    movl $0x4ff, %eax
    movl $7, %edx
    movl $0x9000, %ecx
    call *%ecx
    movl %eax, 0x604
    movl %edx, 0x608
    EXIT 1
    """
    )
    assert machine.run().exit_code == 3
    words = [int.from_bytes(machine.memory.read(0x600 + 4 * i, 4), "little") for i in range(3)]
    assert words == [0xFFFF, 2, 0]
    assert machine.inspect()["hypercalls"] == {"unknown": 1}


@pytest.mark.parametrize("share", [0.8, 1.0, 1.25])
def test_a_timer_comes_though_the_hosts_clock_and_the_tsc_disagree(
    roms: Roms, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    rate = Vp.tsc_khz
    monkeypatch.setattr(Vp, "tsc_khz", lambda vp: int(rate(vp) * share))
    machine = roms.machine(
        """
    movw $tick, 4 * 0x40
    movw %cs, 4 * 0x40 + 2
    movl $0x1b, %ecx
    rdmsr
    orw $0xc00, %ax
    wrmsr
    movl $0x80f, %ecx
    movl $0x1ff, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x400000b0, %ecx
    movl $0x1408, %eax
    wrmsr
    movl $0x40000020, %ecx
    rdmsr
    addl $200000, %eax
    adcl $0, %edx
    movl $0x400000b1, %ecx
    wrmsr
    sti
wait:
    hlt
    jmp wait
tick:
    movl $0x40000020, %ecx
    rdmsr
    EXIT 1
    """,
        timeout=20,
    )
    outcome = machine.run()
    assert (outcome.exit_code, outcome.message) == (3, "")


# Life cycle


def test_a_paused_guest_does_not_move_and_goes_on_where_it_was(roms: Roms) -> None:
    vm = roms.start(COUNT)
    for _ in range(20):
        counting(vm)
        vm.machine.pause()
        assert vm.machine.state == "paused"
        before = vm.word(0x500)
        vm.machine.inspect()
        assert vm.word(0x500) == before
        vm.machine.resume()
    counting(vm)
    vm.machine.poweroff()
    assert vm.wait().kind == "poweroff"
    assert vm.machine.state == "stopped"


def test_a_halted_guest_can_be_paused_resumed_and_stopped(roms: Roms) -> None:
    vm = roms.start("movb $1, 0x500\n cli\nhalt: hlt\n jmp halt", cpus=2)
    vm.until(lambda: vm.word(0x500) == 1, "the guest is there")
    vm.machine.pause()
    vm.machine.resume()
    vm.machine.stop(42, "enough")
    outcome = vm.wait()
    assert (outcome.kind, outcome.exit_code, outcome.message) == ("stopped", 42, "enough")


def test_states_that_do_not_allow_a_request_refuse_it(roms: Roms) -> None:
    machine = roms.machine(COUNT)
    for request in (machine.pause, machine.resume, lambda: machine.shutdown(1)):
        with pytest.raises(MachineError, match="the VM is stopped"):
            request()
    machine.close()


def test_inspect_shows_registers_of_parked_vps_only(roms: Roms) -> None:
    vm = roms.start(COUNT)
    counting(vm)
    assert [entry["registers"] for entry in vm.machine.inspect()["vps"]] == [None]
    vm.machine.pause()
    (found,) = (entry["registers"] for entry in vm.machine.inspect()["vps"])
    assert int(found["rsp"], 16) == 0x7000
    vm.machine.stop(0)
    vm.wait()
    assert vm.machine.inspect()["vps"][0]["registers"] == found
    vm.machine.close()
    assert vm.machine.inspect()["vps"][0]["registers"] is None


def test_a_reset_from_outside_works_without_reboots_too(roms: Roms) -> None:
    vm = roms.start("incl 0x504\n" + COUNT, reboot=False)
    for boots in range(1, 4):
        vm.until(lambda boots=boots: vm.word(0x504) == boots, "it boots")  # type: ignore[misc]
        vm.machine.reset()
    vm.until(lambda: vm.word(0x504) == 4, "it boots again")
    vm.machine.poweroff()
    assert vm.wait().kind == "poweroff"


def test_a_paused_machine_stays_paused_over_a_reset(roms: Roms) -> None:
    vm = roms.start("incl 0x504\n" + COUNT)
    counting(vm)
    vm.machine.pause()
    vm.machine.reset()
    vm.until(lambda: not vm.machine._events, "the reset is done")
    with vm.machine._lifecycle:
        assert vm.machine.state == "paused"
        assert vm.word(0x504) == 1
    vm.machine.resume()
    vm.until(lambda: vm.word(0x504) == 2, "it boots again")


def test_requests_from_several_threads_at_once_leave_a_machine_that_works(roms: Roms) -> None:
    vm = roms.start("incl 0x504\n" + COUNT, cpus=2)
    counting(vm)
    failures: list[BaseException] = []

    def user(seed: int) -> None:
        choose = random.Random(seed)
        requests: list[Callable[[], Any]] = [vm.machine.pause, vm.machine.resume, vm.machine.reset, vm.machine.inspect]
        try:
            for _ in range(40):
                try:
                    choose.choice(requests)()
                except MachineError:  # paused twice, or resumed while it runs
                    continue
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)

    users = [threading.Thread(target=user, args=(seed,), daemon=True) for seed in range(4)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join(60)
        assert not thread.is_alive(), "a request hangs"
    assert not failures
    vm.until(lambda: not vm.machine._events, "all resets are done")
    with vm.machine._lifecycle:
        if vm.machine.state == "paused":
            vm.machine.resume()
    counting(vm)
    vm.machine.stop(0)
    vm.wait()


def test_closing_waits_for_a_vp_that_is_inside_a_device(roms: Roms) -> None:
    entered, leave = threading.Event(), threading.Event()
    left: list[bool] = []

    def slow() -> None:
        entered.set()
        leave.wait(60)
        left.append(True)

    machine = roms.machine(f"movw ${PORT}, %dx\n outb %al, %dx\n" + COUNT)
    machine.board.pio.register(PORT, 1, Recorder(slow), "slow")
    runner = threading.Thread(target=machine.run, daemon=True)
    runner.start()
    assert entered.wait(60)
    machine.stop(0)
    leave.set()
    runner.join(60)
    machine.close()
    assert left == [True]
    assert not any(thread.name.startswith("vp") for thread in threading.enumerate())


# Errors


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (GuestViolation("it wrote what nobody may write"), "VP 0: it wrote what nobody may write"),
        (KeyError("oops"), "VP 0: KeyError: 'oops'"),
        (SystemExit(9), "VP 0: SystemExit: 9"),
    ],
)
def test_what_a_device_raises_is_the_guests_end_not_ours(roms: Roms, error: BaseException, text: str) -> None:
    def fail() -> None:
        raise error

    machine = roms.machine(f"movw ${PORT}, %dx\n outb %al, %dx\n EXIT 1")
    machine.board.pio.register(PORT, 1, Recorder(fail), "broken")
    outcome = machine.run()
    assert (outcome.kind, outcome.exit_code, outcome.message) == ("crash", 4, text)


def test_what_a_devices_thread_raises_is_the_guests_end(roms: Roms) -> None:
    vm = roms.start(COUNT)
    counting(vm)

    def fail() -> None:
        raise GuestViolation("the ring is broken")

    vm.machine._worker.call_soon(fail)
    outcome = vm.wait()
    assert (outcome.kind, outcome.message) == ("crash", "a device: the ring is broken")


def test_a_diagnosis_that_fails_is_still_an_end(roms: Roms, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise ImportError("no disassembler")

    monkeypatch.setattr("pyvmm.machine.diagnosis.diagnose", fail)
    outcome = roms.machine(PROTECTED_MODE + "lidtl 0xf0000 + empty\n ud2\nempty: .word 0\n .long 0").run()
    assert (outcome.kind, outcome.message) == ("crash", "VP 0: ImportError: no disassembler")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"firmware": "/nonexistent/rom"}, "/nonexistent/rom: No such file"),
        ({"firmware": __file__}, "multiple of 64 KiB"),
        ({"disks": [DiskConfig("/nonexistent/disk")]}, "/nonexistent/disk"),
        ({"disks": [DiskConfig("/dev/null")], "enlightenments": "full,-vmbus"}, "needs the enlightenment vmbus"),
        ({"enlightenments": "telepathy"}, "unknown enlightenment profile"),
        ({"memory": 4096}, "at least 1 MiB"),
    ],
)
def test_a_machine_that_cannot_be_made_says_why_in_one_line(roms: Roms, config: dict[str, Any], text: str) -> None:
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(MachineError, match=text) as caught:
        roms.machine("EXIT 1", **config)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before


# What is left


def test_machines_leave_neither_files_nor_threads(roms: Roms, tmp_path: Path) -> None:
    firmware = str(roms.build("EXIT 1"))

    def use(machine: Machine, run: bool) -> None:
        if run:
            assert machine.run().exit_code == 3
            machine.synthetic()
        machine.close()
        machine.close()

    roms._machines = []
    gc.collect()
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    networks = ("user", "user,type=legacy", "none")
    for number in range(20):
        nics = [parse_nic(text) for text in networks] if number % 2 else []
        use(roms.machine("", firmware=firmware, cpus=2, nics=nics), run=number % 4 != 0)
        roms._machines.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files
    assert threading.active_count() == threads
