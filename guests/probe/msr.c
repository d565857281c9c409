/* Synthetic MSRs, TLFS v6.0b: reset values, what a write does, and where a guest must get #GP. */
#include "probe.h"

#define ENABLE 1ull
#define RESERVED 0xffcull /* bits of the hypercall MSR */

static u8 assist_page[PAGE_SIZE] __attribute__((aligned(4096)));

static void expect_read_fault(const char *name, u32 msr)
{
    u64 value;
    expect_equal(name, rdmsr_safe(msr, &value), EXCEPTION_GP);
}

static void expect_write_fault(const char *name, u32 msr, u64 value)
{
    expect_equal(name, wrmsr_safe(msr, value), EXCEPTION_GP);
}

static void hypercall_msrs(void)
{
    u64 page = address_of(hypercall_page), faulted;

    expect_equal("msr.guest_os_id_at_reset", rdmsr(MSR_GUEST_OS_ID), 0);
    wrmsr_safe(MSR_HYPERCALL, page | ENABLE);
    expect_equal("msr.hypercall_without_os_id", rdmsr(MSR_HYPERCALL) & ENABLE, 0);
    wrmsr_safe(MSR_GUEST_OS_ID, GUEST_OS_ID);
    expect_equal("msr.guest_os_id", rdmsr(MSR_GUEST_OS_ID), GUEST_OS_ID);
    wrmsr_safe(MSR_HYPERCALL, page | ENABLE);
    expect_equal("msr.hypercall", rdmsr(MSR_HYPERCALL), page | ENABLE);
    expect("msr.hypercall_page", *(volatile u32 *)hypercall_page, !all_zero(hypercall_page, 64), "code");
    wrmsr_safe(MSR_GUEST_OS_ID, 0);
    expect_equal("msr.hypercall_os_id_cleared", rdmsr(MSR_HYPERCALL) & ENABLE, 0);
    wrmsr_safe(MSR_GUEST_OS_ID, GUEST_OS_ID);
    wrmsr_safe(MSR_HYPERCALL, page | ENABLE);
    expect_write_fault("msr.hypercall_beyond_gpa_space", MSR_HYPERCALL, 0xffffffffff000 | ENABLE);
    /* The TLFS says that reserved bits are to be preserved, not what happens otherwise: #GP (Hyper-V) or nothing. */
    faulted = wrmsr_safe(MSR_HYPERCALL, page | ENABLE | 1 << 8);
    expect("msr.hypercall_reserved_bit", faulted, (rdmsr(MSR_HYPERCALL) & ~RESERVED) == (page | ENABLE),
           "page still enabled");
    wrmsr_safe(MSR_HYPERCALL, page | ENABLE);
}

static void time_msrs(void)
{
    u64 hertz, runtime;

    if (privileges_eax & EAX_TIME_REF_COUNT) {
        u64 first = reference_time(), second = reference_time(), third = reference_time();
        expect("msr.time_ref_count", third - first, first < second && second < third && third - first < 10000000,
               "rising");
    }
    if (privileges_eax & EAX_REFERENCE_TSC) {
        u64 page = address_of(&reference_tsc_page) | ENABLE, before, between, after;

        wrmsr_safe(MSR_REFERENCE_TSC, page);
        expect_equal("msr.reference_tsc", rdmsr(MSR_REFERENCE_TSC), page);
        expect("msr.reference_tsc_sequence", reference_tsc_page.sequence, reference_tsc_page.sequence != 0, "not 0");
        before = reference_page_time();
        between = reference_time();
        after = reference_page_time();
        /* One tick of rounding on each side, for scale is cut to 64 bits. */
        expect("msr.reference_tsc_agrees", between - before, before <= between + 1 && between <= after + 1,
               "between page time before and after");
    }
    if (privileges_eax & EAX_FREQUENCY) {
        hertz = rdmsr(MSR_TSC_FREQUENCY);
        expect("msr.tsc_frequency", hertz, hertz > 100000000 && hertz < 10000000000, "0.1 to 10 GHz");
        hertz = rdmsr(MSR_APIC_FREQUENCY);
        expect("msr.apic_frequency", hertz, hertz > 1000000 && hertz < 10000000000, "1 MHz to 10 GHz");
        expect_write_fault("msr.tsc_frequency_readonly", MSR_TSC_FREQUENCY, 1);
    }
    if (privileges_eax & EAX_VP_RUNTIME) {
        runtime = rdmsr(MSR_VP_RUNTIME);
        expect("msr.vp_runtime", runtime, runtime && rdmsr(MSR_VP_RUNTIME) >= runtime, "rising, not 0");
    }
}

