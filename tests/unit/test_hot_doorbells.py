"""Event ports: HvSignalEvent's way to an eventfd."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from pyvmm.core._hot import Doorbells

if TYPE_CHECKING:
    from collections.abc import Iterator

SUCCESS, INVALID_PARAMETER, INVALID_CONNECTION_ID = 0, 5, 0x12
MAX_PORTS = 4096


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_a_signal_reaches_the_eventfd_and_is_counted(eventfd: int) -> None:
    doorbells = Doorbells()
    doorbells.connect(0x2001, eventfd)
    assert [doorbells.signal(0x2001, 0) for _ in range(3)] == [SUCCESS] * 3
    assert os.eventfd_read(eventfd) == 3
    assert doorbells.inspect() == {0x2001: 3}


def test_an_unknown_connection_has_its_status(eventfd: int) -> None:
    doorbells = Doorbells()
    doorbells.connect(5, eventfd)
    assert [doorbells.signal(number, 0) for number in (0, 4, 6, 0xFFFFFFFF)] == [INVALID_CONNECTION_ID] * 4


def test_a_port_has_one_flag(eventfd: int) -> None:
    doorbells = Doorbells()
    doorbells.connect(5, eventfd)
    assert doorbells.signal(5, 1) == INVALID_PARAMETER
    assert doorbells.inspect() == {5: 0}
    with pytest.raises(BlockingIOError):
        os.eventfd_read(eventfd)


def test_many_ports_are_told_apart() -> None:
    numbers = [(index * 7919) % 100_003 for index in range(100)]
    fds = {number: os.eventfd(0, os.EFD_NONBLOCK) for number in numbers}
    doorbells = Doorbells()
    for number, fd in fds.items():
        doorbells.connect(number, fd)
    for number in numbers[::3]:
        doorbells.disconnect(number)
    for number in numbers:
        gone = number in numbers[::3]
        assert doorbells.signal(number, 0) == (INVALID_CONNECTION_ID if gone else SUCCESS)
        if not gone:
            assert os.eventfd_read(fds[number]) == 1
        os.close(fds[number])


def test_an_id_is_connected_once_and_may_be_connected_anew(eventfd: int) -> None:
    doorbells = Doorbells()
    doorbells.connect(5, eventfd)
    with pytest.raises(ValueError, match="0x5"):
        doorbells.connect(5, eventfd)
    doorbells.disconnect(5)
    doorbells.disconnect(5)
    assert doorbells.signal(5, 0) == INVALID_CONNECTION_ID
    doorbells.connect(5, eventfd)
    assert doorbells.signal(5, 0) == SUCCESS


def test_a_full_table_says_so(eventfd: int) -> None:
    doorbells = Doorbells()
    for number in range(MAX_PORTS):
        doorbells.connect(number, eventfd)
    with pytest.raises(RuntimeError):
        doorbells.connect(MAX_PORTS, eventfd)
    with pytest.raises(ValueError):
        doorbells.connect(0, eventfd)
    doorbells.disconnect(0)
    doorbells.connect(MAX_PORTS, eventfd)
    assert len(doorbells.inspect()) == MAX_PORTS


def test_a_full_eventfd_neither_blocks_nor_fails(eventfd: int) -> None:
    os.eventfd_write(eventfd, (1 << 64) - 2)
    doorbells = Doorbells()
    doorbells.connect(1, eventfd)
    assert doorbells.signal(1, 0) == SUCCESS


def test_a_closed_eventfd_only_loses_the_signal() -> None:
    fd = os.eventfd(0)
    os.close(fd)
    doorbells = Doorbells()
    doorbells.connect(1, fd)
    assert doorbells.signal(1, 0) == SUCCESS


def test_threads_connect_signal_and_disconnect_at_once(eventfd: int) -> None:
    doorbells = Doorbells()
    doorbells.connect(0, eventfd)

    def ring() -> None:
        for _ in range(2000):
            assert doorbells.signal(0, 0) == SUCCESS
            doorbells.signal(7, 0)
            doorbells.inspect()

    threads = [threading.Thread(target=ring) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(2000):
        doorbells.connect(7, eventfd)
        doorbells.disconnect(7)
    for thread in threads:
        thread.join()
    assert doorbells.inspect() == {0: 6000}
