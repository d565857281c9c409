"""The PCI functions of the board's chipset, an i440FX with a PIIX4 as Hyper-V's first generation has it.

Sources: Intel 82441FX (PMC) data sheet, 290549; Intel 82371AB (PIIX4) data sheet, 290562.
"""

from __future__ import annotations

import threading
from functools import cache

from devices.legacy.pci import BUS_MASTER, COMMAND, IO_SPACE, MEMORY_SPACE, PciFunction
from pyvmm.core.irq import IrqLine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_INTEL = 0x8086
#: Route control of PIRQ A; B to D follow. Bit 7 means no route; of the ISA interrupts these are allowed.
_PIRQRC = 0x60
_ROUTABLE = frozenset({3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15})


class HostBridge(PciFunction):
    """82441FX at 00.0.

    Its attribute registers say whether the guest sees ROM or RAM between 768 KiB and 1 MiB. There is RAM always, so
    they only keep what firmware writes.
    """

    def __init__(self) -> None:
        super().__init__("host-bridge", (_INTEL, 0x1237), 0x060000, 2)
        self.define(COMMAND, 2, MEMORY_SPACE | BUS_MASTER)
        self.define(0x59, 1, 0, 0x30)  # PAM0: 0xF0000 to 1 MiB
        for register in range(0x5A, 0x60):  # PAM1-6: 16 KiB by each half, from 0xC0000 on
            self.define(register, 1, 0, 0x33)
        self.define(0x72, 1, 0x02, 0x78)  # SMRAM control


class IsaBridge(PciFunction):
    """PIIX4 function 0 at 07.0: the way to the legacy devices, and from the PCI interrupts A to D to ISA ones.

    `irqs` are the ISA interrupts that PIRQRC names at power-on, which are the ones of the ACPI tables too. Firmware may
    choose others. `irq_line` gives the line of an ISA interrupt.
    """

    def __init__(self, irqs: tuple[int, int, int, int], irq_line: Callable[[int], IrqLine]) -> None:
        super().__init__("isa-bridge", (_INTEL, 0x7110), 0x060100, 1)
        self.define(COMMAND, 2, IO_SPACE | MEMORY_SPACE | BUS_MASTER)
        self.set_multi_function()
        for register, irq in enumerate(irqs, _PIRQRC):
            self.define(register, 1, irq, 0x8F)
        self._irq_line = cache(irq_line)
        self._lock = threading.Lock()
        #: The pins that ask for an interrupt, by PIRQ; and the ISA interrupts that are high for them.
        self._asking: tuple[set[_Pin], ...] = (set(), set(), set(), set())
        self._high: set[int] = set()

    def pin(self, device: int, pin: int) -> IrqLine:
        """The interrupt pin A to D (0 to 3) of a device on the bus: which PIRQ it is shifts from device to device."""
        return _Pin(self, (device - 1 + pin) % 4)

    def irq(self, device: int, pin: int) -> int:
        """The ISA interrupt that the pin leads to at power-on."""
        return self.read_config(_PIRQRC + (device - 1 + pin) % 4, 1)

    def ask(self, pirq: int, pin: _Pin, level: bool) -> None:
        """One of the pins that share a PIRQ goes high or low."""
        with self._lock:
            if level:
                self._asking[pirq].add(pin)
            else:
                self._asking[pirq].discard(pin)
            self._route()

    def _route(self) -> None:
        high = set()
        for pirq, asking in enumerate(self._asking):
            route = self.read_config(_PIRQRC + pirq, 1)
            if asking and route in _ROUTABLE:
                high.add(route)
        for irq in high ^ self._high:
            self._irq_line(irq).set(irq in high)
        self._high = high

    def write_config(self, offset: int, value: int) -> None:
        super().write_config(offset, value)
        if _PIRQRC <= offset < _PIRQRC + 4:
            with self._lock:
                self._route()

    def reset(self) -> None:
        super().reset()
        with self._lock:
            for asking in self._asking:
                asking.clear()
            self._route()


class _Pin(IrqLine):
    """An interrupt pin of one function."""

    def __init__(self, bridge: IsaBridge, pirq: int) -> None:
        self._bridge = bridge
        self._pirq = pirq

    def set(self, level: bool) -> None:
        self._bridge.ask(self._pirq, self, level)
