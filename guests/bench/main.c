/* Measures a disk. The command line has `disk=DRIVER` and tests, each OPERATION:BYTES:DEPTH:MILLISECONDS, such as
 * `randread:4096:32:500`. For each there is a line on COM1:
 *
 *     bench: storvsc.randread_4096_32 = 51234 requests 500012 us 312 kicks ok
 *
 * Each 4 KiB block of the disk has its own number in all its 64-bit words, which is what writes write; the verdict is
 * `ok` if no request failed and every block that was read begins and ends with its number.
 */
#include "bench.h"

#define BLOCK_SECTORS (PAGE_SIZE / SECTOR_SIZE)
#define BLOCK_WORDS (PAGE_SIZE / sizeof(u64))
#define POISON 0xbadbadbadbadbadull

#define EXIT_PORT 0xf4 /* QEMU's isa-debug-exit, as pyvmm's --testdev has it too */
#define PM_TIMER 0x608 /* where QEMU's firmware and pyvmm put it (ACPI 6.5, 4.8.3.3) */
#define PM_TIMER_HZ 3579545u
#define PM_TIMER_MASK 0xffffffu
#define CALIBRATION (PM_TIMER_HZ / 20)

#define CODE_SELECTOR 0x10
#define TASK_SELECTOR 0x30

struct test {
    char name[32]; /* as in the report */
    bool write, random;
    u32 bytes, depth, milliseconds;
    u64 requests, ticks;
    u32 kicks, failures, wrong;
};

static const struct {
    const char *name;
    bool write, random;
} operations[] = {{"read", false, false}, {"write", true, false}, {"randread", false, true}, {"randwrite", true, true}};

static struct driver *const drivers[] = {&storvsc, &virtio_blk, &ide_pio, &ide_dma};

extern u64 gdt[];
extern u8 user_end[];
_Noreturn void leave_user(void);

u64 tsc_per_ms = 3000000; /* until it is measured */
u8 buffers[MAX_DEPTH][MAX_BYTES] __attribute__((aligned(4096)));

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

static struct driver *driver;
static struct test test;
static u64 disk_blocks;
static u64 blocks[MAX_DEPTH]; /* where each slot's request begins */
static u64 next_block;
static u64 random_state = 0x9e3779b97f4a7c15ull;
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
    print("bench: disk.start = - bad ");
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

/* xorshift64* (S. Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled"). */
static u32 random_number(void)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (u32)(random_state * 0x2545f4914f6cdd1dull >> 32);
}

static void begin(u32 slot)
{
    u32 count = test.bytes / PAGE_SIZE;
    u64 *at = (u64 *)buffers[slot], block;

    if (test.random) {
        block = ((u64)random_number() * (disk_blocks / count) >> 32) * count;
    } else {
        block = next_block;
        next_block = block + 2 * count > disk_blocks ? 0 : block + count;
    }
    blocks[slot] = block;
    for (; count--; at += BLOCK_WORDS, block++) {
        if (test.write)
            for (u32 i = 0; i < BLOCK_WORDS; i++)
                at[i] = block;
        else
            at[0] = at[BLOCK_WORDS - 1] = POISON;
    }
    driver->submit(slot, test.write, blocks[slot] * BLOCK_SECTORS, test.bytes);
}

static void end(u32 slot, bool good)
{
    const u64 *at = (const u64 *)buffers[slot];
    u64 block = blocks[slot];

    test.requests++;
    test.failures += !good;
    for (u32 count = test.bytes / PAGE_SIZE; count--; at += BLOCK_WORDS, block++)
        if (at[0] != block || at[BLOCK_WORDS - 1] != block) {
            test.wrong++;
            return;
        }
}

/* All requests that are over are taken and begun anew before the host is told, once for all of them. */
static void run(void)
{
    u64 start = rdtsc(), limit = test.milliseconds * tsc_per_ms;
    u32 running = 0;
    bool untold = true;

    while (running < test.depth)
        begin(running++);
    while (running) {
        bool good;
        int slot = driver->poll(&good);

        if (slot >= 0) {
            end((u32)slot, good);
            if (rdtsc() - start < limit) {
                begin((u32)slot);
                untold = true;
            } else {
                running--;
            }
        } else if (untold) {
            driver->kick();
            untold = false;
        } else {
            pause();
        }
    }
    test.ticks = rdtsc() - start;
}

static void report(void)
{
    bool good = !test.failures && !test.wrong;

    *(good ? &passed : &failed) += 1;
    print("bench: ");
    print(driver->name);
    print(".");
    print(test.name);
    print(" = ");
    print_decimal((u32)test.requests);
    print(" requests ");
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
    for (u32 i = 0; i < sizeof(operations) / sizeof(operations[0]); i++) {
        const char *name = operations[i].name, *from = at;

        if (memcmp(name, at, length) || name[length])
            continue;
        memset(&test, 0, sizeof(test));
        test.write = operations[i].write;
        test.random = operations[i].random;
        at = number(at + length + 1, &test.bytes);
        at = number(at, &test.depth);
        number(at, &test.milliseconds);
        for (at_name = 0; at_name < sizeof(test.name) - 1 && from < at - 1; from++)
            test.name[at_name++] = *from == ':' ? '_' : *from;
        return test.bytes && test.bytes % PAGE_SIZE == 0 && test.bytes <= MAX_BYTES && test.depth &&
               test.depth <= driver->depth && test.milliseconds && test.bytes / PAGE_SIZE <= disk_blocks;
    }
    return false;
}

static void run_tests(void)
{
    const char *at = command_line;
    u32 kicks;

    while (*at) {
        if (parse(at)) {
            kicks = driver->kicks;
            run_as_user(run);
            test.kicks = driver->kicks - kicks;
            report();
        }
        while (*at && *at != ' ')
            at++;
        while (*at == ' ')
            at++;
    }
}

static bool start_driver(void)
{
    u64 sectors;

    for (u32 i = 0; i < sizeof(drivers) / sizeof(drivers[0]); i++)
        if (lists("disk=", drivers[i]->name))
            driver = drivers[i];
    if (!driver) {
        fail("no such disk=");
        return false;
    }
    if (!driver->start(&sectors))
        return false;
    disk_blocks = sectors / BLOCK_SECTORS;
    return true;
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
    if (start_driver())
        run_tests();
    print("bench: done ");
    print_decimal(passed);
    print(" ");
    print_decimal(failed);
    print("\n");
    outl(EXIT_PORT, failed || !passed);
}
