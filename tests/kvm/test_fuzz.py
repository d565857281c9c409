"""Random MSR accesses and hypercalls from a guest: it gets an answer to each, and reaches its end."""

from __future__ import annotations

import pytest

from enlightenments.tlfs import MSR_STIMER0_CONFIG
from tests.fuzz import vp
from tests.kvm.conftest import Roms

pytestmark = pytest.mark.kvm


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_guest_gets_an_answer_to_whatever_it_asks(seed: int) -> None:
    assert vp.life(vp.build(), seed, rounds=2000).startswith("fuzz: done")


def test_a_guest_without_enlightenments_is_answered_too() -> None:
    assert vp.life(vp.build(), 4, rounds=2000, enlightenments="none").startswith("fuzz: done")


def test_timers_of_the_shortest_period_let_the_guest_run(roms: Roms) -> None:
    """Four direct timers, each due every 100 ns: sooner than a VP is back in the guest. Found by a guest of seed 2."""
    done = roms.cli(f"""
        movl ${MSR_STIMER0_CONFIG}, %ecx
        xorl %edx, %edx
        movw $4, %bp
    next_timer:
        movl $0x1303, %eax
        wrmsr
        incl %ecx
        movl $1, %eax
        wrmsr
        incl %ecx
        decw %bp
        jnz next_timer
        movw $2000, %cx
    work:
        loop work
        EXIT 0
    """)
    assert done.returncode == 1, done.stderr
