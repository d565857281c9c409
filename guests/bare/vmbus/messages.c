/* Control messages: contact, offers, GPADLs, open, close, unload. */
#include "vmbus.h"

#define GPADL_BODY_PAGES 28u

struct initiate_contact {
    struct header header;
    u32 version;
    u32 target_vp;
    u64 target; /* from 5.0 on: SINT in bits 0-7, VTL in bits 8-15; before: GPA of the interrupt page */
    u64 monitor_pages[2];
};

struct gpadl_header {
    struct header header;
    u32 channel;
    u32 gpadl;
    u16 range_bytes;
    u16 range_count;
    u64 data[27];
} __attribute__((packed));

struct gpadl_body {
    struct header header;
    u32 number;
    u32 gpadl;
    u64 data[GPADL_BODY_PAGES];
};

struct open_channel {
    struct header header;
    u32 channel;
    u32 open_id;
    u32 gpadl;
    u32 target_vp;
    u32 downstream_page;
    u8 user_data[120];
};

static u8 monitor_pages[2][PAGE_SIZE] __attribute__((aligned(4096)));
static u8 interrupt_page[PAGE_SIZE] __attribute__((aligned(4096)));
u32 vmbus_connection;

bool vmbus_await(u32 type, void *to, u32 size)
{
    struct message *slot = message_slot(VMBUS_SINT);

    while (WAIT_UNTIL(slot->type != 0, VMBUS_PATIENCE)) {
        bool found = ((struct header *)slot->payload)->type == type;
        if (found)
            memcpy(to, slot->payload, size);
        message_done(slot);
        if (found)
            return true;
    }
    return false;
}

u32 vmbus_send(const void *message, u32 size)
{
    return post_message(vmbus_connection, VMBUS_MESSAGE, message, size);
}

bool vmbus_contact(u32 version, u32 on_connection, struct version_response *response)
{
    struct initiate_contact message = {
        .header = {INITIATE_CONTACT, 0},
        .version = version,
        .target = version >= VERSION_5_3 ? VMBUS_SINT : address_of(interrupt_page),
        .monitor_pages = {address_of(monitor_pages[0]), address_of(monitor_pages[1])},
    };

    vmbus_connection = on_connection;
    if (vmbus_send(&message, sizeof(message)) != STATUS_SUCCESS ||
        !vmbus_await(VERSION_RESPONSE, response, sizeof(*response)))
        return false;
    if (response->supported && version >= VERSION_5_3)
        vmbus_connection = response->connection;
    return true;
}

bool vmbus_next_offer(struct offer *offer, bool *more)
{
    struct message *slot = message_slot(VMBUS_SINT);

    do {
        if (!WAIT_UNTIL(slot->type != 0, VMBUS_PATIENCE))
            return false;
        memcpy(offer, slot->payload, sizeof(*offer));
        message_done(slot);
    } while (offer->header.type != OFFER_CHANNEL && offer->header.type != ALL_OFFERS_DELIVERED);
    *more = offer->header.type == OFFER_CHANNEL;
    return true;
}

u32 vmbus_share(u32 channel, u32 gpadl, const void *memory, u32 pages)
{
    struct gpadl_header head = {
        .header = {GPADL_HEADER, 0},
        .channel = channel,
        .gpadl = gpadl,
        .range_bytes = (u16)(8 + 8 * pages),
        .range_count = 1,
    };
    struct {
        struct header header;
        u32 channel;
        u32 gpadl;
        u32 status;
    } result;
    u64 number = address_of(memory) / PAGE_SIZE;
    u32 now = pages < 26 ? pages : 26;

    head.data[0] = pages * PAGE_SIZE;
    for (u32 i = 0; i < now; i++)
        head.data[1 + i] = number++;
    vmbus_send(&head, 20 + 8 + 8 * now);
    pages -= now;
    for (u32 message = 1; pages; message++, pages -= now) {
        struct gpadl_body body = {.header = {GPADL_BODY, 0}, .number = message, .gpadl = gpadl};

        now = pages < GPADL_BODY_PAGES ? pages : GPADL_BODY_PAGES;
        for (u32 i = 0; i < now; i++)
            body.data[i] = number++;
        vmbus_send(&body, 16 + 8 * now);
    }
    if (!vmbus_await(GPADL_CREATED, &result, sizeof(result)) || result.gpadl != gpadl)
        return ~0u;
    return result.status;
}

bool vmbus_unshare(u32 channel, u32 gpadl)
{
    struct {
        struct header header;
        u32 channel, gpadl;
    } message = {{GPADL_TEARDOWN, 0}, channel, gpadl};
    struct {
        struct header header;
        u32 gpadl;
    } answer;

    vmbus_send(&message, sizeof(message));
    return vmbus_await(GPADL_TORNDOWN, &answer, sizeof(answer)) && answer.gpadl == gpadl;
}

bool vmbus_open(u32 channel, u32 open_id, u32 gpadl, u32 downstream_page, struct open_result *result)
{
    struct open_channel message = {
        .header = {OPEN_CHANNEL, 0},
        .channel = channel,
        .open_id = open_id,
        .gpadl = gpadl,
        .downstream_page = downstream_page,
    };

    vmbus_send(&message, sizeof(message));
    return vmbus_await(OPEN_CHANNEL_RESULT, result, sizeof(*result));
}

u32 vmbus_close(u32 channel)
{
    struct {
        struct header header;
        u32 channel;
    } message = {{CLOSE_CHANNEL, 0}, channel};

    return vmbus_send(&message, sizeof(message));
}

bool vmbus_unload(void)
{
    struct header unload = {UNLOAD, 0}, answer;

    vmbus_send(&unload, sizeof(unload));
    return vmbus_await(UNLOAD_RESPONSE, &answer, sizeof(answer));
}
