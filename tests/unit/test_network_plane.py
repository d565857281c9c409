"""The in-process data plane, through what all planes do."""

from __future__ import annotations

from devices.network.definition import SwitchDefinition
from devices.network.plane import DataPlane
from devices.network.process_plane import ProcessPlane
from tests.fakes.plane_cases import PlaneCases


class TestProcessPlane(PlaneCases):
    def make_plane(self) -> DataPlane:
        return ProcessPlane(SwitchDefinition(name="test"))
