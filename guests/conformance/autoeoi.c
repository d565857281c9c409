/* Auto-EOI SINTs: their interrupts end by themselves, and yet obey the local APIC's priorities. */
#include "kit.h"

#define SINT 4
#define VECTOR 0x82
#define VECTOR_LOWER 0x42
#define VECTOR_HIGHER 0xa2

static volatile u32 others_good;

static void expire(void)
{
    wrmsr_safe(MSR_STIMER0_CONFIG, 0);
    wrmsr_safe(MSR_STIMER0_COUNT, 1);
    wrmsr_safe(MSR_STIMER0_CONFIG, TIMER_SINT(SINT) | TIMER_ENABLE);
}

static bool comes(u32 vector, u32 count)
{
    return WAIT_UNTIL(this_vp()->interrupts[vector] == count, PATIENCE);
}

static u32 apic_bit(u32 offset, u32 vector)
{
    return apic_read(offset + vector / 32 * 16) >> vector % 32 & 1;
}

/* Leave no interrupt in service behind, whatever went wrong. */
static void end(void)
{
    synic_disable();
    while (apic_bit(APIC_ISR, VECTOR))
        apic_write(APIC_EOI, 0);
}

static void begin(void)
{
    synic_enable();
    wrmsr_safe(MSR_SINT0 + SINT, SINT_AUTO_EOI | VECTOR);
}

static void no_eoi_needed(void)
{
    struct vp *vp = this_vp();

    expire();
    expect_equal("autoeoi.interrupt", "11.8.5", comes(VECTOR, 1), 1);
    expect_equal("autoeoi.not_in_service", "11.8.5", vp->in_service[VECTOR], 0);
    message_done(message_slot(SINT));
    expire();
    expect_equal("autoeoi.same_vector_again", "11.8.5", comes(VECTOR, 2), 1);
    message_done(message_slot(SINT));
    apic_write(APIC_ICR_LOW, ICR_SELF_FIXED | VECTOR_LOWER);
    expect_equal("autoeoi.lower_vector_after", "11.8.5", comes(VECTOR_LOWER, 1), 1);
    expect_equal("autoeoi.no_trace_in_apic", "11.8.5", apic_bit(APIC_ISR, VECTOR) | apic_bit(APIC_IRR, VECTOR), 0);
}

/* Another interrupt, of higher priority, stays in service until this VP ends it. */
static void held_by_service(void)
{
    u32 before = this_vp()->interrupts[VECTOR];

    end_of_interrupt[VECTOR_HIGHER] = EOI_BY_NOBODY;
    apic_write(APIC_ICR_LOW, ICR_SELF_FIXED | VECTOR_HIGHER);
    comes(VECTOR_HIGHER, 1);
    if (!apic_bit(APIC_ISR, VECTOR_HIGHER)) {
        /* kvm_pvm's local APIC is like that. */
        skip("autoeoi.held_by_service", "11.8.5", "nothing is ever in service here");
        return;
    }
    expire();
    WAIT_UNTIL(message_slot(SINT)->type, PATIENCE);
    let_ticks_pass(2);
    expect_equal("autoeoi.held_by_service", "11.8.5", this_vp()->interrupts[VECTOR] - before, 0);
    apic_write(APIC_EOI, 0);
    end_of_interrupt[VECTOR_HIGHER] = EOI_BY_APIC;
    expect_equal("autoeoi.let_by_eoi", "11.8.5", comes(VECTOR, before + 1), 1);
    message_done(message_slot(SINT));
}

static void priorities(void)
{
    struct vp *vp = this_vp();
    u32 before = vp->interrupts[VECTOR];

    apic_write(APIC_TPR, 0x90);
    expire();
    WAIT_UNTIL(message_slot(SINT)->type, PATIENCE);
    let_ticks_pass(2);
    expect_equal("autoeoi.held_by_task_priority", "11.8.5", vp->interrupts[VECTOR] - before, 0);
    apic_write(APIC_TPR, 0);
    expect_equal("autoeoi.let_by_task_priority", "11.8.5", comes(VECTOR, before + 1), 1);
    message_done(message_slot(SINT));
    held_by_service();
}

/* Nothing else may wake the VP within the time that is measured: the watchdog is slow. */
static void wakes(void)
{
    u64 start = reference_time(), took;

    watchdog(100 * WATCHDOG_PERIOD);
    wrmsr_safe(MSR_STIMER0_CONFIG, 0);
    wrmsr_safe(MSR_STIMER0_COUNT, start + 2 * MILLISECOND);
    wrmsr_safe(MSR_STIMER0_CONFIG, TIMER_SINT(SINT) | TIMER_ENABLE);
    idle();
    took = reference_time() - start;
    watchdog(WATCHDOG_PERIOD);
    expect_measured("autoeoi.wakes_halted_vp", "11.8.5", took, took < 500 * MILLISECOND, "within half a second");
    message_done(message_slot(SINT));
    take_interrupts();
}

static void on_other(void)
{
    begin();
    expire();
    if (comes(VECTOR, 1)) {
        message_done(message_slot(SINT));
        expire();
        others_good += comes(VECTOR, 2) && !this_vp()->in_service[VECTOR];
    }
    message_done(message_slot(SINT));
    end();
}

void test_autoeoi(void)
{
    if (!(privileges_eax & EAX_STIMER))
        return;
    end_of_interrupt[VECTOR] = EOI_BY_NOBODY;
    begin();
    no_eoi_needed();
    priorities();
    wakes();
    end();
    if (vp_count < 2) {
        skip("autoeoi.on_other_vps", "11.8.5", "needs 2 VPs");
        return;
    }
    for (u32 number = 1; number < vp_count; number++)
        vp_run(number, on_other);
    expect_equal("autoeoi.on_other_vps", "11.8.5", others_good, vp_count - 1);
}