static void synic_msrs(void)
{
    u64 masked = 0;

    expect_equal("msr.scontrol_at_reset", rdmsr(MSR_SCONTROL), 0);
    expect_equal("msr.sversion", rdmsr(MSR_SVERSION), 1);
    expect_equal("msr.siefp_at_reset", rdmsr(MSR_SIEFP), 0);
    expect_equal("msr.simp_at_reset", rdmsr(MSR_SIMP), 0);
    expect_equal("msr.eom", wrmsr_safe(MSR_EOM, 0), 0);
    for (u32 sint = 0; sint < 16; sint++)
        masked += rdmsr(MSR_SINT0 + sint) == SINT_MASKED;
    expect_equal("msr.sints_masked_at_reset", masked, 16);
    expect_write_fault("msr.sint_vector_below_16", MSR_SINT0 + 5, 15);
    wrmsr_safe(MSR_SINT0 + 5, SINT_MASKED | 0x55);
    expect_equal("msr.sint", rdmsr(MSR_SINT0 + 5), SINT_MASKED | 0x55);
    wrmsr_safe(MSR_SINT0 + 5, SINT_MASKED);
    expect_write_fault("msr.sversion_readonly", MSR_SVERSION, 1);
}

static void stimer_msrs(void)
{
    u64 at_reset = 0;

    for (u32 i = 0; i < 8; i++)
        at_reset |= rdmsr(MSR_STIMER0_CONFIG + i);
    expect_equal("msr.stimers_at_reset", at_reset, 0);
    wrmsr_safe(MSR_STIMER0_COUNT + 6, 0x123456789);
    expect_equal("msr.stimer_count", rdmsr(MSR_STIMER0_COUNT + 6), 0x123456789);
    wrmsr_safe(MSR_STIMER0_COUNT + 6, 0);
    /* Periodic, lazy, SINT 4; not enabled. */
    wrmsr_safe(MSR_STIMER0_CONFIG + 6, 4 << 16 | 6);
    expect_equal("msr.stimer_config", rdmsr(MSR_STIMER0_CONFIG + 6), 4 << 16 | 6);
    wrmsr_safe(MSR_STIMER0_CONFIG + 6, 0);
}

static void crash_msrs(void)
{
    u64 kept = 0;

    for (u32 i = 0; i < 5; i++)
        wrmsr_safe(MSR_CRASH_P0 + i, 0x1111111111 * (i + 1));
    for (u32 i = 0; i < 5; i++)
        kept += rdmsr(MSR_CRASH_P0 + i) == 0x1111111111 * (i + 1);
    expect_equal("msr.crash_parameters", kept, 5);
    expect_equal("msr.crash_control", rdmsr(MSR_CRASH_CTL) >> 63, 1);
}

/* Advertised means readable, not advertised means #GP. Reading GUEST_IDLE would halt, so it is not here. */
static void access_follows_privileges(void)
{
    static const struct {
        u32 privilege, msr;
    } table[] = {
        {EAX_VP_RUNTIME, MSR_VP_RUNTIME},     {EAX_TIME_REF_COUNT, MSR_TIME_REF_COUNT},
        {EAX_SYNIC, MSR_SCONTROL},            {EAX_STIMER, MSR_STIMER0_CONFIG},
        {EAX_APIC, MSR_TPR},                  {EAX_HYPERCALL, MSR_HYPERCALL},
        {EAX_VP_INDEX, MSR_VP_INDEX},         {EAX_RESET, MSR_RESET},
        {EAX_REFERENCE_TSC, MSR_REFERENCE_TSC}, {EAX_FREQUENCY, MSR_TSC_FREQUENCY},
    };
    u64 differ = 0, value;

    for (u32 i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        bool readable = !rdmsr_safe(table[i].msr, &value);
        if (readable != !!(privileges_eax & table[i].privilege))
            differ |= table[i].privilege;
    }
    expect_equal("msr.access_unlike_privileges", differ, 0);
}

void probe_msrs(void)
{
    u64 page = address_of(assist_page) | ENABLE;

    if (privileges_eax & EAX_HYPERCALL)
        hypercall_msrs();
    if (privileges_eax & EAX_VP_INDEX) {
        expect_equal("msr.vp_index", rdmsr(MSR_VP_INDEX), 0);
        expect_write_fault("msr.vp_index_readonly", MSR_VP_INDEX, 1);
    }
    time_msrs();
    if (privileges_eax & EAX_TIME_REF_COUNT)
        expect_write_fault("msr.time_ref_count_readonly", MSR_TIME_REF_COUNT, 1);
    /* Linux writes it on every VP, whatever the privileges say (arch/x86/hyperv/hv_init.c). */
    wrmsr_safe(MSR_VP_ASSIST_PAGE, page);
    expect_equal("msr.vp_assist_page", rdmsr(MSR_VP_ASSIST_PAGE), page);
    if (privileges_eax & EAX_SYNIC)
        synic_msrs();
    if (privileges_eax & EAX_STIMER)
        stimer_msrs();
    if (privileges_edx & EDX_CRASH)
        crash_msrs();
    expect_read_fault("msr.unknown_read", 0x400001f0);
    expect_write_fault("msr.unknown_write", 0x400001f0, 0);
    access_follows_privileges();
}
