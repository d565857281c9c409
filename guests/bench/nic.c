/* Measures a NIC with frames of a local experimental type (IEEE 802, 0x88b5) that have a number behind their header.
 * `send` counts frames that the host has taken; `receive` those that came, whose numbers have to grow.
 */
#include "bench.h"

#define TYPE_AT 12u
#define NUMBER_AT 16u
#define TYPE_HIGH 0x88
#define TYPE_LOW 0xb5
#define PATIENCE_MS 5000u /* for the first frame */

static struct nic_driver *const drivers[] = {&netvsc, &virtio_net};
static struct nic_driver *driver;
static u64 number;

static void send(void)
{
    u64 start = rdtsc(), limit = test.milliseconds * tsc_per_ms;
    u32 running = 0;
    bool untold = true;

    while (running < test.depth) {
        *(u64 *)(driver->frame(running) + NUMBER_AT) = number++;
        driver->submit(running++, test.bytes);
    }
    while (running) {
        int slot = driver->poll();

        if (slot >= 0) {
            test.done++;
            if (rdtsc() - start < limit) {
                *(u64 *)(driver->frame((u32)slot) + NUMBER_AT) = number++;
                driver->submit((u32)slot, test.bytes);
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

/* From the first frame on. Room is given back `depth` frames at a time, or when nothing is there. */
static void receive(void)
{
    u64 start = rdtsc(), limit = PATIENCE_MS * tsc_per_ms, last = 0;
    u32 taken = 0;

    while (rdtsc() - start < limit) {
        u32 bytes;
        const u8 *at = driver->receive(&bytes);

        if (!at || ++taken >= test.depth) {
            driver->kick();
            taken = 0;
        }
        if (!at) {
            pause();
            continue;
        }
        if (bytes < NUMBER_AT + sizeof(u64) || at[TYPE_AT] != TYPE_HIGH || at[TYPE_AT + 1] != TYPE_LOW)
            continue; /* the host's own: IPv6 and the like */
        if (!test.done++) {
            start = rdtsc();
            limit = test.milliseconds * tsc_per_ms;
        }
        test.wrong += bytes != test.bytes || *(const u64 *)(at + NUMBER_AT) <= last;
        last = *(const u64 *)(at + NUMBER_AT);
    }
    test.ticks = rdtsc() - start;
    test.failures = !test.done;
}

static bool start(void)
{
    static const u8 header[NUMBER_AT] = {0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, TYPE_HIGH, TYPE_LOW};

    for (u32 i = 0; i < sizeof(drivers) / sizeof(drivers[0]); i++)
        if (lists(nic.key, drivers[i]->name))
            driver = drivers[i];
    if (!driver) {
        fail("no such nic=");
        return false;
    }
    if (!driver->start())
        return false;
    nic.driver = driver->name;
    for (u32 slot = 0; slot < driver->depth; slot++)
        memcpy(driver->frame(slot), header, sizeof(header));
    return true;
}

static bool prepare(u32 operation)
{
    nic.run = operation ? receive : send;
    return test.bytes >= NUMBER_AT + sizeof(u64) && test.bytes <= MAX_FRAME && test.depth <= driver->depth;
}

static u32 kicks(void)
{
    return driver->kicks;
}

struct subject nic = {
    .key = "nic=",
    .unit = "frames",
    .operations = {"send", "receive"},
    .start = start,
    .prepare = prepare,
    .kicks = kicks,
};
