/* VMBus control messages, guest side: connect, offers, GPADLs, open, close, unload.
 *
 * Numbers and layouts as in Linux include/linux/hyperv.h and drivers/hv/{connection,channel,channel_mgmt}.c.
 */
#include "probe.h"

#define VMBUS_SINT 2
#define VERSION_5_3 (5u << 16 | 3)
#define VERSION_4_0 (4u << 16)
#define VERSION_NONE (0x7fffu << 16)
#define CONNECTION_OLD 1
#define CONNECTION_NEW 4
#define VMBUS_MESSAGE 1
#define PATIENCE 2000ull

#define SCSI_INTERFACE 0xba6163d9u
#define CHANNEL_LIMIT 2048u

#define RING_PAGES (2 * (1 + RING_SIZE / PAGE_SIZE))
#define RING_GPADL 0xe1e10
#define LARGE_GPADL 0xe1e11
#define LARGE_PAGES 40u

enum {
    OFFER_CHANNEL = 1,
    REQUEST_OFFERS = 3,
    ALL_OFFERS_DELIVERED = 4,
    OPEN_CHANNEL = 5,
    OPEN_CHANNEL_RESULT = 6,
    CLOSE_CHANNEL = 7,
    GPADL_HEADER = 8,
    GPADL_BODY = 9,
    GPADL_CREATED = 10,
    GPADL_TEARDOWN = 11,
    GPADL_TORNDOWN = 12,
    INITIATE_CONTACT = 14,
    VERSION_RESPONSE = 15,
    UNLOAD = 16,
    UNLOAD_RESPONSE = 17,
};

struct header {
    u32 type;
    u32 reserved;
};

struct initiate_contact {
    struct header header;
    u32 version;
    u32 target_vp;
    u64 target; /* from 5.0 on: SINT in bits 0-7, VTL in bits 8-15; before: GPA of the interrupt page */
    u64 monitor_pages[2];
};

struct version_response {
    struct header header;
    u8 supported;
    u8 state;
    u16 reserved;
    u32 connection;
};

struct offer {
    struct header header;
    u32 interface[4];
    u32 instance[4];
    u8 other[144];
    u32 id;
    u8 monitor_id;
    u8 monitor_allocated;
    u16 dedicated;
    u32 connection;
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
    u64 data[28];
};

