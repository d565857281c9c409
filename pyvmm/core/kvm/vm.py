"""One VM of KVM: memory slots, interrupt controllers and the MSR filter."""

from __future__ import annotations

import ctypes
import os

from pyvmm.core.irq import IrqLine
from pyvmm.core.kvm import abi, capabilities
from pyvmm.core.kvm.errors import ioctl
from pyvmm.core.kvm.vp import Vp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pyvmm.core.memory import Region


class Vm:
    """A VM file descriptor of KVM."""

    def __init__(self, fd: int, run_size: int) -> None:
        self.fd = fd
        self._run_size = run_size
        self._slots = 0

    def close(self) -> None:
        """Give the VM back to the kernel, which ends it once its VPs are closed too."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def add_memory(self, region: Region) -> None:
        """Show a region to the guest in the next memory slot."""
        address = ctypes.addressof(ctypes.c_uint8.from_buffer(region.map))
        slot = abi.UserspaceMemoryRegion(
            slot=self._slots,
            flags=abi.MEM_READONLY if region.readonly else 0,
            guest_phys_addr=region.gpa,
            memory_size=region.size,
            userspace_addr=address,
        )
        ioctl(self.fd, abi.SET_USER_MEMORY_REGION, slot)
        self._slots += 1

    def create_interrupt_controllers(self, tss_gpa: int, identity_map_gpa: int) -> None:
        """Make PIC, IOAPIC, LAPICs and PIT, with its port 0x61, in the kernel.

        `tss_gpa` (3 pages) and `identity_map_gpa` (1 page) lie outside RAM: Intel processors need them in real mode.
        """
        ioctl(self.fd, abi.SET_TSS_ADDR, tss_gpa)
        ioctl(self.fd, abi.SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(identity_map_gpa))
        ioctl(self.fd, abi.CREATE_IRQCHIP)
        ioctl(self.fd, abi.CREATE_PIT2, abi.PitConfig(flags=abi.PIT_SPEAKER_DUMMY))

    def enable_capability(self, number: int, argument: int = 0) -> None:
        """KVM_ENABLE_CAP with one argument."""
        request = abi.EnableCap(cap=number)
        request.args[0] = argument
        ioctl(self.fd, abi.ENABLE_CAP, request)

    def trap_msrs(self, base: int, count: int, let_through: Iterable[int] = ()) -> None:
        """Make `count` MSRs from `base`, but those to be `let_through`, and all that KVM does not know, exit to us."""
        reasons = abi.MSR_EXIT_REASON_UNKNOWN | abi.MSR_EXIT_REASON_FILTER
        self.enable_capability(capabilities.X86_USER_SPACE_MSR, reasons)
        bitmap = (ctypes.c_uint8 * (count // 8))()  # a clear bit denies the access to KVM
        for index in let_through:
            bitmap[(index - base) // 8] |= 1 << (index - base) % 8
        request = abi.MsrFilter()
        request.ranges[0].flags = abi.MSR_FILTER_READ | abi.MSR_FILTER_WRITE
        request.ranges[0].base = base
        request.ranges[0].nmsrs = count
        request.ranges[0].bitmap = ctypes.cast(bitmap, ctypes.POINTER(ctypes.c_uint8))
        ioctl(self.fd, abi.X86_SET_MSR_FILTER, request)

    def connect_eventfd(self, port: int, value: int, eventfd: int, connect: bool = True) -> None:
        """Have KVM write to `eventfd` when the guest writes the 32-bit `value` to `port`, instead of leaving the guest.

        With `connect` false, no more. Raises KvmError, with ENOSPC when there are too many.
        """
        flags = abi.IOEVENTFD_DATAMATCH | abi.IOEVENTFD_PIO | (0 if connect else abi.IOEVENTFD_DEASSIGN)
        ioctl(self.fd, abi.IOEVENTFD, abi.IoEventFd(datamatch=value, addr=port, len=4, fd=eventfd, flags=flags))

    def create_vp(self, index: int) -> Vp:
        """Make VP `index`, whose APIC id is `index` too."""
        return Vp(ioctl(self.fd, abi.CREATE_VCPU, index), index, self._run_size)

    def get_state(self) -> dict[str, Any]:
        """State of PIC, IOAPIC and PIT."""
        chips = []
        for number in range(abi.IRQCHIP_COUNT):
            chip = (ctypes.c_uint8 * abi.IRQCHIP_SIZE)(number)
            ioctl(self.fd, abi.GET_IRQCHIP, chip)
            chips.append(bytes(chip))
        pit = (ctypes.c_uint8 * abi.PIT_STATE_SIZE)()
        ioctl(self.fd, abi.GET_PIT2, pit)
        return {"irqchips": chips, "pit": bytes(pit)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Set what `get_state` returned."""
        for chip in state["irqchips"]:
            ioctl(self.fd, abi.SET_IRQCHIP, (ctypes.c_uint8 * abi.IRQCHIP_SIZE).from_buffer_copy(chip))
        ioctl(self.fd, abi.SET_PIT2, (ctypes.c_uint8 * abi.PIT_STATE_SIZE).from_buffer_copy(state["pit"]))

    def irq_line(self, number: int) -> KvmIrqLine:
        """Line `number` of the PIC (0-15) and IOAPIC (0-23)."""
        return KvmIrqLine(self, number)


class KvmIrqLine(IrqLine):
    """A line of the in-kernel controllers. Once the VM is closed, it leads nowhere."""

    def __init__(self, vm: Vm, number: int) -> None:
        self._vm = vm
        self._up = abi.IrqLevel(irq=number, level=1)
        self._down = abi.IrqLevel(irq=number, level=0)

    def set(self, level: bool) -> None:
        """Drive the line."""
        if self._vm.fd >= 0:
            ioctl(self._vm.fd, abi.IRQ_LINE, self._up if level else self._down)
