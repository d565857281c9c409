"""A SCSI controller on a stand-in bus with a guest's driver, for tests of what it answers."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, cast

from devices.synthetic.storvsp.scsi import Target
from devices.synthetic.storvsp.vsp import StorVsp
from pyvmm.core.memory import GuestMemory
from tests.fakes.disks import MemoryDisk
from tests.fakes.storvsc import InlineLane, Loopback, LoopbackBus, StorVsc

if TYPE_CHECKING:
    from devices.vmbus.bus import VmBus

WIN6, WIN7, WIN8, WIN8_1, WIN10 = 0x0200, 0x0402, 0x0501, 0x0600, 0x0602
SIZE = 1 << 20
BLOCKS = SIZE // 512

BEGIN, END, VERSION, PROPERTIES, FCHBA, CREATE = 7, 8, 9, 10, 12, 13
EXECUTE, RESET_LUN, RESET_ADAPTER, RESET_BUS, ENUMERATE = 3, 4, 5, 6, 11
REVISION_MISMATCH, INVALID_STATE, INVALID_REQUEST, INVALID_PARAMETER = 0xC0000059, 0xC0000184, 0xC0000010, 0xC000000D

TEST_UNIT_READY = bytes(6)
INQUIRY = bytes((0x12, 0, 0, 0, 36, 0))
REPORT_LUNS = struct.pack(">BBB3xI2x", 0xA0, 0, 0, 1024)

# Runs of neighbouring pages, single pages, and pages in falling order.
PAGES = [16, 17, 18, 40, 39, 38, 60, 62, 64, *range(100, 230)]


class Rig:
    """A controller on a stand-in bus, with a guest's driver on its primary channel."""

    def __init__(self, disks: dict[int, Any] | None = None, subchannels: int = 0, body: int = 0x34, **how: Any) -> None:
        self.memory = GuestMemory(1 << 20)
        self.bus = LoopbackBus(self.memory)
        self.vsp = StorVsp(
            0, {0: MemoryDisk(SIZE)} if disks is None else disks, subchannels, make_lane=InlineLane, **how
        )
        self.vsp.attached(cast("VmBus", self.bus), ())
        self.end = Loopback(self.vsp, self.memory)
        self.guest = StorVsc(self.end, PAGES, body)

    def ready(self, **how: Any) -> StorVsc:
        self.guest.initialize(**how)
        return self.guest

    def disk(self, lun: int = 0) -> MemoryDisk:
        return cast("MemoryDisk", self.vsp._commands.luns[lun].disk)

    def target(self, lun: int = 0) -> Target:
        return cast("Target", self.vsp._commands.luns[lun].target)


def luns(guest: StorVsc, **where: int) -> list[int]:
    result = guest.read(REPORT_LUNS, 1024, **where)
    assert result.srb_status == 1
    (size,) = struct.unpack_from(">I", result.data)
    assert result.transferred == 8 + size
    return [int.from_bytes(result.data[8 + at : 10 + at], "big") for at in range(0, size, 8)]
