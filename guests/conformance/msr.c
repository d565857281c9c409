/* Synthetic MSRs: reset values, what a write does, where a guest must get #GP, and that CPUID tells which there are. */
#include "kit.h"

#define ENABLE 1ull
#define LOCKED 2ull
#define BEYOND_GPA_SPACE 0xffffffffff000ull

static u8 assist_page[PAGE_SIZE] __attribute__((aligned(4096)));
static u8 other_page[PAGE_SIZE] __attribute__((aligned(4096)));
static u64 other_os_id, other_hypercall, other_index;

static void guest_os_id(void)
{
    u64 page = address_of(hypercall_page);

    wrmsr_safe(MSR_GUEST_OS_ID, 0);
    wrmsr_safe(MSR_HYPERCALL, page | ENABLE);
    expect_equal("msr.hypercall_without_os_id", "3.13", rdmsr(MSR_HYPERCALL) & ENABLE, 0);
    wrmsr_safe(MSR_GUEST_OS_ID, GUEST_OS_ID);
    expect_equal("msr.guest_os_id", "2.6", rdmsr(MSR_GUEST_OS_ID), GUEST_OS_ID);
    wrmsr_safe(MSR_HYPERCALL, page | ENABLE);
    expect_equal("msr.hypercall", "3.13", rdmsr(MSR_HYPERCALL), page | ENABLE);
    expect("msr.hypercall_page", "3.13", !all_zero(hypercall_page, 64), !all_zero(hypercall_page, 64), "code");
    wrmsr_safe(MSR_GUEST_OS_ID, 0);
    expect_equal("msr.os_id_cleared", "3.13", rdmsr(MSR_HYPERCALL) & ENABLE, 0);
    hypercall_enable();
}

static void hypercall_msr(void)
{
    u64 page = address_of(hypercall_page);
    u32 vector;

    expect_equal("msr.hypercall_beyond_gpa_space", "3.13", wrmsr_safe(MSR_HYPERCALL, BEYOND_GPA_SPACE | ENABLE),
                 EXCEPTION_GP);
    expect_equal("msr.hypercall_stays", "3.13", rdmsr(MSR_HYPERCALL), page | ENABLE);
    /* To be preserved, says the TLFS, not what happens otherwise: #GP as on Hyper-V, or nothing. */
    vector = wrmsr_safe(MSR_HYPERCALL, page | ENABLE | 1 << 8);
    expect("msr.hypercall_reserved_bit", "3.13", vector, (rdmsr(MSR_HYPERCALL) & ~0xffcull) == (page | ENABLE),
           "page still enabled");
    /* An overlay: what was below comes back, and another place has the code at once. */
    memset(other_page, 0x5a, PAGE_SIZE);
    wrmsr_safe(MSR_HYPERCALL, address_of(other_page) | ENABLE);
    expect_equal("msr.hypercall_moved", "3.13", rdmsr(MSR_HYPERCALL), address_of(other_page) | ENABLE);
    expect_equal("msr.hypercall_page_moved", "5.2.1", other_page[0] != 0x5a, 1);
    wrmsr_safe(MSR_HYPERCALL, page | ENABLE);
    expect_equal("msr.hypercall_page_uncovers", "5.2.1", other_page[0] == 0x5a, 1);
    wrmsr_safe(MSR_HYPERCALL, 0);
    expect_equal("msr.hypercall_disabled", "3.13", rdmsr(MSR_HYPERCALL) & ENABLE, 0);
    hypercall_enable();
}

static void read_on_other(void)
{
    other_os_id = rdmsr(MSR_GUEST_OS_ID);
    other_hypercall = rdmsr(MSR_HYPERCALL);
    other_index = rdmsr(MSR_VP_INDEX);
}

static void other_vps(void)
{
    u32 indices = 1, shared = 0;

    if (vp_count < 2) {
        skip("msr.hypercall_is_partition_wide", "3.13", "needs 2 VPs");
        return;
    }
    for (u32 number = 1; number < vp_count; number++) {
        vp_run(number, read_on_other);
        shared += other_os_id == GUEST_OS_ID && other_hypercall == (address_of(hypercall_page) | ENABLE);
        if (other_index < vp_count)
            indices |= 1u << (other_index & 31);
    }
    expect_equal("msr.hypercall_is_partition_wide", "3.13", shared, vp_count - 1);
    if (vp_count < 32 && (privileges_eax & EAX_VP_INDEX))
        expect_equal("msr.vp_indices", "7.2", indices, (1u << vp_count) - 1);
}

