"""Guests made from Debian's packages: the package cache, the initramfs writer and what a guest reports."""

from __future__ import annotations

import gzip
import struct
import subprocess
from pathlib import Path

import pytest

from guests import initramfs, linux, packages

_KERNEL = "linux-image-6.1.0-9-cloud-amd64"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/pyvmm"


def _listing(archive: Path) -> list[str]:
    with archive.open("rb") as file:
        done = subprocess.run(
            [initramfs.BUSYBOX, "cpio", "-tv"], stdin=file, capture_output=True, text=True, check=True
        )
    return done.stdout.splitlines()


def test_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    archive = initramfs.Archive()
    archive.add("deep/er/file", b"hello", 0o640)
    archive.add("deep/other", b"")
    archive.link("link", "deep/er/file")
    archive.character_device("console", 5, 1)
    file = tmp_path / "archive"
    file.write_bytes(archive.to_bytes())
    entries = [(line.split()[0], line.split("  ")[-1].split()[-1]) for line in _listing(file)]
    assert [(mode, name) for mode, name in entries if mode.startswith(("d", "-", "c"))] == [
        ("drwxr-xr-x", "deep"),
        ("drwxr-xr-x", "deep/er"),
        ("-rw-r-----", "deep/er/file"),
        ("-rwxr-xr-x", "deep/other"),
        ("crw-------", "console"),
    ]
    extracted = subprocess.run(
        [initramfs.BUSYBOX, "cpio", "-id", "deep*", "link"],
        input=file.read_bytes(),
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert extracted.returncode == 0
    assert (tmp_path / "link").read_bytes() == b"hello"


def test_archive_refuses_a_name_twice() -> None:
    archive = initramfs.Archive()
    archive.add("init", b"")
    with pytest.raises(packages.RecipeError, match="init is given twice"):
        archive.add("init", b"")


def test_program_comes_with_its_libraries() -> None:
    archive = initramfs.Archive()
    initramfs.add_programs(archive, {"sbin/mke2fs": "mke2fs"})
    data = archive.to_bytes()
    assert b"sbin/mke2fs\0" in data
    assert b"libc.so.6\0" in data
    assert b"ld-linux-x86-64.so.2\0" in data


def _modules(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "modules.dep").write_text(
        "kernel/a/hv_vmbus.ko:\n"
        "kernel/b/scsi_common.ko:\n"
        "kernel/b/scsi_mod.ko: kernel/b/scsi_common.ko\n"
        "kernel/b/hv-storvsc.ko: kernel/b/scsi_mod.ko kernel/b/scsi_common.ko kernel/a/hv_vmbus.ko\n"
    )
    (folder / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    return folder


def test_modules_come_after_what_they_need_and_once(tmp_path: Path) -> None:
    modules = _modules(tmp_path / "6.1.0")
    names = [path.name for path in initramfs.modules_in_order(modules, ["hv_storvsc", "ext4", "hv-vmbus", "scsi_mod"])]
    assert names == ["hv_vmbus.ko", "scsi_common.ko", "scsi_mod.ko", "hv-storvsc.ko"]


def test_a_module_that_the_kernel_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(packages.RecipeError, match=r"kernel 6\.1\.0 has no module kvm-amd"):
        initramfs.modules_in_order(_modules(tmp_path / "6.1.0"), ["kvm-amd"])


def test_kernel_is_unpacked_once(tmp_path: Path) -> None:
    packed = gzip.compress(b"\x7fELF-kernel")
    header = bytearray(0x400 + 0x200)
    header[0x1F1] = 1
    struct.pack_into("<II", header, 0x248, 0x200, len(packed))
    image = tmp_path / "vmlinuz-6.1.0"
    image.write_bytes(bytes(header) + packed)
    unpacked = initramfs.unpacked_kernel(image)
    assert unpacked == tmp_path / "vmlinux-6.1.0"
    assert unpacked.read_bytes() == b"\x7fELF-kernel"
    image.unlink()
    assert initramfs.unpacked_kernel(image) == unpacked


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins for apt, dpkg and depmod that log their calls into `calls` beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tools = {
        "apt-cache": f'echo "linux-image-cloud-amd64"; echo "  Depends: {_KERNEL}"',
        "apt-get": f'case "$*" in *update*) ;; *) touch {_KERNEL}_6.1.27-1_amd64.deb ;; esac',
        "dpkg": 'mkdir -p "$3/lib/modules/6.1.0-9-cloud-amd64" "$3/boot"',
        "depmod": 'touch "$2/lib/modules/$3/modules.dep"',
    }
    for name, body in tools.items():
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/calls\n{body}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_kernel_is_downloaded_once_and_then_needs_no_apt(debian: Path, cache: Path) -> None:
    kernel = packages.kernel("cloud-amd64")
    assert kernel.release == "6.1.0-9-cloud-amd64"
    assert kernel.image == cache / f"packages/{_KERNEL}_6.1.27-1_amd64/boot/vmlinuz-{kernel.release}"
    calls = debian.with_name("calls")
    assert f"download {_KERNEL}\n" in calls.read_text()
    calls.unlink()
    assert packages.kernel("cloud-amd64") == kernel
    assert not calls.exists()
    assert [path.name for path in (cache / "packages").iterdir()] == [f"{_KERNEL}_6.1.27-1_amd64"]


def test_newest_cached_kernel_of_that_flavour_is_used(debian: Path, cache: Path) -> None:
    for version in ("6.1.0-9", "6.1.0-10"):
        for flavour in ("amd64", "cloud-amd64"):
            modules = cache / f"packages/linux-image-{version}-{flavour}_6.1_amd64/lib/modules/{version}-{flavour}"
            modules.mkdir(parents=True)
            (modules / "modules.dep").touch()
    assert packages.kernel("amd64").release == "6.1.0-10-amd64"
    assert packages.kernel("cloud-amd64").release == "6.1.0-10-cloud-amd64"


def test_apt_failure_is_one_line_after_one_refresh_of_the_lists(
    debian: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    (debian / "apt-get").write_text(
        f'#!/bin/sh\necho "$*" >>{debian}/calls\necho "E: no network" >&2\n[ $1 = update ]\n'
    )
    with pytest.raises(packages.RecipeError) as caught:
        packages.kernel("cloud-amd64")
    assert str(caught.value).endswith("failed: E: no network")
    assert "\n" not in str(caught.value)
    assert [line.split()[0] for line in (debian / "calls").read_text().splitlines()] == ["-o", "update", "-o"]
    assert list((cache / "packages").iterdir()) == []


def test_results_are_found_among_other_console_lines() -> None:
    console = "[ 1.0] noise\r\nRESULT version=5.3\r\nx RESULT not=this\r\nRESULT sum=a=b c\r\nRESULT version=5.2\r\n"
    assert linux.results(console) == {"version": "5.2", "sum": "a=b c"}


def test_root_image_holds_a_system_that_runs_the_script(tmp_path: Path) -> None:
    image = tmp_path / "root.img"
    linux.write_root(image, "result answer 42\n", 16)
    for name, content in (("/script", "result answer 42"), ("/sbin/init", "sh /script")):
        shown = subprocess.run(
            ["/sbin/debugfs", "-R", f"cat {name}", image], capture_output=True, text=True, check=True
        )
        assert content in shown.stdout
    assert b"root" in image.read_bytes()[1024 + 120 : 1024 + 136]  # the label: ext4's s_volume_name
    checked = subprocess.run(["/sbin/e2fsck", "-fn", image], capture_output=True, check=False)
    assert checked.returncode == 0
