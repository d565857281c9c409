/* What the kit's parts share: VPs, findings, hypercalls, the SynIC.
 *
 * A test's name begins with its topic, which is also its file; its section is one of the TLFS v6.0b unless it says
 * otherwise. Interrupts are on only inside idle(), so no data needs a lock against its own VP's handler.
 */
#ifndef KIT_H
#define KIT_H

#include "../bare/hyperv.h"

#define MAX_VPS 64u
#define STACK_SIZE 16384u

/* Open source, no known vendor, version 1 (2.6). */
#define GUEST_OS_ID (1ull << 63 | 0x7full << 56 | 1ull << 16)

#define CODE32_SELECTOR 0x08
#define CODE64_SELECTOR 0x10
#define DATA_SELECTOR 0x18
#ifdef __x86_64__
#define CODE_SELECTOR CODE64_SELECTOR
#else
#define CODE_SELECTOR CODE32_SELECTOR
#endif

/* Vectors; each topic that takes interrupts has its own. */
#define VECTOR_LAST 0x20
#define VECTOR_WATCHDOG 0xf0 /* above all that may be stuck in service */
#define VECTOR_WAKE 0xf1
#define VECTOR_SPURIOUS 0xff

/* Who ends an interrupt on a vector. */
enum end_of_interrupt { EOI_BY_APIC, EOI_BY_NOBODY, EOI_BY_MSR, EOI_BY_ASSIST };

/* One VP's own data; it stands at the foot of the VP's stack, where this_vp() finds it. */
struct vp {
    volatile u32 interrupts[256];
    volatile u8 in_service[256]; /* the vector's ISR bit was seen set by the handler of EOI_BY_NOBODY */
    u32 number;                  /* its APIC id */
    volatile bool online;
    void (*volatile job)(void);
};

/* vp.c */
extern u32 vp_count;
extern u8 end_of_interrupt[256];
extern volatile u32 *eoi_assist; /* the first word of the first VP's assist page */
extern u32 eois_saved;
extern u8 vp_stacks[MAX_VPS][STACK_SIZE];
void vps_count(void);
void vp_init(u32 number);
void vp_main(void); /* an AP's life */
void watchdog(u32 period);
u32 vps_start(void); /* returns how many are online, with the first */
void vp_begin(u32 number, void (*job)(void));
bool vp_finished(u32 number); /* waits for it */
bool vp_run(u32 number, void (*job)(void));
void let_ticks_pass(u32 ticks); /* of the watchdog, with interrupts on: time for what must not come */
void take_interrupts(void); /* all those that are pending now */
u32 apic_read(u32 offset);
void apic_write(u32 offset, u32 value);
struct vp *vp_at(u32 number);

#define APIC_ID 0x20
#define APIC_TPR 0x80
#define APIC_EOI 0xb0
#define APIC_SPURIOUS 0xf0
#define APIC_ISR 0x100
#define APIC_IRR 0x200
#define APIC_ICR_LOW 0x300
#define APIC_ICR_HIGH 0x310
#define ICR_FIXED 0x4000u
#define ICR_SELF_FIXED 0x44000u

/* 10 ms with KVM's 1 GHz APIC bus divided by 16. Only its being finite matters: it bounds every wait. */
#define WATCHDOG_PERIOD 625000u

static inline struct vp *this_vp(void)
{
    return (struct vp *)(stack_pointer() & ~(ulong)(STACK_SIZE - 1));
}

/* report.c: each call prints one line. Values that differ from run to run go to the `measured` form. */
void expect(const char *name, const char *section, u64 value, bool ok, const char *expected);
void expect_measured(const char *name, const char *section, u64 value, bool ok, const char *expected);
void expect_equal(const char *name, const char *section, u64 value, u64 expected);
void expect_text(const char *name, const char *section, const char *value, bool ok, const char *expected);
void skip(const char *name, const char *section, const char *reason);
_Noreturn void report_done(void);

/* cpuid.c */
extern u32 privileges_eax, privileges_ebx, privileges_edx, hints;
void cpuid_read(void);

/* hypercall.c, start.S */
extern u8 hypercall_page[PAGE_SIZE];
extern u8 scratch[2 * PAGE_SIZE];
u64 hypercall(u64 control, u64 input, u64 output);
void hypercall_enable(void);
u32 hypercall_changes(u64 control, u64 input, u64 output);
extern bool xmm_kept; /* by the last hypercall_xmm() */
u64 hypercall_xmm(u64 control, u64 input, u64 output, const u64 xmm[12]); /* fast, with XMM0 to XMM5 */
u32 status_of(u64 control, u64 input, u64 output); /* the result's status only */
void expect_not_offered(const char *name, const char *section, u64 control);

/* synic.c */
struct message *message_slot(u32 sint); /* of this VP */
volatile u32 *event_flags(u32 sint);
void synic_enable(void); /* pages and SCONTROL of this VP; all SINTs masked */
void synic_disable(void);

/* ports.c: QEMU's Hyper-V test device */
#define TESTDEV_PORT 0x3000
enum {
    TESTDEV_ROUTE_CREATE = 1,
    TESTDEV_ROUTE_DESTROY,
    TESTDEV_SET_SINT,
    TESTDEV_MESSAGE_CREATE,
    TESTDEV_MESSAGE_DESTROY,
    TESTDEV_EVENT_CREATE,
    TESTDEV_EVENT_DESTROY,
};
void testdev(u32 control, u32 vp, u32 sint, u32 connection);

/* time.c: 100 ns, by MSR, and by the reference TSC page. */
#define MILLISECOND 10000u
extern struct reference_tsc reference_tsc_page;
u64 reference_page_time(void);

/* The topics, one file each. */
void test_startvp(void);
void test_cpuid(void);
void test_msr(void);
void test_hypercall(void);
void test_ext(void);
void test_time(void);
void test_synic(void);
void test_stimer(void);
void test_ports(void);
void test_autoeoi(void);
void test_apic(void);
void test_idle(void);
void test_spinwait(void);
void test_ipi(void);
void test_flush(void);
void test_registers(void);
void test_lock(void);

#define PATIENCE 1000u /* milliseconds */

#endif
