/* The SCSI disk on LUN 0 of the first controller on VMBus, by one channel with Linux's ring size. */
#include "bench.h"

#define RING_BYTES (128u << 10) /* storvsc_ringbuffer_size */
#define SCSI_READ_10 0x28
#define SCSI_WRITE_10 0x2a
#define SCSI_READ_CAPACITY_10 0x25
#define STORAGE_VERSION 0x602

static u8 rings[2][PAGE_SIZE + RING_BYTES] __attribute__((aligned(4096)));
static struct channel channel;

static bool handshake(void)
{
    struct storage_packet steps[] = {
        {.operation = BEGIN_INITIALIZATION},
        {.operation = QUERY_PROTOCOL_VERSION, .version = {STORAGE_VERSION, 0}},
        {.operation = QUERY_PROPERTIES},
        {.operation = END_INITIALIZATION},
    };

    for (u32 i = 0; i < sizeof(steps) / sizeof(steps[0]); i++)
        if (!storvsc_exchange(&channel, &steps[i], NULL, 0) || steps[i].operation != COMPLETE_IO || steps[i].status)
            return false;
    return true;
}

static bool read_capacity(u64 *sectors)
{
    const u8 cdb[10] = {SCSI_READ_CAPACITY_10};
    struct storage_packet packet = {.operation = EXECUTE_SRB};

    packet.srb = storvsc_srb(0, cdb, sizeof(cdb), DATA_IN, 8);
    if (!storvsc_exchange(&channel, &packet, buffers[0], 8) || !storvsc_succeeded(&packet.srb))
        return false;
    *sectors = __builtin_bswap32(*(u32 *)buffers[0]) + 1ull;
    return __builtin_bswap32(*(u32 *)(buffers[0] + 4)) == SECTOR_SIZE;
}

static bool start(u64 *sectors)
{
    if (!hyperv_find(SCSI_INTERFACE, &channel)) {
        fail("no SCSI controller on VMBus");
        return false;
    }
    if (!hyperv_open(&channel, rings, RING_BYTES) || !handshake()) {
        fail("the SCSI controller's channel does not open");
        return false;
    }
    if (!read_capacity(sectors)) {
        fail("no disk on LUN 0");
        return false;
    }
    return true;
}

static void submit(u32 slot, bool write, u64 sector, u32 bytes)
{
    const u32 count = bytes / SECTOR_SIZE;
    const u8 cdb[10] = {
        write ? SCSI_WRITE_10 : SCSI_READ_10, 0,         (u8)(sector >> 24), (u8)(sector >> 16),
        (u8)(sector >> 8),                    (u8)sector, 0,                  (u8)(count >> 8),
        (u8)count,                            0,
    };
    struct storage_packet packet = {.operation = EXECUTE_SRB, .flags = 1};

    packet.srb = storvsc_srb(0, cdb, sizeof(cdb), write ? DATA_OUT : DATA_IN, bytes);
    storvsc_put(&channel, &packet, buffers[slot], bytes, slot);
}

static void kick(void)
{
    ring_release(&channel);
    ring_publish(&channel);
    storvsc.kicks = channel.signals;
}

static int poll(bool *good)
{
    struct storage_packet packet;
    struct packet head;

    if (!ring_take(&channel, &head, &packet, sizeof(packet)))
        return -1;
    *good = head.type == PACKET_COMPLETION && packet.operation == COMPLETE_IO && storvsc_succeeded(&packet.srb);
    return (int)head.transaction;
}

struct driver storvsc = {
    .name = "storvsc",
    .depth = MAX_DEPTH,
    .start = start,
    .submit = submit,
    .kick = kick,
    .poll = poll,
};
