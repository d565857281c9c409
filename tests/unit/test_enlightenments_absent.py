"""What docs/enlightenments.md says is absent is absent, even where everything is offered; and the page is not stale."""

from __future__ import annotations

import pytest

from enlightenments.catalog import ENLIGHTENMENTS, msr_bitmap
from enlightenments.cpuid import LAST_LEAF, hypervisor_leaves
from enlightenments.selection import Selection
from enlightenments.tlfs import INVALID_HYPERCALL_CODE, MSR_BASE, MSR_COUNT
from guests.conformance import tests as kit
from tests.docs.absent import BITS, HYPERCALLS, MSRS
from tests.docs.enlightenments import PAGE, ROOT, TESTS, updated
from tests.fakes.partition import Vm

ALL = frozenset(ENLIGHTENMENTS)
REGISTERS = ("eax", "ebx", "ecx", "edx")


def test_the_page_is_what_the_catalogue_makes_it() -> None:
    page = PAGE.read_text()
    assert updated(page) == page, "stale: run python -m tests.docs"


def test_every_enlightenment_names_tests_that_are_there() -> None:
    assert list(TESTS) == list(ENLIGHTENMENTS)
    assert {topic for topics, _ in TESTS.values() for topic in topics} == set(kit.topics())
    for name, (topics, files) in TESTS.items():
        assert topics or files, name
        for file in files:
            assert (ROOT / file).is_file(), file


@pytest.mark.parametrize(("leaf", "register", "first", "last"), [row[:4] for row in BITS])
def test_an_absent_bit_is_0(leaf: int, register: str, first: int, last: int) -> None:
    value = hypervisor_leaves(Selection(ALL), 4, 46)[leaf][REGISTERS.index(register)]
    assert value >> first & (1 << last - first + 1) - 1 == 0


@pytest.mark.parametrize(("first", "last"), [row[:2] for row in MSRS])
def test_an_absent_msr_is_not_offered(first: int, last: int) -> None:
    bitmap = msr_bitmap(ALL)
    for msr in range(first, last + 1):
        number = msr - MSR_BASE
        assert number >= MSR_COUNT or not bitmap[number // 8] >> number % 8 & 1


@pytest.mark.parametrize(("first", "last"), [row[:2] for row in HYPERCALLS])
def test_an_absent_hypercall_has_status_2(first: int, last: int) -> None:
    vm = Vm(",".join(("full", *(f"+{name}" for name in ALL))))
    assert {vm.call(code) for code in range(first, last + 1)} == {INVALID_HYPERCALL_CODE}


def test_the_leaves_end_where_the_page_says() -> None:
    assert max(hypervisor_leaves(Selection(ALL), 4, 46)) == LAST_LEAF
