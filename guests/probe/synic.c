/* SynIC messages and synthetic timers, TLFS v6.0b, inter-partition communication and timers. */
#include "probe.h"

#define SINT 3

#define MILLISECOND 10000ull /* reference time is in 100 ns */
#define PATIENCE 1000ull     /* milliseconds */

struct reference_tsc reference_tsc_page __attribute__((aligned(4096)));
static u8 message_pages[MAX_VPS][PAGE_SIZE] __attribute__((aligned(4096)));
static u8 event_pages[MAX_VPS][PAGE_SIZE] __attribute__((aligned(4096)));

u64 reference_page_time(void)
{
    u32 sequence;
    u64 time;

    do {
        sequence = reference_tsc_page.sequence;
        time = (u64)((unsigned __int128)rdtsc() * reference_tsc_page.scale >> 64) + reference_tsc_page.offset;
    } while (sequence != reference_tsc_page.sequence);
    return time;
}

struct message *message_slot(u32 sint)
{
    return (struct message *)message_pages[this_vp()->number] + sint;
}

volatile u64 *event_flags(u32 sint)
{
    return (volatile u64 *)(event_pages[this_vp()->number] + sint * 256);
}

void synic_enable(void)
{
    u32 vp = this_vp()->number;

    memset(message_pages[vp], 0xff, PAGE_SIZE);
    memset(event_pages[vp], 0xff, PAGE_SIZE);
    wrmsr_safe(MSR_SIMP, address_of(message_pages[vp]) | 1);
    wrmsr_safe(MSR_SIEFP, address_of(event_pages[vp]) | 1);
    wrmsr_safe(MSR_SINT0 + SINT, VECTOR_TIMER_SINT);
    wrmsr_safe(MSR_SCONTROL, 1);
}

static u64 arm(u32 timer, u64 config, u64 count)
{
    wrmsr_safe(MSR_STIMER0_CONFIG + 2 * timer, 0);
    wrmsr_safe(MSR_STIMER0_COUNT + 2 * timer, count);
    wrmsr_safe(MSR_STIMER0_CONFIG + 2 * timer, config | TIMER_ENABLE);
    return count;
}

static void one_shot(void)
{
    struct message *slot = message_slot(SINT);
    struct timer_payload payload;
    u32 interrupts = this_vp()->interrupts[VECTOR_TIMER_SINT];
    u64 due = arm(0, TIMER_SINT(SINT), reference_time() + 2 * MILLISECOND);

    /* A message may be seen before its interrupt is taken, which happens only in idle(). */
    WAIT_UNTIL(slot->type != 0 && this_vp()->interrupts[VECTOR_TIMER_SINT] != interrupts, PATIENCE);
    expect_equal("synic.timer_message", slot->type, MESSAGE_TIMER_EXPIRED);
    expect_equal("synic.timer_payload_size", slot->size, sizeof(payload));
    memcpy(&payload, slot->payload, sizeof(payload));
    expect_equal("synic.timer_expiration", payload.expiration, due);
    expect("synic.timer_delivery", payload.delivery - due,
           payload.delivery >= due && payload.delivery <= reference_time(),
           "between expiration and now");
    expect_equal("synic.timer_interrupts", this_vp()->interrupts[VECTOR_TIMER_SINT] - interrupts, 1);
    expect_equal("synic.timer_one_shot_disabled", rdmsr(MSR_STIMER0_CONFIG) & TIMER_ENABLE, 0);
    message_done(slot);
}

/* Two timers for one slot: one must wait, flag that it waits, and come after EOM. Which is first is not promised. */
static void slot_busy(void)
{
    struct message *slot = message_slot(SINT);
    u64 due = reference_time() + MILLISECOND, came = 0;

    arm(0, TIMER_SINT(SINT), due);
    arm(1, TIMER_SINT(SINT), due);
    WAIT_UNTIL(slot->flags & 1, PATIENCE);
    expect_equal("synic.message_pending", slot->flags & 1, 1);
    for (int i = 0; i < 2 && WAIT_UNTIL(slot->type != 0, PATIENCE); i++) {
        came |= 1ull << slot->payload[0];
        message_done(slot);
    }
    expect_equal("synic.messages_after_eom", came, 3);
}

static void periodic(void)
{
    struct message *slot = message_slot(SINT);
    u64 ticks = 0, start = reference_time(), took;

    arm(2, TIMER_SINT(SINT) | TIMER_PERIODIC, 3 * MILLISECOND);
    while (ticks < 3 && WAIT_UNTIL(slot->type != 0, PATIENCE)) {
        ticks += slot->type == MESSAGE_TIMER_EXPIRED && slot->payload[0] == 2;
        message_done(slot);
    }
    took = reference_time() - start;
    wrmsr_safe(MSR_STIMER0_CONFIG + 4, 0);
    expect_equal("synic.periodic_ticks", ticks, 3);
    expect("synic.periodic_time", took, took >= 9 * MILLISECOND - MILLISECOND / 100, "3 periods of 3 ms or more");
    /* A tick may have been on its way while the timer was stopped. */
    if (slot->type)
        message_done(slot);
}

