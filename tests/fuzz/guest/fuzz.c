/* Random accesses to the synthetic MSRs and random hypercalls, from a seed: `seed=N rounds=N` on the command line.
 *
 * Left out is only what ends or restarts the guest by design (RESET, the crash notification, INIT by the ICR), and what
 * would only wait (GUEST_IDLE). Overlay pages and the output of hypercalls stay off the guest's own code and data.
 */
#include "../../../guests/bare/hyperv.h"

#define CODE_SELECTOR 0x08
#define EXIT_PORT 0xf4 /* QEMU's isa-debug-exit */
#define IMAGE 0x100000u
#define ARENA_SIZE (8 * PAGE_SIZE)
#define CRASH_NOTIFY (1ull << 63)
#define APIC_TPR 0xfee00080u
#define APIC_EOI 0xfee000b0u
#define APIC_SPURIOUS 0xfee000f0u
#define APIC_ICR 0xfee00300u
#define ICR_SELF_FIXED 0x44000u
#define MULTIBOOT_HAS_COMMAND_LINE (1u << 2)
#define FIRST_INTERRUPT 16u /* the lowest vector of a SINT */

extern u8 arena[ARENA_SIZE];
u64 hypercall(u64 control, u64 input, u64 output);

static const u16 calls[] = {
    CALL_FLUSH_SPACE,      CALL_FLUSH_LIST,      CALL_LONG_SPIN_WAIT,    CALL_SEND_IPI,         CALL_FLUSH_SPACE_EX,
    CALL_FLUSH_LIST_EX,    CALL_SEND_IPI_EX,     CALL_GET_VP_REGISTERS,  CALL_SET_VP_REGISTERS, CALL_POST_MESSAGE,
    CALL_SIGNAL_EVENT,     CALL_START_VP,        CALL_VP_INDEX_FROM_APIC_ID, CALL_EXT_QUERY,
};

static const u32 pages[] = {MSR_GUEST_OS_ID, MSR_HYPERCALL, MSR_REFERENCE_TSC, MSR_VP_ASSIST_PAGE};

static u64 state;
static u32 faults, interrupts, failures;
static volatile u32 own_interrupts;

