"""The benchmark guest's drivers read and write what they say, and it notices data that is not the disk's."""

from __future__ import annotations

import os
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from guests.bench.build import build
from guests.bench.run import (
    BLOCK,
    MeasureError,
    Workload,
    measure,
    pyvmm_command,
    pyvmm_nic_command,
    qemu_command,
    qemu_nic_command,
    write_image,
)
from tests.bench.native import compile_c

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.kvm

_SIZE = 1 << 20
_MS = 300
_FRAME_TYPE = 0x88B5
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h
_LEGS: dict[str, tuple[Callable[..., list[str]], str]] = {
    "pyvmm": (pyvmm_command, "storvsc"),
    "QEMU": (qemu_command, "virtio-blk"),
}


_IDE_TESTS = {
    # Outgoing words leave the guest one by one: too slow to fill a disk.
    "ide-pio": [Workload("randread", 4096, 1, _MS), Workload("read", 128 << 10, 1, _MS)],
    "ide-dma": [Workload(operation, 128 << 10, 1, _MS) for operation in ("write", "randread", "randwrite", "read")],
}


@pytest.fixture(scope="session")
def guest() -> Path:
    return build()


@pytest.fixture(params=list(_LEGS))
def command(request: pytest.FixtureRequest, guest: Path, tmp_path: Path) -> Callable[..., list[str]]:
    make, driver = _LEGS[request.param]
    return lambda *tests: make(guest, tmp_path / "com1", tmp_path / "disk.img", driver, tests)


def test_every_block_is_read_from_where_it_is(command: Callable[..., list[str]], tmp_path: Path) -> None:
    write_image(tmp_path / "disk.img", _SIZE)
    tests = [
        Workload("randread", 4096, 32, _MS),
        Workload("randread", 4096, 1, _MS),
        Workload("read", 128 << 10, 32, _MS),
    ]
    found = measure(command(*tests), tmp_path / "com1")
    assert list(found) == ["randread_4096_32", "randread_4096_1", "read_131072_32"]
    for measured in found.values():
        assert measured.microseconds >= _MS * 1000
        assert 0 < measured.kicks <= measured.requests


def test_writes_fill_the_disk_with_its_blocks_numbers(command: Callable[..., list[str]], tmp_path: Path) -> None:
    image, expected = tmp_path / "disk.img", tmp_path / "expected.img"
    image.write_bytes(bytes(_SIZE))
    write_image(expected, _SIZE)
    found = measure(
        command(Workload("write", 4096, 32, _MS), Workload("randwrite", 128 << 10, 7, _MS)), tmp_path / "com1"
    )
    assert found["write_4096_32"].requests * 4096 >= _SIZE, "too slow to tell"
    assert image.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("driver", list(_IDE_TESTS))
def test_ide_disks_are_read_and_written_one_request_at_a_time(guest: Path, tmp_path: Path, driver: str) -> None:
    image, tests = tmp_path / "disk.img", _IDE_TESTS[driver]
    write_image(image, _SIZE)
    before = image.read_bytes()
    found = measure(pyvmm_command(guest, tmp_path / "com1", image, driver, tests), tmp_path / "com1")
    assert all(measured.kicks == measured.requests for measured in found.values())
    assert len(found) == len(tests)
    assert image.read_bytes() == before


def test_a_block_with_another_number_is_wrong_data(guest: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "disk.img", 16 * BLOCK)
    with (tmp_path / "disk.img").open("r+b") as file:
        file.seek(3 * BLOCK)
        file.write((4).to_bytes(8, "little"))
    test = Workload("randread", 4096, 32, _MS)
    with pytest.raises(MeasureError, match=r"randread_4096_32: 0 failed, [1-9]\d* with wrong data"):
        measure(pyvmm_command(guest, tmp_path / "com1", tmp_path / "disk.img", "storvsc", [test]), tmp_path / "com1")


def test_a_driver_without_its_device_says_so(guest: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "disk.img", _SIZE)
    command = pyvmm_command(
        guest, tmp_path / "com1", tmp_path / "disk.img", "virtio-blk", [Workload("read", 4096, 1, _MS)]
    )
    with pytest.raises(MeasureError, match="no virtio-blk on PCI"):
        measure(command, tmp_path / "com1")


@pytest.fixture
def tap() -> Iterator[str]:
    name = f"pvt{os.getpid()}"
    subprocess.run(["ip", "tuntap", "add", "dev", name, "mode", "tap"], check=True)
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    yield name
    subprocess.run(["ip", "link", "delete", name], check=True)


_NICS: dict[str, Callable[..., list[str]]] = {"pyvmm": pyvmm_nic_command, "QEMU": qemu_nic_command}


@pytest.mark.parametrize("monitor", list(_NICS))
def test_frames_that_are_sent_come_out_of_the_tap_in_order(guest: Path, tmp_path: Path, tap: str, monitor: str) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_FRAME_TYPE)) as host:
        host.bind((tap, _FRAME_TYPE))
        host.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        test = Workload("send", 60, 4, 20)
        (found,) = measure(_NICS[monitor](guest, tmp_path / "com1", tap, [test]), tmp_path / "com1").values()
        host.setblocking(False)
        for number in range(min(found.requests, 10000)):
            frame = host.recv(2048)
            assert (len(frame), frame[12:14]) == (60, b"\x88\xb5")
            assert int.from_bytes(frame[16:24], "little") == number


@pytest.mark.parametrize("monitor", list(_NICS))
def test_frames_that_come_are_taken_whole_and_in_order(guest: Path, tmp_path: Path, tap: str, monitor: str) -> None:
    program = compile_c("blast", tmp_path)
    with subprocess.Popen(["nice", "-n", "19", str(program), tap, "1000"]) as sender:
        command = _NICS[monitor](guest, tmp_path / "com1", tap, [Workload("receive", 1000, 8, 100)])
        (found,) = measure(command, tmp_path / "com1").values()
        sender.kill()
    assert found.requests > 100
