"""Random MSR accesses and hypercalls from a guest: it gets an answer to each, and reaches its end."""

from __future__ import annotations

import pytest

from tests.fuzz import vp

pytestmark = pytest.mark.kvm


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_guest_gets_an_answer_to_whatever_it_asks(seed: int) -> None:
    assert vp.life(vp.build(), seed, rounds=2000).startswith("fuzz: done")


def test_a_guest_without_enlightenments_is_answered_too() -> None:
    assert vp.life(vp.build(), 4, rounds=2000, enlightenments="none").startswith("fuzz: done")
