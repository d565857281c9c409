/* TLB flushes by hypercall: what is refused, how repetitions are counted, and that another VP sees the new page. */
#include "kit.h"

#define FLUSH_ALL_PROCESSORS 1u
#define FLUSH_ALL_SPACES 2u
#define FLUSH_NON_GLOBAL 4u
#define FLUSH_EXTENDED_RANGE 8u
#define FLUSH_ALL (FLUSH_ALL_PROCESSORS | FLUSH_ALL_SPACES)

struct flush_input {
    u64 space, flags;
    u64 words[61]; /* a mask or a set, then ranges */
};

static struct flush_input *input = (struct flush_input *)scratch;

static u64 flush(u64 control, u64 flags, u64 first, u64 second, u64 third, u64 fourth)
{
    memset(input, 0, sizeof(*input));
    input->flags = flags;
    input->words[0] = first;
    input->words[1] = second;
    input->words[2] = third;
    input->words[3] = fourth;
    return hypercall(control, address_of(input), 0);
}

static u64 everybody(void)
{
    return vp_count == 64 ? ~0ull : (1ull << vp_count) - 1;
}

static u32 completed(u64 result)
{
    return result & 0xffff ? ~0u : (u32)(result >> 32 & 0xfff);
}

static void space(void)
{
    u64 call = CALL_FLUSH_SPACE, here = address_of(scratch);

    expect_equal("flush.space_all", "9.4.2", flush(call, FLUSH_ALL, 0, 0, 0, 0), STATUS_SUCCESS);
    expect_equal("flush.space_mask", "9.4.2", flush(call, FLUSH_ALL_SPACES, everybody(), 0, 0, 0), STATUS_SUCCESS);
    expect_equal("flush.space_non_global", "9.4.2", flush(call, FLUSH_ALL | FLUSH_NON_GLOBAL, 0, 0, 0, 0),
                 STATUS_SUCCESS);
    expect_equal("flush.space_empty_mask", "9.4.2", flush(call, FLUSH_ALL_SPACES, 0, 0, 0, 0),
                 STATUS_INVALID_PARAMETER);
    expect_equal("flush.space_reserved_flag", "9.4.2", flush(call, FLUSH_ALL | 1u << 4, 0, 0, 0, 0),
                 STATUS_INVALID_PARAMETER);
    expect_equal("flush.space_reserved_high_flag", "9.4.2", flush(call, FLUSH_ALL | 1ull << 63, 0, 0, 0, 0),
                 STATUS_INVALID_PARAMETER);
    memset(input, 0, sizeof(*input));
    input->space = 1ull << 60;
    input->flags = FLUSH_ALL_PROCESSORS;
    expect_equal("flush.space_of_no_cr3", "9.4.2", status_of(call, here, 0), STATUS_INVALID_PARAMETER);
    expect_equal("flush.space_rep_count", "3.12.3", flush(call | CALL_REPS(1), FLUSH_ALL, 0, 0, 0, 0),
                 STATUS_INVALID_HYPERCALL_INPUT);
    expect_equal("flush.space_variable_header", "3.7.1", flush(call | CALL_VARIABLE_HEADER(1), FLUSH_ALL, 0, 0, 0, 0),
                 STATUS_INVALID_HYPERCALL_INPUT);
    expect_equal("flush.space_misaligned", "3.6", status_of(call, here + 1, 0), STATUS_INVALID_ALIGNMENT);
    expect_equal("flush.space_across_pages", "3.6", status_of(call, here + PAGE_SIZE - 16, 0),
                 STATUS_INVALID_ALIGNMENT);
}