struct gpadl_result {
    struct header header;
    u32 channel;
    u32 gpadl;
    u32 status;
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

struct open_result {
    struct header header;
    u32 channel;
    u32 open_id;
    u32 status;
};

static u8 monitor_pages[2][PAGE_SIZE] __attribute__((aligned(4096)));
static u8 interrupt_page[PAGE_SIZE] __attribute__((aligned(4096)));
static struct ring rings[2] __attribute__((aligned(4096)));
static u32 connection;

/* Take messages off the slot until one of `type` came; `to` gets it. */
static bool await(u32 type, void *to, u32 size)
{
    struct message *slot = message_slot(VMBUS_SINT);

    while (WAIT_UNTIL(slot->type != 0, PATIENCE)) {
        bool found = ((struct header *)slot->payload)->type == type;
        if (found)
            memcpy(to, slot->payload, size);
        message_done(slot);
        if (found)
            return true;
    }
    return false;
}

static u32 send(const void *message, u32 size)
{
    return post_message(connection, VMBUS_MESSAGE, message, size);
}

/* Returns whether the host answered, with its answer. */
static bool initiate_contact(u32 version, u32 on_connection, struct version_response *response)
{
    struct initiate_contact message = {
        .header = {INITIATE_CONTACT, 0},
        .version = version,
        .target = version >= VERSION_5_3 ? VMBUS_SINT : address_of(interrupt_page),
        .monitor_pages = {address_of(monitor_pages[0]), address_of(monitor_pages[1])},
    };

    connection = on_connection;
    return send(&message, sizeof(message)) == STATUS_SUCCESS && await(VERSION_RESPONSE, response, sizeof(*response));
}

static bool connect(void)
{
    struct version_response response = {0};
    bool answered = initiate_contact(VERSION_NONE, CONNECTION_NEW, &response);

    expect_text("vmbus.unknown_version", !answered ? "no answer" : response.supported ? "accepted" : "refused",
                answered && !response.supported, "refused");
    answered = initiate_contact(VERSION_5_3, CONNECTION_NEW, &response);
    if (answered && response.supported) {
        connection = response.connection;
        expect_text("vmbus.version", "5.3", response.state == 0, "connection state 0");
        expect("vmbus.message_connection", connection, connection != 0, "not 0");
        return response.state == 0;
    }
    answered = initiate_contact(VERSION_4_0, CONNECTION_OLD, &response);
    expect_text("vmbus.version", !answered ? "no answer" : response.supported ? "4.0" : "refused", false, "5.3");
    return answered && response.supported;
}

/* Print each offer; remember the first SCSI controller. The request goes through the 32-bit ABI: a good call there. */
static bool list_offers(struct channel *scsi)
{
    struct message *slot = message_slot(VMBUS_SINT);
    struct header request = {REQUEST_OFFERS, 0};
    u32 *input = (u32 *)scratch, type = 0;
    u64 offers = 0;

    memset(input, 0, 16);
    input[0] = connection;
    input[2] = VMBUS_MESSAGE;
    input[3] = sizeof(request);
    memcpy(input + 4, &request, sizeof(request));
    expect_equal("vmbus.request_offers_32bit", hypercall_32(CALL_POST_MESSAGE, address_of(input), 0), STATUS_SUCCESS);
    while (type != ALL_OFFERS_DELIVERED && WAIT_UNTIL(slot->type != 0, PATIENCE)) {
        struct offer offer;

        memcpy(&offer, slot->payload, sizeof(offer));
        message_done(slot);
        type = offer.header.type;
        if (type != OFFER_CHANNEL)
            continue;
        offers++;
        expect_numbered("vmbus.offer", offer.id, offer.interface[0],
                        offer.id && offer.id < CHANNEL_LIMIT && offer.dedicated == 1,
                        "channel 1..2047, own connection");
        if (offer.interface[0] == SCSI_INTERFACE && !scsi->id) {
            scsi->id = offer.id;
            scsi->connection = offer.connection;
        }
    }
    expect("vmbus.offers", offers, type == ALL_OFFERS_DELIVERED, "all offers delivered");
    return type == ALL_OFFERS_DELIVERED;
}

/* Share `pages` pages from `memory` on, in one range; returns the host's status. */
static u32 establish_gpadl(u32 channel, u32 gpadl, const void *memory, u32 pages)
{
    struct gpadl_header head = {
        .header = {GPADL_HEADER, 0},
        .channel = channel,
        .gpadl = gpadl,
        .range_bytes = (u16)(8 + 8 * pages),
        .range_count = 1,
    };
    struct gpadl_body body = {.header = {GPADL_BODY, 0}, .number = 1, .gpadl = gpadl};
    struct gpadl_result result;
    u64 number = address_of(memory) / PAGE_SIZE;
    u32 in_head = pages < 26 ? pages : 26, rest = pages - in_head;

    head.data[0] = pages * PAGE_SIZE;
    for (u32 i = 0; i < in_head; i++)
        head.data[1 + i] = number + i;
    for (u32 i = 0; i < rest; i++)
        body.data[i] = number + in_head + i;
    send(&head, 20 + 8 + 8 * in_head);
    if (rest)
        send(&body, 16 + 8 * rest);
    if (!await(GPADL_CREATED, &result, sizeof(result)) || result.gpadl != gpadl)
        return ~0u;
    return result.status;
}

static bool teardown_gpadl(u32 channel, u32 gpadl)
{
    struct {
        struct header header;
        u32 channel, gpadl;
    } message = {{GPADL_TEARDOWN, 0}, channel, gpadl};
    struct {
        struct header header;
        u32 gpadl;
    } answer;

    send(&message, sizeof(message));
    return await(GPADL_TORNDOWN, &answer, sizeof(answer)) && answer.gpadl == gpadl;
}

static bool open_channel(struct channel *channel)
{
    struct open_channel message = {
        .header = {OPEN_CHANNEL, 0},
        .channel = channel->id,
        .open_id = 0x123,
        .gpadl = RING_GPADL,
        .downstream_page = RING_PAGES / 2,
    };
    struct open_result result;

    send(&message, sizeof(message));
    if (!await(OPEN_CHANNEL_RESULT, &result, sizeof(result))) {
        expect_text("vmbus.open", "no answer", false, "0");
        return false;
    }
    expect_equal("vmbus.open_id", result.open_id, message.open_id);
    expect_equal("vmbus.open", result.status, 0);
    return result.status == 0;
}

static void use_channel(struct channel *channel)
{
    struct {
        struct header header;
        u32 channel;
    } close = {{CLOSE_CHANNEL, 0}, channel->id};

    channel->send = &rings[0];
    channel->receive = &rings[1];
    rings[0].features = rings[1].features = 1;
    /* Any memory of ours will do for the large one; it needs a body message. */
    expect_equal("vmbus.gpadl_with_body", establish_gpadl(channel->id, LARGE_GPADL, vp_stacks, LARGE_PAGES), 0);
    expect_equal("vmbus.gpadl_with_body_torn_down", teardown_gpadl(channel->id, LARGE_GPADL), 1);
    expect_equal("vmbus.gpadl", establish_gpadl(channel->id, RING_GPADL, rings, RING_PAGES), 0);
    if (open_channel(channel)) {
        if (topic_selected("storage"))
            probe_storage(channel);
        expect_equal("vmbus.close", send(&close, sizeof(close)), STATUS_SUCCESS);
    }
    expect_equal("vmbus.gpadl_torn_down", teardown_gpadl(channel->id, RING_GPADL), 1);
}

void probe_vmbus(void)
{
    struct channel scsi = {0};
    struct header unload = {UNLOAD, 0}, answer;

    if (!(privileges_eax & EAX_SYNIC) || !(privileges_ebx & EBX_POST_MESSAGES))
        return;
    hypercall_enable();
    synic_enable();
    wrmsr_safe(MSR_SINT0 + VMBUS_SINT, VECTOR_VMBUS);
    if (connect() && list_offers(&scsi)) {
        expect("vmbus.scsi_channel", scsi.id, scsi.id != 0, "an offer of a SCSI controller");
        if (scsi.id)
            use_channel(&scsi);
    }
    send(&unload, sizeof(unload));
    expect_equal("vmbus.unload", await(UNLOAD_RESPONSE, &answer, sizeof(answer)), 1);
}
