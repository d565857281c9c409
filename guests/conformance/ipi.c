/* Interrupts to many VPs by hypercall: by mask and by sparse set, in memory, in registers and in XMM registers. */
#include "kit.h"

#define VECTOR 0x90

struct ipi_input {
    u32 vector;
    u8 vtl;
    u8 reserved[3];
    u64 set[4]; /* a mask; or format, mask of banks, banks */
};

static struct ipi_input *fill(u32 vector, u64 first, u64 second, u64 third)
{
    struct ipi_input *input = (struct ipi_input *)scratch;

    *input = (struct ipi_input){.vector = vector, .set = {first, second, third, third}};
    return input;
}

static u64 everybody(void)
{
    return vp_count == 64 ? ~0ull : (1ull << vp_count) - 1;
}

/* Whether every VP gets one more interrupt than `before`, and none gets two. */
static u32 arrivals(const u32 *before, u64 set)
{
    u32 good = 0;

    for (u32 number = 0; number < vp_count; number++) {
        u32 wanted = before[number] + (u32)(set >> number & 1);
        good += WAIT_UNTIL(vp_at(number)->interrupts[VECTOR] == wanted, PATIENCE);
    }
    return good;
}

static void count(u32 *before)
{
    take_interrupts();
    for (u32 number = 0; number < vp_count; number++)
        before[number] = vp_at(number)->interrupts[VECTOR];
}

static void by_mask(void)
{
    static u32 before[MAX_VPS];
    u64 fast = CALL_SEND_IPI | CALL_FAST, here = address_of(scratch), last = 1ull << (vp_count - 1);
    u32 status;

    count(before);
    expect_equal("ipi.to_self", "10.5.2", status_of(fast, VECTOR, 1), STATUS_SUCCESS);
    expect_equal("ipi.to_self_arrives", "10.5.2", arrivals(before, 1), vp_count);
    count(before);
    fill(VECTOR, last, 0, 0);
    expect_equal("ipi.in_memory", "10.5.2", status_of(CALL_SEND_IPI, here, 0), STATUS_SUCCESS);
    expect_equal("ipi.in_memory_arrives", "10.5.2", arrivals(before, last), vp_count);
    count(before);
    status_of(fast, VECTOR, everybody());
    expect_equal("ipi.to_all_arrives", "10.5.2", arrivals(before, everybody()), vp_count);

    count(before);
    expect_equal("ipi.vector_15", "10.5.2", status_of(fast, 15, 1), STATUS_INVALID_PARAMETER);
    expect_equal("ipi.vector_256", "10.5.2", status_of(fast, 0x100 | VECTOR, 1), STATUS_INVALID_PARAMETER);
    status = status_of(fast, VECTOR | 1ull << 32, 1);
    expect("ipi.vtl_1", "10.5.2", status, status != STATUS_SUCCESS, "an error: there is only VTL 0");
    expect_equal("ipi.rep_count", "3.12.3", status_of(fast | CALL_REPS(1), VECTOR, 1), STATUS_INVALID_HYPERCALL_INPUT);
    expect_equal("ipi.variable_header", "3.7.1", status_of(fast | CALL_VARIABLE_HEADER(1), VECTOR, 1),
                 STATUS_INVALID_HYPERCALL_INPUT);
    fill(VECTOR, 1, 0, 0);
    expect_equal("ipi.misaligned", "3.6", status_of(CALL_SEND_IPI, here + 4, 0), STATUS_INVALID_ALIGNMENT);
    expect_equal("ipi.across_pages", "3.6", status_of(CALL_SEND_IPI, here + PAGE_SIZE - 8, 0),
                 STATUS_INVALID_ALIGNMENT);
    expect_equal("ipi.refused_ones_stay_away", "10.5.2", arrivals(before, 0), vp_count);
}

static void by_set(void)
{
    static u32 before[MAX_VPS];
    u64 call = CALL_SEND_IPI_EX, sparse = call | CALL_VARIABLE_HEADER(1), here = address_of(scratch);
    u32 status;

    count(before);
    fill(VECTOR, VP_SET_ALL, 0, 0);
    expect_equal("ipi.ex_all", "10.5.3", status_of(call, here, 0), STATUS_SUCCESS);
    expect_equal("ipi.ex_all_arrives", "7.8.7.3", arrivals(before, everybody()), vp_count);
    count(before);
    fill(VECTOR, VP_SET_SPARSE, 1, 1ull << (vp_count - 1));
    expect_equal("ipi.ex_sparse", "10.5.3", status_of(sparse, here, 0), STATUS_SUCCESS);
    expect_equal("ipi.ex_sparse_arrives", "7.8.7.3", arrivals(before, 1ull << (vp_count - 1)), vp_count);
    count(before);
    fill(VECTOR, VP_SET_SPARSE, 3, 1ull);
    ((struct ipi_input *)scratch)->set[3] = ~0ull; /* bank 1: VPs that do not exist, or at least are not here */
    status_of(call | CALL_VARIABLE_HEADER(2), here, 0);
    expect_equal("ipi.ex_two_banks_arrives", "7.8.7.3", arrivals(before, 1), vp_count);
    if (privileges_edx & EDX_XMM_INPUT) {
        u64 banks[12] = {1, everybody()};

        count(before);
        expect_equal("ipi.ex_xmm", "3.7.2", hypercall_xmm(sparse | CALL_FAST, VECTOR, VP_SET_SPARSE, banks) & 0xffff,
                     STATUS_SUCCESS);
        expect_equal("ipi.ex_xmm_kept", "3.9", xmm_kept, 1);
        expect_equal("ipi.ex_xmm_arrives", "3.7.2", arrivals(before, everybody()), vp_count);
    }
    count(before);
    fill(15, VP_SET_ALL, 0, 0);
    expect_equal("ipi.ex_vector_15", "10.5.3", status_of(call, here, 0), STATUS_INVALID_PARAMETER);
    fill(VECTOR, 2, 1, 1);
    status = status_of(sparse, here, 0);
    expect("ipi.ex_unknown_format", "7.8.7.3", status,
           status == STATUS_INVALID_PARAMETER || status == STATUS_INVALID_HYPERCALL_INPUT, "3 or 5");
    fill(VECTOR, VP_SET_SPARSE, 3, 1);
    status = status_of(sparse, here, 0);
    expect("ipi.ex_fewer_banks_than_said", "7.8.7.3", status,
           status == STATUS_INVALID_PARAMETER || status == STATUS_INVALID_HYPERCALL_INPUT, "3 or 5");
    expect_equal("ipi.ex_refused_ones_stay_away", "10.5.3", arrivals(before, 0), vp_count);
}

void test_ipi(void)
{
    if (!(privileges_eax & EAX_HYPERCALL))
        return;
    hypercall_enable();
    if (!(hints & HINT_CLUSTER_IPI)) {
        fill(VECTOR, 1, 0, 0);
        expect_not_offered("ipi.not_offered", "10.5.2", CALL_SEND_IPI);
        expect_not_offered("ipi.ex_not_offered", "10.5.3", CALL_SEND_IPI_EX);
        return;
    }
    by_mask();
    if (hints & HINT_EX_MASKS)
        by_set();
}
