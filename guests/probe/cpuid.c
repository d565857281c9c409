/* Hypervisor CPUID leaves: TLFS v6.0b, feature discovery, and Microsoft's
 * "Requirements for Implementing the Microsoft Hypervisor Interface".
 */
#include "probe.h"

#define HYPERVISOR_PRESENT (1u << 31)
#define LEAF_BASE 0x40000000u
#define LEAF_LAST 0x40000006u
#define INTERFACE_HV1 0x31237648u /* "Hv#1" */

static const char *const leaf_names[] = {
    "cpuid.leaf0", "cpuid.leaf1", "cpuid.leaf2", "cpuid.leaf3", "cpuid.leaf4", "cpuid.leaf5", "cpuid.leaf6",
};

u32 privileges_eax, privileges_ebx, privileges_edx;

static void leaf_text(char *at, const u32 regs[4])
{
    for (int i = 0; i < 4; i++) {
        for (int shift = 28; shift >= 0; shift -= 4)
            *at++ = "0123456789abcdef"[regs[i] >> shift & 15];
        *at++ = i < 3 ? ',' : 0;
    }
}

static const char *leaf_fault(u32 leaf, const u32 regs[4])
{
    switch (leaf) {
    case LEAF_BASE:
        return regs[0] < LEAF_BASE + 5 || regs[0] > 0x4000ffff ? "max leaf 0x40000005..0x4000ffff" : NULL;
    case LEAF_BASE + 1:
        return regs[0] != INTERFACE_HV1 ? "Hv#1" : NULL;
    case LEAF_BASE + 3:
        if (!(regs[0] & EAX_HYPERCALL) || !(regs[0] & EAX_VP_INDEX))
            return "hypercall and VP index privileges";
        if (regs[1] & ROOT_PRIVILEGES)
            return "no root partition privileges";
        return !(regs[0] & EAX_FREQUENCY) != !(regs[3] & EDX_FREQUENCY) ? "EAX bit 11 as EDX bit 8" : NULL;
    case LEAF_BASE + 5:
        return regs[0] < platform.vp_count ? "at least as many VPs as the MADT has" : NULL;
    }
    return NULL;
}

void probe_cpuid(void)
{
    bool selected = topic_selected("cpuid");
    u32 regs[4], last;
    u64 hertz;

    cpuid(1, regs);
    if (selected)
        expect_equal("cpuid.hypervisor_present", regs[2] >> 31, 1);
    if (!(regs[2] & HYPERVISOR_PRESENT))
        return;
    cpuid(LEAF_BASE, regs);
    last = regs[0];
    if (selected) {
        char vendor[13] = {0};
        memcpy(vendor, regs + 1, 12);
        expect_text("cpuid.vendor", vendor, !memcmp(vendor, "Microsoft Hv", 12), "Microsoft Hv");
    }
    for (u32 leaf = LEAF_BASE; leaf <= LEAF_LAST && leaf <= last; leaf++) {
        char text[40];
        const char *fault;

        cpuid(leaf, regs);
        if (leaf == LEAF_BASE + 3) {
            privileges_eax = regs[0];
            privileges_ebx = regs[1];
            privileges_edx = regs[3];
        }
        if (!selected)
            continue;
        leaf_text(text, regs);
        fault = leaf_fault(leaf, regs);
        expect_text(leaf_names[leaf - LEAF_BASE], text, !fault, fault);
    }
    if ((privileges_eax & EAX_FREQUENCY) && !rdmsr_safe(MSR_TSC_FREQUENCY, &hertz) && hertz > 1000000)
        tsc_per_ms = hertz / 1000;
}
