"""Tests that test_kernel_plane.py runs inside the lab: the kernel's data plane, through what all planes do."""

from __future__ import annotations

from devices.network.definition import SwitchDefinition
from devices.network.kernel.plane import KernelPlane
from devices.network.plane import DataPlane
from tests.fakes.plane_cases import PlaneCases


class TestKernelPlane(PlaneCases):
    def make_plane(self) -> DataPlane:
        return KernelPlane(SwitchDefinition(name="test"))
