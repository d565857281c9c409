"""The board: the legacy devices of a PC on its buses, there for enlightened and unenlightened guests alike."""

from __future__ import annotations

import threading

from devices.legacy.acpi_pm import AcpiPm
from devices.legacy.i8042 import I8042
from devices.legacy.rtc import Rtc
from devices.legacy.system_ports import SystemPorts
from devices.legacy.uart import Uart
from pyvmm.boot import layout
from pyvmm.core.bus import Bus, BusHandler

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from devices.legacy.hyperv_testdev import HypervTestdev
    from devices.legacy.pci import PciBus
    from devices.legacy.ports import PortRange
    from devices.storage.backend import Disk
    from enlightenments.ports import Ports
    from pyvmm.core.clock import Clock
    from pyvmm.core.device import Device
    from pyvmm.core.irq import IrqLine
    from pyvmm.core.memory import GuestMemory
    from pyvmm.core.trace import Tracer
    from pyvmm.core.worker import Worker
    from pyvmm.machine.disks import Slot
    from pyvmm.machine.nics import Slot as NicSlot

#: CONFIG_ADDRESS and CONFIG_DATA.
_PCI_PORTS = ((0xCF8, 1), (0xCFC, 4))


class TracedBus(Bus):
    """A bus that writes a line per access."""

    def __init__(self, name: str, tracer: Tracer) -> None:
        super().__init__(name)
        self._tracer = tracer

    def read(self, address: int, size: int) -> int:
        """Read and tell."""
        value = super().read(address, size)
        self._tracer.line("io", f"{self.name} read {address:#x} size {size} = {value:#x}")
        return value

    def write(self, address: int, size: int, value: int) -> None:
        """Write and tell."""
        self._tracer.line("io", f"{self.name} write {address:#x} size {size} = {value:#x}")
        super().write(address, size, value)

    def read_string(self, address: int, size: int, count: int) -> bytes:
        """Read and tell."""
        data = super().read_string(address, size, count)
        self._tracer.line("io", f"{self.name} read {address:#x} size {size} * {count} = {data.hex(' ', size)}")
        return data

    def write_string(self, address: int, size: int, data: bytes) -> None:
        """Write and tell."""
        count = len(data) // size
        self._tracer.line("io", f"{self.name} write {address:#x} size {size} * {count} = {data.hex(' ', size)}")
        super().write_string(address, size, data)


