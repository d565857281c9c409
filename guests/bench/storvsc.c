/* The SCSI disk on LUN 0 of the first controller on VMBus, by one channel with Linux's ring size. The interrupt mask of
 * our incoming ring stays set: completions are polled for.
 */
#include "bench.h"

#define VECTOR 0xf3
#define GUEST_OS_ID (1ull << 63 | 0x7full << 56 | 1ull << 16) /* open source, no known vendor, version 1 */
#define RING_BYTES (128u << 10) /* storvsc_ringbuffer_size */
#define RING_PAGES (RING_BYTES / PAGE_SIZE)
#define GPADL 0xe1e10
#define SCSI_READ_10 0x28
#define SCSI_WRITE_10 0x2a
#define SCSI_READ_CAPACITY_10 0x25
#define STORAGE_VERSION 0x602

static u8 message_page[PAGE_SIZE] __attribute__((aligned(4096)));
static u8 event_page[PAGE_SIZE] __attribute__((aligned(4096)));
static struct post_message_input post_input __attribute__((aligned(256)));
static u8 rings[2][PAGE_SIZE + RING_BYTES] __attribute__((aligned(4096)));
static struct channel channel;

struct message *message_slot(u32 sint)
{
    return (struct message *)message_page + sint;
}

volatile u64 *event_flags(u32 sint)
{
    return (volatile u64 *)(event_page + sint * 256);
}

u32 post_message(u32 connection, u32 type, const void *payload, u32 size)
{
    u32 status;

    post_input.connection = connection;
    post_input.type = type;
    post_input.size = size;
    memcpy(post_input.payload, payload, size);
    do
        status = (u16)hypercall_64(CALL_POST_MESSAGE, address_of(&post_input), 0);
    while (status == STATUS_INSUFFICIENT_BUFFERS);
    return status;
}

static bool find_controller(void)
{
    struct header request = {REQUEST_OFFERS, 0};
    struct version_response response;
    struct offer offer;
    bool more;

    if (!vmbus_contact(VERSION_5_3, CONNECTION_NEW, &response) || !response.supported)
        return false;
    vmbus_send(&request, sizeof(request));
    while (vmbus_next_offer(&offer, &more)) {
        if (!more)
            return channel.id;
        if (offer.interface[0] == SCSI_INTERFACE && !channel.id) {
            channel.id = offer.id;
            channel.connection = offer.connection;
        }
    }
    return false;
}

static bool open_channel(void)
{
    struct open_result result;

    channel.ring_size = RING_BYTES;
    channel.send = (struct ring *)rings[0];
    channel.receive = (struct ring *)rings[1];
    channel.send->features = channel.receive->features = 1;
    channel.receive->mask = 1;
    return vmbus_share(channel.id, GPADL, rings, 2 * (1 + RING_PAGES)) == 0 &&
           vmbus_open(channel.id, 1, GPADL, 1 + RING_PAGES, &result) && result.status == 0;
}

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
    wrmsr_safe(MSR_GUEST_OS_ID, GUEST_OS_ID);
    wrmsr_safe(MSR_HYPERCALL, address_of(hypercall_page) | 1);
    wrmsr_safe(MSR_SIMP, address_of(message_page) | 1);
    wrmsr_safe(MSR_SIEFP, address_of(event_page) | 1);
    wrmsr_safe(MSR_SINT0 + VMBUS_SINT, VECTOR);
    wrmsr_safe(MSR_SCONTROL, 1);
    if (!find_controller()) {
        fail("no SCSI controller on VMBus");
        return false;
    }
    if (!open_channel() || !handshake()) {
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
