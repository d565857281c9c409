/* The first NIC on VMBus, by one channel with Linux's ring size. Each frame goes through its own section of the send
 * buffer, in a packet of its own; what is received is taken from the receive buffer.
 *
 * Numbers and layouts as in Linux drivers/net/hyperv/hyperv_net.h and include/linux/rndis.h.
 */
#include "bench.h"

#define RING_BYTES (128u * PAGE_SIZE) /* netvsc's ring_size */
#define RECEIVE_BYTES (2u << 20)
#define SECTION_BYTES 6144u
#define SEND_BYTES (NIC_DEPTH * SECTION_BYTES)
#define RECEIVE_GPADL 0xe1e11
#define SEND_GPADL 0xe1e12
#define RECEIVE_ID 0xcafe
#define SEND_ID 0
#define MAX_RANGES 512u

enum {
    NVSP_INIT = 1,
    NVSP_NDIS_VERSION = 100,
    NVSP_RECEIVE_BUFFER = 101,
    NVSP_SEND_BUFFER = 104,
    NVSP_RNDIS = 107,
    NVSP_RNDIS_COMPLETE = 108,
    NVSP_NDIS_CONFIG = 125,
    NVSP_6_1 = 0x60001,
    NVSP_SUCCESS = 1,
    NO_SECTION = 0xffffffff,
};

enum {
    RNDIS_PACKET = 1,
    RNDIS_INITIALIZE = 2,
    RNDIS_SET = 5,
    RNDIS_REPLY = 0x80000000,
    OID_PACKET_FILTER = 0x1010e,
    FILTER_PROMISCUOUS = 0x20,
};

#define COMPLETION_REQUESTED 1
#define CONTROL_TRANSACTION 0x100000ull

struct nvsp {
    u32 type;
    u32 words[9];
};

struct rndis_packet {
    u32 type, bytes;
    u32 data_offset, data_bytes; /* from the third word on */
    u32 rest[7];
};

struct rndis_control {
    u32 type, bytes;
    u32 words[8];
};

struct transfer_pages {
    u16 set;
    u8 sender_owns_set;
    u8 reserved;
    u32 count;
    struct {
        u32 bytes, offset;
    } ranges[MAX_RANGES];
};

_Static_assert(sizeof(struct rndis_packet) == 44, "the header of a frame");

static u8 rings[2][PAGE_SIZE + RING_BYTES] __attribute__((aligned(4096)));
static u8 receive_buffer[RECEIVE_BYTES] __attribute__((aligned(4096)));
static u8 send_buffer[SEND_BYTES] __attribute__((aligned(4096)));
static struct rndis_control control __attribute__((aligned(4096)));
static struct channel channel;

/* The packet of received frames that is being taken. */
static struct transfer_pages batch;
static u32 batch_at;
static u64 batch_transaction;

enum taken { NOTHING, COMPLETION, FRAMES, OTHER };

static void put(const struct nvsp *message, u16 flags, u64 transaction)
{
    struct packet head = {.type = PACKET_IN_BAND, .flags = flags, .transaction = transaction};

    ring_put(&channel, head, NULL, 0, message, sizeof(*message));
}

static void give_back(void)
{
    struct packet head = {.type = PACKET_COMPLETION, .transaction = batch_transaction};
    struct nvsp message = {NVSP_RNDIS_COMPLETE, {NVSP_SUCCESS}};

    ring_put(&channel, head, NULL, 0, &message, sizeof(message));
    batch.count = batch_at = 0;
}

/* Takes a packet off the ring. A completion is in `answer` and `transaction` then, frames in the batch, which has to be
 * empty before.
 */
static enum taken take(struct nvsp *answer, u64 *transaction)
{
    struct packet head;
    u32 size = ring_take_whole(&channel, &head, &batch, sizeof(batch));

    if (!size)
        return NOTHING;
    if (head.type == PACKET_TRANSFER_PAGES && batch.count <= MAX_RANGES) {
        batch_transaction = head.transaction;
        batch_at = 0;
        return FRAMES;
    }
    memcpy(answer, &batch, sizeof(*answer) < size ? sizeof(*answer) : size);
    *transaction = head.transaction;
    batch.count = 0;
    return head.type == PACKET_COMPLETION ? COMPLETION : OTHER;
}

/* Sends `message`, waits for its completion, which it becomes, and then, with `reply`, for a control message of that type. */
static bool exchange(struct nvsp *message, u32 reply)
{
    u64 deadline = rdtsc() + VMBUS_PATIENCE * tsc_per_ms, transaction;
    struct nvsp answer;
    bool completed = false;

    put(message, COMPLETION_REQUESTED, CONTROL_TRANSACTION);
    ring_publish(&channel);
    while (rdtsc() < deadline && (!completed || reply)) {
        switch (take(&answer, &transaction)) {
        case COMPLETION:
            completed = true;
            *message = answer;
            break;
        case FRAMES:
            for (; batch_at < batch.count; batch_at++) {
                const struct rndis_control *came = (void *)(receive_buffer + batch.ranges[batch_at].offset);
                if (came->type == reply) {
                    control = *came;
                    reply = 0;
                }
            }
            give_back();
            ring_publish(&channel);
            break;
        default:
            break;
        }
        ring_release(&channel);
    }
    return completed && !reply;
}

