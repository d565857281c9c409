/* Measures a disk, or a NIC. The command line has `disk=DRIVER` or `nic=DRIVER` and tests, each
 * OPERATION:BYTES:DEPTH:MILLISECONDS, such as `randread:4096:32:500`. For each there is a line on COM1:
 *
 *     bench: storvsc.randread_4096_32 = 51234 requests 500012 us 312 kicks ok
 */
#include "bench.h"

#define EXIT_PORT 0xf4 /* QEMU's isa-debug-exit, as pyvmm's --testdev has it too */
#define PM_TIMER 0x608 /* where QEMU's firmware and pyvmm put it (ACPI 6.5, 4.8.3.3) */
#define PM_TIMER_HZ 3579545u
#define PM_TIMER_MASK 0xffffffu
#define CALIBRATION (PM_TIMER_HZ / 20)

#define CODE_SELECTOR 0x10
#define TASK_SELECTOR 0x30

static struct subject *const subjects[] = {&disk, &nic};

extern u64 gdt[];
extern u8 user_end[];
_Noreturn void leave_user(void);

u64 tsc_per_ms = 3000000; /* until it is measured */
struct test test;

static struct {
    u32 reserved0;
    u64 stacks[3];
    u64 reserved1;
    u64 more_stacks[7];
    u64 reserved2;
    u16 reserved3;
    u16 io_map;
    u8 denied[65536 / 8 + 1]; /* no port is; bits beyond the last one are read too, and the last byte has to be set */
} __attribute__((packed)) task = {.io_map = 104, .denied[65536 / 8] = 0xff};

static struct subject *subject;
static u32 passed, failed;

/* The environment --------------------------------------------------------------------------------------- */

void idle(void)
{
    pause();
}

void on_trap(struct frame *frame)
{
    if (frame->ip == address_of(user_end))
        leave_user();
    if (fix_up(frame))
        return;
    print_exception("bench", frame);
    print("\n");
    outl(EXIT_PORT, 1);
}

void fail(const char *why)
{
    failed++;
    print("bench: bench.start = - bad ");
    print(why);
    print("\n");
}

static void privileges_init(void)
{
    u64 base = address_of(&task), limit = sizeof(task) - 1;

    task.stacks[0] = address_of(trap_stack_end);
    gdt[TASK_SELECTOR / 8] = limit | (base & 0xffffff) << 16 | 0x89ull << 40 | (base >> 24 & 0xff) << 56;
    gdt[TASK_SELECTOR / 8 + 1] = base >> 32;
    __asm__ volatile("ltr %w0" : : "r"(TASK_SELECTOR));
    idt_fill(CODE_SELECTOR);
    idt_load();
}

/* In user mode, where the tests read the TSC too. */
static void calibrate(void)
{
    u32 start = inl(PM_TIMER), passed_ticks;
    u64 tsc = rdtsc();

    do
        passed_ticks = (inl(PM_TIMER) - start) & PM_TIMER_MASK;
    while (passed_ticks < CALIBRATION);
    tsc_per_ms = (rdtsc() - tsc) * PM_TIMER_HZ / passed_ticks / 1000;
}

/* Tests ----------------------------------------------------------------------------------------------------- */

static void report(void)
{
    bool good = !test.failures && !test.wrong;

    *(good ? &passed : &failed) += 1;
    print("bench: ");
    print(subject->driver);
    print(".");
    print(test.name);
    print(" = ");
    print_decimal((u32)test.done);
    print(" ");
    print(subject->unit);
    print(" ");
    print_decimal((u32)(test.ticks * 1000 / tsc_per_ms));
    print(" us ");
    print_decimal(test.kicks);
    print(" kicks");
    if (good) {
        print(" ok\n");
        return;
    }
    print(" bad ");
    print_decimal(test.failures);
    print(" failed, ");
    print_decimal(test.wrong);
    print(" with wrong data\n");
}

/* Reads a number up to a colon or the end of the word; 0 if there is something else. */
static const char *number(const char *at, u32 *value)
{
    *value = 0;
    while (*at >= '0' && *at <= '9')
        *value = *value * 10 + (u32)(*at++ - '0');
    if (*at == ':')
        return at + 1;
    if (*at && *at != ' ')
        *value = 0;
    return at;
}

/* Reads the word at `at`; false if it is no test. */
static bool parse(const char *at)
{
    u32 length = 0, at_name;

    while (at[length] && at[length] != ' ' && at[length] != ':')
        length++;
    if (at[length] != ':')
        return false;
    for (u32 i = 0; i < MAX_OPERATIONS && subject->operations[i]; i++) {
        const char *name = subject->operations[i], *from = at;

        if (memcmp(name, at, length) || name[length])
            continue;
        memset(&test, 0, sizeof(test));
        at = number(at + length + 1, &test.bytes);
        at = number(at, &test.depth);
        number(at, &test.milliseconds);
        for (at_name = 0; at_name < sizeof(test.name) - 1 && from < at - 1; from++)
            test.name[at_name++] = *from == ':' ? '_' : *from;
        return test.bytes && test.depth && test.milliseconds && subject->prepare(i);
    }
    return false;
}

static void run_tests(void)
{
    const char *at = command_line;
    u32 kicks;

    while (*at) {
        if (parse(at)) {
            kicks = subject->kicks();
            run_as_user(subject->run);
            test.kicks = subject->kicks() - kicks;
            report();
        }
        while (*at && *at != ' ')
            at++;
        while (*at == ' ')
            at++;
    }
}

static bool start(void)
{
    for (u32 i = 0; i < sizeof(subjects) / sizeof(subjects[0]); i++)
        if (has_key(subjects[i]->key))
            subject = subjects[i];
    if (!subject) {
        fail("neither disk= nor nic=");
        return false;
    }
    return subject->start();
}

void bench_main(u32 multiboot);
void bench_main(u32 multiboot)
{
    command_line_of_multiboot(multiboot);
    privileges_init();
    run_as_user(calibrate);
    print("bench: TSC of ");
    print_decimal((u32)tsc_per_ms);
    print(" kHz\n");
    if (start())
        run_tests();
    print("bench: done ");
    print_decimal(passed);
    print(" ");
    print_decimal(failed);
    print("\n");
    outl(EXIT_PORT, failed || !passed);
}