static void assist_page_msr(void)
{
    u64 page = address_of(assist_page) | ENABLE, value;
    u32 word;

    /* Linux writes it whatever the privileges say (arch/x86/hyperv/hv_init.c), so it may be there without them. */
    if (!(privileges_eax & EAX_APIC) && rdmsr_safe(MSR_VP_ASSIST_PAGE, &value)) {
        skip("msr.vp_assist_page", "7.8.7.1", "not offered");
        return;
    }
    expect_equal("msr.vp_assist_page_at_reset", "7.8.7.1", rdmsr(MSR_VP_ASSIST_PAGE), 0);
    memset(assist_page, 0xff, PAGE_SIZE);
    wrmsr_safe(MSR_VP_ASSIST_PAGE, page);
    expect_equal("msr.vp_assist_page", "7.8.7.1", rdmsr(MSR_VP_ASSIST_PAGE), page);
    memcpy(&word, assist_page, sizeof(word));
    expect_equal("msr.vp_assist_page_saves_no_eoi_yet", "10.3.5", word, 0);
    wrmsr_safe(MSR_VP_ASSIST_PAGE, 0);
    expect_equal("msr.vp_assist_page_disabled", "7.8.7.1", rdmsr(MSR_VP_ASSIST_PAGE), 0);
}

static void crash_msrs(void)
{
    u64 kept = 0;

    for (u32 i = 0; i < 5; i++)
        wrmsr_safe(MSR_CRASH_P0 + i, 0x1111111111 * (i + 1));
    for (u32 i = 0; i < 5; i++)
        kept += rdmsr(MSR_CRASH_P0 + i) == 0x1111111111 * (i + 1);
    expect_equal("msr.crash_parameters", "4.3.2", kept, 5);
    expect_equal("msr.crash_control", "4.3.2", rdmsr(MSR_CRASH_CTL) >> 63, 1);
    /* A write without the notify bit reports nothing. */
    expect_equal("msr.crash_control_write_0", "4.3.2", wrmsr_safe(MSR_CRASH_CTL, 0), 0);
    for (u32 i = 0; i < 5; i++)
        wrmsr_safe(MSR_CRASH_P0 + i, 0);
}

static void reset_msr(void)
{
    expect_equal("msr.reset_reads_0", "2.4.4", rdmsr(MSR_RESET), 0);
    expect_equal("msr.reset_write_0", "2.4.4", wrmsr_safe(MSR_RESET, 0), 0);
}

/* #GP or nothing: the bad value is not there afterwards. */
static void expect_refused(const char *name, const char *section, u32 msr, u64 value)
{
    u32 vector = wrmsr_safe(msr, value);

    expect(name, section, vector, rdmsr(msr) != value, "refused");
    wrmsr_safe(msr, 0);
}

static void reenlightenment(void)
{
    u64 good = 0x10000 | 0xee | (u64)(vp_count - 1) << 32;

    expect_equal("msr.reenlightenment_at_reset", "16.6.1", rdmsr(MSR_REENLIGHTENMENT_CONTROL), 0);
    wrmsr_safe(MSR_REENLIGHTENMENT_CONTROL, good);
    expect_equal("msr.reenlightenment", "16.6.1", rdmsr(MSR_REENLIGHTENMENT_CONTROL), good);
    wrmsr_safe(MSR_REENLIGHTENMENT_CONTROL, 0);
    expect_refused("msr.reenlightenment_reserved_bit", "16.6.1", MSR_REENLIGHTENMENT_CONTROL, good | 1u << 17);
    expect_refused("msr.reenlightenment_vector_15", "16.6.1", MSR_REENLIGHTENMENT_CONTROL, (good & ~0xffull) | 15);
    expect_refused("msr.reenlightenment_bad_vp", "16.6.1", MSR_REENLIGHTENMENT_CONTROL, good + (1ull << 32));
    expect_refused("msr.tsc_emulation_reserved_bit", "16.6.2", MSR_TSC_EMULATION_CONTROL, 2);
    wrmsr_safe(MSR_TSC_EMULATION_CONTROL, 1);
    expect_equal("msr.tsc_emulation_control", "16.6.2", rdmsr(MSR_TSC_EMULATION_CONTROL), 1);
    wrmsr_safe(MSR_TSC_EMULATION_CONTROL, 0);
    expect_equal("msr.tsc_emulation_status", "16.6.2", rdmsr(MSR_TSC_EMULATION_STATUS) & 1, 0);
    expect_equal("msr.tsc_emulation_status_write_0", "16.6.2", wrmsr_safe(MSR_TSC_EMULATION_STATUS, 0), 0);
}

