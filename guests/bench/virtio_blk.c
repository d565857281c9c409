/* A virtio block device by its legacy PCI interface (Virtual I/O Device Version 1.1, 4.1.4.8, 2.6 and 5.2). Completions
 * are polled for: with event indices, or else by a flag, the device is told to raise no interrupt; and it is notified
 * only when its own index or flag asks for it.
 */
#include "bench.h"

#define DEVICE_ID 0x10011af4u

/* Offsets of BAR 0. */
#define HOST_FEATURES 0x00
#define GUEST_FEATURES 0x04
#define QUEUE_PAGE 0x08
#define QUEUE_SIZE 0x0c
#define QUEUE_SELECT 0x0e
#define QUEUE_NOTIFY 0x10
#define STATUS 0x12
#define CAPACITY 0x14

#define STATUS_ACKNOWLEDGE 1
#define STATUS_DRIVER 2
#define STATUS_DRIVER_OK 4
#define FEATURE_FLUSH (1u << 9) /* the driver would flush, so the device need not write through */
#define FEATURE_EVENT_INDEX (1u << 29)

#define NEXT 1
#define DEVICE_WRITES 2
#define NO_INTERRUPT 1
#define NO_NOTIFY 1
#define LARGEST_QUEUE 1024u
#define CHAIN 3u /* descriptors of a request: header, data, status */

#define TYPE_IN 0
#define TYPE_OUT 1

struct descriptor {
    u64 address;
    u32 bytes;
    u16 flags;
    u16 next;
};

struct available {
    volatile u16 flags;
    volatile u16 index;
    u16 ring[];
};

struct used {
    volatile u16 flags;
    volatile u16 index;
    struct {
        u32 id;
        u32 bytes;
    } ring[];
};

static u8 queue_memory[16 * PAGE_SIZE] __attribute__((aligned(4096)));
static struct descriptor *descriptors;
static struct available *available;
static struct used *used;
static volatile u16 *used_event, *available_event;
static u16 ports, mask, submitted, taken;
static bool event_index;

static struct {
    u32 type;
    u32 reserved;
    u64 sector;
} headers[MAX_DEPTH];
static volatile u8 statuses[MAX_DEPTH];

static bool make_queue(void)
{
    u32 size, descriptor_bytes, available_bytes;

    outw(ports + QUEUE_SELECT, 0);
    size = inw(ports + QUEUE_SIZE);
    if (size < CHAIN * MAX_DEPTH || size > LARGEST_QUEUE)
        return false;
    mask = (u16)(size - 1);
    descriptor_bytes = size * (u32)sizeof(struct descriptor);
    available_bytes = 6 + 2 * size;
    descriptors = (struct descriptor *)queue_memory;
    available = (struct available *)(queue_memory + descriptor_bytes);
    used = (struct used *)(queue_memory + ((descriptor_bytes + available_bytes + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)));
    used_event = (volatile u16 *)&available->ring[size];
    available_event = (volatile u16 *)&used->ring[size];
    available->flags = NO_INTERRUPT;
    for (u32 slot = 0; slot < MAX_DEPTH; slot++) {
        struct descriptor *chain = descriptors + CHAIN * slot;

        chain[0] = (struct descriptor){address_of(&headers[slot]), sizeof(headers[0]), NEXT, (u16)(CHAIN * slot + 1)};
        chain[1] = (struct descriptor){address_of(buffers[slot]), 0, NEXT, (u16)(CHAIN * slot + 2)};
        chain[2] = (struct descriptor){address_of(&statuses[slot]), 1, DEVICE_WRITES, 0};
    }
    outl(ports + QUEUE_PAGE, (u32)(address_of(queue_memory) / PAGE_SIZE));
    return true;
}

static bool start(u64 *sectors)
{
    u32 device, features;

    if (!pci_find(DEVICE_ID, &device) || !(ports = pci_ports(device, 0))) {
        fail("no virtio-blk on PCI");
        return false;
    }
    outb(ports + STATUS, 0);
    outb(ports + STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    features = inl(ports + HOST_FEATURES) & (FEATURE_FLUSH | FEATURE_EVENT_INDEX);
    event_index = features & FEATURE_EVENT_INDEX;
    outl(ports + GUEST_FEATURES, features);
    if (!make_queue()) {
        fail("virtio-blk has a queue of another size");
        return false;
    }
    *used_event = 0x8000;
    outb(ports + STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK);
    *sectors = inl(ports + CAPACITY) | (u64)inl(ports + CAPACITY + 4) << 32;
    return true;
}

static void submit(u32 slot, bool write, u64 sector, u32 bytes)
{
    struct descriptor *chain = descriptors + CHAIN * slot;

    headers[slot].type = write ? TYPE_OUT : TYPE_IN;
    headers[slot].sector = sector;
    chain[1].bytes = bytes;
    chain[1].flags = write ? NEXT : NEXT | DEVICE_WRITES;
    available->ring[submitted++ & mask] = (u16)(CHAIN * slot);
}

static void kick(void)
{
    u16 before = available->index;
    bool wanted;

    *used_event = (u16)(taken + 0x8000); /* as far away as an index gets */
    fence();
    available->index = submitted;
    fence();
    if (event_index)
        wanted = (u16)(submitted - *available_event - 1) < (u16)(submitted - before);
    else
        wanted = !(used->flags & NO_NOTIFY);
    if (wanted) {
        virtio_blk.kicks++;
        outw(ports + QUEUE_NOTIFY, 0);
    }
}

static int poll(bool *good)
{
    u32 slot;

    if (used->index == taken)
        return -1;
    fence();
    slot = used->ring[taken++ & mask].id / CHAIN;
    *good = statuses[slot] == 0;
    return (int)slot;
}

struct driver virtio_blk = {
    .name = "virtio-blk",
    .depth = MAX_DEPTH,
    .start = start,
    .submit = submit,
    .kick = kick,
    .poll = poll,
};
