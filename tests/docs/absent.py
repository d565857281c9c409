"""What the TLFS has and pyvmm does not offer, with the reason.

Numbers and names: TLFS v6.0b, chapter 2 and appendices A and C; TLFS v2.0, appendix G; Linux
``arch/x86/include/asm/hyperv-tlfs.h``. What a guest must not be offered: Microsoft's Requirements for Implementing the
Microsoft Hypervisor Interface (2012).
"""

from __future__ import annotations

from enlightenments.tlfs import FEATURES, RECOMMENDATIONS

_PARENT = "for partitions with children"
_ROOT = "for the root partition"
_DEBUG = "no debugger is at the other end"
_STATISTICS = "a guest must not have it: statistics are the host's"
_VSM = "there is no virtual secure mode"
_NESTED = "for hypervisors inside a guest; KVM's own nested interface is architectural"

#: (leaf, register, first bit, last bit, meaning, reason).
BITS = (
    (FEATURES, "eax", 8, 8, "statistics", _STATISTICS),
    (FEATURES, "eax", 12, 12, "debug MSRs", _DEBUG),
    (FEATURES, "eax", 14, 14, "MSRs of the root scheduler", _ROOT),
    (FEATURES, "ebx", 0, 3, "partitions, partition ids, memory pool, message buffers", "a guest must not have it"),
    (FEATURES, "ebx", 6, 7, "creating and connecting ports", "VMBus connects its ports itself"),
    (FEATURES, "ebx", 8, 8, "statistics", _STATISTICS),
    (FEATURES, "ebx", 11, 11, "debugging", _DEBUG),
    (
        FEATURES,
        "ebx",
        12,
        14,
        "CPU management, profiler, traces of exits",
        "Linux would take itself for the root partition",
    ),
    (FEATURES, "ebx", 16, 16, "virtual secure mode", _VSM),
    (FEATURES, "ebx", 19, 19, "hypercall output in registers", "no call that is offered gains by it"),
    (FEATURES, "ebx", 22, 22, "isolation", "guests are not confidential"),
    (FEATURES, "ecx", 0, 31, "power states, performance counters", "nothing there to offer"),
    (FEATURES, "edx", 0, 0, "MWAIT", "deprecated"),
    (FEATURES, "edx", 1, 1, "guest debugging", _DEBUG),
    (FEATURES, "edx", 2, 3, "performance monitor, changing processors", "nothing there to offer"),
    (FEATURES, "edx", 6, 7, "sleep state, NUMA distances", _ROOT),
    (FEATURES, "edx", 9, 9, "synthetic machine checks", "pyvmm injects none"),
    (FEATURES, "edx", 11, 11, "debug MSRs", _DEBUG),
    (FEATURES, "edx", 12, 12, "NPIEP", "KVM has no hook for SGDT, SIDT, SLDT and STR"),
    (FEATURES, "edx", 13, 13, "disabling the hypervisor", _ROOT),
    (FEATURES, "edx", 15, 15, "hypercall output in registers", "no call that is offered gains by it"),
    (FEATURES, "edx", 20, 21, "PAT and BNDCFGS for secure mode", _VSM),
    (FEATURES, "edx", 23, 23, "time-unhalted timer", "KVM does not tell when a VP is halted"),
    (FEATURES, "edx", 26, 26, "last branch records", "they are not given to guests"),
    (RECOMMENDATIONS, "eax", 0, 1, "hypercalls for CR3 and local flushes", "the instructions need no exit"),
    (RECOMMENDATIONS, "eax", 4, 4, "reset by MSR", "it may be used, ACPI's is as good"),
    (RECOMMENDATIONS, "eax", 6, 7, "remapping of DMA and interrupts", "no device is passed through"),
    (RECOMMENDATIONS, "eax", 12, 14, "nested, MBEC, enlightened VMCS", _NESTED),
    (RECOMMENDATIONS, "eax", 15, 15, "the root's performance counter bias", "there is no root partition"),
    (RECOMMENDATIONS, "eax", 17, 17, "toggling CR4.PGE to flush", "no advice is needed"),
    (RECOMMENDATIONS, "eax", 18, 18, "no sharing of cores but with siblings", "the host's scheduler decides"),
)

#: (first, last, name, reason).
MSRS = (
    (0x4000_0040, 0x4000_0040, "NPIEP_CONFIG", "KVM has no hook for SGDT, SIDT, SLDT and STR"),
    (0x4000_00C1, 0x4000_00C3, "POWER_STATE_TRIGGER_C1..C3", _ROOT),
    (0x4000_00D1, 0x4000_00D3, "POWER_STATE_CONFIG_C1..C3", _ROOT),
    (0x4000_00E0, 0x4000_00E3, "STATS_*", _STATISTICS),
    (0x4000_00F1, 0x4000_00F5, "SYNDBG_*", _DEBUG),
    (0x4000_0114, 0x4000_0115, "STIME_UNHALTED_TIMER_*", "KVM does not tell when a VP is halted"),
    (0x4000_1002, 0x4000_109F, "NESTED_*", _NESTED),
)

#: (first, last, name, reason).
HYPERCALLS = (
    (0x01, 0x01, "HvSwitchVirtualAddressSpace", "MOV to CR3 needs no exit"),
    (0x04, 0x04, "HvGetLogicalProcessorRunTime", _ROOT),
    (0x09, 0x09, "HvParkedVirtualProcessors", _ROOT),
    (0x0C, 0x12, "VTLs", _VSM),
    (0x40, 0x45, "partitions and their memory", _PARENT),
    (0x46, 0x46, "HvGetPartitionId", "a guest must not have the privilege"),
    (0x47, 0x4F, "children, mapping, intercepts, VPs", _PARENT),
    (0x52, 0x5B, "translation, memory and interrupts of others, ports", _PARENT),
    (0x5E, 0x68, "saved state, event log", _ROOT),
    (0x69, 0x6B, "debug data", _DEBUG),
    (0x6C, 0x6E, "statistics", _STATISTICS),
    (0x6F, 0x7D, "the system, logical processors, devices", _ROOT),
    (0x7E, 0x7E, "HvRetargetDeviceInterrupt", "there is no virtual PCI bus"),
    (0x7F, 0x97, "devices, power, intercepts, ports", _ROOT),
    (0xAF, 0xB0, "HvFlushGuestPhysicalAddress*", _NESTED),
    (0x8002, 0x8006, "boot-zeroed memory, heat hints", "the query says that there are none"),
)
