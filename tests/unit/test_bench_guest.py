"""The benchmark guest without a VM: its command line, its report, its code; and the benchmark's figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from guests.bare.report import parse
from guests.bench.build import build
from guests.bench.run import BLOCK, Measured, MeasureError, Workload, command_line, measurements, write_image
from tests.bench import storage
from tests.fakes.objdump import lacking_instructions

GOOD = """bench: TSC of 2595983 kHz
bench: virtio-blk.randread_4096_32 = 6000 requests 300000 us 190 kicks ok
bench: virtio-blk.write_131072_1 = 1000 requests 150000 us 1000 kicks ok
bench: done 2 0
"""


def test_measurements_have_the_tests_names() -> None:
    found = measurements(parse("bench", GOOD))
    assert found == {"randread_4096_32": Measured(6000, 300000, 190), "write_131072_1": Measured(1000, 150000, 1000)}
    assert found["randread_4096_32"].each == 50
    assert Workload("randread", 4096, 32, 300).name == "randread_4096_32"


def test_the_command_line_names_the_driver_and_the_tests() -> None:
    tests = [Workload("randread", 4096, 32, 300), Workload("write", 131072, 1, 150)]
    assert command_line("disk=storvsc", tests) == "disk=storvsc randread:4096:32:300 write:131072:1:150"


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ("190 kicks ok", "190 kicks bad 1 failed, 2 with wrong data", "randread_4096_32: 1 failed, 2 with wrong data"),
        ("bench: done 2 0\n", "bench: no disk on LUN 0\n", "its last note: no disk on LUN 0"),
        ("6000 requests", "0 requests", "randread_4096_32: no measurement in '0 requests 300000 us 190 kicks'"),
        ("6000 requests", "many requests", "randread_4096_32: no measurement in 'many requests"),
        ("done 2 0", "done 3 0", "counted 3 good"),
    ],
)
def test_what_is_no_good_measurement_is_an_error(was: str, becomes: str, message: str) -> None:
    with pytest.raises(MeasureError, match=message):
        measurements(parse("bench", GOOD.replace(was, becomes)))


def test_each_block_of_an_image_has_its_number(tmp_path: Path) -> None:
    write_image(tmp_path / "disk.img", 3 * BLOCK)
    assert (tmp_path / "disk.img").read_bytes() == b"".join(bytes([n, *bytes(7)]) * 512 for n in range(3))


def test_the_guest_uses_no_instruction_that_kvms_emulator_lacks(tmp_path: Path) -> None:
    assert lacking_instructions(build(tmp_path), 64) == set()


def test_figures_are_of_all_rounds_but_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    legs: list[str] = []
    requests = {"storvsc": 100, "virtio-blk": 200, "ide-pio": 2, "ide-dma": 5}

    def measure(command: list[str], console: Path) -> dict[str, Measured]:
        driver = next(word for word in requests if any(f"disk={word} " in argument for argument in command))
        legs.append(driver)
        count = requests[driver] if len(legs) > 5 else 1
        return {workload.name: Measured(count, 1000, 1) for workload in storage._ALL}

    monkeypatch.setattr(storage, "measure", measure)
    monkeypatch.setattr(storage, "_IMAGE_BYTES", 1 << 20)
    figures = storage.measure_all(tmp_path, 3)
    assert legs == ["storvsc", "virtio-blk", "storvsc", "ide-pio", "ide-dma"] * 4
    assert figures[0].ours.values == (10.0,) * 3
    targets = [(figure.rival.name, figure.ratio, figure.limit) for figure in figures if figure.rival and figure.limit]
    assert targets == [
        ("QEMU", 2, 1.0),
        ("IDE PIO", pytest.approx(0.02), 0.1),
        ("IDE DMA", pytest.approx(0.05), 1 / 3),
        ("storvsp", 1, 1 / 0.9),
    ]
