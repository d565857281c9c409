/* The local APIC's registers as MSRs, and EOIs that the VP assist page saves. */
#include "kit.h"

#define VECTOR 0x52
#define TIMES 3

static u8 assist_page[PAGE_SIZE] __attribute__((aligned(4096)));

static void send_to_self(void)
{
    wrmsr_safe(MSR_ICR, (u64)apic_read(APIC_ID) << 32 | ICR_FIXED | VECTOR);
}

static u32 in_service(void)
{
    return apic_read(APIC_ISR + VECTOR / 32 * 16) >> VECTOR % 32 & 1;
}

static u32 arrivals(void)
{
    struct vp *vp = this_vp();
    u32 before = vp->interrupts[VECTOR];

    for (u32 i = 0; i < TIMES; i++) {
        u32 wanted = before + i + 1;
        send_to_self();
        WAIT_UNTIL(vp->interrupts[VECTOR] == wanted, PATIENCE);
    }
    return vp->interrupts[VECTOR] - before;
}

static void registers(void)
{
    u64 value;

    wrmsr_safe(MSR_TPR, 0x50);
    expect_equal("apic.tpr", "10.2.3.3", apic_read(APIC_TPR), 0x50);
    expect_equal("apic.tpr_reads_back", "10.2.3.3", rdmsr(MSR_TPR), 0x50);
    wrmsr_safe(MSR_TPR, 0);
    expect_equal("apic.eoi_write_only", "10.2.3.1", rdmsr_safe(MSR_EOI, &value), EXCEPTION_GP);
    end_of_interrupt[VECTOR] = EOI_BY_APIC;
    expect_equal("apic.icr", "10.2.3.2", arrivals(), TIMES);
    expect_equal("apic.icr_reads_back", "10.2.3.2", rdmsr(MSR_ICR) & ~(1ull << 12),
                 (u64)apic_read(APIC_ID) << 32 | ICR_FIXED | VECTOR);
    end_of_interrupt[VECTOR] = EOI_BY_MSR;
    expect_equal("apic.eoi", "10.2.3.1", arrivals(), TIMES);
    expect_equal("apic.eoi_ends_service", "10.2.3.1", in_service(), 0);
}

/* Whether EOIs are saved, and which, is the hypervisor's choice; that the interrupts go on coming is not. */
static void lazy_eoi(void)
{
    eoi_assist = (volatile u32 *)assist_page;
    eois_saved = 0;
    wrmsr_safe(MSR_VP_ASSIST_PAGE, address_of(assist_page) | 1);
    end_of_interrupt[VECTOR] = EOI_BY_ASSIST;
    expect_equal("apic.lazy_eoi", "10.3.5", arrivals(), TIMES);
    expect_measured("apic.lazy_eois_saved", "10.3.5", eois_saved, eois_saved <= TIMES, "no more than interrupts");
    end_of_interrupt[VECTOR] = EOI_BY_APIC;
    expect_equal("apic.eoi_after_lazy", "10.3.5", arrivals(), TIMES);
    wrmsr_safe(MSR_VP_ASSIST_PAGE, 0);
    expect_equal("apic.eoi_without_page", "10.3.5", arrivals(), TIMES);
    expect_equal("apic.lazy_ends_service", "10.3.5", in_service(), 0);
}

void test_apic(void)
{
    if (!(privileges_eax & EAX_APIC)) {
        expect_equal("apic.eoi_not_offered", "4.2.2", wrmsr_safe(MSR_EOI, 0), EXCEPTION_GP);
        expect_equal("apic.icr_not_offered", "4.2.2", wrmsr_safe(MSR_ICR, 0), EXCEPTION_GP);
        expect_equal("apic.tpr_not_offered", "4.2.2", wrmsr_safe(MSR_TPR, 0), EXCEPTION_GP);
        return;
    }
    registers();
    lazy_eoi();
}
