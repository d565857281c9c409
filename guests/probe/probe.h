/* What the parts of the probe share: machine access, findings, and the calls from one part to another.
 *
 * The probe runs with interrupts off and takes them only inside idle(), so no data here needs a lock
 * against its own VP's interrupt handler.
 */
#ifndef PROBE_H
#define PROBE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define PAGE_SIZE 4096u
#define MAX_VPS 64u
#define STACK_SIZE 16384u
#define RING_SIZE 4096u /* data bytes in one direction: small, so that the storage tests wrap it */

/* Open source, no known vendor, version 1. */
#define GUEST_OS_ID (1ull << 63 | 0x7full << 56 | 1ull << 16)

#define CODE32_SELECTOR 0x08
#define CODE64_SELECTOR 0x10
#define DATA_SELECTOR 0x18

/* Vectors of ours. VMBUS is the one Linux uses (HYPERVISOR_CALLBACK_VECTOR); the others are free choices. */
#define VECTOR_TIMER_SINT 0x50
#define VECTOR_DIRECT_TIMER 0x51
#define VECTOR_WATCHDOG 0x60
#define VECTOR_WAKE 0x61
#define VECTOR_VMBUS 0xf3
#define VECTOR_SPURIOUS 0xff

/* Synthetic MSRs, TLFS v6.0b. */
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
    MSR_CRASH_P0 = 0x40000100,
    MSR_CRASH_CTL = 0x40000105,
};

/* Hypercalls and their status codes, TLFS v6.0b. */
enum {
    CALL_POST_MESSAGE = 0x5c,
    CALL_SIGNAL_EVENT = 0x5d,
    CALL_FAST = 1 << 16,

    STATUS_SUCCESS = 0,
    STATUS_INVALID_HYPERCALL_CODE = 2,
    STATUS_INVALID_HYPERCALL_INPUT = 3,
    STATUS_INVALID_ALIGNMENT = 4,
    STATUS_INVALID_PARAMETER = 5,
    STATUS_INVALID_CONNECTION_ID = 0x12,
    STATUS_INSUFFICIENT_BUFFERS = 0x13,
};

/* Privileges, CPUID 0x40000003. */
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
    EBX_POST_MESSAGES = 1 << 4,
    EBX_SIGNAL_EVENTS = 1 << 5,
    EDX_FREQUENCY = 1 << 8,
    EDX_CRASH = 1 << 10,
    EDX_DIRECT_TIMER = 1 << 19,
};

/* A SynIC message slot, TLFS v6.0b HV_MESSAGE. */
struct message {
    volatile u32 type;
    u8 size;
    volatile u8 flags; /* bit 0: another message waits for this slot */
    u16 reserved;
    u64 sender;
    u8 payload[240];
};

/* The reference TSC page, TLFS v6.0b HV_REFERENCE_TSC_PAGE. */
struct reference_tsc {
    volatile u32 sequence;
    u32 reserved;
    volatile u64 scale;
    volatile u64 offset;
};

/* One VP's own data; it stands at the foot of the VP's stack, where this_vp() finds it. */
struct vp {
    volatile u32 interrupts[256];
    u32 number;
    volatile u64 index; /* what VP_INDEX read */
    volatile u32 apic_id;
    volatile u32 messages;
    volatile u64 time; /* from the reference TSC page, 0 if there is none */
    volatile bool done;
};

/* What the firmware tables and the command line say. */
struct platform {
    const char *command_line;
    u32 vp_count;
    u16 pm1a_control;
};

extern struct platform platform;
extern u32 privileges_eax, privileges_ebx, privileges_edx;
extern u64 tsc_per_ms;
extern struct reference_tsc reference_tsc_page;
extern u8 scratch[2 * PAGE_SIZE];

/* start.S */
int rdmsr_safe(u32 msr, u64 *value); /* 0, or 1 after #GP */
int wrmsr_safe(u32 msr, u64 value);
u64 hypercall_64(u64 control, u64 input, u64 output);
u64 hypercall_32(u64 control, u64 input, u64 output); /* the same, through compatibility mode */
extern u8 hypercall_page[PAGE_SIZE];
extern u8 vp_stacks[MAX_VPS][STACK_SIZE];
extern u8 trampoline_start[], trampoline_end[];
extern volatile u32 ap_count;
extern u64 ap_cr0, ap_cr3, ap_cr4, ap_efer;

