"""The PCI bus of a machine with its functions. Imported when a guest first needs it."""

from __future__ import annotations

from devices.legacy.chipset import HostBridge, IsaBridge
from devices.legacy.ide.controller import PiixIde
from devices.legacy.pci import PciBus
from pyvmm.boot import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from devices.storage.backend import Disk
    from pyvmm.core.bus import Bus
    from pyvmm.core.irq import IrqLine
    from pyvmm.core.memory import GuestMemory
    from pyvmm.core.worker import Worker
    from pyvmm.machine.nics import Slot as NicSlot


def make_pci(
    pio: Bus,
    mmio: Bus,
    memory: GuestMemory,
    irq_line: Callable[[int], IrqLine],
    ide_disks: Mapping[tuple[int, int], Disk],
    nics: Sequence[NicSlot],
    make_worker: Callable[[str], Worker],
) -> PciBus:
    """Make the bus, with the functions where Hyper-V has them."""
    bus = PciBus(pio, mmio)
    bus.add(0, 0, HostBridge())
    bus.add(7, 0, IsaBridge(layout.PCI_IRQS, irq_line))
    bus.add(7, 1, PiixIde(ide_disks, memory, irq_line, make_worker, layout.IDE_MASTER_PORT))
    return bus
