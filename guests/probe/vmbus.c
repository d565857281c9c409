/* VMBus control messages: connect, offers, GPADLs, open, close, unload. */
#include "probe.h"

#define VERSION_4_0 (4u << 16)
#define VERSION_NONE (0x7fffu << 16)
#define CHANNEL_LIMIT 2048u

#define RING_PAGES (2 * (1 + RING_SIZE / PAGE_SIZE))
#define RING_GPADL 0xe1e10
#define LARGE_GPADL 0xe1e11
#define LARGE_PAGES 40u
#define OPEN_ID 0x123

static u8 rings[RING_PAGES * PAGE_SIZE] __attribute__((aligned(4096)));

static bool connect(void)
{
    struct version_response response = {0};
    bool answered = vmbus_contact(VERSION_NONE, CONNECTION_NEW, &response);

    expect_text("vmbus.unknown_version", !answered ? "no answer" : response.supported ? "accepted" : "refused",
                answered && !response.supported, "refused");
    answered = vmbus_contact(VERSION_5_3, CONNECTION_NEW, &response);
    if (answered && response.supported) {
        expect_text("vmbus.version", "5.3", response.state == 0, "connection state 0");
        expect("vmbus.message_connection", response.connection, response.connection != 0, "not 0");
        return response.state == 0;
    }
    answered = vmbus_contact(VERSION_4_0, CONNECTION_OLD, &response);
    expect_text("vmbus.version", !answered ? "no answer" : response.supported ? "4.0" : "refused", false, "5.3");
    return answered && response.supported;
}

/* Print each offer; remember the first SCSI controller. The request goes through the 32-bit ABI: a good call there. */
static bool list_offers(struct channel *scsi)
{
    struct header request = {REQUEST_OFFERS, 0};
    u32 *input = (u32 *)scratch;
    struct offer offer;
    u64 offers = 0;
    bool more, all;

    memset(input, 0, 16);
    input[0] = vmbus_connection;
    input[2] = VMBUS_MESSAGE;
    input[3] = sizeof(request);
    memcpy(input + 4, &request, sizeof(request));
    expect_equal("vmbus.request_offers_32bit", hypercall_32(CALL_POST_MESSAGE, address_of(input), 0), STATUS_SUCCESS);
    while ((all = vmbus_next_offer(&offer, &more)) && more) {
        offers++;
        expect_numbered("vmbus.offer", offer.id, offer.interface[0],
                        offer.id && offer.id < CHANNEL_LIMIT && offer.dedicated == 1,
                        "channel 1..2047, own connection");
        if (offer.interface[0] == SCSI_INTERFACE && !scsi->id) {
            scsi->id = offer.id;
            scsi->connection = offer.connection;
        }
    }
    expect("vmbus.offers", offers, all, "all offers delivered");
    return all;
}

static bool open_channel(struct channel *channel)
{
    struct open_result result;

    if (!vmbus_open(channel->id, OPEN_ID, RING_GPADL, RING_PAGES / 2, &result)) {
        expect_text("vmbus.open", "no answer", false, "0");
        return false;
    }
    expect_equal("vmbus.open_id", result.open_id, OPEN_ID);
    expect_equal("vmbus.open", result.status, 0);
    return result.status == 0;
}

static void use_channel(struct channel *channel)
{
    channel->ring_size = RING_SIZE;
    channel->send = (struct ring *)rings;
    channel->receive = (struct ring *)(rings + PAGE_SIZE + RING_SIZE);
    channel->send->features = channel->receive->features = 1;
    /* Any memory of ours will do for the large one; it needs a body message. */
    expect_equal("vmbus.gpadl_with_body", vmbus_share(channel->id, LARGE_GPADL, vp_stacks, LARGE_PAGES), 0);
    expect_equal("vmbus.gpadl_with_body_torn_down", vmbus_unshare(channel->id, LARGE_GPADL), 1);
    expect_equal("vmbus.gpadl", vmbus_share(channel->id, RING_GPADL, rings, RING_PAGES), 0);
    if (open_channel(channel)) {
        if (topic_selected("storage"))
            probe_storage(channel);
        expect_equal("vmbus.close", vmbus_close(channel->id), STATUS_SUCCESS);
    }
    expect_equal("vmbus.gpadl_torn_down", vmbus_unshare(channel->id, RING_GPADL), 1);
}

void probe_vmbus(void)
{
    struct channel scsi = {0};

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
    expect_equal("vmbus.unload", vmbus_unload(), 1);
}
