"""The conformance kit on an ordinary KVM: pyvmm conforms, and differs from KVM's own Hyper-V code only as explained."""

from __future__ import annotations

import pytest

from guests.bare.report import Report, parse
from guests.conformance.build import WIDTHS, build
from guests.conformance.run import EXIT_GOOD
from tests.lab.conformance_differences import ABSENT, explained
from tests.lab.conftest import Session, StartSession

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def session(lab_session: StartSession) -> Session:
    return lab_session("-m", "tests.lab.conformance_session", *(str(build(bits)) for bits in WIDTHS), timeout=200)


def report(session: Session, run: str, bits: int) -> Report:
    """The report of a run that went through to its end."""
    name = f"{run}-kit{bits}"
    ended = session.report("ended")[name]
    found = parse("kit", (session.results / f"{name}.txt").read_text(errors="replace"))
    assert found.totals is not None, f"status {ended['status']}, last note {found.notes[-1:]}\n{ended['stderr']}"
    return found


def values(found: Report) -> dict[str, str]:
    """Test name to its value; what differs from run to run is only good or not."""
    return {f.full_name: f.verdict if f.value.startswith("~") else f.value for f in found.findings}


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("run", ["pyvmm", "all", "user"])
def test_pyvmm_conforms(session: Session, run: str, bits: int) -> None:
    found = report(session, run, bits)
    assert found.problem is None, "\n".join(f"{f.full_name} = {f.value} {f.note}" for f in found.failed)
    assert session.report("ended")[f"{run}-kit{bits}"]["status"] == EXIT_GOOD


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_difference_to_kvms_own_code_is_explained(session: Session, bits: int) -> None:
    qemu, pyvmm = values(report(session, "qemu", bits)), values(report(session, "pyvmm", bits))
    pairs = {test: (qemu.get(test, ABSENT), pyvmm.get(test, ABSENT)) for test in {**qemu, **pyvmm}}
    assert {test: pair for test, pair in pairs.items() if pair[0] != pair[1]} == explained()
