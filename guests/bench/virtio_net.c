/* A virtio network device without offloads (Virtual I/O Device Version 1.1, 5.1): a frame is one descriptor, behind its
 * header of 10 bytes.
 */
#include "bench.h"

#define DEVICE_ID 0x10001af4u
#define FEATURE_ANY_LAYOUT (1u << 27)
#define HEADER 10u
#define RECEIVE_DEPTH 256u

static struct virtio_queue receive_queue, send_queue;
static u8 sent[NIC_DEPTH][2048] __attribute__((aligned(4096)));
static u8 received[RECEIVE_DEPTH][2048] __attribute__((aligned(4096)));
static int taken = -1;

static bool start(void)
{
    u32 features = FEATURE_ANY_LAYOUT;

    if (!virtio_find(DEVICE_ID, &features) || !(features & FEATURE_ANY_LAYOUT)) {
        fail("no virtio-net on PCI");
        return false;
    }
    if (!virtio_queue(&receive_queue, 0, RECEIVE_DEPTH) || !virtio_queue(&send_queue, 1, NIC_DEPTH)) {
        fail("virtio-net has queues of another size");
        return false;
    }
    for (u32 i = 0; i < RECEIVE_DEPTH; i++) {
        receive_queue.descriptors[i] =
            (struct descriptor){address_of(received[i]), sizeof(received[i]), VIRTIO_DEVICE_WRITES, 0};
        virtio_submit(&receive_queue, i);
    }
    for (u32 i = 0; i < NIC_DEPTH; i++)
        send_queue.descriptors[i] = (struct descriptor){address_of(sent[i]), 0, 0, 0};
    virtio_ready();
    return true;
}

static u8 *frame(u32 slot)
{
    return sent[slot] + HEADER;
}

static void submit(u32 slot, u32 bytes)
{
    send_queue.descriptors[slot].bytes = HEADER + bytes;
    virtio_submit(&send_queue, slot);
}

static int poll(void)
{
    u32 bytes;

    return virtio_take(&send_queue, &bytes);
}

static const u8 *receive(u32 *bytes)
{
    if (taken >= 0)
        virtio_submit(&receive_queue, (u32)taken);
    taken = virtio_take(&receive_queue, bytes);
    if (taken < 0)
        return NULL;
    *bytes -= HEADER;
    return received[taken] + HEADER;
}

static void kick(void)
{
    virtio_net.kicks += virtio_publish(&receive_queue) + virtio_publish(&send_queue);
}

struct nic_driver virtio_net = {
    .name = "virtio-net",
    .depth = NIC_DEPTH,
    .start = start,
    .frame = frame,
    .submit = submit,
    .poll = poll,
    .receive = receive,
    .kick = kick,
};
