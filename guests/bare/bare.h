/* What all bare-metal guests share: types, machine access, the serial port, traps, the command line.
 *
 * Built for 64-bit long mode, or with -m32 for 32-bit protected mode; virtual = physical, interrupts off except in
 * places that the guest chooses, and no instruction that KVM's emulator lacks.
 */
#ifndef BARE_H
#define BARE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef unsigned long ulong; /* a general register */

#define PAGE_SIZE 4096u

#define EXCEPTION_UD 6u
#define EXCEPTION_GP 13u

/* Registers of an interrupted instruction, as vectors.S leaves them on the stack. */
struct frame {
#ifdef __x86_64__
    ulong r11, r10, r9, r8, di, si, dx, cx, ax;
#else
    ulong di, si, bp, sp_before, bx, dx, cx, ax;
#endif
    ulong vector, error, ip, cs, flags;
};

/* serial.c: COM1, polled. */
void print(const char *text);
void print_hex(u64 value);
void print_decimal(u32 value);

/* memory.c: memset, memcpy and memcmp are also what gcc calls. */
void *memset(void *to, int value, size_t size);
void *memcpy(void *to, const void *from, size_t size);
int memcmp(const void *left, const void *right, size_t size);
bool all_zero(const void *page, size_t size);

/* command_line.c: words with spaces between, some of them KEY=ITEM,ITEM... */
extern const char *command_line;
void command_line_of_multiboot(u32 information); /* takes a copy of the loader's */
bool has_word(const char *word);
bool has_key(const char *key); /* `key` begins a word */
bool lists(const char *key, const char *item);

/* traps.c */
void idt_fill(u16 code_selector);
void idt_load(void);
bool fix_up(struct frame *frame); /* resume an instruction that was expected to fault; false if none was */
void print_exception(const char *guest, const struct frame *frame); /* the beginning of a line */
void on_trap(struct frame *frame); /* the guest's own: every exception and interrupt */

static inline void outb(u16 port, u8 value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void outw(u16 port, u16 value)
{
    __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static inline void outl(u16 port, u32 value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static inline u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u16 inw(u16 port)
{
    u16 value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u32 inl(u16 port)
{
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void cpuid(u32 leaf, u32 regs[4])
{
    __asm__ volatile("cpuid" : "=a"(regs[0]), "=b"(regs[1]), "=c"(regs[2]), "=d"(regs[3]) : "a"(leaf), "c"(0));
}

static inline u64 rdtsc(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (u64)high << 32 | low;
}

/* An instruction from 1 to 2 in the assembly may fault: fix_up() goes on at 2 with the vector in EDI. */
#define MAY_FAULT(instruction)                          \
    "xor %%edi, %%edi\n"                                \
    "1: " instruction "\n"                              \
    "2:\n"                                              \
    ".pushsection .fixups, \"a\"\n"                     \
    ".long 1b, 2b\n"                                    \
    ".popsection\n"

/* Both return the exception's vector, or 0. A read that faults gives 0. */
static inline u32 rdmsr_safe(u32 msr, u64 *value)
{
    u32 low = 0, high = 0, vector;

    __asm__ volatile(MAY_FAULT("rdmsr") : "+a"(low), "+d"(high), "=&D"(vector) : "c"(msr) : "memory");
    *value = (u64)high << 32 | low;
    return vector;
}

static inline u32 wrmsr_safe(u32 msr, u64 value)
{
    u32 vector;

    __asm__ volatile(MAY_FAULT("wrmsr")
                     : "=&D"(vector)
                     : "c"(msr), "a"((u32)value), "d"((u32)(value >> 32))
                     : "memory");
    return vector;
}

static inline u64 rdmsr(u32 msr)
{
    u64 value;
    rdmsr_safe(msr, &value);
    return value;
}

static inline void fence(void)
{
#ifdef __x86_64__
    __asm__ volatile("lock orl $0, (%%rsp)" : : : "memory", "cc");
#else
    __asm__ volatile("lock orl $0, (%%esp)" : : : "memory", "cc");
#endif
}

static inline ulong stack_pointer(void)
{
    ulong sp;
#ifdef __x86_64__
    __asm__ volatile("mov %%rsp, %0" : "=r"(sp));
#else
    __asm__ volatile("mov %%esp, %0" : "=r"(sp));
#endif
    return sp;
}

static inline u64 address_of(const volatile void *pointer)
{
    return (ulong)pointer;
}

/* The guest's own. */
extern u64 tsc_per_ms;
void idle(void); /* interrupts on, halt until one was taken, interrupts off */

/* Halt until `condition` holds; false after `milliseconds` by the TSC. */
#define WAIT_UNTIL(condition, milliseconds)                       \
    ({                                                            \
        u64 deadline_ = rdtsc() + (milliseconds) * tsc_per_ms;    \
        bool met_;                                                \
        while (!(met_ = (condition)) && rdtsc() < deadline_)      \
            idle();                                               \
        met_;                                                     \
    })

#endif
