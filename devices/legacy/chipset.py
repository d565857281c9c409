"""The PCI functions of the board's chipset, an i440FX with a PIIX4 as Hyper-V's first generation has it.

Sources: Intel 82441FX (PMC) data sheet, 290549; Intel 82371AB (PIIX4) data sheet, 290562.
"""

from __future__ import annotations

from devices.legacy.pci import BUS_MASTER, COMMAND, IO_SPACE, MEMORY_SPACE, PciFunction

_INTEL = 0x8086


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
    """PIIX4 function 0 at 07.0: the way to the legacy devices, and from the PCI interrupts A to D to `irqs`.

    Firmware may choose other ISA interrupts (PIRQRC); where none runs, the guest finds the ones of the ACPI tables.
    """

    def __init__(self, irqs: tuple[int, int, int, int]) -> None:
        super().__init__("isa-bridge", (_INTEL, 0x7110), 0x060100, 1)
        self.define(COMMAND, 2, IO_SPACE | MEMORY_SPACE | BUS_MASTER)
        self.set_multi_function()
        for register, irq in enumerate(irqs, 0x60):
            self.define(register, 1, irq, 0x8F)
