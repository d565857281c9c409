/* Exceptions, interrupts and the local APIC (Intel SDM volume 3, chapters 6 and 11). */
#include "probe.h"

#define APIC_BASE 0xfee00000u
#define APIC_EOI 0xb0
#define APIC_SPURIOUS 0xf0
#define APIC_LVT_TIMER 0x320
#define APIC_TIMER_INITIAL 0x380
#define APIC_TIMER_DIVIDE 0x3e0

#define PIC_MASTER_MASK 0x21
#define PIC_SLAVE_MASK 0xa1

/* 10 ms with KVM's 1 GHz APIC bus divided by 16. Only its being finite matters. */
#define WATCHDOG_PERIOD 625000u

u32 apic_read(u32 offset)
{
    return *(volatile u32 *)(u64)(APIC_BASE + offset);
}

void apic_write(u32 offset, u32 value)
{
    *(volatile u32 *)(u64)(APIC_BASE + offset) = value;
}

void on_trap(struct frame *frame)
{
    if (frame->vector >= 32) {
        this_vp()->interrupts[frame->vector]++;
        if (frame->vector != VECTOR_SPURIOUS)
            apic_write(APIC_EOI, 0);
        return;
    }
    if (fix_up(frame))
        return;
    print_exception("probe", frame);
    print("\n");
    power_off();
}

void trap_init(void)
{
    /* The PICs may still have a firmware's vectors, which are exceptions here. */
    outb(PIC_MASTER_MASK, 0xff);
    outb(PIC_SLAVE_MASK, 0xff);
    idt_fill(CODE64_SELECTOR);
}

void vp_init(u32 number)
{
    idt_load();
    this_vp()->number = number;
    apic_write(APIC_SPURIOUS, 0x100 | VECTOR_SPURIOUS);
    apic_write(APIC_TIMER_DIVIDE, 3);
    apic_write(APIC_LVT_TIMER, 1 << 17 | VECTOR_WATCHDOG);
    apic_write(APIC_TIMER_INITIAL, WATCHDOG_PERIOD);
}

void idle(void)
{
    __asm__ volatile("sti; hlt; cli" : : : "memory");
}
