"""Debian's SeaBIOS on /dev/kvm finds the PCI bus and the IDE drives, and boots from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fakes.boot_media import boot_cd, boot_sector
from tests.kvm.conftest import run_cli

pytestmark = pytest.mark.kvm

SEABIOS = "/usr/share/seabios/bios.bin"


@pytest.mark.parametrize("medium", ["disk", "cd"])
def test_seabios_boots(tmp_path: Path, medium: str) -> None:
    image, console, report = tmp_path / "image", tmp_path / "console", tmp_path / "report"
    if medium == "cd":
        image.write_bytes(boot_cd("started from cd", tmp_path))
        drive = ["--cdrom", str(image)]
    else:
        image.write_bytes(boot_sector("started from disk", tmp_path).ljust(1 << 20, b"\0"))
        drive = ["--disk", f"{image},bus=ide"]
    options = ["--memory", "64M", "--enlightenments", "none", "--com1", f"file:{console}", "--report", str(report)]
    result = run_cli("--firmware", SEABIOS, *drive, *options)
    assert result.returncode == 0x21, result.stderr
    assert console.read_text() == f"started from {medium}"
    # Firmware has given the IDE controller's bus master other ports than the ones it had.
    pci = json.loads(report.read_text())["board"]["devices"]["pci"]
    assert pci["07.1"]["bars"] == {"4": "0xc001"}


def test_seabios_finds_all_legacy_nics(tmp_path: Path) -> None:
    image, report = tmp_path / "image", tmp_path / "report"
    image.write_bytes(boot_sector("started", tmp_path).ljust(1 << 20, b"\0"))
    options = ["--memory", "64M", "--enlightenments", "none", "--report", str(report)]
    for number in range(4):
        options += ["--nic", f"none,type=legacy,mac=00:15:5d:00:00:0{number}"]
    result = run_cli("--firmware", SEABIOS, "--disk", f"{image},bus=ide", *options)
    assert result.returncode == 0x21, result.stderr
    pci = json.loads(report.read_text())["board"]["devices"]["pci"]
    bars = [pci[f"0a.{number}"]["bars"] for number in range(4)]
    ports, memory = ([int(bar[index], 16) & ~1 for bar in bars] for index in ("0", "1"))
    # Firmware has placed all of them anew, from the start of its windows on and from the end.
    assert [port % 128 for port in ports] == [0] * 4 and all(0xC000 <= port < 0xC400 for port in ports)
    assert [base % 4096 for base in memory] == [0] * 4 and all(0xFE00_0000 <= base < 0xFEC0_0000 for base in memory)
    assert len(set(ports)) == len(set(memory)) == 4
