"""Numbers and structures of Linux's KVM interface.

Source: Linux ``include/uapi/linux/kvm.h``, ``arch/x86/include/uapi/asm/kvm.h`` and ``Documentation/virt/kvm/api.rst``.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64

_NONE, _WRITE, _READ = 0, 1, 2
_KVMIO = 0xAE


def ioc(direction: int, number: int, size: int) -> int:
    """An ioctl request of KVM as ``_IOC`` of ``asm-generic/ioctl.h`` composes it."""
    return direction << 30 | size << 16 | _KVMIO << 8 | number


class Segment(ctypes.Structure):
    """struct kvm_segment."""

    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    ]


class DescriptorTable(ctypes.Structure):
    """struct kvm_dtable."""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class Regs(ctypes.Structure):
    """struct kvm_regs."""

    _fields_ = [
        (name, c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
        )
    ]


class Sregs(ctypes.Structure):
    """struct kvm_sregs."""

    _fields_ = [
        *[(name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")],
        ("gdt", DescriptorTable),
        ("idt", DescriptorTable),
        *[(name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")],
        ("interrupt_bitmap", c_uint64 * 4),
    ]


class UserspaceMemoryRegion(ctypes.Structure):
    """struct kvm_userspace_memory_region."""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


MEM_READONLY = 2


class CpuidEntry(ctypes.Structure):
    """struct kvm_cpuid_entry2."""

    _fields_ = [(name, c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")] + [
        ("padding", c_uint32 * 3)
    ]


CPUID_FLAG_SIGNIFICANT_INDEX = 1


def cpuid_table(count: int) -> type[ctypes.Structure]:
    """struct kvm_cpuid2 with room for `count` entries."""

    class Cpuid(ctypes.Structure):
        _fields_ = [
            ("nent", c_uint32),
            ("padding", c_uint32),
            ("entries", CpuidEntry * count),
        ]

    return Cpuid


CPUID_HEADER_SIZE = 8


class MsrEntry(ctypes.Structure):
    """struct kvm_msr_entry."""

    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


def msr_list(count: int) -> type[ctypes.Structure]:
    """struct kvm_msrs with room for `count` entries."""

    class Msrs(ctypes.Structure):
        _fields_ = [
            ("nmsrs", c_uint32),
            ("pad", c_uint32),
            ("entries", MsrEntry * count),
        ]

    return Msrs


MSRS_HEADER_SIZE = 8


class MsrFilterRange(ctypes.Structure):
    """struct kvm_msr_filter_range."""

    _fields_ = [
        ("flags", c_uint32),
        ("nmsrs", c_uint32),
        ("base", c_uint32),
        ("bitmap", ctypes.POINTER(c_uint8)),
    ]


class MsrFilter(ctypes.Structure):
    """struct kvm_msr_filter."""

    _fields_ = [("flags", c_uint32), ("ranges", MsrFilterRange * 16)]


MSR_FILTER_READ = 1
MSR_FILTER_WRITE = 2


class EnableCap(ctypes.Structure):
    """struct kvm_enable_cap."""

    _fields_ = [
        ("cap", c_uint32),
        ("flags", c_uint32),
        ("args", c_uint64 * 4),
        ("pad", c_uint8 * 64),
    ]


class PitConfig(ctypes.Structure):
    """struct kvm_pit_config."""

    _fields_ = [("flags", c_uint32), ("pad", c_uint32 * 15)]


#: Have KVM serve port 0x61, through which the PIT's timer 2 is gated and read.
PIT_SPEAKER_DUMMY = 1


class IrqLevel(ctypes.Structure):
    """struct kvm_irq_level."""

    _fields_ = [("irq", c_uint32), ("level", c_uint32)]


IOEVENTFD_DATAMATCH, IOEVENTFD_PIO, IOEVENTFD_DEASSIGN = 1, 2, 4


class IoEventFd(ctypes.Structure):
    """struct kvm_ioeventfd."""

    _fields_ = [
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", ctypes.c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    ]


class MpState(ctypes.Structure):
    """struct kvm_mp_state."""

    _fields_ = [("mp_state", c_uint32)]


class DeviceAttr(ctypes.Structure):
    """struct kvm_device_attr."""

    _fields_ = [
        ("flags", c_uint32),
        ("group", c_uint32),
        ("attr", c_uint64),
        ("addr", c_uint64),
    ]


VCPU_TSC_CTRL = 0
VCPU_TSC_OFFSET = 0


class VcpuEvents(ctypes.Structure):
    """struct kvm_vcpu_events, its parts named flat."""

    _fields_ = [
        ("exception_injected", c_uint8),
        ("exception_nr", c_uint8),
        ("exception_has_error_code", c_uint8),
        ("exception_pending", c_uint8),
        ("exception_error_code", c_uint32),
        ("interrupt_injected", c_uint8),
        ("interrupt_nr", c_uint8),
        ("interrupt_soft", c_uint8),
        ("interrupt_shadow", c_uint8),
        ("nmi_injected", c_uint8),
        ("nmi_pending", c_uint8),
        ("nmi_masked", c_uint8),
        ("nmi_pad", c_uint8),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),
        ("smi", c_uint8 * 4),
        ("triple_fault_pending", c_uint8),
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    ]


class LapicState(ctypes.Structure):
    """struct kvm_lapic_state: the register page's first KiB."""

    _fields_ = [("regs", c_uint8 * 1024)]


