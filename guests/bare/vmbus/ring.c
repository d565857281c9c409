/* A channel's rings; layout and signalling rules as in Linux drivers/hv/ring_buffer.c. */
#include "vmbus.h"

#define FOOTER_SIZE 8u

static u32 advance(const struct channel *channel, u32 at, u32 by)
{
    at += by;
    return at >= channel->ring_size ? at - channel->ring_size : at;
}

static u32 distance(const struct channel *channel, u32 from, u32 to)
{
    return to >= from ? to - from : channel->ring_size - (from - to);
}

static u32 put(const struct channel *channel, u32 at, const void *from, u32 size)
{
    u32 first = channel->ring_size - at < size ? channel->ring_size - at : size;

    memcpy(channel->send->data + at, from, first);
    memcpy(channel->send->data, (const u8 *)from + first, size - first);
    return advance(channel, at, size);
}

static void get(const struct channel *channel, u32 at, void *to, u32 size)
{
    u32 first = channel->ring_size - at < size ? channel->ring_size - at : size;

    memcpy(to, channel->receive->data + at, first);
    memcpy((u8 *)to + first, channel->receive->data, size - first);
}

static void signal(struct channel *channel)
{
    channel->signals++;
    hypercall_64(CALL_SIGNAL_EVENT | CALL_FAST, channel->connection, 0);
}

void ring_put(struct channel *channel, struct packet head, const void *extra, u32 extra_size, const void *payload,
              u32 size)
{
    u64 footer = (u64)channel->written << 32;
    u32 at;

    head.data_offset8 = (u16)((sizeof(head) + extra_size) / 8);
    head.length8 = (u16)((sizeof(head) + extra_size + size) / 8);
    at = put(channel, channel->written, &head, sizeof(head));
    at = put(channel, at, extra, extra_size);
    at = put(channel, at, payload, size);
    channel->written = put(channel, at, &footer, FOOTER_SIZE);
}

void ring_publish(struct channel *channel)
{
    struct ring *ring = channel->send;
    u32 before = ring->in;

    if (channel->written == before)
        return;
    fence();
    ring->in = channel->written;
    fence();
    if (!ring->mask && ring->out == before)
        signal(channel);
}

/* What stands `skip` bytes, or else with the payload, behind the start of the packet. */
static u32 take(struct channel *channel, struct packet *head, u32 skip, void *to, u32 room)
{
    u32 start = channel->read, size;

    if (channel->receive->in == start)
        return 0;
    fence();
    get(channel, start, head, sizeof(*head));
    skip = skip ? skip : head->data_offset8 * 8u;
    size = head->length8 * 8u - skip;
    get(channel, advance(channel, start, skip), to, size < room ? size : room);
    channel->read = advance(channel, start, head->length8 * 8u + FOOTER_SIZE);
    return size;
}

u32 ring_take(struct channel *channel, struct packet *head, void *payload, u32 room)
{
    return take(channel, head, 0, payload, room);
}

u32 ring_take_whole(struct channel *channel, struct packet *head, void *rest, u32 room)
{
    return take(channel, head, sizeof(*head), rest, room);
}

void ring_release(struct channel *channel)
{
    struct ring *ring = channel->receive;
    u32 before = ring->out, wanted, free;

    if (channel->read == before)
        return;
    fence();
    ring->out = channel->read;
    fence();
    wanted = ring->pending_send_size;
    if (!wanted)
        return;
    free = channel->ring_size - distance(channel, channel->read, ring->in);
    if (free > wanted && free - distance(channel, before, channel->read) <= wanted)
        signal(channel);
}