static void tsc_invariant(void)
{
    expect_equal("msr.tsc_invariant_at_reset", "2.4.4", rdmsr(MSR_TSC_INVARIANT_CONTROL), 0);
    expect_equal("msr.tsc_invariant_reserved_bit", "2.4.4", wrmsr_safe(MSR_TSC_INVARIANT_CONTROL, 2), EXCEPTION_GP);
    wrmsr_safe(MSR_TSC_INVARIANT_CONTROL, 1);
    expect_equal("msr.tsc_invariant", "2.4.4", rdmsr(MSR_TSC_INVARIANT_CONTROL), 1);
}

/* Advertised means readable, not advertised means #GP. EOI and EOM are write-only in spirit, GUEST_IDLE would halt. */
static void access_follows_privileges(void)
{
    static const struct {
        u32 first, count;
        u32 privilege; /* in EAX */
        u32 feature;   /* in EDX */
    } table[] = {
        {MSR_GUEST_OS_ID, 2, EAX_HYPERCALL, 0},
        {MSR_VP_INDEX, 1, EAX_VP_INDEX, 0},
        {MSR_RESET, 1, EAX_RESET, 0},
        {MSR_VP_RUNTIME, 1, EAX_VP_RUNTIME, 0},
        {MSR_TIME_REF_COUNT, 1, EAX_TIME_REF_COUNT, 0},
        {MSR_REFERENCE_TSC, 1, EAX_REFERENCE_TSC, 0},
        {MSR_TSC_FREQUENCY, 2, EAX_FREQUENCY, 0},
        {MSR_NPIEP_CONFIG, 1, 0, EDX_NPIEP},
        {MSR_ICR, 2, EAX_APIC, 0},
        {MSR_SCONTROL, 4, EAX_SYNIC, 0},
        {MSR_SINT0, 16, EAX_SYNIC, 0},
        {MSR_STIMER0_CONFIG, 8, EAX_STIMER, 0},
        {MSR_SYNTH_DEBUG_CONTROL, 5, 0, EDX_DEBUG},
        {MSR_CRASH_P0, 6, 0, EDX_CRASH},
        {MSR_REENLIGHTENMENT_CONTROL, 3, EAX_REENLIGHTENMENT, 0},
        {MSR_TSC_INVARIANT_CONTROL, 1, EAX_TSC_INVARIANT, 0},
    };
    u64 first_wrong = 0, value;

    for (u32 i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        bool offered = (privileges_eax & table[i].privilege) || (privileges_edx & table[i].feature);
        for (u32 j = 0; j < table[i].count; j++)
            if (!rdmsr_safe(table[i].first + j, &value) != offered && !first_wrong)
                first_wrong = table[i].first + j;
    }
    expect_equal("msr.readable_as_offered", "8.10", first_wrong, 0);
    first_wrong = 0;
    for (u32 i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        bool offered = (privileges_eax & table[i].privilege) || (privileges_edx & table[i].feature);
        for (u32 j = 0; j < table[i].count; j++)
            if (!offered && wrmsr_safe(table[i].first + j, 0) != EXCEPTION_GP && !first_wrong)
                first_wrong = table[i].first + j;
    }
    expect_equal("msr.not_writable_unless_offered", "8.10", first_wrong, 0);
}

static void unknown_msrs(void)
{
    static const u32 unknown[] = {0x40000004, 0x4000000f, 0x40000024, 0x40000074, 0x40000085, 0x4000008f,
                                  0x400000a0, 0x400000b8, 0x40000109, 0x400001f0, 0x400001ff};
    u64 first_wrong = 0, value;

    for (u32 i = 0; i < sizeof(unknown) / sizeof(unknown[0]); i++)
        if ((rdmsr_safe(unknown[i], &value) != EXCEPTION_GP || wrmsr_safe(unknown[i], 0) != EXCEPTION_GP) &&
            !first_wrong)
            first_wrong = unknown[i];
    expect_equal("msr.unknown", "8.10", first_wrong, 0);
}

void test_msr(void)
{
    access_follows_privileges();
    unknown_msrs();
    if (privileges_eax & EAX_HYPERCALL) {
        guest_os_id();
        hypercall_msr();
        other_vps();
    }
    if (privileges_eax & EAX_VP_INDEX) {
        expect_equal("msr.vp_index", "7.2", rdmsr(MSR_VP_INDEX), 0);
        expect_equal("msr.vp_index_readonly", "7.2", wrmsr_safe(MSR_VP_INDEX, 0), EXCEPTION_GP);
        assist_page_msr();
    }
    if (privileges_eax & EAX_RESET)
        reset_msr();
    if (privileges_edx & EDX_CRASH)
        crash_msrs();
    if (privileges_eax & EAX_REENLIGHTENMENT)
        reenlightenment();
    if (privileges_eax & EAX_TSC_INVARIANT)
        tsc_invariant();
}
