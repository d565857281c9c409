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

#define EXCEPTION_GP 13

/* 10 ms with KVM's 1 GHz APIC bus divided by 16. Only its being finite matters. */
#define WATCHDOG_PERIOD 625000u

struct gate {
    u16 offset_low;
    u16 selector;
    u16 type;
    u16 offset_middle;
    u32 offset_high;
    u32 reserved;
};

struct frame {
    u64 r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax;
    u64 vector, error, rip, cs, rflags, rsp, ss;
};

extern u8 vector_stubs[], rdmsr_instruction[], wrmsr_instruction[], msr_fault[];

static struct gate idt[256] __attribute__((aligned(16)));

u32 apic_read(u32 offset)
{
    return *(volatile u32 *)(u64)(APIC_BASE + offset);
}

void apic_write(u32 offset, u32 value)
{
    *(volatile u32 *)(u64)(APIC_BASE + offset) = value;
}

void on_trap(struct frame *frame);
void on_trap(struct frame *frame)
{
    if (frame->vector >= 32) {
        this_vp()->interrupts[frame->vector]++;
        if (frame->vector != VECTOR_SPURIOUS)
            apic_write(APIC_EOI, 0);
        return;
    }
    if (frame->vector == EXCEPTION_GP &&
        (frame->rip == address_of(rdmsr_instruction) || frame->rip == address_of(wrmsr_instruction))) {
        frame->rip = address_of(msr_fault);
        return;
    }
    print("probe: exception ");
    print_decimal(frame->vector);
    print(" error ");
    print_hex(frame->error);
    print(" rip ");
    print_hex(frame->rip);
    print("\n");
    power_off();
}

void trap_init(void)
{
    /* The PICs may still have a firmware's vectors, which are exceptions here. */
    outb(PIC_MASTER_MASK, 0xff);
    outb(PIC_SLAVE_MASK, 0xff);
    for (u32 vector = 0; vector < 256; vector++) {
        u64 stub = address_of(vector_stubs) + vector * 16;
        idt[vector] = (struct gate){
            .offset_low = (u16)stub,
            .selector = CODE64_SELECTOR,
            .type = 0x8e00,
            .offset_middle = (u16)(stub >> 16),
            .offset_high = (u32)(stub >> 32),
        };
    }
}

void vp_init(u32 number)
{
    struct {
        u16 limit;
        u64 base;
    } __attribute__((packed)) pointer = {sizeof(idt) - 1, address_of(idt)};

    __asm__ volatile("lidt %0" : : "m"(pointer));
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
