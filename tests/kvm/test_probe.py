"""The probe on /dev/kvm: everything it finds is as expected, and pyvmm's exit status tells how a guest ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from guests.bare.run import Run
from guests.probe.__main__ import DISK_START, run
from guests.probe.build import build

pytestmark = pytest.mark.kvm

#: What the probe writes to sector 1: 8-byte words that count up by 8.
PATTERN = b"".join((0x70796D6D2D6F6B00 + offset).to_bytes(8, "little") for offset in range(0, 512, 8))


@pytest.fixture(scope="session")
def probe() -> Path:
    return build()


def assert_as_expected(result: Run) -> None:
    bad = "\n".join(f"{f.full_name} = {f.value}, expected {f.note}" for f in result.report.failed)
    if result.report.problem is not None or result.status != 0:
        pytest.fail(f"{result.report.problem}; status {result.status}\n{bad}\n{result.stderr}", pytrace=False)


@pytest.mark.parametrize("cpus", [1, 4])
def test_everything_is_as_expected(probe: Path, tmp_path: Path, cpus: int) -> None:
    result = run(probe, tmp_path, cpus=cpus)
    assert_as_expected(result)
    found = {finding.full_name: finding.value for finding in result.report.findings}
    assert {finding.topic for finding in result.report.findings} >= {
        "cpuid",
        "msr",
        "hypercall",
        "synic",
        "vmbus",
        "storage",
    }
    assert found["storage.sector0"] == DISK_START.hex()
    assert (tmp_path / "disk.img").read_bytes()[512:1024] == PATTERN
    assert found.get("smp.started") == (hex(cpus - 1) if cpus > 1 else None)


def test_64_vps_and_more_memory_than_the_host_has(probe: Path, tmp_path: Path) -> None:
    host_kib = next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    gibibytes = max(64, 2 * int(host_kib) >> 20)
    result = run(probe, tmp_path, cpus=64, memory=f"{gibibytes}GiB")
    assert_as_expected(result)
    assert {finding.full_name: finding.value for finding in result.report.findings}["smp.started"] == hex(63)


@pytest.mark.skipif(not Path("/sys/module/kvm_pvm").exists(), reason="the limit is for kvm_pvm")
def test_the_whole_run_takes_less_than_three_seconds(probe: Path, tmp_path: Path) -> None:
    assert run(probe, tmp_path, cpus=4).seconds < 3


@pytest.mark.parametrize(
    "profile",
    ["minimal", "windows-server-2008", "windows-11", "linux", "full,-time", "full,-stimer-direct,-idle,-crash"],
)
def test_a_profile_offers_exactly_what_works(probe: Path, tmp_path: Path, profile: str) -> None:
    topics = "probe=cpuid,msr,hypercall,synic,smp"
    assert_as_expected(run(probe, tmp_path, cpus=2, enlightenments=profile, disk=False, cmdline=topics))


def test_without_enlightenments_there_is_no_hypervisor_bit(probe: Path, tmp_path: Path) -> None:
    result = run(probe, tmp_path, enlightenments="none", disk=False, cmdline="probe=cpuid")
    assert [(finding.full_name, finding.value) for finding in result.report.findings] == [
        ("cpuid.hypervisor_present", "0x0")
    ]


@pytest.mark.parametrize(
    ("wish", "status"),
    [("crash", 4), ("triple", 4), ("hang", 124), ("reset", 3), ("reset=msr", 3), ("reset=i8042", 3)],
)
def test_the_exit_status_tells_how_the_guest_ended(probe: Path, tmp_path: Path, wish: str, status: int) -> None:
    result = run(probe, tmp_path, cmdline=f"probe.{wish}", timeout=2)
    assert result.status == status, result.stderr
    assert "Traceback" not in result.stderr


def test_a_crash_report_is_shown_with_its_parameters_and_message(probe: Path, tmp_path: Path) -> None:
    result = run(probe, tmp_path, cmdline="probe.crash")
    assert "P0=0xdead P1=0x1 P2=0x2" in result.stderr
    assert "probe: this crash was asked for" in result.stderr


def test_a_triple_fault_is_diagnosed_with_the_instruction(probe: Path, tmp_path: Path) -> None:
    result = run(probe, tmp_path, cmdline="probe.triple")
    assert "triple fault" in result.stderr
    # An AMD processor loses the VP's state with the fault.
    assert "ud2" in result.stderr or "KVM has reset the VP since" in result.stderr
