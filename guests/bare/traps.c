/* The IDT (Intel SDM volume 3, chapter 6), and instructions that may fault. */
#include "bare.h"

#define INTERRUPT_GATE 0x8e00

struct gate {
    u16 offset_low;
    u16 selector;
    u16 type;
    u16 offset_middle;
#ifdef __x86_64__
    u32 offset_high;
    u32 reserved;
#endif
};

struct fixup {
    u32 at, resume;
};

extern u8 vector_stubs[];
extern const struct fixup fixups_start[], fixups_end[];

static struct gate idt[256] __attribute__((aligned(16)));

void idt_fill(u16 code_selector)
{
    for (u32 vector = 0; vector < 256; vector++) {
        ulong stub = (ulong)(vector_stubs + vector * 16);
        idt[vector] = (struct gate){
            .offset_low = (u16)stub,
            .selector = code_selector,
            .type = INTERRUPT_GATE,
            .offset_middle = (u16)(stub >> 16),
        };
    }
}

void idt_load(void)
{
    struct {
        u16 limit;
        ulong base;
    } __attribute__((packed)) pointer = {sizeof(idt) - 1, (ulong)idt};

    __asm__ volatile("lidt %0" : : "m"(pointer));
}

void print_exception(const char *guest, const struct frame *frame)
{
    print(guest);
    print(": exception ");
    print_decimal((u32)frame->vector);
    print(" error ");
    print_hex(frame->error);
    print(" ip ");
    print_hex(frame->ip);
}

bool fix_up(struct frame *frame)
{
    for (const struct fixup *fixup = fixups_start; fixup < fixups_end; fixup++)
        if (fixup->at == frame->ip) {
            frame->ip = fixup->resume;
            frame->di = frame->vector;
            return true;
        }
    return false;
}
