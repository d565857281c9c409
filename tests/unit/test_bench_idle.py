"""The benchmark of idle guests without guests: what it asks of the session in the lab, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guests import lab, linux
from tests.bench import idle, session
from tests.bench.idle_session import Guest
from tests.bench.native import BenchError

CONSOLE = Path("/tmp/com1")


@pytest.fixture(autouse=True)
def _no_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    images = linux.Images(Path("bzImage"), Path("vmlinux"), Path("initrd"))
    monkeypatch.setattr(linux, "build", lambda script: images)
    monkeypatch.setattr(session, "kvm_kind", lambda: "kvm_pvm")


def test_each_guest_is_a_figure_with_the_samples_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> lab.Result:
        guests, rounds, found = command[-3:]
        names = list(json.loads(Path(guests).read_text()))
        samples = {"pyvmm": [3.0] * int(rounds), "QEMU": [2.0] * int(rounds)}
        Path(found).write_text(json.dumps(dict.fromkeys(names, samples)))
        return lab.Result(0, 0, 0)

    monkeypatch.setattr(lab, "run", run)
    figures = idle.measure(tmp_path, 2)
    assert [figure.title for figure in figures][:3] == ["idle: direct tick", "idle: message tick", "idle: Linux"]
    assert {(figure.ours.values, figure.ratio, figure.limit) for figure in figures} == {((3.0, 3.0), 1.5, 1.0)}


def test_a_session_that_fails_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "run", lambda *_, **__: lab.Result(1, 0, 0))
    with pytest.raises(BenchError, match="status 1"):
        idle.measure(tmp_path, 1)


def test_both_monitors_get_the_same_guest_and_console() -> None:
    commands = Guest("vmlinux", 5.0, "initrd", "quiet", "full,-vmbus").commands(CONSOLE)
    assert list(commands) == ["pyvmm", "QEMU"]
    for command in commands.values():
        assert {"vmlinux", "initrd", "quiet", f"file:{CONSOLE}"} <= set(command)
