"""Synthetic timers that KVM runs instead of us, where it can: a tick then needs no exit to user space.

KVM must go by our reference time, or timers would expire early or late. It takes a scale and an offset of user space's
from a guest page, and never changes them, once it has been told that the guest's TSC is emulated: its own way to keep
reference time through a migration. Source: Linux 6.1 ``arch/x86/kvm/hyperv.c``, tsc_page_update_unsafe (since 5.12, and
`Vp.tsc_offset` needs 5.16).
"""

from __future__ import annotations

from enlightenments import tlfs
from pyvmm.boot.layout import KVM_REFERENCE_TIME_ADDRESS
from pyvmm.core.kvm import abi, capabilities
from pyvmm.core.memory import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enlightenments.selection import Selection
    from pyvmm.core import _hot
    from pyvmm.core.kvm.system import System
    from pyvmm.core.kvm.vp import Vp
    from pyvmm.core.memory import GuestMemory
    from pyvmm.core.trace import Tracer

#: What guests read and write without us: the COUNT of all four timers.
COUNT_MSRS = tuple(range(tlfs.MSR_STIMER0_CONFIG + 1, tlfs.MSR_STIMER0_CONFIG + 8, 2))

_ENABLE = 1


def wanted(system: System, chosen: Selection, tracer: Tracer) -> bool:
    """Whether KVM is to run the timers: it can, there are any, and nobody wants to see each access of an MSR."""
    return "stimer" in chosen and not tracer.msr and bool(system.check_extension(capabilities.HYPERV_SYNIC2))


def reserve_page(memory: GuestMemory) -> None:
    """Make room for what `share_reference_time` tells KVM; before KVM is given the memory."""
    memory.add_rom(KVM_REFERENCE_TIME_ADDRESS, bytes(PAGE_SIZE))


def share_reference_time(memory: GuestMemory, vp: Vp, reference: _hot.ReferenceTime, page: bytes) -> bool:
    """Have KVM go by `reference`, which `page` tells in the format of the reference TSC page; once, by any VP.

    False if it cannot, because KVM takes the guest's TSC for something else than it is: for one that stands still, on a
    processor without TSC scaling whose frequency Linux has corrected by more than 250 ppm since KVM was loaded. Source:
    Linux 6.1 ``arch/x86/kvm/x86.c``, kvm_set_tsc_khz.
    """
    before = reference.now()
    seen = (vp.get_msr(abi.MSR_IA32_TSC) * reference.scale >> 64) + reference.offset
    if not before <= seen <= reference.now():
        return False
    region = next(region for region in memory.regions if region.gpa == KVM_REFERENCE_TIME_ADDRESS)
    region.map[:] = page
    msrs = [(tlfs.MSR_TSC_EMULATION_CONTROL, 1), (tlfs.MSR_REFERENCE_TSC, KVM_REFERENCE_TIME_ADDRESS | _ENABLE)]
    return vp.set_msrs(msrs) == len(msrs)