class _FirstAccess(BusHandler):
    """Stands where the PCI bus will be."""

    def __init__(self, board: Board, base: int) -> None:
        self._board = board
        self._base = base

    def read(self, offset: int, size: int) -> int:
        self._board.find_pci()
        return self._board.pio.read(self._base + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._board.find_pci()
        self._board.pio.write(self._base + offset, size, value)


class Board:
    """All legacy devices, registered and wired.

    The callbacks `on_poweroff` and `on_reset` run on a VP's thread.
    """

    def __init__(
        self,
        memory: GuestMemory,
        irq_line: Callable[[int], IrqLine],
        cpus: int,
        console: Callable[[bytes], None],
        worker: Worker,
        make_worker: Callable[[str], Worker],
        ide_disks: Mapping[tuple[int, int], Disk],
        nics: Sequence[NicSlot],
        tracer: Tracer,
        clock: Clock,
        on_poweroff: Callable[[], None],
        on_reset: Callable[[], None],
    ) -> None:
        self.pio = TracedBus("pio", tracer) if tracer.io else Bus("pio")
        self.mmio = TracedBus("mmio", tracer) if tracer.io else Bus("mmio")
        self.uart = Uart("uart0", irq_line(layout.COM1_IRQ), console, clock, worker.call_at)
        low, *high = memory.ram_ranges()
        self.rtc = Rtc(irq_line(layout.RTC_IRQ), low[1], high[0][1] if high else 0, cpus, clock, worker.call_at)
        self.keyboard_controller = I8042(irq_line(layout.KEYBOARD_IRQ), irq_line(layout.MOUSE_IRQ), on_reset)
        self.power = AcpiPm(irq_line(layout.SCI_IRQ), on_poweroff, clock)
        system_ports = SystemPorts(self.keyboard_controller, on_reset)
        self.devices: list[Device] = []
        self._hyperv_testdev: HypervTestdev | None = None
        self._add(self.uart, [(layout.COM1_PORT, 8, self.uart, self.uart.name)])
        self._add(self.rtc, self.rtc.ports())
        self._add(self.keyboard_controller, self.keyboard_controller.ports())
        self._add(self.power, self.power.ports())
        self._add(system_ports, system_ports.ports())
        self._pci_lock = threading.Lock()
        self._pci: PciBus | None = None
        self._pci_parts = (memory, irq_line, ide_disks, nics, make_worker, clock)
        for base, length in _PCI_PORTS:
            self.pio.register(base, length, _FirstAccess(self, base), "PCI, not looked at so far")
        if ide_disks or nics:
            self.find_pci()

    def find_pci(self) -> None:
        """Make the PCI bus, unless it is there. Guests that never look at it start faster without."""
        with self._pci_lock:
            if self._pci is None:
                from pyvmm.machine.pci import make_pci

                self._pci = make_pci(self.pio, self.mmio, *self._pci_parts)
                self._pci.reset()
                for base, _ in _PCI_PORTS:
                    self.pio.unregister(base)
                self._add(self._pci, self._pci.ports())

    def change_disc(self, slot: Slot, disc: Disk | None, force: bool) -> Disk | None:
        """Change what is in an IDE CD drive; see `PiixIde.change_disc`."""
        from devices.legacy.ide.controller import PiixIde

        assert self._pci is not None
        ide = self._pci.functions[7, 1]
        assert isinstance(ide, PiixIde)
        return ide.change_disc(slot.controller, slot.lun, disc, force)

    def add_test_devices(
        self,
        memory: GuestMemory,
        irq_line: Callable[[int], IrqLine],
        cpus: int,
        worker: Worker,
        ports: Ports,
        on_exit: Callable[[int], None],
    ) -> None:
        """Add what test programs expect of QEMU. `on_exit` gets the guest's exit status, on a VP's thread."""
        from devices.legacy import testdev
        from devices.legacy.fw_cfg import FwCfg
        from devices.legacy.hyperv_testdev import HypervTestdev

        debug_exit = testdev.DebugExit(on_exit)
        pc_testdev = testdev.PcTestdev(memory.forget_page, [irq_line(number) for number in range(testdev.LINES)])
        fw_cfg = FwCfg(memory.size, cpus)
        self._hyperv_testdev = HypervTestdev(ports, worker)
        self._add(debug_exit, debug_exit.ports())
        self._add(pc_testdev, pc_testdev.ports(), pc_testdev.memory())
        self._add(fw_cfg, fw_cfg.ports())
        self._add(self._hyperv_testdev, self._hyperv_testdev.ports())

    def _add(self, device: Device, ports: list[PortRange], memory: list[PortRange] | None = None) -> None:
        self.devices.append(device)
        for port in ports:
            self.pio.register(*port)
        for window in memory or ():
            self.mmio.register(*window)

    def reset(self) -> None:
        """Power-on state of all."""
        for device in self.devices:
            device.reset()

    def pause(self) -> None:
        """Stop all."""
        for device in self.devices:
            device.pause()

    def resume(self) -> None:
        """Go on."""
        for device in self.devices:
            device.resume()

    def close(self) -> None:
        """Give back what the devices hold of the host; the VPs are gone."""
        if self._pci is not None:
            self._pci.close()
        if self._hyperv_testdev is not None:
            self._hyperv_testdev.close()

    def inspect(self) -> dict[str, Any]:
        """The devices by name, and the buses."""
        return {
            "devices": {device.name: device.inspect() for device in self.devices},
            "pio": self.pio.inspect(),
            "mmio": self.mmio.inspect(),
        }
