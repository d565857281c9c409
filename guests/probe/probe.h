/* What the parts of the probe share: machine access, findings, and the calls from one part to another.
 *
 * The probe runs with interrupts off and takes them only inside idle(), so no data here needs a lock
 * against its own VP's interrupt handler.
 */
#ifndef PROBE_H
#define PROBE_H

#include "../bare/vmbus/vmbus.h"

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

/* What the firmware tables say. */
struct platform {
    u32 vp_count;
    u16 pm1a_control;
};

extern struct platform platform;
extern u32 privileges_eax, privileges_ebx, privileges_edx;
extern struct reference_tsc reference_tsc_page;
extern u8 scratch[2 * PAGE_SIZE];

/* start.S */
u64 hypercall_32(u64 control, u64 input, u64 output); /* the same, through compatibility mode */
extern u8 vp_stacks[MAX_VPS][STACK_SIZE];
extern u8 trampoline_start[], trampoline_end[];
extern volatile u32 ap_count;
extern u64 ap_cr0, ap_cr3, ap_cr4, ap_efer;

/* report.c: each call prints one line; `name` is topic.name as guests/probe/report.py knows it. */
void expect(const char *name, u64 value, bool ok, const char *expected);
void expect_equal(const char *name, u64 value, u64 expected);
void expect_text(const char *name, const char *value, bool ok, const char *expected);
void expect_numbered(const char *name, u32 number, u64 value, bool ok, const char *expected);
void report_done(void);

/* trap.c */
void trap_init(void);
void vp_init(u32 number);
u32 apic_read(u32 offset);
void apic_write(u32 offset, u32 value);

/* platform.c */
void platform_init(const u8 *boot_params);
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

/* synic.c */
void synic_enable(void);
u64 reference_page_time(void);
u32 receive_one_timer_message(void);

/* storvsc.c */
void probe_storage(struct channel *channel);

static inline struct vp *this_vp(void)
{
    return (struct vp *)(stack_pointer() & ~(ulong)(STACK_SIZE - 1));
}

#endif
