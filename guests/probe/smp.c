/* Application processors: INIT and SIPI to all others (Intel SDM volume 3, 8.4), then each uses its own SynIC. */
#include "probe.h"

#define APIC_ID 0x20
#define APIC_ICR_LOW 0x300
#define APIC_ICR_HIGH 0x310
#define ICR_INIT_OTHERS 0xc4500u
#define ICR_STARTUP_OTHERS 0xc4600u
#define ICR_FIXED 0x4000u

#define MSR_EFER 0xc0000080u
#define EFER_LMA (1u << 10)

static u64 read_cr0(void)
{
    u64 value;
    __asm__ volatile("mov %%cr0, %0" : "=r"(value));
    return value;
}

static u64 read_cr3(void)
{
    u64 value;
    __asm__ volatile("mov %%cr3, %0" : "=r"(value));
    return value;
}

static u64 read_cr4(void)
{
    u64 value;
    __asm__ volatile("mov %%cr4, %0" : "=r"(value));
    return value;
}

static struct vp *vp_at(u32 number)
{
    return (struct vp *)vp_stacks[number];
}

void ap_main(u32 number);
void ap_main(u32 number)
{
    struct vp *vp = this_vp();

    vp_init(number);
    vp->apic_id = apic_read(APIC_ID) >> 24;
    vp->index = rdmsr(MSR_VP_INDEX);
    if (privileges_eax & EAX_STIMER) {
        synic_enable();
        vp->messages = receive_one_timer_message();
    }
    if (privileges_eax & EAX_REFERENCE_TSC)
        vp->time = reference_page_time();
    vp->done = true;
    apic_write(APIC_ICR_HIGH, 0);
    apic_write(APIC_ICR_LOW, ICR_FIXED | VECTOR_WAKE);
    halt();
}

/* An all-zero page below 1 MiB is in nobody's use: not the loader's tables, nor anything a firmware left. */
static u8 *free_low_page(void)
{
    for (u64 page = 0x10000; page < 0x90000; page += PAGE_SIZE)
        if (all_zero((u8 *)page, PAGE_SIZE))
            return (u8 *)page;
    return NULL;
}

static u32 count_done(void)
{
    u32 count = 0;

    for (u32 number = 1; number < platform.vp_count && number < MAX_VPS; number++)
        count += vp_at(number)->done;
    return count;
}

static bool start_others(void)
{
    u8 *page = free_low_page();

    if (!page)
        return false;
    memcpy(page, trampoline_start, (u64)(trampoline_end - trampoline_start));
    ap_cr0 = read_cr0();
    ap_cr3 = read_cr3();
    ap_cr4 = read_cr4();
    rdmsr_safe(MSR_EFER, &ap_efer);
    ap_efer &= ~(u64)EFER_LMA;
    fence();
    apic_write(APIC_ICR_LOW, ICR_INIT_OTHERS);
    apic_write(APIC_ICR_LOW, ICR_STARTUP_OTHERS | (u32)(address_of(page) >> 12));
    return true;
}

void probe_smp(void)
{
    u32 others = platform.vp_count - 1;
    u64 indices = 1, before = 0, after = 0, delivered = 0, in_time = 0;

    if (!others)
        return;
    if (privileges_eax & EAX_REFERENCE_TSC) {
        wrmsr_safe(MSR_REFERENCE_TSC, address_of(&reference_tsc_page) | 1);
        before = reference_page_time();
    }
    if (!start_others()) {
        expect("smp.trampoline", 0, false, "a free page below 1 MiB");
        return;
    }
    WAIT_UNTIL(count_done() == others, 2000);
    if (privileges_eax & EAX_REFERENCE_TSC)
        after = reference_page_time();
    expect_equal("smp.started", count_done(), others);
    for (u32 number = 1; number <= others; number++) {
        struct vp *vp = vp_at(number);

        if (!vp->done)
            continue;
        indices |= 1ull << (vp->index & 63);
        delivered += vp->messages;
        in_time += before <= vp->time && vp->time <= after;
        expect_numbered("smp.apic_id_of_vp", (u32)vp->index, vp->apic_id, vp->index <= others,
                        "a VP index below the VP count");
    }
    expect("smp.vp_indices", indices, indices == (others == 63 ? ~0ull : (2ull << others) - 1), "one bit for each VP");
    if (privileges_eax & EAX_STIMER)
        expect_equal("smp.timer_messages", delivered, others);
    if (privileges_eax & EAX_REFERENCE_TSC)
        expect_equal("smp.reference_time_agrees", in_time, others);
    WAIT_UNTIL(this_vp()->interrupts[VECTOR_WAKE] != 0, 100);
    expect("smp.wake_interrupts", this_vp()->interrupts[VECTOR_WAKE], this_vp()->interrupts[VECTOR_WAKE] != 0, "not 0");
}
