/* Measures a disk. Each 4 KiB block of it has its own number in all its 64-bit words, which is what writes write; the
 * verdict is `ok` if no request failed and every block that was read begins and ends with its number.
 */
#include "bench.h"

#define BLOCK_SECTORS (PAGE_SIZE / SECTOR_SIZE)
#define BLOCK_WORDS (PAGE_SIZE / sizeof(u64))
#define POISON 0xbadbadbadbadbadull

static struct driver *const drivers[] = {&storvsc, &virtio_blk, &ide_pio, &ide_dma};
static struct driver *driver;
static bool writes, random;
static u64 disk_blocks;
static u64 blocks[MAX_DEPTH]; /* where each slot's request begins */
static u64 next_block;
static u64 random_state = 0x9e3779b97f4a7c15ull;

u8 buffers[MAX_DEPTH][MAX_BYTES] __attribute__((aligned(4096)));

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

    if (random) {
        block = ((u64)random_number() * (disk_blocks / count) >> 32) * count;
    } else {
        block = next_block;
        next_block = block + 2 * count > disk_blocks ? 0 : block + count;
    }
    blocks[slot] = block;
    for (; count--; at += BLOCK_WORDS, block++) {
        if (writes)
            for (u32 i = 0; i < BLOCK_WORDS; i++)
                at[i] = block;
        else
            at[0] = at[BLOCK_WORDS - 1] = POISON;
    }
    driver->submit(slot, writes, blocks[slot] * BLOCK_SECTORS, test.bytes);
}

static void end(u32 slot, bool good)
{
    const u64 *at = (const u64 *)buffers[slot];
    u64 block = blocks[slot];

    test.done++;
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

static bool start(void)
{
    u64 sectors;

    for (u32 i = 0; i < sizeof(drivers) / sizeof(drivers[0]); i++)
        if (lists(disk.key, drivers[i]->name))
            driver = drivers[i];
    if (!driver) {
        fail("no such disk=");
        return false;
    }
    if (!driver->start(&sectors))
        return false;
    disk.driver = driver->name;
    disk_blocks = sectors / BLOCK_SECTORS;
    return true;
}

static bool prepare(u32 operation)
{
    writes = operation & 1;
    random = operation & 2;
    return test.bytes % PAGE_SIZE == 0 && test.bytes <= MAX_BYTES && test.depth <= driver->depth &&
           test.bytes / PAGE_SIZE <= disk_blocks;
}

static u32 kicks(void)
{
    return driver->kicks;
}

struct subject disk = {
    .key = "disk=",
    .unit = "requests",
    .operations = {"read", "write", "randread", "randwrite"},
    .start = start,
    .prepare = prepare,
    .run = run,
    .kicks = kicks,
};
