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
    from pyvmm.core.clock import Clock
    from pyvmm.core.irq import IrqLine
    from pyvmm.core.memory import GuestMemory
    from pyvmm.core.worker import Worker
    from pyvmm.machine.nics import Slot as NicSlot

_NIC_DEVICE = 0x0A


def make_pci(
    pio: Bus,
    mmio: Bus,
    memory: GuestMemory,
    irq_line: Callable[[int], IrqLine],
    ide_disks: Mapping[tuple[int, int], Disk],
    nics: Sequence[NicSlot],
    make_worker: Callable[[str], Worker],
    clock: Clock,
) -> PciBus:
    """Make the bus, with the functions where Hyper-V has them; those of the `nics`, up to four, are one device's."""
    bus = PciBus(pio, mmio)
    bus.add(0, 0, HostBridge())
    isa_bridge = IsaBridge(layout.PCI_IRQS, irq_line)
    bus.add(7, 0, isa_bridge)
    bus.add(7, 1, PiixIde(ide_disks, memory, irq_line, make_worker, layout.IDE_MASTER_PORT))
    for number, slot in enumerate(nics):
        from devices.legacy.dec21140.nic import Dec21140

        nic = Dec21140(slot.name, slot.mac, memory, make_worker(slot.name), clock)
        slot.attach(nic)
        nic.place_registers(layout.NIC_PORT, layout.NIC_MMIO, number)
        nic.connect_interrupt(number, isa_bridge.pin(_NIC_DEVICE, number), isa_bridge.irq(_NIC_DEVICE, number))
        if len(nics) > 1:
            nic.set_multi_function()
        bus.add(_NIC_DEVICE, number, nic)
    return bus
