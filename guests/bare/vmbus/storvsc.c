/* Packets of a SCSI controller's channel. */
#include "vmbus.h"

#define COMPLETION_REQUESTED 1

static u64 last_transaction = 0x1000;

void storvsc_put(struct channel *channel, const struct storage_packet *packet, const void *data, u32 bytes,
                 u64 transaction)
{
    struct packet head = {
        .type = bytes ? PACKET_GPA_DIRECT : PACKET_IN_BAND,
        .flags = COMPLETION_REQUESTED,
        .transaction = transaction,
    };
    u32 pages = (bytes + PAGE_SIZE - 1) / PAGE_SIZE;
    struct one_range range;

    range.reserved = 0;
    range.count = 1;
    range.bytes = bytes;
    range.offset = 0;
    for (u32 i = 0; i < pages; i++)
        range.pages[i] = address_of(data) / PAGE_SIZE + i;
    ring_put(channel, head, &range, bytes ? 16 + 8 * pages : 0, packet, sizeof(*packet));
}

bool storvsc_exchange(struct channel *channel, struct storage_packet *packet, const void *data, u32 bytes)
{
    volatile u64 *flags = event_flags(VMBUS_SINT) + channel->id / 64;
    struct packet answer;

    packet->flags = 1;
    storvsc_put(channel, packet, data, bytes, ++last_transaction);
    ring_publish(channel);
    while (WAIT_UNTIL(channel->receive->in != channel->read, VMBUS_PATIENCE)) {
        __atomic_and_fetch(flags, ~(1ull << (channel->id % 64)), __ATOMIC_SEQ_CST);
        ring_take(channel, &answer, packet, sizeof(*packet));
        ring_release(channel);
        if (answer.type == PACKET_COMPLETION && answer.transaction == last_transaction)
            return true;
    }
    return false;
}

struct srb storvsc_srb(u8 lun, const u8 *cdb, u8 cdb_length, u8 direction, u32 bytes)
{
    struct srb srb = {
        .length = sizeof(struct srb),
        .lun = lun,
        .cdb_length = cdb_length,
        .sense_length = 20,
        .direction = direction,
        .transfer = bytes,
        .timeout = 60,
    };

    memcpy(srb.cdb, cdb, cdb_length);
    return srb;
}

bool storvsc_succeeded(const struct srb *srb)
{
    return (srb->srb_status & SRB_STATUS_MASK) == SRB_SUCCESS && srb->scsi_status == 0;
}
