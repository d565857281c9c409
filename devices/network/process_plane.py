"""The data plane in this process, for hosts whose kernel lacks something or gives no privileges: `_hot.Switch`."""

from __future__ import annotations

from devices.network.plane import DataPlane

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.network.definition import SwitchDefinition


class ProcessPlane(DataPlane):
    """Private switches need no privileges. Internal and NAT ones have a TAP, external ones an AF_PACKET socket."""

    name = "process"

    def __init__(self, definition: SwitchDefinition) -> None:
        self._definition = definition
