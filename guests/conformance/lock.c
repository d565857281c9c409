/* The hypercall MSR, locked: the page stays where it is and goes on working. */
#include "kit.h"

#define ENABLE 1u
#define LOCKED 2u

static u8 other_page[PAGE_SIZE] __attribute__((aligned(4096)));

void test_lock(void)
{
    u64 locked = address_of(hypercall_page) | LOCKED | ENABLE;
    u32 vector;

    if (!(privileges_eax & EAX_HYPERCALL))
        return;
    hypercall_enable();
    wrmsr_safe(MSR_HYPERCALL, locked);
    expect_equal("lock.reads_back", "3.13", rdmsr(MSR_HYPERCALL) == locked, 1);
    /* Whether a write faults or is ignored is not said. */
    vector = wrmsr_safe(MSR_HYPERCALL, address_of(other_page) | ENABLE);
    expect("lock.page_cannot_move", "3.13", vector, rdmsr(MSR_HYPERCALL) == locked, "the same value");
    vector = wrmsr_safe(MSR_HYPERCALL, 0);
    expect("lock.page_cannot_go", "3.13", vector, rdmsr(MSR_HYPERCALL) == locked, "the same value");
    expect_equal("lock.page_works", "3.13", status_of(0x3fff, 0, 0), STATUS_INVALID_HYPERCALL_CODE);
}
