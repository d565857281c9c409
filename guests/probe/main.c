/* The probe's order of events, and the ways to die that a host's tests ask for on the command line. */
#include "probe.h"

#define CRASH_NOTIFY (1ull << 63)
#define CRASH_MESSAGE (1ull << 62)

u64 tsc_per_ms = 3000000;
u8 scratch[2 * PAGE_SIZE] __attribute__((aligned(4096)));

static void crash(void)
{
    static const char message[] = "probe: this crash was asked for";

    wrmsr_safe(MSR_CRASH_P0, 0xdead);
    wrmsr_safe(MSR_CRASH_P0 + 1, 1);
    wrmsr_safe(MSR_CRASH_P0 + 2, 2);
    wrmsr_safe(MSR_CRASH_P0 + 3, address_of(message));
    wrmsr_safe(MSR_CRASH_P0 + 4, sizeof(message) - 1);
    wrmsr_safe(MSR_CRASH_CTL, CRASH_NOTIFY | CRASH_MESSAGE);
}

static void triple_fault(void)
{
    static const struct {
        u16 limit;
        u64 base;
    } __attribute__((packed)) nothing = {0, 0};

    __asm__ volatile("lidt %0; ud2" : : "m"(nothing));
}

static void last_wish(void)
{
    if (has_word("probe.crash")) {
        print("probe: crashing\n");
        crash();
        halt();
    }
    if (has_word("probe.hang")) {
        print("probe: hanging\n");
        halt();
    }
    if (has_word("probe.reset")) {
        print("probe: resetting by port 0xcf9\n");
        outb(0xcf9, 6);
        halt();
    }
    if (has_word("probe.reset=msr")) {
        print("probe: resetting by MSR\n");
        wrmsr_safe(MSR_RESET, 1);
        halt();
    }
    if (has_word("probe.reset=i8042")) {
        print("probe: resetting by i8042\n");
        outb(0x64, 0xfe);
        halt();
    }
    if (has_word("probe.triple")) {
        print("probe: triple fault\n");
        triple_fault();
    }
}

void probe_main(const u8 *boot_params);
void probe_main(const u8 *boot_params)
{
    trap_init();
    vp_init(0);
    platform_init(boot_params);
    print("probe: start\n");

    probe_cpuid();
    if (topic_selected("msr"))
        probe_msrs();
    if (topic_selected("hypercall"))
        probe_hypercalls();
    if (topic_selected("synic"))
        probe_synic();
    if (topic_selected("smp"))
        probe_smp();
    if (topic_selected("vmbus"))
        probe_vmbus();
    report_done();
    last_wish();
    power_off();
}