static u64 draw(void)
{
    state ^= state << 13; /* Marsaglia's xorshift */
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static u32 below(u32 limit)
{
    return (u32)draw() % limit;
}

static _Noreturn void end(const char *trouble, u64 value)
{
    print("fuzz: ");
    print(trouble);
    print(" ");
    print_hex(value);
    print(" rounds left, faults, interrupts, failures: ");
    print_decimal(faults);
    print(" ");
    print_decimal(interrupts);
    print(" ");
    print_decimal(failures);
    print("\n");
    outl(EXIT_PORT, value != 0);
    for (;;)
        __asm__ volatile("cli; hlt");
}

void on_trap(struct frame *frame)
{
    if (frame->vector == EXCEPTION_GP && fix_up(frame)) {
        faults++;
        return;
    }
    if (frame->vector < FIRST_INTERRUPT)
        end("exception at", frame->ip);
    interrupts++;
    own_interrupts += frame->vector == FIRST_INTERRUPT;
    *(volatile u32 *)APIC_EOI = 0;
}

static void take_traps(void)
{
    struct {
        u16 limit;
        u32 base;
    } __attribute__((packed)) idt;

    idt_fill(CODE_SELECTOR);
    idt_load();
    /* An interrupt on vector 17 has no error code, unlike the exception: it comes as 18 does. */
    __asm__ volatile("sidt %0" : "=m"(idt));
    ((u64 *)idt.base)[17] = ((u64 *)idt.base)[18];
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
    *(volatile u32 *)APIC_SPURIOUS = 0x1ff;
}

/* Nothing that names a page of the guest's own. */
static u64 harmless(u64 value)
{
    u64 page = value & ~(u64)(PAGE_SIZE - 1);

    return page >= IMAGE && page < address_of(arena) ? value | 1u << 30 : value;
}

static u64 some_value(void)
{
    switch (below(6)) {
    case 0:
        return harmless(draw());
    case 1:
        return below(0x2000); /* timer configurations, vectors */
    case 2:
        return (u64)below(16) << 16 | below(0x2000);
    case 3:
        return harmless(1ull << below(64));
    default:
        return address_of(arena) + below(8) * PAGE_SIZE + below(4);
    }
}

static u32 some_msr(void)
{
    switch (below(5)) {
    case 0:
        return 0x40000000 + below(0x200);
    case 1:
        return MSR_SCONTROL + below(5);
    case 2:
        return pages[below(sizeof(pages) / sizeof(pages[0]))];
    case 3:
        return MSR_SINT0 + below(16);
    default:
        return MSR_STIMER0_CONFIG + below(8);
    }
}

static void write_msr(void)
{
    u32 msr = some_msr();
    u64 value = some_value();

    if (msr == MSR_RESET || msr == MSR_ICR)
        return;
    if (msr == MSR_CRASH_CTL)
        value &= ~CRASH_NOTIFY;
    if (msr == MSR_SCONTROL || msr == MSR_GUEST_OS_ID || msr == MSR_HYPERCALL)
        value |= 1; /* mostly on, or little happens */
    if (msr == MSR_HYPERCALL)
        value &= ~2ull; /* never locked, which is for good */
    wrmsr_safe(msr, value);
}

static void read_msr(void)
{
    u64 value;
    u32 msr = some_msr();

    if (msr != MSR_GUEST_IDLE)
        rdmsr_safe(msr, &value);
}

static void write_memory(void)
{
    u64 *page = (u64 *)(arena + below(8) * PAGE_SIZE);

    switch (below(4)) {
    case 0:
        for (u32 slot = 0; slot < 16; slot++)
            page[32 * slot] = 0;
        break;
    case 1:
        page[below(512)] = draw();
        break;
    default:
        for (u32 word = 0; word < 4; word++)
            page[word] = below(2) ? ~0ull : below(256);
    }
}

static void call(void)
{
    u64 control = below(16) ? calls[below(sizeof(calls) / sizeof(calls[0]))] : (u16)draw();
    u64 input = below(4) ? address_of(arena) + below(ARENA_SIZE / 8) * 8 : harmless(draw());
    u64 output = below(4) ? address_of(arena) + below(ARENA_SIZE / 8) * 8 : harmless(draw());
    u64 result;

    if (below(2))
        control |= CALL_FAST;
    if (!below(3))
        control |= CALL_VARIABLE_HEADER(below(4));
    if (below(2))
        control |= CALL_REPS(below(8)) | CALL_START(below(4));
    if (!below(16))
        control ^= 1ull << below(64);
    result = hypercall(control, input, output);
    if (!(rdmsr(MSR_HYPERCALL) & 1))
        return;
    failures += (u16)result != STATUS_SUCCESS;
    if ((u32)result >= 0x100 || result >> 32 > (control >> 32 & 0xfff))
        end("a result that no hypercall has:", result);
}

/* One of our own, of the lowest priority, comes after all that wait. */
static void take_interrupts(void)
{
    u32 wanted = own_interrupts + 1;

    *(volatile u32 *)APIC_TPR = 0;
    *(volatile u32 *)APIC_ICR = ICR_SELF_FIXED | FIRST_INTERRUPT;
    while (own_interrupts < wanted)
        __asm__ volatile("sti; hlt; cli" : : : "memory");
}

static u64 number(const char *text, const char *key)
{
    u64 value = 0;

    for (; *text; text++) {
        const char *at = text, *k = key;
        while (*k && *at == *k)
            at++, k++;
        if (*k)
            continue;
        while (*at >= '0' && *at <= '9')
            value = value * 10 + (u64)(*at++ - '0');
        return value;
    }
    return 0;
}

struct multiboot {
    u32 flags, lower, upper, device, command_line;
};

void fuzz_main(const struct multiboot *information);
void fuzz_main(const struct multiboot *information)
{
    const char *options = information->flags & MULTIBOOT_HAS_COMMAND_LINE ? (const char *)information->command_line : "";
    u32 rounds = (u32)number(options, "rounds=");

    state = number(options, "seed=") * 0x9e3779b97f4a7c15 + 1;
    take_traps();
    wrmsr_safe(MSR_GUEST_OS_ID, 1);
    wrmsr_safe(MSR_HYPERCALL, address_of(arena) | 1);
    wrmsr_safe(MSR_SCONTROL, 1);
    wrmsr_safe(MSR_SIMP, address_of(arena) + (PAGE_SIZE | 1));
    wrmsr_safe(MSR_SIEFP, address_of(arena) + (2 * PAGE_SIZE | 1));
    for (; rounds; rounds--) {
        switch (below(8)) {
        case 0:
            write_memory();
            break;
        case 1:
            read_msr();
            break;
        case 2:
        case 3:
        case 4:
            call();
            break;
        default:
            write_msr();
        }
        if (!below(16))
            take_interrupts();
    }
    end("done", rounds);
}
