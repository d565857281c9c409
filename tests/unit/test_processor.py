"""What VPs' threads ask of each other, and what becomes of it when one ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm.core.kvm import abi
from pyvmm.machine.processor import Processor

PATIENCE_S = 20


class Guest:
    """Runs `script` once on the VP's thread, as if the guest made a hypercall, then waits to be stopped."""

    def __init__(self) -> None:
        self.script: Callable[[], object] = lambda: None
        self.done = threading.Event()
        self._stop = threading.Event()

    def run(self) -> int:
        script, self.script = self.script, lambda: None
        script()
        self.done.set()
        self._stop.wait(PATIENCE_S)
        self._stop.clear()
        return abi.EXIT_INTR

    def stop(self) -> None:
        self._stop.set()


class Pair:
    """Two processors whose guests are scripts."""

    def __init__(self) -> None:
        self.guests = [Guest(), Guest()]
        self.errors: list[BaseException] = []
        self.processors = [
            Processor(
                SimpleNamespace(index=index),  # type: ignore[arg-type]
                guest,  # type: ignore[arg-type]
                lambda processor, reason: None,
                lambda processor, error: self.errors.append(error),
            )
            for index, guest in enumerate(self.guests)
        ]

    def start(self) -> None:
        for processor in self.processors:
            processor.start()
            processor.release()

    def end(self) -> None:
        for processor in self.processors:
            processor.end()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.end()
    assert pair.errors == []


def asks(pair: Pair, asker: int, other: int, found: list[Any], value: int) -> Callable[[], None]:
    def action() -> int:
        found.append(threading.current_thread().name)
        return value

    return lambda: found.append(pair.processors[asker].ask(pair.processors[other], action))


def test_a_request_is_done_on_the_others_thread(pair: Pair) -> None:
    found: list[Any] = []
    pair.guests[0].script = asks(pair, 0, 1, found, 7)
    pair.start()
    assert pair.guests[0].done.wait(PATIENCE_S)
    assert found == ["vp1", 7]


def test_two_that_ask_each_other_both_get_their_answer(pair: Pair) -> None:
    together = threading.Barrier(2)
    found: list[list[Any]] = [[], []]
    for asker in (0, 1):
        ask = asks(pair, asker, 1 - asker, found[asker], asker)
        pair.guests[asker].script = lambda ask=ask: (together.wait(PATIENCE_S), ask())  # type: ignore[misc]
    pair.start()
    assert all(guest.done.wait(PATIENCE_S) for guest in pair.guests)
    assert found == [["vp1", 0], ["vp0", 1]]


def test_a_parked_vp_does_what_it_is_asked(pair: Pair) -> None:
    found: list[Any] = []
    pair.guests[0].script = asks(pair, 0, 1, found, 3)
    pair.processors[1].start()
    pair.processors[1].wait_parked()
    pair.processors[0].start()
    pair.processors[0].release()
    assert pair.guests[0].done.wait(PATIENCE_S)
    assert found == ["vp1", 3]


def test_nobody_waits_for_a_vp_that_has_ended(pair: Pair) -> None:
    found: list[Any] = []
    pair.guests[0].script = asks(pair, 0, 1, found, 3)
    pair.processors[1].start()
    pair.processors[1].end()
    pair.processors[0].start()
    pair.processors[0].release()
    assert pair.guests[0].done.wait(PATIENCE_S)
    assert found == [None]
