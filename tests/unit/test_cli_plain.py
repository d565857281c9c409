"""`pyvmm run` reads plain command lines without argparse: just as argparse would, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.cli.parser import build_parser
from pyvmm.cli.run import OPTIONS, Option, read_plain
from pyvmm.machine.config import DiskConfig

REPOSITORY = Path(__file__).parents[2]

VALUES = st.one_of(
    st.sampled_from(["", "1", "1.5", "512M", "d.img,readonly", "d,controller=2", "a=b", " 7 ", "nan", "1_0", "msr,io"]),
    st.text(alphabet="ab1=,- \u00e9", max_size=4),
)


def words_of(option: Option) -> st.SearchStrategy[list[str]]:
    if option.metavar is None:
        return st.sampled_from([[option.flag], [option.flag], [f"{option.flag}=1"]])
    return st.one_of(
        VALUES.map(lambda value: [option.flag, value]),
        VALUES.map(lambda value: [f"{option.flag}={value}"]),
    )


GROUPS = st.one_of(
    *map(words_of, OPTIONS),
    st.sampled_from(
        [["--help"], ["-h"], ["--"], ["--firm", "x"], ["--kernel"], ["-"], ["--nothing=1"], ["second.toml"]]
    ),
)


def as_dict(namespace: object) -> dict[str, object]:
    """The values, with disks and not-a-number such that they can be compared."""

    def plain(value: object) -> object:
        if isinstance(value, DiskConfig):
            return vars(value)
        return [plain(item) for item in value] if isinstance(value, list) else repr(value)

    return {name: plain(value) for name, value in vars(namespace).items()}


@given(file=st.lists(st.sampled_from(["vm.toml", "a b"]), max_size=1), groups=st.lists(GROUPS, max_size=4))
def test_what_is_read_is_what_argparse_reads(file: list[str], groups: list[list[str]]) -> None:
    words = [*file, *(word for group in groups for word in group)]
    plain = read_plain(words)
    if plain is not None and ["second.toml"] not in groups:
        assert as_dict(plain) == as_dict(build_parser(["run"]).parse_args(["run", *words]))


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.flag)
def test_every_option_is_read(option: Option) -> None:
    values = {"N": "4", "SIZE": "1G", "S": "2.5"}
    words = [option.flag] if option.metavar is None else [option.flag, values.get(option.metavar, "text")]
    plain = read_plain([*words, "vm.toml"])
    assert plain is not None
    assert plain.vm == "vm.toml"
    assert option.field in vars(plain)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--cpus", "many"],
        ["--cpus"],
        ["--cpus", "-1"],
        ["--disk", "d,rw"],
        ["--testdev=1"],
        ["a", "b"],
        [""],
    ],
)
def test_help_and_errors_are_left_to_argparse(words: list[str]) -> None:
    assert read_plain(words) is None


def test_the_module_is_the_command(tmp_path: Path) -> None:
    missing = str(tmp_path / "rom")
    command = [sys.executable, "-m", "pyvmm", "run", "--firmware", missing]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"pyvmm: error: firmware {missing}: no such file\n"
