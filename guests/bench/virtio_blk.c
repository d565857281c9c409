/* A virtio block device (Virtual I/O Device Version 1.1, 5.2). */
#include "bench.h"

#define DEVICE_ID 0x10011af4u
#define FEATURE_FLUSH (1u << 9) /* the driver would flush, so the device need not write through */
#define CHAIN 3u                /* descriptors of a request: header, data, status */

#define TYPE_IN 0
#define TYPE_OUT 1

static struct virtio_queue queue;
static struct {
    u32 type;
    u32 reserved;
    u64 sector;
} headers[MAX_DEPTH];
static volatile u8 statuses[MAX_DEPTH];

static bool start(u64 *sectors)
{
    u32 features = FEATURE_FLUSH;

    if (!virtio_find(DEVICE_ID, &features)) {
        fail("no virtio-blk on PCI");
        return false;
    }
    if (!virtio_queue(&queue, 0, CHAIN * MAX_DEPTH)) {
        fail("virtio-blk has a queue of another size");
        return false;
    }
    for (u32 slot = 0; slot < MAX_DEPTH; slot++) {
        struct descriptor *chain = queue.descriptors + CHAIN * slot;
        u16 next = (u16)(CHAIN * slot + 1);

        chain[0] = (struct descriptor){address_of(&headers[slot]), sizeof(headers[0]), VIRTIO_NEXT, next};
        chain[1] = (struct descriptor){address_of(buffers[slot]), 0, VIRTIO_NEXT, (u16)(next + 1)};
        chain[2] = (struct descriptor){address_of(&statuses[slot]), 1, VIRTIO_DEVICE_WRITES, 0};
    }
    virtio_ready();
    *sectors = inl(virtio_ports() + VIRTIO_CONFIGURATION) | (u64)inl(virtio_ports() + VIRTIO_CONFIGURATION + 4) << 32;
    return true;
}

static void submit(u32 slot, bool write, u64 sector, u32 bytes)
{
    struct descriptor *chain = queue.descriptors + CHAIN * slot;

    headers[slot].type = write ? TYPE_OUT : TYPE_IN;
    headers[slot].sector = sector;
    chain[1].bytes = bytes;
    chain[1].flags = write ? VIRTIO_NEXT : VIRTIO_NEXT | VIRTIO_DEVICE_WRITES;
    virtio_submit(&queue, CHAIN * slot);
}

static void kick(void)
{
    virtio_blk.kicks += virtio_publish(&queue);
}

static int poll(bool *good)
{
    u32 bytes;
    int chain = virtio_take(&queue, &bytes);

    if (chain < 0)
        return -1;
    *good = statuses[(u32)chain / CHAIN] == 0;
    return chain / (int)CHAIN;
}

struct driver virtio_blk = {
    .name = "virtio-blk",
    .depth = MAX_DEPTH,
    .start = start,
    .submit = submit,
    .kick = kick,
    .poll = poll,
};