static bool ask(u32 type, u32 words)
{
    struct nvsp message = {NVSP_RNDIS, {1, 0, 0}};

    control.type = type;
    control.bytes = 8 + 4 * words;
    memcpy(send_buffer, &control, control.bytes);
    message.words[1] = 0;
    message.words[2] = control.bytes;
    return exchange(&message, type | RNDIS_REPLY) && control.words[1] == 0;
}

static bool handshake(void)
{
    struct nvsp init = {NVSP_INIT, {NVSP_6_1, NVSP_6_1}};
    const struct nvsp config = {NVSP_NDIS_CONFIG, {MAX_FRAME}};
    const struct nvsp version = {NVSP_NDIS_VERSION, {6, 30}};
    struct nvsp receives = {NVSP_RECEIVE_BUFFER, {RECEIVE_GPADL, RECEIVE_ID}};
    struct nvsp sends = {NVSP_SEND_BUFFER, {SEND_GPADL, SEND_ID}};

    if (!exchange(&init, 0) || init.words[2] != NVSP_SUCCESS)
        return false;
    put(&config, 0, 0);
    put(&version, 0, 0);
    if (vmbus_share(channel.id, RECEIVE_GPADL, receive_buffer, RECEIVE_BYTES / PAGE_SIZE) ||
        vmbus_share(channel.id, SEND_GPADL, send_buffer, SEND_BYTES / PAGE_SIZE))
        return false;
    if (!exchange(&receives, 0) || receives.words[0] != NVSP_SUCCESS)
        return false;
    if (!exchange(&sends, 0) || sends.words[0] != NVSP_SUCCESS || sends.words[1] != SECTION_BYTES)
        return false;
    memset(&control, 0, sizeof(control));
    control.words[0] = 1; /* request id */
    control.words[1] = 1; /* major version */
    control.words[3] = 0x4000;
    if (!ask(RNDIS_INITIALIZE, 4))
        return false;
    memset(&control, 0, sizeof(control));
    control.words[0] = 2;
    control.words[1] = OID_PACKET_FILTER;
    control.words[2] = 4;
    control.words[3] = 20; /* where the value is, from the third word on */
    control.words[5] = FILTER_PROMISCUOUS;
    return ask(RNDIS_SET, 6);
}

static bool start(void)
{
    if (!hyperv_find(NETWORK_INTERFACE, &channel)) {
        fail("no NIC on VMBus");
        return false;
    }
    if (!hyperv_open(&channel, rings, RING_BYTES) || !handshake()) {
        fail("the NIC's channel does not open");
        return false;
    }
    return true;
}

static u8 *frame(u32 slot)
{
    return send_buffer + slot * SECTION_BYTES + sizeof(struct rndis_packet);
}

static void submit(u32 slot, u32 bytes)
{
    struct rndis_packet *packet = (void *)(send_buffer + slot * SECTION_BYTES);
    const struct nvsp message = {NVSP_RNDIS, {0, slot, (u32)sizeof(*packet) + bytes}};

    packet->type = RNDIS_PACKET;
    packet->bytes = (u32)sizeof(*packet) + bytes;
    packet->data_offset = sizeof(*packet) - 8;
    packet->data_bytes = bytes;
    put(&message, COMPLETION_REQUESTED, slot);
}

static int poll(void)
{
    struct nvsp answer;
    u64 transaction;

    for (;;) {
        switch (take(&answer, &transaction)) {
        case NOTHING:
            return -1;
        case COMPLETION:
            return (int)transaction;
        case FRAMES:
            give_back(); /* nobody asked for them */
            break;
        case OTHER:
            break;
        }
    }
}

static const u8 *receive(u32 *bytes)
{
    const struct rndis_packet *packet;
    struct nvsp answer;
    u64 transaction;

    for (;;) {
        if (batch.count && batch_at == batch.count)
            give_back();
        if (!batch.count && take(&answer, &transaction) == NOTHING)
            return NULL;
        if (!batch.count)
            continue;
        packet = (void *)(receive_buffer + batch.ranges[batch_at++].offset);
        if (packet->type == RNDIS_PACKET) {
            *bytes = packet->data_bytes;
            return (const u8 *)packet + 8 + packet->data_offset;
        }
    }
}

static void kick(void)
{
    ring_release(&channel);
    ring_publish(&channel);
    netvsc.kicks = channel.signals;
}

struct nic_driver netvsc = {
    .name = "netvsc",
    .depth = NIC_DEPTH,
    .start = start,
    .frame = frame,
    .submit = submit,
    .poll = poll,
    .receive = receive,
    .kick = kick,
};
