"""Disks and drives on SCSI controllers under a stock Debian guest, judged by its drivers, sg3-utils and util-linux."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pycdlib
import pytest

from guests import linux
from tests.lab.conftest import StartSession, guest_script, told

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

_PROGRAMS = (
    "sg_persist",
    "sg_get_lba_status",
    "sg_opcodes",
    "sg_reset",
    "sg_start",
    "sg_turs",
    "sg_write_same",
    "blkdiscard",
    "dd",
)


def make_disc(path: Path, text: str) -> str:
    """An ISO 9660 image with one file."""
    disc = pycdlib.PyCdlib()
    disc.new(interchange_level=3, rock_ridge="1.09")
    disc.add_fp(io.BytesIO(text.encode()), len(text), "/LETTER.TXT;1", rr_name="letter.txt")
    disc.write(str(path))
    disc.close()
    return str(path)


@pytest.fixture(scope="module")
def found(lab_session: StartSession, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("discs")
    discs = [make_disc(folder / f"{name}.iso", f"the {name} disc") for name in ("first", "second")]
    images = linux.build(guest_script("scsi_guest.sh"), programs=_PROGRAMS, extra_modules=("sr_mod", "isofs"))
    session = lab_session("-m", "tests.lab.scsi_session", str(images.vmlinux), str(images.initrd), *discs, timeout=700)
    report: dict[str, Any] = session.report("scsi")
    return report


def test_guest_uses_a_channel_per_processor_and_transfers_of_a_mebibyte(found: dict[str, Any]) -> None:
    assert told(found, "channels") == "3"
    assert int(told(found, "transfer")) >= 512
    assert told(found, "taint") == "0"


def test_guest_sees_that_it_may_discard(found: dict[str, Any]) -> None:
    maximum, granularity = map(int, told(found, "discard").split())
    assert maximum > 0 and granularity == 4096
    assert told(found, "opcodes") == "1"


def test_sg_persist_goes_through_a_life_of_reservations(found: dict[str, Any]) -> None:
    assert "persist_failed" not in found["results"], found["results"]
    assert int(told(found, "persist_keys")) >= 3
    assert told(found, "persist_aptpl") != "0"


def test_discarded_blocks_are_holes_and_told_so(found: dict[str, Any]) -> None:
    assert "discard_failed" not in found["results"] and "write_same_failed" not in found["results"]
    runs = [tuple(int(word, 16) for word in run.split()) for run in told(found, "lba_status").split(",") if run]
    assert runs == [(0, 2048, 0, 0), (2048, 5120, 1, 0), (7168, 1024, 0, 0), (8192, 122880, 1, 0)]
    assert told(found, "zeroed") == "0"
    assert found["steps"]["blocks"] < 4 << 20


def test_reset_is_answered(found: dict[str, Any]) -> None:
    assert told(found, "reset") == "0"


def test_without_a_write_cache_every_write_is_flushed(found: dict[str, Any]) -> None:
    assert told(found, "write_through") == "write through write through"
    assert told(found, "write_back") == "write back"
    before, after = (found["steps"][f"flushes_{when}"]["reply"]["inspect"] for when in ("before", "after"))
    assert before["write_cache"] is False and after["write_cache"] is True
    assert after["writes"] - before["writes"] >= 16


def test_disk_grown_by_the_host_is_seen_by_an_idle_guest(found: dict[str, Any]) -> None:
    assert found["steps"]["resize"]["exit"] == 0, found["steps"]["resize"]
    assert told(found, "resized") == "1" and told(found, "grown_written") == "1"


def test_limited_disk_keeps_to_its_rate_and_holds_up_no_other(found: dict[str, Any]) -> None:
    begin, end = map(float, told(found, "limited").split())
    assert 3.5 <= end - begin <= 12  # 4 MiB at 1 MiB/s, less the burst
    assert told(found, "overtaken") == "1"


def test_disc_is_mounted_locked_ejected_and_changed(found: dict[str, Any]) -> None:
    assert told(found, "cd") == told(found, "cd_still") == "the first disc"
    refused = found["steps"]["eject_locked"]
    assert refused["exit"] == 1 and "has locked the drive" in refused["reply"]["error"]
    assert told(found, "cd_opened") != "0"
    assert found["steps"]["insert"]["exit"] == 0, found["steps"]["insert"]
    assert told(found, "cd_second") == "the second disc"
    assert found["steps"]["eject"]["exit"] == 0, found["steps"]["eject"]
    assert told(found, "cd_gone") == "1"


def test_full_host_is_an_error_that_the_guest_survives(found: dict[str, Any]) -> None:
    assert told(found, "full") == "No space left on device"
    assert told(found, "full_survived") == "1"


def test_error_of_the_image_is_an_error_of_the_disk_until_it_is_mended(found: dict[str, Any]) -> None:
    assert told(found, "broken") == "critical medium error"
    assert told(found, "broken_start_readable") == told(found, "mended") == "1"
    luns = found["report"]["synthetic"]["devices"]["scsi0"]["luns"]
    assert luns["3"]["errors"] > 0 and luns["2"]["errors"] > 0


def test_disks_come_and_go_under_load(found: dict[str, Any]) -> None:
    assert found["steps"]["hot"] == [0] * 8
    assert told(found, "hot") == told(found, "hot_gone") == "1"
    assert "load_failed" not in found["results"]


def test_guest_shuts_down_and_nothing_was_violated(found: dict[str, Any]) -> None:
    assert found["steps"]["shutdown"]["reply"]["obeyed"] is True
    assert found["exit"] == 0, found["stderr"]
    synthetic = found["report"]["synthetic"]
    assert synthetic["violations"] == 0, synthetic["last_violation"]
    assert all(channel["broken"] is None for channel in synthetic["channels"])
    assert synthetic["devices"]["scsi0"]["in_flight"] == 0
