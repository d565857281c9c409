"""The synthetic NIC with guests that behave: handshakes, RNDIS, objects, frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.fakes import netvsc
from tests.fakes.netvsc import start_linux
from tests.fakes.netvsp_rig import BROADCAST_MAC, MAC, PEER, frame, make

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fakes.netvsp_rig import Rig

    Make = Callable[..., Rig]

__all__ = ["make"]


@pytest.mark.parametrize("version", netvsc.LINUX_VERSIONS)
def test_linux_brings_the_nic_up_under_every_version(make: Make, version: int) -> None:
    rig = make(max_version=version)
    start_linux(rig.driver)
    assert rig.driver.version == version
    assert rig.driver.transmit(frame()) == netvsc.SUCCESS
    assert rig.port.sent()[1] == frame()
    rig.port.arrive(frame(to=MAC, source=PEER))
    assert rig.driver.frame().data == frame(to=MAC, source=PEER)
    rig.port.arrive(frame(to=BROADCAST_MAC, source=PEER))
    assert rig.driver.frame().data == frame(to=BROADCAST_MAC, source=PEER)
