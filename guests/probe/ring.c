/* A VMBus channel's rings as the guest uses them; layout and signalling rules as in Linux drivers/hv/ring_buffer.c. */
#include "probe.h"

#define FOOTER_SIZE 8u

static u32 put(struct ring *ring, u32 at, const void *from, u32 size)
{
    u32 first = RING_SIZE - at < size ? RING_SIZE - at : size;

    memcpy(ring->data + at, from, first);
    memcpy(ring->data, (const u8 *)from + first, size - first);
    return (at + size) % RING_SIZE;
}

static u32 get(struct ring *ring, u32 at, void *to, u32 size)
{
    u32 first = RING_SIZE - at < size ? RING_SIZE - at : size;

    memcpy(to, ring->data + at, first);
    memcpy((u8 *)to + first, ring->data, size - first);
    return (at + size) % RING_SIZE;
}

/* The caller has at most one request in flight, so the ring always has room. `extra_size` and `size` are padded by the
 * caller to 8 bytes together. */
void ring_send(struct channel *channel, struct packet head, const void *extra, u32 extra_size, const void *payload,
               u32 size)
{
    struct ring *ring = channel->send;
    u32 start = ring->in, at;
    u64 footer = (u64)start << 32;

    head.data_offset8 = (u16)((sizeof(head) + extra_size) / 8);
    head.length8 = (u16)((sizeof(head) + extra_size + size) / 8);
    at = put(ring, start, &head, sizeof(head));
    at = put(ring, at, extra, extra_size);
    at = put(ring, at, payload, size);
    at = put(ring, at, &footer, FOOTER_SIZE);
    fence();
    ring->in = at;
    fence();
    if (!ring->mask && ring->out == start)
        hypercall_64(CALL_SIGNAL_EVENT | CALL_FAST, channel->connection, 0);
}

u32 ring_receive(struct channel *channel, struct packet *head, void *payload, u32 room)
{
    struct ring *ring = channel->receive;
    u32 start = ring->out, at, skip, size;
    u32 free_before, free_after;

    if (ring->in == start)
        return 0;
    fence();
    at = get(ring, start, head, sizeof(*head));
    skip = head->data_offset8 * 8u - (u32)sizeof(*head);
    size = (head->length8 - head->data_offset8) * 8u;
    get(ring, (at + skip) % RING_SIZE, payload, size < room ? size : room);
    free_before = (start + RING_SIZE - ring->in) % RING_SIZE;
    at = (start + head->length8 * 8u + FOOTER_SIZE) % RING_SIZE;
    fence();
    ring->out = at;
    fence();
    free_after = (at + RING_SIZE - ring->in) % RING_SIZE;
    if (free_after == 0)
        free_after = RING_SIZE;
    if (ring->pending_send_size && free_before <= ring->pending_send_size && free_after > ring->pending_send_size)
        hypercall_64(CALL_SIGNAL_EVENT | CALL_FAST, channel->connection, 0);
    return size;
}
