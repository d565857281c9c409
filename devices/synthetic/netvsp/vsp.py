"""A NIC on VMBus."""

from __future__ import annotations

from devices.network.port import Nic
from devices.vmbus.vsp import Vsp


class NetVsp(Vsp, Nic):
    """NIC `number` of a VM, with its address of six bytes; a guest may ask for up to `max_subchannels`.

    It may be connected before it's put on a bus.
    """

    def __init__(self, number: int, mac: bytes, max_subchannels: int = 0) -> None:
        super().__init__(f"net{number}")
        self.mac = mac
        self.max_subchannels = max_subchannels