static void direct_mode(void)
{
    u32 interrupts = this_vp()->interrupts[VECTOR_DIRECT_TIMER];

    arm(3, TIMER_DIRECT | TIMER_VECTOR(VECTOR_DIRECT_TIMER), reference_time() + MILLISECOND);
    WAIT_UNTIL(this_vp()->interrupts[VECTOR_DIRECT_TIMER] != interrupts, PATIENCE);
    expect_equal("synic.direct_interrupts", this_vp()->interrupts[VECTOR_DIRECT_TIMER] - interrupts, 1);
    expect_equal("synic.direct_no_message", message_slot(0)->type | message_slot(SINT)->type, 0);
}

static void enable_rules(void)
{
    wrmsr_safe(MSR_STIMER0_CONFIG, 0);
    wrmsr_safe(MSR_STIMER0_COUNT, reference_time() + 60000 * MILLISECOND);
    wrmsr_safe(MSR_STIMER0_CONFIG, TIMER_ENABLE); /* SINT 0 is for the hypervisor's own messages */
    expect_equal("synic.timer_sint0_disabled", rdmsr(MSR_STIMER0_CONFIG) & TIMER_ENABLE, 0);
    wrmsr_safe(MSR_STIMER0_CONFIG, TIMER_SINT(SINT) | TIMER_AUTO_ENABLE);
    wrmsr_safe(MSR_STIMER0_COUNT, reference_time() + 60000 * MILLISECOND);
    expect_equal("synic.timer_auto_enable", rdmsr(MSR_STIMER0_CONFIG) & TIMER_ENABLE, 1);
    wrmsr_safe(MSR_STIMER0_COUNT, 0);
    expect_equal("synic.timer_count0_disabled", rdmsr(MSR_STIMER0_CONFIG) & TIMER_ENABLE, 0);
    wrmsr_safe(MSR_STIMER0_CONFIG, 0);
}

/* Reading GUEST_IDLE sleeps until an interrupt is pending, also with interrupts off as here. */
static void guest_idle(void)
{
    u64 value, start = reference_time(), took;

    arm(0, TIMER_SINT(SINT), start + 2 * MILLISECOND);
    rdmsr_safe(MSR_GUEST_IDLE, &value);
    took = reference_time() - start;
    expect("synic.guest_idle", took, took < PATIENCE * MILLISECOND, "woken by an interrupt");
    WAIT_UNTIL(message_slot(SINT)->type != 0, PATIENCE);
    expect_equal("synic.guest_idle_message", message_slot(SINT)->type, MESSAGE_TIMER_EXPIRED);
    message_done(message_slot(SINT));
}

/* The frequency MSRs against the reference counter, over the time that the timer tests took. */
static void frequencies(u64 tsc, u64 time)
{
    u64 hertz = rdmsr(MSR_TSC_FREQUENCY), measured;

    time = reference_time() - time;
    measured = (rdtsc() - tsc) * 10000 / time * 1000;
    expect("synic.tsc_rate", measured, measured > hertz - hertz / 50 && measured < hertz + hertz / 50,
           "within 2 % of the TSC frequency MSR");
}

void probe_synic(void)
{
    u64 tsc, time;

    if (!(privileges_eax & EAX_SYNIC))
        return;
    synic_enable();
    expect_equal("synic.simp", rdmsr(MSR_SIMP), address_of(message_pages[0]) | 1);
    expect_equal("synic.siefp", rdmsr(MSR_SIEFP), address_of(event_pages[0]) | 1);
    expect_equal("synic.simp_zeroed", all_zero(message_pages[0], PAGE_SIZE), 1);
    expect_equal("synic.siefp_zeroed", all_zero(event_pages[0], PAGE_SIZE), 1);
    if (!(privileges_eax & EAX_STIMER))
        return;
    tsc = rdtsc();
    time = reference_time();
    one_shot();
    slot_busy();
    periodic();
    if (privileges_edx & EDX_DIRECT_TIMER)
        direct_mode();
    enable_rules();
    if (privileges_eax & EAX_GUEST_IDLE)
        guest_idle();
    if (privileges_eax & EAX_FREQUENCY)
        frequencies(tsc, time);
}

/* What an AP does: one timer message on its own SynIC. Returns how many came. */
u32 receive_one_timer_message(void)
{
    struct message *slot = message_slot(SINT);
    bool came;

    arm(0, TIMER_SINT(SINT), reference_time() + MILLISECOND);
    came = WAIT_UNTIL(slot->type != 0 && this_vp()->interrupts[VECTOR_TIMER_SINT] == 1, PATIENCE) &&
           slot->type == MESSAGE_TIMER_EXPIRED;
    message_done(slot);
    return came;
}
