/* The SynIC's registers, its pages and SINTs. */
#include "kit.h"

#define SINT 5
#define BEYOND_GPA_SPACE 0xffffffffff000ull

static u8 message_pages[MAX_VPS][PAGE_SIZE] __attribute__((aligned(4096)));
static u8 event_pages[MAX_VPS][PAGE_SIZE] __attribute__((aligned(4096)));
static u32 other_masked;

struct message *message_slot(u32 sint)
{
    return (struct message *)message_pages[this_vp()->number] + sint;
}

volatile u32 *event_flags(u32 sint)
{
    return (volatile u32 *)(event_pages[this_vp()->number] + sint * 256);
}

void synic_enable(void)
{
    u32 vp = this_vp()->number;

    wrmsr_safe(MSR_SIMP, address_of(message_pages[vp]) | 1);
    wrmsr_safe(MSR_SIEFP, address_of(event_pages[vp]) | 1);
    wrmsr_safe(MSR_SCONTROL, 1);
}

void synic_disable(void)
{
    for (u32 sint = 0; sint < 16; sint++)
        wrmsr_safe(MSR_SINT0 + sint, SINT_MASKED);
    wrmsr_safe(MSR_SCONTROL, 0);
    wrmsr_safe(MSR_SIMP, 0);
    wrmsr_safe(MSR_SIEFP, 0);
}

static u32 masked_sints(void)
{
    u32 masked = 0;

    for (u32 sint = 0; sint < 16; sint++)
        masked += rdmsr(MSR_SINT0 + sint) == SINT_MASKED;
    return masked;
}

static void registers(void)
{
    expect_equal("synic.scontrol_at_reset", "11.8.1", rdmsr(MSR_SCONTROL), 0);
    expect_equal("synic.siefp_at_reset", "11.8.3", rdmsr(MSR_SIEFP), 0);
    expect_equal("synic.simp_at_reset", "11.8.4", rdmsr(MSR_SIMP), 0);
    expect_equal("synic.sints_masked_at_reset", "11.8.5", masked_sints(), 16);
    expect_equal("synic.sversion", "11.8.2", rdmsr(MSR_SVERSION), 1);
    expect_equal("synic.sversion_readonly", "11.8.2", wrmsr_safe(MSR_SVERSION, 1), EXCEPTION_GP);
    wrmsr_safe(MSR_SCONTROL, 1);
    expect_equal("synic.scontrol", "11.8.1", rdmsr(MSR_SCONTROL), 1);
    wrmsr_safe(MSR_SCONTROL, 0);
    expect_equal("synic.eom_reads_0", "11.8.6", rdmsr(MSR_EOM), 0);
    expect_equal("synic.eom_with_nothing_waiting", "11.8.6", wrmsr_safe(MSR_EOM, 0), 0);
}

static void sints(void)
{
    u32 faults = 0;

    for (u32 vector = 0; vector < 16; vector++)
        faults += wrmsr_safe(MSR_SINT0 + SINT, vector) == EXCEPTION_GP;
    expect_equal("synic.sint_vectors_below_16", "11.8.5", faults, 16);
    expect_equal("synic.sint_unchanged", "11.8.5", rdmsr(MSR_SINT0 + SINT), SINT_MASKED);
    wrmsr_safe(MSR_SINT0 + SINT, 16);
    expect_equal("synic.sint_vector_16", "11.8.5", rdmsr(MSR_SINT0 + SINT), 16);
    wrmsr_safe(MSR_SINT0 + SINT, SINT_AUTO_EOI | 0xff);
    expect_equal("synic.sint_auto_eoi", "11.8.5", rdmsr(MSR_SINT0 + SINT), SINT_AUTO_EOI | 0xff);
    if (privileges_edx & EDX_SINT_POLLING) {
        wrmsr_safe(MSR_SINT0 + SINT, SINT_POLLING | 0x70);
        expect_equal("synic.sint_polling", "11.8.5", rdmsr(MSR_SINT0 + SINT), SINT_POLLING | 0x70);
    }
    wrmsr_safe(MSR_SINT0 + SINT, SINT_MASKED);
    expect_equal("synic.sint_masked", "11.8.5", rdmsr(MSR_SINT0 + SINT), SINT_MASKED);
}

static void pages(void)
{
    u8 *messages = message_pages[0], *events = event_pages[0];

    memset(messages, 0xff, PAGE_SIZE);
    memset(events, 0xff, PAGE_SIZE);
    synic_enable();
    expect_equal("synic.simp", "11.8.4", rdmsr(MSR_SIMP), address_of(messages) | 1);
    expect_equal("synic.siefp", "11.8.3", rdmsr(MSR_SIEFP), address_of(events) | 1);
    expect_equal("synic.simp_zeroed", "11.9", all_zero(messages, PAGE_SIZE), 1);
    expect_equal("synic.siefp_zeroed", "11.9", all_zero(events, PAGE_SIZE), 1);
    if (has_word("qemu")) {
        skip("synic.simp_after_beyond_gpa_space", "11.8.4", "QEMU aborts");
    } else {
        /* Pages that nobody sees: the write may be taken or refused, and what stood there stays usable. */
        wrmsr_safe(MSR_SIMP, BEYOND_GPA_SPACE | 1);
        wrmsr_safe(MSR_SIEFP, BEYOND_GPA_SPACE | 1);
        synic_enable();
        expect_equal("synic.simp_after_beyond_gpa_space", "11.8.4", rdmsr(MSR_SIMP) == (address_of(messages) | 1), 1);
    }
    synic_disable();
    expect_equal("synic.simp_disabled", "11.8.4", rdmsr(MSR_SIMP), 0);
}

static void on_other(void)
{
    other_masked = masked_sints();
}

void test_synic(void)
{
    if (!(privileges_eax & EAX_SYNIC))
        return;
    registers();
    sints();
    pages();
    if (vp_count < 2) {
        skip("synic.each_vp_has_its_own", "11.8", "needs 2 VPs");
        return;
    }
    wrmsr_safe(MSR_SINT0 + SINT, 0x55);
    vp_run(1, on_other);
    wrmsr_safe(MSR_SINT0 + SINT, SINT_MASKED);
    expect_equal("synic.each_vp_has_its_own", "11.8", other_masked, 16);
}