class RunInternal(ctypes.Structure):
    """The ``internal`` member of struct kvm_run's union (and ``emulation_failure``, which overlays it)."""

    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class RunSystemEvent(ctypes.Structure):
    """The ``system_event`` member of struct kvm_run's union."""

    _fields_ = [("type", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class RunFailEntry(ctypes.Structure):
    """The ``fail_entry`` member of struct kvm_run's union."""

    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


class _RunUnion(ctypes.Union):
    _fields_ = [
        ("internal", RunInternal),
        ("system_event", RunSystemEvent),
        ("fail_entry", RunFailEntry),
        ("padding", c_uint8 * 256),
    ]


class Run(ctypes.Structure):
    """struct kvm_run up to its union: what diagnosis reads. The run loop itself is C."""

    _anonymous_ = ("exit",)
    _fields_ = [
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("exit", _RunUnion),
    ]


for _structure, _size in (
    (Segment, 24),
    (DescriptorTable, 16),
    (Regs, 144),
    (Sregs, 312),
    (UserspaceMemoryRegion, 32),
    (CpuidEntry, 40),
    (MsrEntry, 16),
    (MsrFilterRange, 24),
    (MsrFilter, 392),
    (EnableCap, 104),
    (PitConfig, 64),
    (IrqLevel, 8),
    (IoEventFd, 64),
    (MpState, 4),
    (DeviceAttr, 24),
    (VcpuEvents, 64),
    (LapicState, 1024),
    (RunInternal, 136),
    (Run, 288),
):
    assert ctypes.sizeof(_structure) == _size, f"{_structure.__name__} has {ctypes.sizeof(_structure)} bytes"

API_VERSION = 12

GET_API_VERSION = ioc(_NONE, 0x00, 0)
CREATE_VM = ioc(_NONE, 0x01, 0)
CHECK_EXTENSION = ioc(_NONE, 0x03, 0)
GET_VCPU_MMAP_SIZE = ioc(_NONE, 0x04, 0)
GET_SUPPORTED_CPUID = ioc(_READ | _WRITE, 0x05, CPUID_HEADER_SIZE)
CREATE_VCPU = ioc(_NONE, 0x41, 0)
SET_USER_MEMORY_REGION = ioc(_WRITE, 0x46, ctypes.sizeof(UserspaceMemoryRegion))
SET_TSS_ADDR = ioc(_NONE, 0x47, 0)
SET_IDENTITY_MAP_ADDR = ioc(_WRITE, 0x48, 8)
CREATE_IRQCHIP = ioc(_NONE, 0x60, 0)
IRQ_LINE = ioc(_WRITE, 0x61, ctypes.sizeof(IrqLevel))
IOEVENTFD = ioc(_WRITE, 0x79, ctypes.sizeof(IoEventFd))
CREATE_PIT2 = ioc(_WRITE, 0x77, ctypes.sizeof(PitConfig))
GET_REGS = ioc(_READ, 0x81, ctypes.sizeof(Regs))
SET_REGS = ioc(_WRITE, 0x82, ctypes.sizeof(Regs))
GET_SREGS = ioc(_READ, 0x83, ctypes.sizeof(Sregs))
SET_SREGS = ioc(_WRITE, 0x84, ctypes.sizeof(Sregs))
GET_MSRS = ioc(_READ | _WRITE, 0x88, MSRS_HEADER_SIZE)
SET_MSRS = ioc(_WRITE, 0x89, MSRS_HEADER_SIZE)
GET_LAPIC = ioc(_READ, 0x8E, ctypes.sizeof(LapicState))
SET_LAPIC = ioc(_WRITE, 0x8F, ctypes.sizeof(LapicState))
SET_CPUID2 = ioc(_WRITE, 0x90, CPUID_HEADER_SIZE)
GET_MP_STATE = ioc(_READ, 0x98, ctypes.sizeof(MpState))
SET_MP_STATE = ioc(_WRITE, 0x99, ctypes.sizeof(MpState))
GET_VCPU_EVENTS = ioc(_READ, 0x9F, ctypes.sizeof(VcpuEvents))
SET_VCPU_EVENTS = ioc(_WRITE, 0xA0, ctypes.sizeof(VcpuEvents))
ENABLE_CAP = ioc(_WRITE, 0xA3, ctypes.sizeof(EnableCap))
GET_TSC_KHZ = ioc(_NONE, 0xA3, 0)
X86_SET_MSR_FILTER = ioc(_WRITE, 0xC6, ctypes.sizeof(MsrFilter))
SET_DEVICE_ATTR = ioc(_WRITE, 0xE1, ctypes.sizeof(DeviceAttr))
GET_DEVICE_ATTR = ioc(_WRITE, 0xE2, ctypes.sizeof(DeviceAttr))


# Exit reasons (KVM_EXIT_*).
EXIT_NAMES = {
    0: "unknown",
    1: "exception",
    2: "io",
    3: "hypercall",
    4: "debug",
    5: "hlt",
    6: "mmio",
    7: "irq-window-open",
    8: "shutdown",
    9: "fail-entry",
    10: "intr",
    11: "set-tpr",
    12: "tpr-access",
    16: "nmi",
    17: "internal-error",
    24: "system-event",
    26: "ioapic-eoi",
    27: "hyperv",
    29: "rdmsr",
    30: "wrmsr",
    31: "dirty-ring-full",
}
EXIT_IO = 2
EXIT_MMIO = 6
EXIT_SHUTDOWN = 8
EXIT_FAIL_ENTRY = 9
EXIT_INTR = 10
EXIT_INTERNAL_ERROR = 17
EXIT_SYSTEM_EVENT = 24
EXIT_RDMSR = 29
EXIT_WRMSR = 30

SYSTEM_EVENT_SHUTDOWN = 1
SYSTEM_EVENT_RESET = 2
SYSTEM_EVENT_CRASH = 3

# Reasons of KVM_CAP_X86_USER_SPACE_MSR.
MSR_EXIT_REASON_UNKNOWN = 2
MSR_EXIT_REASON_FILTER = 4

MP_STATE_RUNNABLE = 0
MP_STATE_UNINITIALIZED = 1

# x86 model-specific registers that this package touches itself.
MSR_IA32_TSC = 0x10
MSR_IA32_APIC_BASE = 0x1B
MSR_IA32_MISC_ENABLE = 0x1A0

XCRS_SIZE = 392
GET_XCRS = ioc(_READ, 0xA6, XCRS_SIZE)
SET_XCRS = ioc(_WRITE, 0xA7, XCRS_SIZE)
XSAVE_SIZE = 4096
GET_XSAVE = ioc(_READ, 0xA4, XSAVE_SIZE)
SET_XSAVE = ioc(_WRITE, 0xA5, XSAVE_SIZE)
DEBUGREGS_SIZE = 128
GET_DEBUGREGS = ioc(_READ, 0xA1, DEBUGREGS_SIZE)
SET_DEBUGREGS = ioc(_WRITE, 0xA2, DEBUGREGS_SIZE)

# State that is saved and set as a whole, opaque to this package: (name, get, set, bytes), in the order of setting.
# Multiprocessor state comes first because it can make KVM reset the VP, events last because all others touch them.
VP_STATE = (
    ("mp_state", GET_MP_STATE, SET_MP_STATE, ctypes.sizeof(MpState)),
    ("sregs", GET_SREGS, SET_SREGS, ctypes.sizeof(Sregs)),
    ("regs", GET_REGS, SET_REGS, ctypes.sizeof(Regs)),
    ("xcrs", GET_XCRS, SET_XCRS, XCRS_SIZE),
    ("xsave", GET_XSAVE, SET_XSAVE, XSAVE_SIZE),
    ("debugregs", GET_DEBUGREGS, SET_DEBUGREGS, DEBUGREGS_SIZE),
    ("lapic", GET_LAPIC, SET_LAPIC, ctypes.sizeof(LapicState)),
    ("events", GET_VCPU_EVENTS, SET_VCPU_EVENTS, ctypes.sizeof(VcpuEvents)),
)

#: struct kvm_irqchip: u32 chip id (0 and 1 PIC, 2 IOAPIC), u32 padding, 512 bytes.
IRQCHIP_SIZE = 520
IRQCHIP_COUNT = 3
GET_IRQCHIP = ioc(_READ | _WRITE, 0x62, IRQCHIP_SIZE)
SET_IRQCHIP = ioc(_READ, 0x63, IRQCHIP_SIZE)
#: struct kvm_pit_state2.
PIT_STATE_SIZE = 112
GET_PIT2 = ioc(_READ, 0x9F, PIT_STATE_SIZE)
SET_PIT2 = ioc(_WRITE, 0xA0, PIT_STATE_SIZE)
#: struct kvm_msr_list: u32 count, then u32 indices.
MSR_INDEX_LIST_HEADER = 4
GET_MSR_INDEX_LIST = ioc(_READ | _WRITE, 0x02, MSR_INDEX_LIST_HEADER)

IOCTL_NAMES = {
    value: f"KVM_{name}"
    for name, value in list(globals().items())
    if name.isupper() and isinstance(value, int) and value >> 8 & 0xFF == _KVMIO
}
