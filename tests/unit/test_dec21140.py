"""The 21140: registers, interrupts, frames both ways, the cable, and its life."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from devices.legacy.dec21140 import descriptors as d
from tests.fakes.tulip import (
    TulipGuest,
    Wire,
    frame,
    on_wire,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def guest() -> Iterator[TulipGuest]:
    guest = TulipGuest()
    guest.plug()
    yield guest
    guest.close()


@pytest.fixture
def wire(guest: TulipGuest) -> Wire:
    """The network of a guest whose driver has started."""
    guest.start()
    assert guest.wire is not None
    return guest.wire


def test_a_frame_is_sent_padded_and_without_offload(guest: TulipGuest, wire: Wire) -> None:
    data = frame(b"short")
    at = guest.send(data)
    assert wire.sent() == [data.ljust(60, b"\0")]
    assert wire.offloads == 0
    assert guest.status_of(at) == 0


def test_a_frame_is_received_with_padding_and_checksum(guest: TulipGuest, wire: Wire) -> None:
    wire.give(frame(b"x"))
    guest.work()
    assert guest.received() == [(64 << d.LENGTH_SHIFT | d.FIRST | d.LAST | d.FRAME_TYPE, on_wire(frame(b"x")))]
