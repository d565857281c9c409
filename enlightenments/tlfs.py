"""Numbers of the hypervisor interface, and their names: MSRs, hypercalls and status codes.

Sources: TLFS v6.0b, appendices A to C; Linux ``include/asm-generic/hyperv-tlfs.h`` and
``arch/x86/include/asm/hyperv-tlfs.h``.
"""

from __future__ import annotations

#: CPUID leaves with bits of features and of recommendations.
FEATURES = 0x4000_0003
RECOMMENDATIONS = 0x4000_0004

MSR_BASE = 0x4000_0000
MSR_COUNT = 0x200

MSR_GUEST_OS_ID = 0x4000_0000
MSR_HYPERCALL = 0x4000_0001
MSR_VP_INDEX = 0x4000_0002
MSR_RESET = 0x4000_0003
MSR_VP_RUNTIME = 0x4000_0010
MSR_TIME_REF_COUNT = 0x4000_0020
MSR_REFERENCE_TSC = 0x4000_0021
MSR_TSC_FREQUENCY = 0x4000_0022
MSR_APIC_FREQUENCY = 0x4000_0023
MSR_EOI = 0x4000_0070
MSR_ICR = 0x4000_0071
MSR_TPR = 0x4000_0072
MSR_VP_ASSIST_PAGE = 0x4000_0073
MSR_SCONTROL = 0x4000_0080
MSR_SVERSION = 0x4000_0081
MSR_SIEFP = 0x4000_0082
MSR_SIMP = 0x4000_0083
MSR_EOM = 0x4000_0084
MSR_SINT0 = 0x4000_0090
MSR_STIMER0_CONFIG = 0x4000_00B0
MSR_GUEST_IDLE = 0x4000_00F0
MSR_CRASH_P0 = 0x4000_0100
MSR_CRASH_CTL = 0x4000_0105
MSR_REENLIGHTENMENT_CONTROL = 0x4000_0106
MSR_TSC_EMULATION_CONTROL = 0x4000_0107
MSR_TSC_EMULATION_STATUS = 0x4000_0108
MSR_TSC_INVARIANT_CONTROL = 0x4000_0118

HVCALL_FLUSH_SPACE = 0x02
HVCALL_FLUSH_LIST = 0x03
HVCALL_LONG_SPIN_WAIT = 0x08
HVCALL_SEND_IPI = 0x0B
HVCALL_FLUSH_SPACE_EX = 0x13
HVCALL_FLUSH_LIST_EX = 0x14
HVCALL_SEND_IPI_EX = 0x15
HVCALL_GET_VP_REGISTERS = 0x50
HVCALL_SET_VP_REGISTERS = 0x51
HVCALL_POST_MESSAGE = 0x5C
HVCALL_SIGNAL_EVENT = 0x5D
HVCALL_START_VP = 0x99
HVCALL_VP_INDEX_FROM_APIC_ID = 0x9A
HVCALL_EXT_QUERY_CAPABILITIES = 0x8001

#: Names as in the TLFS, without its HV_X64_MSR_.
MSR_NAMES = {
    **{
        value: name.removeprefix("MSR_")
        for name, value in globals().items()
        if name.startswith("MSR_") and name not in ("MSR_BASE", "MSR_COUNT")
    },
    **{MSR_SINT0 + i: f"SINT{i}" for i in range(16)},
    **{MSR_STIMER0_CONFIG + i: f"STIMER{i // 2}_{('CONFIG', 'COUNT')[i % 2]}" for i in range(8)},
    **{MSR_CRASH_P0 + i: f"CRASH_P{i}" for i in range(5)},
}

HYPERCALL_NAMES = {
    HVCALL_FLUSH_SPACE: "HvFlushVirtualAddressSpace",
    HVCALL_FLUSH_LIST: "HvFlushVirtualAddressList",
    HVCALL_LONG_SPIN_WAIT: "HvNotifyLongSpinWait",
    HVCALL_SEND_IPI: "HvSendSyntheticClusterIpi",
    HVCALL_FLUSH_SPACE_EX: "HvFlushVirtualAddressSpaceEx",
    HVCALL_FLUSH_LIST_EX: "HvFlushVirtualAddressListEx",
    HVCALL_SEND_IPI_EX: "HvSendSyntheticClusterIpiEx",
    HVCALL_GET_VP_REGISTERS: "HvGetVpRegisters",
    HVCALL_SET_VP_REGISTERS: "HvSetVpRegisters",
    HVCALL_POST_MESSAGE: "HvPostMessage",
    HVCALL_SIGNAL_EVENT: "HvSignalEvent",
    HVCALL_START_VP: "HvStartVirtualProcessor",
    HVCALL_VP_INDEX_FROM_APIC_ID: "HvGetVpIndexFromApicId",
    HVCALL_EXT_QUERY_CAPABILITIES: "HvExtCallQueryCapabilities",
}

SUCCESS = 0
INVALID_HYPERCALL_CODE = 2
INVALID_HYPERCALL_INPUT = 3
INVALID_ALIGNMENT = 4
INVALID_PARAMETER = 5
ACCESS_DENIED = 6
INVALID_PARTITION_ID = 0xD
INVALID_VP_INDEX = 0xE
INVALID_PORT_ID = 0x11
INVALID_CONNECTION_ID = 0x12
INSUFFICIENT_BUFFERS = 0x13
INVALID_VP_STATE = 0x15
INVALID_REGISTER_VALUE = 0x50

STATUS_NAMES = {
    SUCCESS: "success",
    INVALID_HYPERCALL_CODE: "invalid hypercall code",
    INVALID_HYPERCALL_INPUT: "invalid hypercall input",
    INVALID_ALIGNMENT: "invalid alignment",
    INVALID_PARAMETER: "invalid parameter",
    ACCESS_DENIED: "access denied",
    INVALID_PARTITION_ID: "invalid partition id",
    INVALID_VP_INDEX: "invalid VP index",
    INVALID_PORT_ID: "invalid port id",
    INVALID_CONNECTION_ID: "invalid connection id",
    INSUFFICIENT_BUFFERS: "insufficient buffers",
    INVALID_VP_STATE: "invalid VP state",
    INVALID_REGISTER_VALUE: "invalid register value",
}


def msr_name(number: int) -> str:
    """What people call an MSR: its name, or its number if it has none."""
    return MSR_NAMES.get(number, f"{number:#x}")


def hypercall_name(code: int) -> str:
    """What people call a hypercall: its name, or its code if it has none."""
    return HYPERCALL_NAMES.get(code, f"{code:#x}")


def status_name(result: int) -> str:
    """What a hypercall's result value says."""
    status = result & 0xFFFF
    return STATUS_NAMES.get(status, f"status {status:#x}")
