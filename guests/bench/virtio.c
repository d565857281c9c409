/* The legacy PCI interface of virtio devices (Virtual I/O Device Version 1.1, 4.1.4.8 and 2.6). What is done is polled
 * for: with event indices, or else by a flag, the device is told to raise no interrupt; and it is notified only when its
 * own index or flag asks for it.
 */
#include "bench.h"

/* Offsets of BAR 0. */
#define HOST_FEATURES 0x00
#define GUEST_FEATURES 0x04
#define QUEUE_PAGE 0x08
#define QUEUE_SIZE 0x0c
#define QUEUE_SELECT 0x0e
#define QUEUE_NOTIFY 0x10
#define STATUS 0x12

#define STATUS_ACKNOWLEDGE 1
#define STATUS_DRIVER 2
#define STATUS_DRIVER_OK 4
#define FEATURE_EVENT_INDEX (1u << 29)

#define NO_INTERRUPT 1
#define NO_NOTIFY 1
#define LARGEST_QUEUE 1024u

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

static u16 ports;
static bool event_index;

bool virtio_find(u32 id, u32 *features)
{
    u32 device;

    if (!pci_find(id, &device) || !(ports = pci_ports(device, 0)))
        return false;
    outb(ports + STATUS, 0);
    outb(ports + STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    *features = inl(ports + HOST_FEATURES) & (*features | FEATURE_EVENT_INDEX);
    event_index = *features & FEATURE_EVENT_INDEX;
    outl(ports + GUEST_FEATURES, *features);
    return true;
}

u16 virtio_ports(void)
{
    return ports;
}

bool virtio_queue(struct virtio_queue *queue, u16 number, u32 least)
{
    u32 size, descriptor_bytes, available_bytes;

    outw(ports + QUEUE_SELECT, number);
    size = inw(ports + QUEUE_SIZE);
    if (size < least || size > LARGEST_QUEUE)
        return false;
    queue->number = number;
    queue->mask = (u16)(size - 1);
    descriptor_bytes = size * (u32)sizeof(struct descriptor);
    available_bytes = 6 + 2 * size;
    queue->descriptors = (struct descriptor *)queue->memory;
    queue->available = (struct available *)(queue->memory + descriptor_bytes);
    queue->used =
        (struct used *)(queue->memory + ((descriptor_bytes + available_bytes + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)));
    queue->used_event = (volatile u16 *)&queue->available->ring[size];
    queue->available_event = (volatile u16 *)&queue->used->ring[size];
    queue->available->flags = NO_INTERRUPT;
    *queue->used_event = 0x8000;
    outl(ports + QUEUE_PAGE, (u32)(address_of(queue->memory) / PAGE_SIZE));
    return true;
}

void virtio_ready(void)
{
    outb(ports + STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK);
}

void virtio_submit(struct virtio_queue *queue, u32 descriptor)
{
    queue->available->ring[queue->submitted++ & queue->mask] = (u16)descriptor;
}

bool virtio_publish(struct virtio_queue *queue)
{
    u16 before = queue->available->index;
    bool wanted;

    if (queue->submitted == before)
        return false;
    *queue->used_event = (u16)(queue->taken + 0x8000); /* as far away as an index gets */
    fence();
    queue->available->index = queue->submitted;
    fence();
    if (event_index)
        wanted = (u16)(queue->submitted - *queue->available_event - 1) < (u16)(queue->submitted - before);
    else
        wanted = !(queue->used->flags & NO_NOTIFY);
    if (wanted)
        outw(ports + QUEUE_NOTIFY, queue->number);
    return wanted;
}

int virtio_take(struct virtio_queue *queue, u32 *bytes)
{
    u32 at = queue->taken & queue->mask;

    if (queue->used->index == queue->taken)
        return -1;
    fence();
    queue->taken++;
    *bytes = queue->used->ring[at].bytes;
    return (int)queue->used->ring[at].id;
}
