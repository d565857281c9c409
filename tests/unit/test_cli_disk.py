"""``pyvmm disk``, as a user calls it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devices.storage.file import HostFile
from pyvmm.cli import main
from tests.fakes.disk_cli import disk, files, refusal, tree

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_raw_image_is_made_sparse_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert disk("create", "a.img", "64G") == 0
    assert capsys.readouterr().out == "a.img: raw, 64GiB\n"
    found = tree(capsys, "info", "a.img")
    assert (found["format"], found["size"], found["size_on_disk"], found["in_use"]) == ("raw", 64 << 30, 0, False)
    assert found["geometry"] == {"cylinders": 32896, "heads": 16, "sectors": 255}
    assert disk("info", "a.img") == 0
    shown = capsys.readouterr().out
    assert "68719476736 (64 GiB)" in shown and "16 heads" in shown


def test_a_fixed_raw_image_takes_its_room_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert disk("create", "a.img", "--kind", "fixed", "4M") == 0
    assert tree(capsys, "info", "a.img")["size_on_disk"] >= 4 << 20


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["create", "a.img"], "no size"),
        (["create", "a.img", "much"], "not a size"),
        (["create", "a.img", "1000"], "not a multiple of the 512-byte sector"),
        (["create", "a.img", "0"], "no size for a disk"),
        (["create", "a.img", "9999999T"], "no size for a disk"),
        (["create", "a.iso", "2560"], "not a multiple of the 2048-byte sectors"),
        (["create", "a.img", "1M", "--block-size", "1M"], "neither blocks nor a parent"),
        (["create", "a.img", "--parent", "base.img"], "neither blocks nor a parent"),
        (["create", "none/a.img", "1M"], "No such file"),
        (["create", "base.img", "1M"], "--force"),
        (["info", "none.img"], "pyvmm disk create"),
        (["check", "."], "not a regular file"),
        (["resize", "base.img", "-512K"], "--shrink"),
        (["resize", "base.img", "-1M"], "nothing would be left"),
        (["resize", "base.img", "+1"], "not a multiple"),
        (["resize", "base.img", "-x"], "required"),
        (["convert", "base.img", "base.img"], "is the image to read"),
        (["convert", "base.img", "none/b.img"], "none/b.img: cannot be created: No such file"),
        (["convert", "none.img", "b.img"], "no such file"),
        (["convert", "base.img", "b.img", "--kind", "differencing"], "a copy has no parent"),
        (["merge", "base.img"], "has no parent"),
        (["diff", "base.img"], "has no parent"),
        (["diff", "base.img", "none.img"], "no such file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], words: list[str], why: str) -> None:
    Path("base.img").write_bytes(b"x" * (1 << 20))
    assert why in refusal(capsys, *words)
    assert files() == ["base.img"] and Path("base.img").read_bytes() == b"x" * (1 << 20)


def test_force_replaces_an_image(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.img").write_bytes(b"old" * 512)
    assert disk("create", "a.img", "1M", "--force") == 0
    assert Path("a.img").read_bytes() == bytes(1 << 20) and files() == ["a.img"]


def test_an_image_that_a_vm_writes_is_shown_but_not_touched(capsys: pytest.CaptureFixture[str]) -> None:
    disk("create", "a.img", "1M")
    disk("create", "b.img", "1M")
    vm = HostFile("a.img")
    assert tree(capsys, "info", "a.img")["in_use"] is True
    for words in (
        ["check", "a.img"],
        ["resize", "a.img", "2M"],
        ["convert", "a.img", "c.img"],
        ["convert", "b.img", "a.img", "--force"],
        ["create", "a.img", "2M", "--force"],
        ["diff", "a.img", "b.img"],
    ):
        assert "a.img: in use by another VM" in refusal(capsys, *words)
    vm.close()
    assert os.path.getsize("a.img") == 1 << 20 and files() == ["a.img", "b.img"]


def test_a_disk_grows_and_shrinks_only_when_told_twice(capsys: pytest.CaptureFixture[str]) -> None:
    disk("create", "a.img", "1M")
    assert disk("resize", "a.img", "+1M") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "a.img: 1MiB -> 2MiB"
    assert disk("resize", "a.img", "-1024K", "--shrink") == 0
    assert disk("resize", "a.img", "4MiB") == 0
    assert tree(capsys, "resize", "a.img", "+0")["size"] == 4 << 20


def test_check_tells_of_a_cut_image_and_repairs_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.img").write_bytes(b"x" * 1000)
    capsys.readouterr()
    assert disk("check", "a.img") == 1
    shown = capsys.readouterr().out
    assert "a.img: error: 1000 bytes" in shown and "--repair" in shown
    found = tree(capsys, "check", "a.img", "--repair", status=3)
    assert [(item["severity"], item["repaired"]) for item in found["findings"]] == [("error", True)]
    assert Path("a.img").read_bytes() == b"x" * 1000 + bytes(24)
    assert disk("check", "a.img") == 0
    assert capsys.readouterr().out == "a.img: no errors\n"


def test_a_converted_disk_reads_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    data = bytes(1 << 20) + os.urandom(1 << 20) + bytes(2 << 20)
    Path("a.img").write_bytes(data)
    made = tree(capsys, "convert", "a.img", "b.raw")
    assert (made["path"], made["format"], made["size"]) == ("b.raw", "raw", 4 << 20)
    assert Path("b.raw").read_bytes() == data and os.stat("b.raw").st_blocks * 512 < 2 << 20
    assert disk("convert", "a.img", "--kind", "fixed", "fixed.img") == 0
    assert os.stat("fixed.img").st_blocks * 512 >= 4 << 20
    assert disk("convert", "a.img", "disc.iso") == 0
    assert disk("convert", "disc.iso", "c.img") == 0
    assert disk("convert", "a.img", "lazy.img", "--no-flush") == 0
    assert Path("lazy.img").read_bytes() == data
    assert Path("c.img").read_bytes() == data
    assert tree(capsys, "diff", "a.img", "c.img")["same"]


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "device").write_bytes(b"old!" * (1 << 18))
    made = subprocess.run(["losetup", "-f", "--show", "device"], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)


@pytest.mark.skipif(shutil.which("losetup") is None, reason="no losetup")
def test_a_disk_is_converted_onto_a_block_device_and_back(loop_device: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = os.urandom(300 << 10) + bytes(300 << 10) + os.urandom(424 << 10)
    Path("a.img").write_bytes(data)
    Path("large.img").write_bytes(bytes(2 << 20))
    assert "will be lost: add --force" in refusal(capsys, "convert", "a.img", loop_device)
    assert "is too small" in refusal(capsys, "convert", "large.img", loop_device, "--force")
    assert "leave the other options out" in refusal(
        capsys, "convert", "a.img", loop_device, "--force", "--kind", "fixed"
    )
    assert "only convert writes to one" in refusal(capsys, "create", loop_device, "1M", "--force")
    assert disk("convert", "a.img", loop_device, "--force") == 0
    assert disk("convert", loop_device, "b.img") == 0
    assert Path("b.img").read_bytes() == data
    assert disk("diff", loop_device, "a.img") == 0


def test_differences_are_listed_and_make_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.img").write_bytes(b"x" * 8192)
    Path("b.img").write_bytes(b"x" * 1024 + b"y" + b"x" * 7167 + bytes(512))
    found = tree(capsys, "diff", "a.img", "b.img", status=1)
    assert found == {
        "same": False,
        "paths": ["a.img", "b.img"],
        "sizes": [8192, 8704],
        "differing": 512,
        "ranges": [{"offset": 1024, "length": 512}],
        "all_ranges_listed": True,
    }
    assert disk("diff", "a.img", "b.img") == 1
    assert capsys.readouterr().out.splitlines() == [
        "0x000000000400 512",
        "sizes differ: 8192 and 8704; only zeros are alike beyond the smaller",
        "a.img and b.img differ in 512 bytes",
    ]
    assert disk("diff", "a.img", "-q", "b.img") == 1 and disk("diff", "-q", "a.img", "a.img") == 0
    assert capsys.readouterr().out == ""


def test_a_failing_medium_is_status_4_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.img").write_bytes(b"x" * (1 << 20))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    assert refusal(capsys, "convert", "a.img", "b.img", status=4) == ("pyvmm: error: b.img: No space left on device\n")
    assert files() == ["a.img"]
    monkeypatch.setattr(os, "preadv", full)
    assert refusal(capsys, "diff", "a.img", "a.img", status=4).startswith("pyvmm: error: a.img: ")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_conversion_and_leaves_the_old_image(tmp_path: Path, number: int, status: int) -> None:
    (tmp_path / "a.img").write_bytes(os.urandom(8 << 20))
    (tmp_path / "b.img").write_bytes(b"old!" * 128)
    script = (
        "import os, sys, time\n"
        "read = os.preadv\n"
        "def slow(*words):\n"
        "    print('reading', flush=True)\n"
        "    time.sleep(0.2)\n"
        "    return read(*words)\n"
        "os.preadv = slow\n"
        "from pyvmm.cli import entry\n"
        "entry()\n"
    )
    command = [sys.executable, "-c", script, "disk", "convert", "a.img", "b.img", "--force"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        running.stdout.readline()
        running.send_signal(number)
        _, error = running.communicate(timeout=60)
    assert running.returncode == status
    assert error in ("", f"pyvmm: error: stopped by {signal.Signals(number).name}\n")
    assert sorted(os.listdir(tmp_path)) == ["a.img", "b.img"]
    assert (tmp_path / "b.img").read_bytes() == b"old!" * 128


def test_a_bar_is_shown_on_a_terminal_only(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(os.urandom(1 << 20))
    command = [sys.executable, "-m", "pyvmm", "disk", "convert", "a.img", "b.img", "--force"]
    quiet = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert quiet.stderr == ""
    ours, theirs = os.openpty()
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    assert b"converting" in os.read(ours, 65536)
    assert done.stdout == b"b.img: raw, 1MiB\n"
    os.close(ours)


def test_completion_offers_files_for_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for place in ("create_pos_0", "convert_pos_0", "convert_pos_1", "merge___into", "diff_pos_1"):
        assert f"_shtab_pyvmm_disk_{place}_COMPGEN=_shtab_compgen_files" in script


def test_the_command_loads_nothing_slow(tmp_path: Path) -> None:
    script = "import sys; from pyvmm.cli import main; status = main(); print(status, *sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", script, "disk", "create", "a.img", "1M"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    status, *loaded = done.stderr.split()
    assert status == "0"
    assert not set(loaded) & {"rich", "msgspec", "construct", "asyncio", "pyvmm.machine.machine"}
