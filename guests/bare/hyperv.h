/* Numbers and layouts of the hypervisor interface, TLFS v6.0b; those it lacks from Linux asm/hyperv-tlfs.h. */
#ifndef HYPERV_H
#define HYPERV_H

#include "bare.h"

enum {
    MSR_GUEST_OS_ID = 0x40000000,
    MSR_HYPERCALL = 0x40000001,
    MSR_VP_INDEX = 0x40000002,
    MSR_RESET = 0x40000003,
    MSR_VP_RUNTIME = 0x40000010,
    MSR_TIME_REF_COUNT = 0x40000020,
    MSR_REFERENCE_TSC = 0x40000021,
    MSR_TSC_FREQUENCY = 0x40000022,
    MSR_APIC_FREQUENCY = 0x40000023,
    MSR_NPIEP_CONFIG = 0x40000040,
    MSR_EOI = 0x40000070,
    MSR_ICR = 0x40000071,
    MSR_TPR = 0x40000072,
    MSR_VP_ASSIST_PAGE = 0x40000073,
    MSR_SCONTROL = 0x40000080,
    MSR_SVERSION = 0x40000081,
    MSR_SIEFP = 0x40000082,
    MSR_SIMP = 0x40000083,
    MSR_EOM = 0x40000084,
    MSR_SINT0 = 0x40000090,
    MSR_STIMER0_CONFIG = 0x400000b0,
    MSR_STIMER0_COUNT = 0x400000b1,
    MSR_GUEST_IDLE = 0x400000f0,
    MSR_SYNTH_DEBUG_CONTROL = 0x400000f1,
    MSR_SYNTH_DEBUG_PENDING_BUFFER = 0x400000f5,
    MSR_CRASH_P0 = 0x40000100,
    MSR_CRASH_CTL = 0x40000105,
    MSR_REENLIGHTENMENT_CONTROL = 0x40000106,
    MSR_TSC_EMULATION_CONTROL = 0x40000107,
    MSR_TSC_EMULATION_STATUS = 0x40000108,
    MSR_TSC_INVARIANT_CONTROL = 0x40000118,
};

#define SINT_MASKED (1u << 16)
#define SINT_AUTO_EOI (1u << 17)
#define SINT_POLLING (1u << 18)

#define TIMER_ENABLE (1u << 0)
#define TIMER_PERIODIC (1u << 1)
#define TIMER_LAZY (1u << 2)
#define TIMER_AUTO_ENABLE (1u << 3)
#define TIMER_VECTOR(vector) ((u32)(vector) << 4)
#define TIMER_DIRECT (1u << 12)
#define TIMER_SINT(sint) ((u32)(sint) << 16)

enum {
    CALL_FLUSH_SPACE = 0x02,
    CALL_FLUSH_LIST = 0x03,
    CALL_LONG_SPIN_WAIT = 0x08,
    CALL_SEND_IPI = 0x0b,
    CALL_FLUSH_SPACE_EX = 0x13,
    CALL_FLUSH_LIST_EX = 0x14,
    CALL_SEND_IPI_EX = 0x15,
    CALL_GET_VP_REGISTERS = 0x50,
    CALL_SET_VP_REGISTERS = 0x51,
    CALL_POST_MESSAGE = 0x5c,
    CALL_SIGNAL_EVENT = 0x5d,
    CALL_START_VP = 0x99,
    CALL_VP_INDEX_FROM_APIC_ID = 0x9a,
    CALL_EXT_QUERY = 0x8001,

    CALL_FAST = 1 << 16,

    STATUS_SUCCESS = 0,
    STATUS_INVALID_HYPERCALL_CODE = 2,
    STATUS_INVALID_HYPERCALL_INPUT = 3,
    STATUS_INVALID_ALIGNMENT = 4,
    STATUS_INVALID_PARAMETER = 5,
    STATUS_ACCESS_DENIED = 6,
    STATUS_INVALID_PARTITION_ID = 0xd,
    STATUS_INVALID_VP_INDEX = 0xe,
    STATUS_INVALID_PORT_ID = 0x11,
    STATUS_INVALID_CONNECTION_ID = 0x12,
    STATUS_INSUFFICIENT_BUFFERS = 0x13,
    STATUS_INVALID_VP_STATE = 0x15,
    STATUS_INVALID_REGISTER_VALUE = 0x50,
};

