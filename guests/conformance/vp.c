/* Processors: how many there are, traps, the local APIC (Intel SDM volume 3, chapter 11), and work for APs. */
#include "kit.h"

#define FW_CFG_SELECTOR 0x510
#define FW_CFG_DATA 0x511
#define FW_CFG_SIGNATURE 0
#define FW_CFG_CPUS 5

#define APIC_BASE 0xfee00000u
#define APIC_LVT_TIMER 0x320
#define APIC_TIMER_INITIAL 0x380
#define APIC_TIMER_DIVIDE 0x3e0
#define ICR_INIT 0x4500u
#define ICR_STARTUP 0x4600u

#define PIC_MASTER_MASK 0x21
#define PIC_SLAVE_MASK 0xa1

#define TRAMPOLINE 0x8000u /* a page that neither QEMU's nor pyvmm's loader has data on */

extern u8 trampoline_start[], trampoline_end[];

u32 vp_count = 1;
u8 end_of_interrupt[256];
volatile u32 *eoi_assist;
u32 eois_saved;

u32 apic_read(u32 offset)
{
    return *(volatile u32 *)(ulong)(APIC_BASE + offset);
}

void apic_write(u32 offset, u32 value)
{
    *(volatile u32 *)(ulong)(APIC_BASE + offset) = value;
}

static void fw_cfg(u16 key, u8 *to, u32 size)
{
    outw(FW_CFG_SELECTOR, key);
    while (size--)
        *to++ = inb(FW_CFG_DATA);
}

void vps_count(void)
{
    u8 signature[4], count[2];

    fw_cfg(FW_CFG_SIGNATURE, signature, sizeof(signature));
    if (memcmp(signature, "QEMU", 4))
        return;
    fw_cfg(FW_CFG_CPUS, count, sizeof(count));
    vp_count = count[0] < MAX_VPS ? count[0] : MAX_VPS;
}

/* Clears the "no EOI required" bit in one instruction, and tells whether it was set (10.3.5). */
static bool eoi_saved(void)
{
    bool was_set;

    __asm__ volatile("btrl $0, %1" : "=@ccc"(was_set), "+m"(*eoi_assist));
    return was_set;
}

static void end_interrupt(u32 vector)
{
    switch (end_of_interrupt[vector]) {
    case EOI_BY_NOBODY:
        this_vp()->in_service[vector] |= apic_read(APIC_ISR + vector / 32 * 16) >> vector % 32 & 1;
        break;
    case EOI_BY_ASSIST:
        if (eoi_saved()) {
            eois_saved++;
            break;
        }
        /* fall through */
    case EOI_BY_MSR:
        wrmsr_safe(MSR_EOI, 0);
        break;
    default:
        if (vector != VECTOR_SPURIOUS)
            apic_write(APIC_EOI, 0);
    }
}

void on_trap(struct frame *frame)
{
    u32 vector = (u32)frame->vector;
    struct vp *vp = this_vp();

    if (vector >= 32) {
        vp->interrupts[vector]++;
        end_interrupt(vector);
        return;
    }
    if (fix_up(frame))
        return;
    print_exception("kit", frame);
    print(" vp ");
    print_decimal(vp->number);
    print("\n");
    expect_equal("kit.exceptions", "8.13", 1, 0);
    report_done();
}

void vp_init(u32 number)
{
    if (!number) {
        /* The PICs may still have a firmware's vectors, which are exceptions here. */
        outb(PIC_MASTER_MASK, 0xff);
        outb(PIC_SLAVE_MASK, 0xff);
        idt_fill(CODE_SELECTOR);
    }
    idt_load();
    this_vp()->number = number;
    apic_write(APIC_SPURIOUS, 0x100 | VECTOR_SPURIOUS);
    apic_write(APIC_TIMER_DIVIDE, 3);
    apic_write(APIC_LVT_TIMER, 1 << 17 | VECTOR_WATCHDOG);
    watchdog(WATCHDOG_PERIOD);
}

void watchdog(u32 period)
{
    apic_write(APIC_TIMER_INITIAL, period);
}

void idle(void)
{
    __asm__ volatile("sti; hlt; cli" : : : "memory");
}

void let_ticks_pass(u32 ticks)
{
    u32 wanted = this_vp()->interrupts[VECTOR_WATCHDOG] + ticks;

    while (this_vp()->interrupts[VECTOR_WATCHDOG] < wanted)
        idle();
}

/* One of our own, of the lowest priority, comes after all that wait. */
void take_interrupts(void)
{
    u32 wanted = this_vp()->interrupts[VECTOR_LAST] + 1;

    apic_write(APIC_ICR_LOW, ICR_SELF_FIXED | VECTOR_LAST);
    WAIT_UNTIL(this_vp()->interrupts[VECTOR_LAST] == wanted, PATIENCE);
}

struct vp *vp_at(u32 number)
{
    return (struct vp *)vp_stacks[number];
}

/* Jobs that the first VP gives. */
void vp_main(void)
{
    struct vp *vp = this_vp();

    vp_init(apic_read(APIC_ID) >> 24);
    vp->online = true;
    for (;;) {
        while (!vp->job)
            idle();
        vp->job();
        fence();
        vp->job = NULL;
    }
}

static void apic_command(u32 target, u32 command)
{
    apic_write(APIC_ICR_HIGH, target << 24);
    apic_write(APIC_ICR_LOW, command);
}

u32 vps_start(void)
{
    u32 online = 1;

    memcpy((void *)TRAMPOLINE, trampoline_start, (size_t)(trampoline_end - trampoline_start));
    fence();
    for (u32 number = 1; number < vp_count; number++)
        if (!vp_at(number)->online) {
            apic_command(number, ICR_INIT);
            apic_command(number, ICR_STARTUP | TRAMPOLINE >> 12);
        }
    for (u32 number = 1; number < vp_count; number++)
        online += WAIT_UNTIL(vp_at(number)->online, 2 * PATIENCE);
    return online;
}

void vp_begin(u32 number, void (*job)(void))
{
    vp_at(number)->job = job;
    fence();
    apic_command(number, ICR_FIXED | VECTOR_WAKE);
}

bool vp_finished(u32 number)
{
    return WAIT_UNTIL(!vp_at(number)->job, 3 * PATIENCE);
}

bool vp_run(u32 number, void (*job)(void))
{
    vp_begin(number, job);
    return vp_finished(number);
}
