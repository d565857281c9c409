/* Reference time by MSR and by page, frequencies, runtime. */
#include "kit.h"

#define RUNS 20
#define BEYOND_GPA_SPACE 0xffffffffff000ull

struct reference_tsc reference_tsc_page __attribute__((aligned(4096)));

static u64 other_by_msr, other_by_page;

/* The upper half of a product of 128 bits. */
static u64 multiply_high(u64 a, u64 b)
{
    u64 low = (u64)(u32)a * (u32)b;
    u64 middle = (a >> 32) * (u32)b + (low >> 32);
    u64 other = (u64)(u32)a * (b >> 32) + (u32)middle;

    return (a >> 32) * (b >> 32) + (middle >> 32) + (other >> 32);
}

u64 reference_page_time(void)
{
    u32 sequence;
    u64 time;

    do {
        sequence = reference_tsc_page.sequence;
        if (!sequence)
            return reference_time();
        time = multiply_high(rdtsc(), reference_tsc_page.scale) + reference_tsc_page.offset;
    } while (sequence != reference_tsc_page.sequence);
    return time;
}

static void read_on_other(void)
{
    if (privileges_eax & EAX_TIME_REF_COUNT)
        other_by_msr = reference_time();
    if (privileges_eax & EAX_REFERENCE_TSC)
        other_by_page = reference_page_time();
}

static void counter(void)
{
    u64 last = reference_time(), now;
    u32 rising = 0;

    for (u32 i = 0; i < RUNS; i++) {
        now = reference_time();
        rising += now > last;
        last = now;
    }
    expect_equal("time.counter_rises", "12.1.2", rising, RUNS);
    expect_equal("time.counter_readonly", "12.4.1", wrmsr_safe(MSR_TIME_REF_COUNT, 0), EXCEPTION_GP);
}

static void page(void)
{
    u64 gpa = address_of(&reference_tsc_page) | 1, before, between, after;
    u32 agree = 0;

    expect_equal("time.page_at_reset", "12.7.1", rdmsr(MSR_REFERENCE_TSC), 0);
    memset(&reference_tsc_page, 0xff, sizeof(reference_tsc_page));
    wrmsr_safe(MSR_REFERENCE_TSC, gpa);
    expect_equal("time.page_reads_back", "12.7.1", rdmsr(MSR_REFERENCE_TSC), gpa);
    expect("time.page_sequence", "12.7.3.2", reference_tsc_page.sequence,
           reference_tsc_page.sequence && reference_tsc_page.sequence != ~0u,
           "a sequence that says the page is valid");
    for (u32 i = 0; i < RUNS; i++) {
        before = reference_page_time();
        between = reference_time();
        after = reference_page_time();
        /* One tick of rounding on each side, for the scale has only 64 bits. */
        agree += before <= between + 1 && between <= after + 1;
    }
    expect_equal("time.page_agrees_with_counter", "12.7.3", agree, RUNS);
    wrmsr_safe(MSR_REFERENCE_TSC, 0);
    expect_equal("time.page_disabled", "12.7.1", rdmsr(MSR_REFERENCE_TSC) & 1, 0);
    /* A page that nobody sees: the write may be taken or refused, and another place works after it. */
    wrmsr_safe(MSR_REFERENCE_TSC, BEYOND_GPA_SPACE | 1);
    memset(&reference_tsc_page, 0xff, sizeof(reference_tsc_page));
    wrmsr_safe(MSR_REFERENCE_TSC, gpa);
    expect_equal("time.page_after_beyond_gpa_space", "12.7.1", reference_tsc_page.sequence != ~0u, 1);
}

/* The TSC against the reference counter over 20 ms and more. Each reading of the counter is between two of the TSC,
 * so that it does not matter how long an exit takes. Both sides are scaled to do without a 64-bit division.
 */
static void rate(u64 hertz)
{
    u64 tsc[4], start, time, expected;

    tsc[0] = rdtsc();
    start = reference_time();
    tsc[1] = rdtsc();
    while (reference_time() - start < 20 * MILLISECOND)
        ;
    tsc[2] = rdtsc();
    time = reference_time() - start;
    tsc[3] = rdtsc();
    expected = time * (hertz >> 7);
    expect_measured("time.tsc_frequency_is_the_rate", "2.4.4", tsc[2] - tsc[1],
                    (tsc[2] - tsc[1]) * (10000000 >> 7) < expected + (expected >> 8) &&
                        (tsc[3] - tsc[0]) * (10000000 >> 7) > expected - (expected >> 8),
                    "the reference counter's");
}

static void frequencies(void)
{
    u64 hertz = rdmsr(MSR_TSC_FREQUENCY);

    expect_measured("time.tsc_frequency", "2.4.4", hertz, hertz > 100000000 && hertz < 10000000000, "0.1 to 10 GHz");
    if (privileges_eax & EAX_TIME_REF_COUNT)
        rate(hertz);
    hertz = rdmsr(MSR_APIC_FREQUENCY);
    expect_measured("time.apic_frequency", "2.4.4", hertz, hertz > 1000000 && hertz < 10000000000, "1 MHz to 10 GHz");
    expect_equal("time.tsc_frequency_readonly", "2.4.4", wrmsr_safe(MSR_TSC_FREQUENCY, 1), EXCEPTION_GP);
    expect_equal("time.apic_frequency_readonly", "2.4.4", wrmsr_safe(MSR_APIC_FREQUENCY, 1), EXCEPTION_GP);
}

static void runtime(void)
{
    u64 first = rdmsr(MSR_VP_RUNTIME), second = rdmsr(MSR_VP_RUNTIME);

    expect_measured("time.runtime", "7.9.1", second, first && second >= first, "rising, not 0");
    expect_equal("time.runtime_readonly", "7.9.1", wrmsr_safe(MSR_VP_RUNTIME, 1), EXCEPTION_GP);
}

/* One time for all VPs: what another reads lies between what this one reads before and after. */
static void other_vps(void)
{
    u32 by_msr = 0, by_page = 0;

    if (vp_count < 2) {
        skip("time.same_on_all_vps", "12.1.2", "needs 2 VPs");
        return;
    }
    for (u32 number = 1; number < vp_count; number++) {
        u64 before = reference_time(), page_before = reference_page_time(), after, page_after;

        vp_run(number, read_on_other);
        after = reference_time();
        page_after = reference_page_time();
        by_msr += before < other_by_msr && other_by_msr < after;
        by_page += page_before < other_by_page && other_by_page < page_after;
    }
    if (privileges_eax & EAX_TIME_REF_COUNT)
        expect_equal("time.same_on_all_vps", "12.1.2", by_msr, vp_count - 1);
    if (privileges_eax & EAX_REFERENCE_TSC)
        expect_equal("time.page_same_on_all_vps", "12.7.3", by_page, vp_count - 1);
}

void test_time(void)
{
    if (privileges_eax & EAX_TIME_REF_COUNT)
        counter();
    if (privileges_eax & EAX_REFERENCE_TSC)
        page();
    if (privileges_eax & EAX_FREQUENCY)
        frequencies();
    if (privileges_eax & EAX_VP_RUNTIME)
        runtime();
    if (privileges_eax & (EAX_TIME_REF_COUNT | EAX_REFERENCE_TSC))
        other_vps();
}
