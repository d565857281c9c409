"""A stock Debian guest that believes it is on Hyper-V: its own drivers, its disks on VMBus, its whole life."""

from __future__ import annotations

import hashlib
import subprocess
from typing import Any

import pytest

from guests import linux
from tests.lab.conftest import Session, StartSession, guest_script, told

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

_SCSI, _SHUTDOWN, _TIMESYNC, _HEARTBEAT = (
    "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f",
    "0e0b6031-5213-4934-818b-38d90ced39db",
    "9527e630-d0ae-497b-adce-e80ab0175caf",
    "57164f39-9115-4e78-ab55-382f3bd5422d",
)
_OLD_GUEST = """
result vmbus "$(dmesg | grep -o 'Vmbus version:.*')"
if [ "$(head -c 6 /dev/sda)" != REBOOT ]; then
    echo REBOOT | dd of=/dev/sda bs=512 conv=sync 2>/dev/null && sync
    exec /sbin/reboot
fi
result rebooted 1
dd if=/dev/urandom of=/tmp/x bs=1M count=4 2>/dev/null
dd if=/tmp/x of=/dev/sda bs=1M 2>/dev/null && sync && echo 3 >/proc/sys/vm/drop_caches
cmp -n 4194304 /tmp/x /dev/sda && result same 1
result ready poweroff
sleep 100
"""


@pytest.fixture(scope="module")
def session(lab_session: StartSession, tmp_path_factory: pytest.TempPathFactory) -> Session:
    images = linux.build(guest_script("hyperv_guest.sh"), programs=("date",))
    plain = linux.build(_OLD_GUEST)
    arguments = (str(images.vmlinux), str(images.initrd), str(plain.initrd))
    return lab_session(
        "-c",
        "import os, sys; from tests.lab import hyperv_session; "
        "sys.argv.append(os.environ['PYVMM_LAB_RESULTS'] + '/data.img'); hyperv_session.main()",
        *arguments,
        timeout=700,
    )


@pytest.fixture(scope="module")
def life(session: Session) -> dict[str, Any]:
    report: dict[str, Any] = session.report("life")
    return report


def test_guest_detects_hyper_v_and_connects(life: dict[str, Any]) -> None:
    assert told(life, "detected") == "Hypervisor detected: Microsoft Hyper-V"
    assert told(life, "vmbus") == "Vmbus version:5.3"
    assert told(life, "clocksource") == "hyperv_clocksource_tsc_page"
    assert told(life, "cpus") == "4"
    assert told(life, "taint") == "0"  # the kernel had nothing to warn of


def test_every_channel_is_bound_to_its_stock_driver(life: dict[str, Any]) -> None:
    drivers = sorted(
        (key.split("_")[1], *value.split()) for key, value in life["results"].items() if key.startswith("channel_")
    )
    assert drivers == sorted(
        [
            (_SHUTDOWN, "hv_utils", "1"),
            (_TIMESYNC, "hv_utils", "1"),
            (_HEARTBEAT, "hv_utils", "1"),
            (_SCSI, "hv_storvsc", "4"),  # a channel for each VP
            (_SCSI, "hv_storvsc", "4"),
        ]
    )


def test_two_disks_on_one_controller_and_a_third_on_another(life: dict[str, Any]) -> None:
    data, second, other = told(life, "disk_262144"), told(life, "disk_49152"), told(life, "disk_32768")
    assert [disk.split()[1] for disk in (data, second, other)] == ["ro=0", "ro=1", "ro=0"]
    places = [disk.split()[0].split(":") for disk in (data, second, other)]
    assert [place[-1] for place in places] == ["0", "1", "0"]
    assert places[0][0] == places[1][0] != places[2][0]


def test_host_reads_the_file_that_the_guest_wrote(session: Session, life: dict[str, Any]) -> None:
    assert told(life, "size") == str(64 << 20)
    image = session.results / "data.img"
    subprocess.run(["e2fsck", "-fn", str(image)], check=True, capture_output=True)
    found = subprocess.run(["debugfs", "-R", "cat /data", str(image)], check=True, capture_output=True).stdout
    assert hashlib.sha256(found).hexdigest() == told(life, "sum")


def test_hot_added_disk_is_seen_written_and_gone_when_removed(life: dict[str, Any]) -> None:
    assert life["steps"]["add"]["exit"] == 0, life["steps"]["add"]
    assert told(life, "added").startswith("sd")
    assert told(life, "added_written") == "1"
    assert life["steps"]["remove"]["exit"] == 0, life["steps"]["remove"]
    assert told(life, "removed") == "1"


def test_heartbeat_is_healthy(life: dict[str, Any]) -> None:
    assert life["steps"]["heartbeat"]["reply"]["inspect"]["status"] == "ok"


def test_clock_is_right_after_a_pause_of_ten_seconds(life: dict[str, Any]) -> None:
    steps = life["steps"]
    assert steps["pause"]["exit"] == steps["resume"]["exit"] == 0, steps
    assert steps["paused_state"]["reply"]["state"] == "paused"
    # A line's way to us takes time, so the smallest difference comes closest to that of the clocks.
    behind = min(seen - told_time for seen, told_time in steps["clocks"][10:])
    assert abs(behind) < 0.1


def test_reset_by_ctl_boots_again_with_the_data_kept(life: dict[str, Any]) -> None:
    assert life["steps"]["reset"]["exit"] == 0
    assert told(life, "second_boot") == "written by the guest"
    assert told(life, "second_sum") == told(life, "sum")


def test_shutdown_by_ctl_is_obeyed(life: dict[str, Any]) -> None:
    shutdown = life["steps"]["shutdown"]
    assert shutdown["exit"] == 0, shutdown
    assert shutdown["reply"]["obeyed"] is True
    assert "disobeyed" not in life["results"]
    assert life["exit"] == 0, life["stderr"]


def test_no_channel_broke_and_nothing_was_violated(life: dict[str, Any]) -> None:
    synthetic = life["report"]["synthetic"]
    assert synthetic["violations"] == 0, synthetic["last_violation"]
    assert all(channel["broken"] is None for channel in synthetic["channels"])


@pytest.fixture(scope="module")
def old(session: Session) -> dict[str, Any]:
    report: dict[str, Any] = session.report("old")
    return report


def test_guest_limited_to_protocol_2_4_has_its_disk_too(old: dict[str, Any]) -> None:
    assert told(old, "vmbus") == "Vmbus version:2.4"
    assert told(old, "same") == "1"


def test_guest_that_reboots_itself_comes_back(old: dict[str, Any]) -> None:
    assert told(old, "rebooted") == "1"


def test_power_is_cut_by_ctl(old: dict[str, Any]) -> None:
    assert old["steps"]["poweroff"]["exit"] == 0, old["steps"]
    assert old["exit"] == 0, old["stderr"]
