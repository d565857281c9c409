"""``pyvmm disk`` with VHD and VHDX: every format into every other, chains of parents, and qemu-img's judgement."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.storage.backend import Disk, DiskError
from devices.storage.create import create_image
from devices.storage.file import HostFile
from devices.storage.images import open_image
from devices.storage.merge import merge, open_to_merge
from devices.storage.vhdx.disk import VhdxDisk
from devices.storage.vhdx.format import METADATA_TABLE_SIZE
from tests.fakes.disk_cli import disk, files, refusal, tree

#: What qemu-img calls them.
QEMU = {"raw": "raw", "vhd": "vpc", "vhdx": "vhdx"}
DIFFERENCING = ("vhd", "vhdx")
SIZE = 12 << 20

differencing = pytest.mark.parametrize("form", DIFFERENCING)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fill(path: str, *spans: tuple[int, bytes]) -> None:
    image = open_image(path)
    for offset, data in spans:
        image.write(offset, [memoryview(data)])
    image.close()


def content(path: str) -> bytes:
    image = open_image(path, readonly=True)
    found = content_of(image)
    image.close()
    return found


def content_of(image: Disk) -> bytes:
    buffer = bytearray(image.size)
    image.read(0, [memoryview(buffer)])
    return bytes(buffer)


def chain(form: str, depth: int = 3) -> list[str]:
    """Images from the top down, each with data of its own, some of it over that of its parents."""
    names: list[str] = []
    for level in range(depth):
        name = f"layer{level}.{form}"
        assert disk("create", name, *([str(SIZE)] if not names else ["--parent", names[0]])) == 0
        numbers = random.Random(level)
        fill(
            name,
            (level << 20, numbers.randbytes(3 << 19)),
            (8 << 20, numbers.randbytes(512 * (depth - level))),
            (SIZE - 512, numbers.randbytes(512)),
        )
        names.insert(0, name)
    return names


@pytest.mark.parametrize("source", QEMU)
@pytest.mark.parametrize("target", QEMU)
@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_every_format_is_converted_into_every_other(source: str, target: str, kind: str) -> None:
    assert disk("create", f"a.{source}", str(SIZE)) == 0
    numbers = random.Random(1)
    fill(f"a.{source}", (1 << 20, numbers.randbytes(1 << 20) + bytes(1 << 20)), (SIZE - 4096, numbers.randbytes(4096)))
    assert disk("convert", f"a.{source}", f"b.{target}", "--kind", kind) == 0
    assert content(f"b.{target}") == content(f"a.{source}")
    compare = ["qemu-img", "compare", "-f", QEMU[source], "-F", QEMU[target], f"a.{source}", f"b.{target}"]
    subprocess.run(compare, check=True, timeout=60, stdout=subprocess.DEVNULL)
    taken = os.stat(f"b.{target}").st_blocks * 512
    assert taken >= SIZE if kind == "fixed" else taken < SIZE // 2
    assert disk("check", f"b.{target}") == 0


@differencing
def test_what_qemu_img_makes_is_converted(form: str) -> None:
    Path("a.raw").write_bytes(bytes(1 << 20) + random.Random(2).randbytes(1 << 20) + bytes(SIZE - (2 << 20)))
    options = ["-o", "force_size=on"] if form == "vhd" else []
    command = ["qemu-img", "convert", "-f", "raw", "-O", QEMU[form], *options, "a.raw", f"a.{form}"]
    subprocess.run(command, check=True, timeout=60)
    assert disk("check", f"a.{form}") == 0
    assert disk("convert", f"a.{form}", "b.raw") == 0
    assert Path("b.raw").read_bytes() == Path("a.raw").read_bytes()


@differencing
def test_a_chain_is_shown_whole(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = chain(form)
    node: dict[str, Any] | None = tree(capsys, "info", names[0])
    kinds = []
    for name in names:
        assert node is not None
        assert Path(node["path"]).name == name
        assert node["size"] == SIZE and 1 << 20 < node["size_on_disk"] < SIZE
        kinds.append(node["kind"])
        node = node["parent"]
    assert node is None
    assert kinds == ["differencing", "differencing", "dynamic"]
    assert disk("info", names[0]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and "problem" not in shown


def test_what_an_image_says_of_itself_reaches_no_terminal_unescaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert disk("create", "a.vhdx", "1M") == 0
    with open("a.vhdx", "r+b") as file:
        file.seek(8)
        file.write("me\x1b[31m\n".encode("utf-16-le") + bytes(2))
    assert tree(capsys, "info", "a.vhdx")["creator"] == "me\x1b[31m\n"
    assert disk("info", "a.vhdx") == 0
    shown = capsys.readouterr().out
    assert "'me\\x1b[31m\\n'" in shown and "\x1b" not in shown


def test_a_log_that_has_to_be_replayed_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert disk("create", "a.vhdx", "1M") == 0
    assert tree(capsys, "info", "a.vhdx")["log"] == "empty"
    vm = open_image("a.vhdx")
    vm.write(0, [memoryview(b"x" * 4096)])
    vm.flush()
    assert tree(capsys, "info", "a.vhdx")["log"] == "replayed"
    vm.close()
    assert tree(capsys, "info", "a.vhdx")["log"] == "empty"


@differencing
def test_an_image_has_a_block_size_as_asked(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert disk("create", f"a.{form}", "--block-size", "1M", "64M") == 0
    assert tree(capsys, "info", f"a.{form}")["block_size"] == 1 << 20


def test_an_image_has_sector_sizes_as_asked_and_so_has_its_child(capsys: pytest.CaptureFixture[str]) -> None:
    assert disk("create", "b.vhdx", "64M", "--sector-size", "4096") == 0
    found = tree(capsys, "info", "b.vhdx")
    assert (found["sector_size"], found["physical_sector_size"]) == (4096, 4096)
    assert disk("create", "c.vhdx", "--parent", "b.vhdx") == 0
    assert tree(capsys, "info", "c.vhdx")["sector_size"] == 4096


@differencing
def test_a_chain_whose_parent_is_missing_is_shown_but_not_used(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = chain(form)
    os.rename(names[-1], "elsewhere")
    found = tree(capsys, "info", names[0])
    assert "is missing" in found["problem"] and Path(found["parent"]["path"]).name == names[1]
    for words in (["convert", names[0], "x.img"], ["merge", names[0]], ["diff", names[0]]):
        assert names[-1] in refusal(capsys, *words)
    os.rename("elsewhere", names[-1])
    assert disk("convert", names[0], "x.img") == 0


@differencing
def test_a_chain_moved_as_a_whole_is_found_again(form: str) -> None:
    names = chain(form)
    wanted = content(names[0])
    os.mkdir("moved")
    for name in names:
        os.rename(name, f"moved/{name}")
    assert content(f"moved/{names[0]}") == wanted


@differencing
def test_a_merge_leaves_the_parent_with_the_content_of_the_child(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = chain(form)
    wanted, below = content(names[0]), content(names[2])
    done = tree(capsys, "merge", names[0])
    assert [Path(path).name for path in done["merged"]] == [names[0]] and done["removed"]
    assert files() == sorted(names[1:])
    assert content(names[1]) == wanted and content(names[2]) == below
    assert disk("check", names[1]) == 0
    assert disk("merge", names[1]) == 0
    assert files() == [names[2]] and content(names[2]) == wanted


@differencing
def test_a_chain_is_merged_into_its_last_parent_at_once(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = chain(form)
    wanted = content(names[0])
    assert disk("merge", names[0], "--into", f"./{names[2]}") == 0
    assert files() == [names[2]] and content(names[2]) == wanted
    assert tree(capsys, "info", names[2])["kind"] == "dynamic"


@differencing
def test_a_chain_is_merged_into_a_new_image_of_any_format(form: str) -> None:
    names = chain(form)
    wanted = content(names[0])
    before = {name: Path(name).read_bytes() for name in names}
    assert disk("merge", names[0], "--into", "whole.img") == 0
    assert Path("whole.img").read_bytes() == wanted
    assert {name: Path(name).read_bytes() for name in names} == before
    assert disk("diff", names[0], "whole.img") == 0


@differencing
def test_a_child_that_is_kept_reads_as_before_and_merges_again(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = chain(form)
    wanted = content(names[0])
    assert disk("merge", names[0], "--keep") == 0
    assert files() == sorted(names)
    assert content(names[0]) == wanted == content(names[1])
    assert disk("diff", names[0]) == 0
    assert disk("merge", names[0]) == 0
    assert content(names[1]) == wanted


def test_a_child_that_is_merged_over_and_over_knows_its_parent_each_time() -> None:
    child, base = chain("vhdx", depth=2)
    for number in range(4):
        fill(child, (number << 20, bytes([number + 1]) * 4096))
        wanted = content(child)
        assert disk("merge", child, "--keep") == 0
        assert content(child) == wanted == content(base)
        assert disk("check", child) == 0
        subprocess.run(["qemu-img", "check", "-q", base], check=True, timeout=60)


def test_other_children_of_a_merged_parent_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    child, base = chain("vhdx", depth=2)
    assert disk("create", "sibling.vhdx", "--parent", base) == 0
    assert disk("merge", child) == 0
    assert "was changed" in refusal(capsys, "convert", "sibling.vhdx", "x.img")


def test_a_child_without_room_for_a_link_is_not_merged() -> None:
    child, _ = chain("vhdx", depth=2)
    above, below = open_to_merge(child)
    assert isinstance(above, VhdxDisk)
    above.regions.metadata.length = METADATA_TABLE_SIZE
    before = content_of(below)
    with pytest.raises(DiskError, match="new image"):
        merge(above, below)
    assert content_of(below) == before
    above.close()
    assert disk("merge", child) == 0


@differencing
def test_a_parent_grows_with_a_larger_child(form: str) -> None:
    child, base = chain(form, depth=2)
    assert disk("resize", child, "+4M") == 0
    fill(child, (SIZE + (3 << 20), b"beyond.." * 64))
    wanted = content(child)
    assert len(wanted) == SIZE + (4 << 20)
    assert disk("merge", child) == 0
    assert content(base) == wanted


@differencing
def test_a_merge_is_refused_while_somebody_uses_the_chain(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = chain(form)
    for name in names[:2]:
        reader = HostFile(name, readonly=True)
        assert "in use by another VM" in refusal(capsys, "merge", names[0])
        reader.close()
    assert "none of the parents" in refusal(capsys, "merge", names[1], "--into", names[0])
    assert files() == sorted(names)


@differencing
def test_differences_from_the_parent_are_those_that_the_child_holds(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    child, base = chain(form, depth=2)
    below, above = content(base), content(child)
    found = tree(capsys, "diff", child, status=1)
    covered = bytearray(SIZE)
    for item in found["ranges"]:
        covered[item["offset"] : item["offset"] + item["length"]] = b"x" * item["length"]
    for at in range(0, SIZE, 512):
        assert (below[at : at + 512] != above[at : at + 512]) == bool(covered[at])


@differencing
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_random_chains_are_copied_compared_and_merged(form: str, data: st.DataObject) -> None:
    """Held against bytearrays, at sector granularity and with sizes that end inside a block."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        names: list[str] = []
        models: list[bytearray] = []
        for level in range(3):
            name = f"{folder}/{level}.{form}"
            sectors = data.draw(st.integers(1, 6000))
            parent = names[0] if names else None
            block_size = data.draw(st.sampled_from([1 << 20, 2 << 20]))
            create_image(name, sectors * 512, parent=parent, block_size=block_size)
            model = bytearray(models[0][: sectors * 512] if models else b"").ljust(sectors * 512, b"\0")
            image = open_image(name)
            for _ in range(data.draw(st.integers(0, 5))):
                start = data.draw(st.integers(0, sectors - 1))
                length = data.draw(st.integers(1, min(sectors - start, 3000)))
                fill = bytes([data.draw(st.integers(0, 3))]) * (length * 512)
                if data.draw(st.booleans()):
                    image.write(start * 512, [memoryview(fill)])
                else:
                    image.write_zeros(start * 512, len(fill))
                    fill = bytes(len(fill))
                model[start * 512 : start * 512 + len(fill)] = fill
            image.close()
            names.insert(0, name)
            models.insert(0, model)
        assert disk("convert", names[0], f"{folder}/copy.img") == 0
        assert Path(f"{folder}/copy.img").read_bytes() == models[0]
        assert disk("diff", names[0], f"{folder}/copy.img") == 0
        longest = max(len(model) for model in models[:2])
        alike = models[0].ljust(longest, b"\0") == models[1].ljust(longest, b"\0")
        assert disk("diff", "-q", names[0]) == (0 if alike else 1)
        base = data.draw(st.sampled_from(names[1:]))
        assert disk("merge", names[0], "--into", base) == 0
        assert content(base)[: len(models[0])] == models[0]
        assert disk("check", base) == 0


