"""VM configurations: sizes, disks, what makes a VM, and VM files."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enlightenments.catalog import ENLIGHTENMENTS
from enlightenments.selection import PROFILES, SETTINGS
from pyvmm.machine import config_file
from pyvmm.machine.config import (
    MAX_LUNS,
    MIB,
    ConfigError,
    DiskConfig,
    VmConfig,
    check_files,
    format_size,
    parse_cdrom,
    parse_disk,
    parse_size,
    split_com1,
    validate,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("64k", 65536), ("512M", 512 * MIB), ("2GiB", 2 << 30), ("1 TiB", 1 << 40), ("3mib", 3 * MIB)],
)
def test_a_size_is_a_whole_number_of_a_power_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "iB", "-1", "1.5G", "2GB", "0x10", "1e3", "\u0662M", "9" * 99, "1 2", "1MM"])
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 512M"):
        parse_size(text)


@given(st.integers(0, 1 << 45))
def test_a_formatted_size_reads_back_exactly(size: int) -> None:
    assert parse_size(format_size(size)) == size


def said(disk: DiskConfig) -> dict[str, Any]:
    """What was said of a disk, without what was left open."""
    return {name: value for name, value in vars(disk).items() if value is not None and (name, value) != ("bus", "scsi")}


def test_a_disk_takes_its_options_in_any_order() -> None:
    assert said(parse_disk("a.img,controller=2,readonly")) == {"path": "a.img", "readonly": True, "controller": 2}
    assert said(parse_disk("a.img")) == {"path": "a.img", "readonly": False, "controller": 0}
    assert parse_disk("a.img,sector_size=4096").sector_size == 4096
    limited = parse_disk("a,bandwidth=50MiB,format=vhdx,iops=500,lun=63")
    assert (limited.bandwidth, limited.format, limited.iops, limited.lun) == (50 * MIB, "vhdx", 500, 63)


_BAD_OPTIONS = [
    "ro",
    "controller=",
    "controller=4",
    "controller=-1",
    "",
    "lun=64",
    "lun",
    "lun=x",
    "sector_size=1024",
    "iops=9",
    "iops=1e3",
]
_BAD_OPTIONS += ["bandwidth=", "bandwidth=65535", "bandwidth=fast", "format=qcow2", "format=", "iops=99999999999999999"]


@pytest.mark.parametrize("text", ["", ",readonly", *(f"a,{option}" for option in _BAD_OPTIONS)])
def test_a_disk_with_a_bad_option_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_disk(text)


def test_com1_is_one_of_four_kinds() -> None:
    assert split_com1("stdio") == ("stdio", "")
    assert split_com1("none") == ("none", "")
    assert split_com1("file:a:b") == ("file", "a:b")
    assert split_com1("unix:/x") == ("unix", "/x")
    for bad in ("", "file", "file:", "unix:", "stdio:", "none:x", "tcp:1"):
        with pytest.raises(ConfigError, match="choose stdio"):
            split_com1(bad)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"kernel": None}, "nothing to start"),
        ({"firmware": "rom"}, "not both"),
        ({"kernel": None, "firmware": "rom", "initrd": "i"}, "initrd needs a kernel"),
        ({"kernel": None, "firmware": "rom", "cmdline": "x"}, "cmdline needs a kernel"),
        ({"cmdline": "a\0b"}, "NUL"),
        ({"cpus": 0}, "cpus: 0"),
        ({"cpus": 65}, "cpus: 65"),
        ({"memory": MIB - 4096}, "memory: 1020KiB"),
        ({"memory": (1 << 40) + 4096}, "1TiB"),
        ({"memory": 2 * MIB + 1}, "multiple of 4096"),
        ({"timeout": 0.0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"com1": "tty"}, "com1"),
        ({"enlightenments": "full,stimer"}, "write \\+NAME, -NAME"),
        ({"enlightenments": "none", "disks": [DiskConfig("d")]}, "enlightenment vmbus"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"disks": [DiskConfig("d", controller=4)]}, "controller 4"),
        ({"disks": [DiskConfig("")]}, "path"),
        ({"disks": [DiskConfig("d")] * (MAX_LUNS + 1)}, "more than 64 disks"),
        ({"disks": [DiskConfig("d", lun=7), DiskConfig("e", lun=7)]}, "disk e: lun 7 of controller 0 is taken"),
        ({"disks": [DiskConfig("d", bus="sata")]}, "bus 'sata': choose scsi or ide"),
        ({"disks": [DiskConfig("d", controller=2, bus="ide")]}, "controller 2 is not 0 to 1"),
        ({"disks": [DiskConfig("d", lun=2, bus="ide")]}, "lun 2 is not 0 to 1"),
        ({"disks": [DiskConfig("d", bus="ide")] * 5}, "more than 4 disks on the IDE"),
        ({"disks": [parse_cdrom("d"), parse_cdrom("e")]}, "disk e: lun 0 of IDE channel 1 is taken"),
        ({"disks": [DiskConfig("d", iops=100, bus="ide")]}, "IDE disk has no limits"),
        ({"smbios": "other"}, "smbios 'other': choose hyper-v or pyvmm"),
    ],
)
def test_what_makes_no_vm_is_refused_in_one_line(values: dict[str, Any], why: str) -> None:
    config = VmConfig(**({"kernel": "k"} | values))
    with pytest.raises(ConfigError, match=why) as caught:
        validate(config)
    assert "\n" not in str(caught.value)


def test_the_limits_themselves_make_a_vm() -> None:
    for values in ({"cpus": 64}, {"memory": MIB}, {"memory": 1 << 40}, {"disks": [DiskConfig("d")] * MAX_LUNS}):
        validate(VmConfig(kernel="k", **values))


def test_a_vm_has_no_other_fields() -> None:
    with pytest.raises(TypeError, match="kernl"):
        VmConfig(kernl="k")


def test_two_vms_do_not_share_their_disks() -> None:
    VmConfig().disks.append(DiskConfig("d"))
    assert VmConfig().disks == []


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    kernel = tmp_path / "k"
    kernel.write_bytes(b"")
    check_files(VmConfig(kernel=str(kernel)))
    for values, why in (
        ({"kernel": str(tmp_path / "no")}, "kernel .*no: no such file"),
        ({"kernel": str(tmp_path)}, "kernel .*: it is a directory"),
        ({"kernel": ""}, "kernel : no such file"),
        ({"kernel": "a\0"}, "NUL"),
        ({"kernel": str(kernel), "disks": [DiskConfig(str(tmp_path / "d"))]}, "disk .*d: no such file"),
    ):
        with pytest.raises(ConfigError, match=why):
            check_files(VmConfig(**values))


def test_an_iso_image_need_not_be_writable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    (tmp_path / "a.ISO").touch()
    check_files(VmConfig(disks=[DiskConfig(str(tmp_path / "a.ISO")), DiskConfig(__file__, format="iso")]))


def test_a_file_that_may_only_be_read_is_a_disk_only_when_readonly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    check_files(VmConfig(disks=[DiskConfig(__file__, readonly=True)]))
    with pytest.raises(ConfigError, match="add ,readonly"):
        check_files(VmConfig(disks=[DiskConfig(__file__)]))


def parse(text: str, path: str = "/vms/a.toml") -> VmConfig:
    return config_file.parse(text.encode(), path)


def test_a_vm_file_sets_fields_and_leaves_the_rest_at_their_defaults() -> None:
    config = parse('kernel = "/k"\nmemory = "2GiB"\ntimeout = 5\n[[disks]]\npath = "/d"\nreadonly = true')
    assert (config.kernel, config.memory, config.timeout, config.cpus) == ("/k", 2 << 30, 5.0, 1)
    assert [said(disk) for disk in config.disks] == [{"path": "/d", "readonly": True, "controller": 0}]
    (limited,) = parse('[[disks]]\npath = "d"\nbandwidth = "1M"\niops = 10\nlun = 5\nformat = "raw"').disks
    assert said(limited) == {
        "path": "/vms/d", "readonly": False, "controller": 0, "lun": 5, "format": "raw", "iops": 10, "bandwidth": MIB,
    }  # fmt: skip
    assert parse("memory = 1048576").memory == MIB


def test_relative_paths_count_from_the_vm_files_folder() -> None:
    config = parse(
        'kernel="k"\ninitrd="/i"\ncontrol="c"\ncom1="unix:u"\n[[disks]]\npath="../d"',
    )
    assert (config.kernel, config.initrd, config.control, config.com1) == ("/vms/k", "/i", "/vms/c", "unix:/vms/u")
    assert config.disks[0].path == "/vms/../d"
    assert parse('enlightenments="p.toml,-crash"').enlightenments == "/vms/p.toml,-crash"
    assert parse('enlightenments="/p.toml"').enlightenments == "/p.toml"
    with pytest.raises(ConfigError, match=r"a.toml: enlightenments: a profile's path cannot hold a comma: /a,b/p.toml"):
        parse('enlightenments="p.toml"', "/a,b/a.toml")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("cpus = 'two'", "a.toml: cpus: expected int, got str"),
        ("cpus = 65", "a.toml: cpus: expected int <= 64"),
        ("[[disks]]\npath = 3", r"a.toml: disks\[0\].path: expected str, got int"),
        ("[[disks]]\npath = 'a'\n[[disks]]\n", r"a.toml: disks\[1\]: object missing required field path"),
        ("[[disks]]\npath = 'a'\nlun = 64", r"a.toml: disks\[0\].lun: expected int <= 63"),
        ("[[disks]]\npath = 'a'\nformat = 'qcow2'", r"a.toml: disks\[0\].format: invalid enum value 'qcow2'"),
        ("[[disks]]\npath = 'a'\nbandwidth = 'x'", r"a.toml: disks\[0\].bandwidth: 'x' is not a size"),
        ("kernl = 'x'", "a.toml: object contains unknown field kernl"),
        ("disks = 'x'", "a.toml: disks: expected array, got str"),
        ("memory = '2X'", "a.toml: memory: '2X' is not a size"),
        ("com1 = 'x'", "a.toml: com1 'x'"),
        ("cpus", "a.toml: not TOML"),
    ],
)
def test_an_error_in_a_vm_file_is_told_with_its_place(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse(text)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_config_or_a_config_error(text: bytes) -> None:
    with contextlib.suppress(ConfigError):
        config_file.parse(text, "x")


def test_a_vm_file_nested_without_end_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="not TOML"):
        parse("a = " + "[" * 100_000)


def test_a_vm_file_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "no.toml", "No such file"), (tmp_path, "directory"), (Path("a\0b"), "null")):
        with pytest.raises(ConfigError, match=why):
            config_file.load(str(path))
    big = tmp_path / "big.toml"
    big.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than 1MiB"):
        config_file.load(str(big))


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(name=texts, cmdline=texts, path=texts, pages=st.integers(256, 1 << 20), timeout=st.none() | st.floats(0.1, 1e6))
def test_what_is_shown_as_toml_reads_back_as_the_same_vm(
    name: str, cmdline: str, path: str, pages: int, timeout: float | None
) -> None:
    disks = [DiskConfig("/" + path, True, 3), DiskConfig("/x", lun=1, format="iso", iops=100, bandwidth=3 * MIB)]
    config = VmConfig(
        name=name, kernel="/" + path, cmdline=cmdline, memory=pages * 4096, timeout=timeout, disks=disks, reboot=False
    )
    again = config_file.parse(config_file.to_toml(config).encode(), "/a/b.toml")
    assert config_file.to_dict(again) == config_file.to_dict(config)


def test_the_schema_holds_every_field_with_its_description_and_limits() -> None:
    definitions = config_file.schema()["$defs"]
    assert list(definitions["VmConfig"]["properties"]) == list(VmConfig.__annotations__)
    assert list(definitions["DiskConfig"]["properties"]) == list(DiskConfig.__annotations__)
    assert definitions["DiskConfig"]["required"] == ["path"]
    for definition in definitions.values():
        assert definition["additionalProperties"] is False
        for field in definition["properties"].values():
            assert field["description"]
    assert definitions["VmConfig"]["properties"]["cpus"]["maximum"] == 64
    description = definitions["VmConfig"]["properties"]["enlightenments"]["description"]
    assert all(name in description for name in (*ENLIGHTENMENTS, *PROFILES, *SETTINGS))
    json.dumps(definitions)
    assert msgspec.json.encode(definitions)
