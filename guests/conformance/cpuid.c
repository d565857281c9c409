/* Hypervisor CPUID leaves. */
#include "kit.h"

#define HYPERVISOR_PRESENT (1u << 31)
#define LEAF_BASE 0x40000000u
#define LEAF_NEEDED 0x40000005u
#define INTERFACE_HV1 0x31237648u /* "Hv#1" */

u32 privileges_eax, privileges_ebx, privileges_edx, hints;
u64 tsc_per_ms = 3000000; /* a guess, where the frequency is not offered; it bounds waits */

static u32 others[4]; /* leaf 0x40000003 as the last VP reads it */

void cpuid_read(void)
{
    u32 regs[4], megahertz;
    u64 hertz;

    cpuid(1, regs);
    if (!(regs[2] & HYPERVISOR_PRESENT))
        return;
    cpuid(LEAF_BASE + 1, regs);
    if (regs[0] != INTERFACE_HV1)
        return;
    cpuid(LEAF_BASE + 3, regs);
    privileges_eax = regs[0];
    privileges_ebx = regs[1];
    privileges_edx = regs[3];
    cpuid(LEAF_BASE + 4, regs);
    hints = regs[0];
    if ((privileges_eax & EAX_FREQUENCY) && !rdmsr_safe(MSR_TSC_FREQUENCY, &hertz)) {
        megahertz = (u32)(hertz >> 20); /* near enough, and needs no 64-bit division */
        if (megahertz)
            tsc_per_ms = megahertz * 1049ull;
    }
}

static void read_others(void)
{
    cpuid(LEAF_BASE + 3, others);
}

void test_cpuid(void)
{
    u32 regs[4], last;
    char vendor[13] = {0};

    cpuid(1, regs);
    if (!privileges_eax) {
        skip("cpuid.hypervisor_present", "2.2", "no Hv#1 interface");
        return;
    }
    expect_equal("cpuid.hypervisor_present", "2.2", regs[2] >> 31, 1);
    cpuid(LEAF_BASE, regs);
    last = regs[0];
    expect("cpuid.last_leaf", "2.4.1", last, last >= LEAF_NEEDED && last <= 0x4000ffff, "0x40000005..0x4000ffff");
    memcpy(vendor, regs + 1, 12);
    expect_text("cpuid.vendor", "2.4.1", vendor, !memcmp(vendor, "Microsoft Hv", 12), "Microsoft Hv");
    cpuid(LEAF_BASE + 1, regs);
    expect_equal("cpuid.interface", "2.4.2", regs[0], INTERFACE_HV1);
    wrmsr_safe(MSR_GUEST_OS_ID, GUEST_OS_ID); /* before it, the version may read as 0 (2.4.3) */
    cpuid(LEAF_BASE + 2, regs);
    expect("cpuid.version", "2.5", regs[1], regs[0] || regs[1], "a build or a version");
    expect_equal("cpuid.hypercall_and_vp_index", "2.4.4",
                 privileges_eax & (EAX_HYPERCALL | EAX_VP_INDEX), EAX_HYPERCALL | EAX_VP_INDEX);
    expect_equal("cpuid.no_root_privileges", "4.2.2", privileges_ebx & ROOT_PRIVILEGES, 0);
    expect_equal("cpuid.frequency_bits_agree", "2.4.4", !(privileges_eax & EAX_FREQUENCY),
                 !(privileges_edx & EDX_FREQUENCY));
    expect("cpuid.stimer_needs_synic", "12.1.3", privileges_eax & (EAX_STIMER | EAX_SYNIC),
           !(privileges_eax & EAX_STIMER) || (privileges_eax & EAX_SYNIC), "no synthetic timers without SynIC");
    expect("cpuid.direct_timer_needs_stimer", "12.2", privileges_edx & EDX_DIRECT_TIMER,
           !(privileges_edx & EDX_DIRECT_TIMER) || (privileges_eax & EAX_STIMER), "no direct timers without timers");
    expect("cpuid.apic_hint_needs_privilege", "2.4.5", hints & HINT_APIC_MSRS,
           !(hints & HINT_APIC_MSRS) || (privileges_eax & EAX_APIC), "no advice of MSRs that are not there");
    cpuid(LEAF_BASE + 4, regs);
    expect("cpuid.spin_count", "2.4.5", regs[1], regs[1] != 0, "not 0");
    expect_equal("cpuid.reserved_ecx", "2.4.5", regs[2] >> 7, 0);
    cpuid(LEAF_BASE + 5, regs);
    expect("cpuid.max_vps", "2.4.6", regs[0], regs[0] >= vp_count, "at least as many as there are");
    if (vp_count < 2) {
        skip("cpuid.same_on_all_vps", "2.4.4", "needs 2 VPs");
        return;
    }
    vp_run(vp_count - 1, read_others);
    expect_equal("cpuid.same_on_all_vps", "2.4.4",
                 others[0] == privileges_eax && others[1] == privileges_ebx && others[3] == privileges_edx, 1);
}
