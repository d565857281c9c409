"""The KVM capabilities that pyvmm uses: (name, number, needed, purpose). Source: Linux ``include/uapi/linux/kvm.h``."""

from __future__ import annotations

IRQCHIP = 0
USER_MEMORY = 3
SET_TSS_ADDR = 4
EXT_CPUID = 7
MP_STATE = 14
PIT2 = 33
SET_IDENTITY_MAP_ADDR = 37
VCPU_EVENTS = 41
HYPERV = 44
GET_TSC_KHZ = 61
MAX_VCPUS = 66
TSC_DEADLINE_TIMER = 72
SYNC_REGS = 74
SIGNAL_MSI = 77
READONLY_MEM = 81
VCPU_ATTRIBUTES = 127
IMMEDIATE_EXIT = 136
HYPERV_SYNIC2 = 148
X86_USER_SPACE_MSR = 188
X86_MSR_FILTER = 189

CAPABILITIES: tuple[tuple[str, int, bool, str], ...] = (
    (
        "KVM_CAP_USER_MEMORY",
        USER_MEMORY,
        True,
        "guest RAM is memory of the VM's own process",
    ),
    ("KVM_CAP_IRQCHIP", IRQCHIP, True, "interrupt controllers in the kernel"),
    ("KVM_CAP_PIT2", PIT2, True, "the PC's interval timer"),
    ("KVM_CAP_EXT_CPUID", EXT_CPUID, True, "the Hyper-V CPUID leaves"),
    ("KVM_CAP_SET_TSS_ADDR", SET_TSS_ADDR, True, "real mode on Intel processors"),
    (
        "KVM_CAP_SET_IDENTITY_MAP_ADDR",
        SET_IDENTITY_MAP_ADDR,
        True,
        "real mode on Intel processors",
    ),
    (
        "KVM_CAP_MP_STATE",
        MP_STATE,
        True,
        "starting and resetting application processors",
    ),
    ("KVM_CAP_VCPU_EVENTS", VCPU_EVENTS, True, "resetting a VP"),
    (
        "KVM_CAP_SIGNAL_MSI",
        SIGNAL_MSI,
        True,
        "interrupts of the synthetic interrupt controller",
    ),
    (
        "KVM_CAP_SYNC_REGS",
        SYNC_REGS,
        True,
        "hypercall registers without another request",
    ),
    ("KVM_CAP_IMMEDIATE_EXIT", IMMEDIATE_EXIT, True, "stopping a VP without a race"),
    (
        "KVM_CAP_X86_USER_SPACE_MSR",
        X86_USER_SPACE_MSR,
        True,
        "synthetic MSRs answered by pyvmm",
    ),
    (
        "KVM_CAP_X86_MSR_FILTER",
        X86_MSR_FILTER,
        True,
        "synthetic MSRs answered by pyvmm",
    ),
    (
        "KVM_CAP_GET_TSC_KHZ",
        GET_TSC_KHZ,
        True,
        "reference time and the TSC frequency MSR",
    ),
    (
        "KVM_CAP_HYPERV",
        HYPERV,
        False,
        "the enlightenment vapic: APIC registers by MSR",
    ),
    (
        "KVM_CAP_HYPERV_SYNIC2",
        HYPERV_SYNIC2,
        False,
        "synthetic timers run by KVM: ticks without exits",
    ),
    (
        "KVM_CAP_READONLY_MEM",
        READONLY_MEM,
        False,
        "firmware that the guest cannot overwrite",
    ),
    (
        "KVM_CAP_TSC_DEADLINE_TIMER",
        TSC_DEADLINE_TIMER,
        False,
        "the LAPIC's deadline timer",
    ),
    (
        "KVM_CAP_VCPU_ATTRIBUTES",
        VCPU_ATTRIBUTES,
        False,
        "reading the guest's TSC offset exactly",
    ),
)
