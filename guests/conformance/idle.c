/* Idling by MSR: a read waits for an interrupt, also with interrupts off as here. */
#include "kit.h"

#define SINT 7
#define VECTOR 0x72

void test_idle(void)
{
    u64 value, start, took;
    u32 before = this_vp()->interrupts[VECTOR];

    if (!(privileges_eax & EAX_GUEST_IDLE)) {
        expect_equal("idle.not_offered", "8.10", rdmsr_safe(MSR_GUEST_IDLE, &value), EXCEPTION_GP);
        return;
    }
    expect_equal("idle.not_writable", "7.5", wrmsr_safe(MSR_GUEST_IDLE, 0), EXCEPTION_GP);
    if (!(privileges_eax & EAX_STIMER)) {
        skip("idle.wakes", "7.5", "needs synthetic timers");
        return;
    }
    synic_enable();
    wrmsr_safe(MSR_SINT0 + SINT, VECTOR);
    start = reference_time();
    wrmsr_safe(MSR_STIMER0_COUNT, start + 2 * MILLISECOND);
    wrmsr_safe(MSR_STIMER0_CONFIG, TIMER_SINT(SINT) | TIMER_ENABLE);
    expect_equal("idle.readable", "7.5", rdmsr_safe(MSR_GUEST_IDLE, &value), 0);
    took = reference_time() - start;
    expect_measured("idle.wakes", "7.5", took, took < 500 * MILLISECOND, "within half a second");
    expect_equal("idle.interrupt_waits", "7.5", this_vp()->interrupts[VECTOR] - before, 0);
    WAIT_UNTIL(this_vp()->interrupts[VECTOR] != before, PATIENCE);
    expect_equal("idle.interrupt_comes", "7.5", this_vp()->interrupts[VECTOR] - before, 1);
    message_done(message_slot(SINT));
    synic_disable();
}