@differencing
@pytest.mark.parametrize("writes", [1, 2, 3])
def test_a_merge_that_was_killed_loses_nothing_and_is_done_again(form: str, writes: int, tmp_path: Path) -> None:
    names = chain(form)
    wanted = content(names[0])
    script = (
        "import os, signal, sys\n"
        "left = int(sys.argv.pop(1))\n"
        "def cut(call):\n"
        "    def counted(fd, views, offset):\n"
        "        global left\n"
        "        if sum(map(len, views)) >= 1 << 18:\n"
        "            left -= 1\n"
        "            if not left:\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return call(fd, views, offset)\n"
        "    return counted\n"
        "os.pwritev = cut(os.pwritev)\n"
        "from pyvmm.cli import entry\n"
        "entry()\n"
    )
    command = [sys.executable, "-c", script, str(writes), "disk", "merge", names[0], "--into", names[2]]
    assert subprocess.run(command, cwd=tmp_path, check=False, timeout=60).returncode == -signal.SIGKILL
    assert files() == sorted(names)
    assert content(names[0]) == wanted
    assert disk("merge", names[0], "--into", names[2]) == 0
    assert content(names[2]) == wanted and files() == [names[2]]


@differencing
def test_an_image_that_a_vm_writes_is_shown(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    child, _ = chain(form, depth=2)
    vm = open_image(child)
    vm.write(0, [memoryview(b"x" * (1 << 20))])
    found = tree(capsys, "info", child)
    assert found["in_use"] and found["size"] == SIZE and found["problem"] is None
    vm.close()


@differencing
def test_info_keeps_nobody_from_using_a_chain(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = chain(form)
    writers = [HostFile(name) for name in names]

    def refuse(_: HostFile) -> None:
        raise AssertionError("locked")

    monkeypatch.setattr(HostFile, "_lock", refuse)
    found = tree(capsys, "info", names[0])
    assert found["in_use"] and found["problem"] is None
    assert Path(found["parent"]["parent"]["path"]).name == names[2]
    for writer in writers:
        writer.close()


@differencing
def test_force_replaces_anything_but_a_parent(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = chain(form)
    wanted = content(names[0])
    Path("old.img").write_bytes(b"old" * 512)
    assert "none of the parents" in refusal(capsys, "merge", names[0], "--into", "old.img")
    assert disk("merge", names[0], "--into", "old.img", "--force") == 0
    assert Path("old.img").read_bytes() == wanted
    assert disk("merge", names[0], "--into", names[2], "--force") == 0
    assert content(names[2]) == wanted and files() == sorted([names[2], "old.img"])


@differencing
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["create", "a.FORM", "--parent", "none.FORM", "1M"], "no such file"),
        (["create", "a.FORM", "--parent", "base.iso"], "convert that first"),
        (["create", "a.FORM", "1M", "--kind", "differencing"], "--parent"),
        (["create", "a.FORM", "1M", "--kind", "fixed", "--parent", "base.FORM"], "--parent"),
        (["create", "a.FORM", "1M", "--block-size", "3M"], "a.FORM"),
        (["create", "a.FORM", "9999T"], "a.FORM"),
        (["merge", "base.FORM"], "has no parent"),
        (["resize", "base.FORM", "9999T"], "base.FORM"),
        (["resize", "base.FORM", "+100"], "base.FORM"),
    ],
)
def test_what_a_format_has_not_is_refused_in_one_line(
    form: str, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    assert disk("create", f"base.{form}", "4M") == 0
    before = Path(f"base.{form}").read_bytes()
    words = [word.replace("FORM", form) for word in words]
    assert why.replace("FORM", form) in refusal(capsys, *words)
    assert files() == [f"base.{form}"] and len(Path(f"base.{form}").read_bytes()) == len(before)


@differencing
def test_an_image_of_nonsense_is_refused_and_not_replaced_by_accident(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(f"a.{form}").write_bytes(random.Random(3).randbytes(1 << 20))
    for action in (["info"], ["convert", "b.img"], ["resize", "2M"], ["diff"], ["merge"]):
        assert f"a.{form}: " in refusal(capsys, action[0], f"a.{form}", *action[1:])
    assert disk("check", f"a.{form}") in (1, 2)
    assert files() == [f"a.{form}"]