static void list(void)
{
    u64 call = CALL_FLUSH_LIST, here = address_of(scratch), mask = everybody();

    /* A range's low 12 bits are the number of pages after its first. */
    expect_equal("flush.list", "9.4.4",
                 completed(flush(call | CALL_REPS(3), FLUSH_ALL_SPACES, mask, 0x100000, 0x200fff, 0x300001)), 3);
    expect_equal("flush.list_from_start", "3.8",
                 completed(flush(call | CALL_REPS(3) | CALL_START(2), FLUSH_ALL, 0, 0x100000, 0x200000, 0x300000)), 3);
    expect_equal("flush.list_invalid_address_ignored", "9.4.4",
                 completed(flush(call | CALL_REPS(1), FLUSH_ALL, 0, 0x0f00000000000000ull, 0, 0)), 1);
    expect_equal("flush.list_longest", "9.4.4", completed(flush(call | CALL_REPS(509), FLUSH_ALL, 0, 0, 0, 0)), 509);
    expect_equal("flush.list_too_long", "3.6", flush(call | CALL_REPS(510), FLUSH_ALL, 0, 0, 0, 0),
                 STATUS_INVALID_ALIGNMENT);
    expect_equal("flush.list_no_reps", "3.12.3", flush(call, FLUSH_ALL, 0, 0, 0, 0) & 0xffff,
                 STATUS_INVALID_HYPERCALL_INPUT);
    expect_equal("flush.list_start_beyond_count", "3.12.3",
                 flush(call | CALL_REPS(2) | CALL_START(2), FLUSH_ALL, 0, 0, 0, 0) & 0xffff,
                 STATUS_INVALID_HYPERCALL_INPUT);
    expect_equal("flush.list_non_global", "9.4.4",
                 flush(call | CALL_REPS(1), FLUSH_ALL | FLUSH_NON_GLOBAL, 0, 0, 0, 0) & 0xffff,
                 STATUS_INVALID_PARAMETER);
    expect_equal("flush.list_empty_mask", "9.4.4", flush(call | CALL_REPS(1), FLUSH_ALL_SPACES, 0, 0, 0, 0) & 0xffff,
                 STATUS_INVALID_PARAMETER);
    if (privileges_edx & EDX_EXT_RANGES)
        expect_equal("flush.list_extended_range", "9.3.2",
                     completed(flush(call | CALL_REPS(1), FLUSH_ALL | FLUSH_EXTENDED_RANGE, 0, 0x200000, 0, 0)), 1);
    expect_equal("flush.list_misaligned", "3.6", status_of(call | CALL_REPS(1), here + 4, 0),
                 STATUS_INVALID_ALIGNMENT);
}

static void with_sets(void)
{
    u64 space_ex = CALL_FLUSH_SPACE_EX, list_ex = CALL_FLUSH_LIST_EX | CALL_REPS(1);
    u64 one_bank = CALL_VARIABLE_HEADER(1);
    u32 status;

    expect_equal("flush.space_ex_all", "7.8.7.3", flush(space_ex, FLUSH_ALL_SPACES, VP_SET_ALL, 0, 0, 0),
                 STATUS_SUCCESS);
    expect_equal("flush.space_ex_sparse", "9.4.3",
                 flush(space_ex | one_bank, FLUSH_ALL_SPACES, VP_SET_SPARSE, 1, everybody(), 0), STATUS_SUCCESS);
    expect_equal("flush.list_ex_all", "7.8.7.3",
                 completed(flush(list_ex, FLUSH_ALL_SPACES, VP_SET_ALL, 0, 0x100000, 0)), 1);
    expect_equal("flush.list_ex_sparse", "9.4.5",
                 completed(flush(list_ex | one_bank, FLUSH_ALL_SPACES, VP_SET_SPARSE, 1, everybody(), 0x100000)), 1);
    status = (u16)flush(space_ex | one_bank, FLUSH_ALL_SPACES, VP_SET_SPARSE, 3, 1, 1);
    expect("flush.space_ex_fewer_banks_than_said", "7.8.7.3", status,
           status == STATUS_INVALID_PARAMETER || status == STATUS_INVALID_HYPERCALL_INPUT, "3 or 5");
    status = (u16)flush(space_ex, FLUSH_ALL_SPACES, 2, 1, 1, 1);
    expect("flush.space_ex_unknown_format", "7.8.7.3", status,
           status == STATUS_INVALID_PARAMETER || status == STATUS_INVALID_HYPERCALL_INPUT, "3 or 5");
    expect_equal("flush.space_ex_reserved_flag", "9.4.3", flush(space_ex, FLUSH_ALL | 1u << 5, VP_SET_ALL, 0, 0, 0),
                 STATUS_INVALID_PARAMETER);
    if (privileges_edx & EDX_XMM_INPUT) {
        u64 xmm[12] = {everybody(), 0x100000, 0x200000};

        expect_equal("flush.list_xmm", "3.7.2",
                     completed(hypercall_xmm(CALL_FLUSH_LIST | CALL_FAST | CALL_REPS(2), 0, FLUSH_ALL_SPACES, xmm)),
                     2);
        expect_equal("flush.list_xmm_too_long", "3.7.2",
                     hypercall_xmm(CALL_FLUSH_LIST | CALL_FAST | CALL_REPS(12), 0, FLUSH_ALL, xmm) & 0xffff,
                     STATUS_INVALID_HYPERCALL_INPUT);
    }
}