/* serial.c */
void print(const char *text);
void print_hex(u64 value);
void print_decimal(u64 value);

/* report.c: each call prints one line; `name` is topic.name as guests/probe/report.py knows it. */
void expect(const char *name, u64 value, bool ok, const char *expected);
void expect_equal(const char *name, u64 value, u64 expected);
void expect_text(const char *name, const char *value, bool ok, const char *expected);
void expect_numbered(const char *name, u32 number, u64 value, bool ok, const char *expected);
void report_done(void);

/* trap.c */
void trap_init(void);
void vp_init(u32 number);
void idle(void); /* interrupts on, halt until one was taken, interrupts off */
u32 apic_read(u32 offset);
void apic_write(u32 offset, u32 value);

/* platform.c */
void platform_init(const u8 *boot_params);
bool option(const char *word); /* is `word` on the command line? */
bool topic_selected(const char *topic);
_Noreturn void power_off(void);
_Noreturn void halt(void);

/* The topics, one file each. */
void probe_cpuid(void);
void probe_msrs(void);
void probe_hypercalls(void);
void probe_synic(void);
void probe_vmbus(void);
void probe_smp(void);

/* hypercall.c */
void hypercall_enable(void);
u32 post_message(u32 connection, u32 type, const void *payload, u32 size); /* retries while the host has no room */

/* synic.c */
struct message *message_slot(u32 sint);
void message_done(struct message *slot);
void synic_enable(void);
u64 reference_time(void); /* 100 ns, by MSR */
u64 reference_page_time(void);
volatile u64 *event_flags(u32 sint);
u32 receive_one_timer_message(void);

/* ring.c: one VMBus channel's two rings, guest side. */
struct ring {
    volatile u32 in, out, mask, pending_send_size;
    u32 reserved[12];
    volatile u32 features;
    u32 padding[1007];
    u8 data[RING_SIZE];
};

struct channel {
    u32 id;
    u32 connection; /* for HvSignalEvent */
    struct ring *send, *receive;
};

struct packet {
    u16 type;
    u16 data_offset8;
    u16 length8;
    u16 flags;
    u64 transaction;
};

void ring_send(struct channel *channel, struct packet head, const void *extra, u32 extra_size, const void *payload,
               u32 size);
u32 ring_receive(struct channel *channel, struct packet *head, void *payload, u32 room); /* payload bytes, 0 if empty */

/* storvsc.c */
void probe_storage(struct channel *channel);

static inline void cpuid(u32 leaf, u32 regs[4])
{
    __asm__ volatile("cpuid" : "=a"(regs[0]), "=b"(regs[1]), "=c"(regs[2]), "=d"(regs[3]) : "a"(leaf), "c"(0));
}

static inline u64 rdmsr(u32 msr)
{
    u64 value = 0;
    rdmsr_safe(msr, &value);
    return value;
}

static inline u64 rdtsc(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (u64)high << 32 | low;
}

static inline void outb(u16 port, u8 value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void outw(u16 port, u16 value)
{
    __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static inline u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void fence(void)
{
    __asm__ volatile("lock orl $0, (%%rsp)" : : : "memory", "cc");
}

static inline struct vp *this_vp(void)
{
    u64 rsp;
    __asm__ volatile("mov %%rsp, %0" : "=r"(rsp));
    return (struct vp *)(rsp & ~(u64)(STACK_SIZE - 1));
}

static inline u64 address_of(const volatile void *pointer)
{
    return (u64)pointer;
}

void *memset(void *to, int value, size_t size);
void *memcpy(void *to, const void *from, size_t size);
int memcmp(const void *left, const void *right, size_t size);
bool all_zero(const void *page, size_t size);

/* Halt until `condition` holds; false after `milliseconds` by the TSC. */
#define WAIT_UNTIL(condition, milliseconds)                       \
    ({                                                            \
        u64 deadline_ = rdtsc() + (milliseconds) * tsc_per_ms;    \
        bool met_;                                                \
        while (!(met_ = (condition)) && rdtsc() < deadline_)      \
            idle();                                               \
        met_;                                                     \
    })

#endif