/* Fields of the hypercall input value beside the call code and the fast bit. */
#define CALL_VARIABLE_HEADER(words) ((u64)(words) << 17)
#define CALL_REPS(count) ((u64)(count) << 32)
#define CALL_START(index) ((u64)(index) << 48)

/* A caller's own partition and VP, and the formats of HV_VP_SET. */
#define PARTITION_SELF (~0ull)
#define VP_SELF 0xfffffffeu
#define VP_SET_SPARSE 0u
#define VP_SET_ALL 1u

/* CPUID 0x40000003 and 0x40000004. */
enum {
    EAX_VP_RUNTIME = 1 << 0,
    EAX_TIME_REF_COUNT = 1 << 1,
    EAX_SYNIC = 1 << 2,
    EAX_STIMER = 1 << 3,
    EAX_APIC = 1 << 4,
    EAX_HYPERCALL = 1 << 5,
    EAX_VP_INDEX = 1 << 6,
    EAX_RESET = 1 << 7,
    EAX_REFERENCE_TSC = 1 << 9,
    EAX_GUEST_IDLE = 1 << 10,
    EAX_FREQUENCY = 1 << 11,
    EAX_DEBUG = 1 << 12,
    EAX_REENLIGHTENMENT = 1 << 13,
    EAX_TSC_INVARIANT = 1 << 15,
    EBX_POST_MESSAGES = 1 << 4,
    EBX_SIGNAL_EVENTS = 1 << 5,
    EBX_VP_REGISTERS = 1 << 17,
    EBX_EXT_HYPERCALLS = 1 << 20,
    EBX_START_VP = 1 << 21,
    EDX_XMM_INPUT = 1 << 4,
    EDX_GUEST_IDLE = 1 << 5,
    EDX_FREQUENCY = 1 << 8,
    EDX_CRASH = 1 << 10,
    EDX_DEBUG = 1 << 11,
    EDX_NPIEP = 1 << 12,
    EDX_EXT_RANGES = 1 << 14,
    EDX_SINT_POLLING = 1 << 17,
    EDX_DIRECT_TIMER = 1 << 19,
    HINT_REMOTE_FLUSH = 1 << 2,
    HINT_APIC_MSRS = 1 << 3,
    HINT_NO_AUTO_EOI = 1 << 9,
    HINT_CLUSTER_IPI = 1 << 10,
    HINT_EX_MASKS = 1 << 11,
};

/* EBX of leaf 0x40000003: what only a root partition may have. */
#define ROOT_PRIVILEGES \
    (1u << 0 | 1u << 1 | 1u << 2 | 1u << 3 | 1u << 6 | 1u << 8 | 1u << 12 | 1u << 13 | 1u << 22)

/* A SynIC message slot, HV_MESSAGE. */
struct message {
    volatile u32 type;
    volatile u8 size;
    volatile u8 flags; /* bit 0: another message waits for this slot */
    u16 reserved;
    u64 sender;
    u8 payload[240];
};

#define MESSAGE_TIMER_EXPIRED 0x80000010u

struct timer_payload {
    u32 index;
    u32 reserved;
    u64 expiration;
    u64 delivery;
};

/* The input of HvPostMessage. */
struct post_message_input {
    u32 connection;
    u32 reserved;
    u32 type;
    u32 size;
    u8 payload[240];
};

/* HV_REFERENCE_TSC_PAGE. */
struct reference_tsc {
    volatile u32 sequence;
    u32 reserved;
    volatile u64 scale;
    volatile u64 offset;
};

/* hyperv.c */
u64 reference_time(void);                /* 100 ns, by MSR */
void message_done(struct message *slot); /* frees the slot; if another message waits for it, says so with EOM */

#endif