#ifdef __x86_64__

/* An address beyond RAM whose large page gives way to a table. */
#define WINDOW 0x80000000u
#define PRESENT_WRITABLE 3u

extern u64 page_directory[];
static u64 window_table[512] __attribute__((aligned(4096)));
static u8 pages[2][PAGE_SIZE] __attribute__((aligned(4096)));
static volatile u32 seen_first, seen_last, phase;

/* Another VP: it looks through the window, stays in the guest, and looks again when it is told to. */
static void look_twice(void)
{
    seen_first = *(volatile u32 *)WINDOW;
    phase = 1;
    for (u64 deadline = rdtsc() + PATIENCE * tsc_per_ms; phase != 2 && rdtsc() < deadline;)
        __asm__ volatile("pause");
    seen_last = *(volatile u32 *)WINDOW;
}

static bool seen_anew(u64 control, u64 flags, u64 first, u64 second, u64 third, u64 fourth)
{
    static u32 current;
    u32 old = current, next = !current;

    window_table[0] = address_of(pages[old]) | PRESENT_WRITABLE;
    __asm__ volatile("invlpg (%0)" : : "r"((ulong)WINDOW) : "memory");
    phase = 0;
    vp_begin(vp_count - 1, look_twice);
    WAIT_UNTIL(phase == 1, PATIENCE);
    window_table[0] = address_of(pages[next]) | PRESENT_WRITABLE;
    flush(control, flags, first, second, third, fourth);
    phase = 2;
    current = next;
    return vp_finished(vp_count - 1) && seen_first == old + 1 && seen_last == next + 1;
}

static void really(void)
{
    u64 last = 1ull << (vp_count - 1), one_bank = CALL_VARIABLE_HEADER(1);
    u64 space;

    if (vp_count < 2) {
        skip("flush.seen_by_other_vp", "9.4.2", "needs 2 VPs");
        return;
    }
    page_directory[WINDOW >> 21] = address_of(window_table) | PRESENT_WRITABLE;
    pages[0][0] = 1;
    pages[1][0] = 2;
    __asm__ volatile("mov %%cr3, %0\nmov %0, %%cr3" : "=r"(space) : : "memory");
    expect_equal("flush.seen_by_other_vp", "9.4.2", seen_anew(CALL_FLUSH_SPACE, FLUSH_ALL_SPACES, last, 0, 0, 0), 1);
    expect_equal("flush.all_seen_by_other_vp", "9.4.2", seen_anew(CALL_FLUSH_SPACE, FLUSH_ALL, 0, 0, 0, 0), 1);
    expect_equal("flush.list_seen_by_other_vp", "9.4.4",
                 seen_anew(CALL_FLUSH_LIST | CALL_REPS(1), FLUSH_ALL_SPACES, last, WINDOW, 0, 0), 1);
    if (hints & HINT_EX_MASKS) {
        expect_equal("flush.ex_seen_by_other_vp", "9.4.3",
                     seen_anew(CALL_FLUSH_SPACE_EX | one_bank, FLUSH_ALL_SPACES, VP_SET_SPARSE, 1, last, 0), 1);
        expect_equal("flush.list_ex_seen_by_other_vp", "9.4.5",
                     seen_anew(CALL_FLUSH_LIST_EX | one_bank | CALL_REPS(1), FLUSH_ALL_SPACES, VP_SET_SPARSE, 1, last,
                               WINDOW),
                     1);
    }
}

#else

static void really(void)
{
    skip("flush.seen_by_other_vp", "9.4.2", "runs without paging");
}

#endif

void test_flush(void)
{
    if (!(privileges_eax & EAX_HYPERCALL))
        return;
    hypercall_enable();
    if (!(hints & HINT_REMOTE_FLUSH)) {
        memset(scratch, 0, 64);
        input->flags = FLUSH_ALL;
        expect_not_offered("flush.space_not_offered", "9.4.2", CALL_FLUSH_SPACE);
        expect_not_offered("flush.list_not_offered", "9.4.4", CALL_FLUSH_LIST | CALL_REPS(1));
        expect_not_offered("flush.space_ex_not_offered", "9.4.3", CALL_FLUSH_SPACE_EX);
        expect_not_offered("flush.list_ex_not_offered", "9.4.5", CALL_FLUSH_LIST_EX | CALL_REPS(1));
        return;
    }
    space();
    list();
    if (hints & HINT_EX_MASKS)
        with_sets();
    really();
}
