"""The kernel's data plane, in the lab, whose kernel keeps VLANs apart on bridges."""

from __future__ import annotations

import pytest

from tests.lab.conftest import StartSession

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def test_the_kernels_plane_does_what_all_planes_do_and_leaves_nothing_behind(lab_session: StartSession) -> None:
    services = ("tests/unit/test_switch_process.py", "tests/unit/test_switch_nat.py")  # on this plane only here
    words = ("-m", "pytest", "-p", "no:cacheprovider", "-q", "-k", "kernel or switch_nat")
    session = lab_session(*words, "tests/lab/kernel_plane_session.py", *services, timeout=850)
    assert session.returncode == 0, session.output_end()
    assert b" passed" in session.stdout
