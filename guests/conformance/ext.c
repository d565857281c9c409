/* Extended hypercalls: the query for them. */
#include "kit.h"

#define CALL_BOOT_ZEROED_MEMORY 0x8002u
#define KNOWN 0x1full

void test_ext(void)
{
    u64 *output = (u64 *)(scratch + PAGE_SIZE), there = address_of(output);

    if (!(privileges_eax & EAX_HYPERCALL))
        return;
    hypercall_enable();
    if (!(privileges_ebx & EBX_EXT_HYPERCALLS)) {
        expect_not_offered("ext.not_offered", "4.2.2", CALL_EXT_QUERY);
        return;
    }
    *output = ~0ull;
    expect_equal("ext.query", "3.14.1", status_of(CALL_EXT_QUERY, 0, there), STATUS_SUCCESS);
    expect_equal("ext.reserved_bits", "3.14.1", *output & ~KNOWN, 0);
    if (!(*output & 1))
        expect_not_offered("ext.boot_zeroed_memory_not_offered", "3.14.1", CALL_BOOT_ZEROED_MEMORY);
    expect_equal("ext.misaligned_output", "3.6", status_of(CALL_EXT_QUERY, 0, there + 4), STATUS_INVALID_ALIGNMENT);
    expect_equal("ext.output_across_pages", "3.6", status_of(CALL_EXT_QUERY, 0, there - 4), STATUS_INVALID_ALIGNMENT);
    expect_equal("ext.rep_count", "3.12.3", status_of(CALL_EXT_QUERY | CALL_REPS(1), 0, there),
                 STATUS_INVALID_HYPERCALL_INPUT);
}
