/* Enlightenments as the drivers on VMBus want them, and a device's channel. The interrupt mask of our incoming ring stays
 * set: what comes is polled for.
 */
#include "bench.h"

#define VECTOR 0xf3
#define GUEST_OS_ID (1ull << 63 | 0x7full << 56 | 1ull << 16) /* open source, no known vendor, version 1 */
#define GPADL 0xe1e10

static u8 message_page[PAGE_SIZE] __attribute__((aligned(4096)));
static u8 event_page[PAGE_SIZE] __attribute__((aligned(4096)));
static struct post_message_input post_input __attribute__((aligned(256)));

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

static void enlighten(void)
{
    wrmsr_safe(MSR_GUEST_OS_ID, GUEST_OS_ID);
    wrmsr_safe(MSR_HYPERCALL, address_of(hypercall_page) | 1);
    wrmsr_safe(MSR_SIMP, address_of(message_page) | 1);
    wrmsr_safe(MSR_SIEFP, address_of(event_page) | 1);
    wrmsr_safe(MSR_SINT0 + VMBUS_SINT, VECTOR);
    wrmsr_safe(MSR_SCONTROL, 1);
}

bool hyperv_find(u32 interface, struct channel *channel)
{
    struct header request = {REQUEST_OFFERS, 0};
    struct version_response response;
    struct offer offer;
    bool more;

    enlighten();
    if (!vmbus_contact(VERSION_5_3, CONNECTION_NEW, &response) || !response.supported)
        return false;
    vmbus_send(&request, sizeof(request));
    while (vmbus_next_offer(&offer, &more)) {
        if (!more)
            return channel->id;
        if (offer.interface[0] == interface && !channel->id) {
            channel->id = offer.id;
            channel->connection = offer.connection;
        }
    }
    return false;
}

bool hyperv_open(struct channel *channel, void *rings, u32 ring_bytes)
{
    u32 pages = 1 + ring_bytes / PAGE_SIZE;
    struct open_result result;

    channel->ring_size = ring_bytes;
    channel->send = rings;
    channel->receive = (void *)((u8 *)rings + pages * PAGE_SIZE);
    channel->send->features = channel->receive->features = 1;
    channel->receive->mask = 1;
    return vmbus_share(channel->id, GPADL, rings, 2 * pages) == 0 &&
           vmbus_open(channel->id, 1, GPADL, pages, &result) && result.status == 0;
}
