/* Word from a VP that spins for a lock. */
#include "kit.h"

#define NEVER 0xffffffffu

void test_spinwait(void)
{
    u64 call = CALL_LONG_SPIN_WAIT;
    u32 regs[4];

    if (!(privileges_eax & EAX_HYPERCALL))
        return;
    hypercall_enable();
    cpuid(0x40000004, regs);
    if (regs[1] == NEVER) {
        expect_not_offered("spinwait.not_offered", "14.5.1", call | CALL_FAST);
        return;
    }
    expect_equal("spinwait.fast", "14.5.1", status_of(call | CALL_FAST, regs[1], 0), STATUS_SUCCESS);
    memset(scratch, 0, 16);
    expect_equal("spinwait.in_memory", "14.5.1", status_of(call, address_of(scratch), 0), STATUS_SUCCESS);
    expect_equal("spinwait.rep_count", "3.12.3", status_of(call | CALL_FAST | CALL_REPS(1), 1, 0),
                 STATUS_INVALID_HYPERCALL_INPUT);
}
