"""IDE disks on VMBus: the disks of the IDE controller by the storage protocol too, as Hyper-V offers its own.

Guests pair the offer with the emulated drive by the instance id: channel and device stand in it. Linux's storvsc takes
path and target from there (drivers/scsi/storvsc_drv.c, storvsc_get_ide_info); the offer's data has them for Windows
(OpenVMM, vm/devices/storage/storvsp).
"""

from __future__ import annotations

import struct
import uuid
from typing import TYPE_CHECKING

from devices.synthetic.storvsp.lane import Lane
from devices.synthetic.storvsp.vsp import StorVsp
from devices.vmbus.vsp import OFFER_ENUMERATE_INTERFACE

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.storage.backend import Disk

#: Reserved, path, target, reserved, flags.
_OFFER = struct.Struct("<HBBII12x")
_OFFER_FLAGS = 2


class IdeAccelerator(StorVsp):
    """The disk at `channel` and `unit` of the IDE controller, LUN 0 of an offer of its own."""

    interface_id = uuid.UUID("32412632-86cb-44a2-9b5c-50d1417354f5")
    offer_flags = OFFER_ENUMERATE_INTERFACE
    any_target = True

    def __init__(self, channel: int, unit: int, disk: Disk, make_lane: Callable[[str, int], Lane] = Lane) -> None:
        self.user_defined = _OFFER.pack(0, channel, unit, 0, _OFFER_FLAGS)
        super().__init__(channel * 2 + unit, {0: disk}, make_lane=make_lane)

    @staticmethod
    def name_of(index: int) -> str:
        return f"ide{index // 2}.{index % 2}"

    @staticmethod
    def instance_of(index: int) -> uuid.UUID:
        return uuid.UUID(fields=(index // 2, index % 2, 0x8899, 0, 0, 0))
