"""The ways that a disk's data may go: a module of tests that uses this fixture runs once for each."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest

from devices.synthetic.storvsp import vsp
from pyvmm.core._hot import StorageQueue
from tests.fakes.disks import MemoryDisk

if TYPE_CHECKING:
    from collections.abc import Iterator

PATHS = ("python", "c", "c-without-io_uring")


@pytest.fixture(params=PATHS, scope="module", autouse=True)
def data_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """By Python alone, or by C code, which waits for the host itself or lets io_uring wait."""
    make = functools.partial(StorageQueue, io_uring=request.param == "c")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryDisk, "by_c", request.param != "python")
        patch.setattr(vsp, "StorageQueue", make)
        yield request.param
