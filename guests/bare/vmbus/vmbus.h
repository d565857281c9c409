/* A VMBus client, and storvsc on it: what bare-metal guests with a channel share. One VP, one connection.
 *
 * Numbers and layouts as in Linux include/linux/hyperv.h, drivers/hv/{connection,channel,channel_mgmt,ring_buffer}.c
 * and drivers/scsi/storvsc_drv.c. The guest brings idle(), tsc_per_ms and the functions of its SynIC and hypercalls.
 */
#ifndef VMBUS_H
#define VMBUS_H

#include "../hyperv.h"

#define VMBUS_SINT 2
#define VMBUS_PATIENCE 2000ull /* milliseconds */
#define VERSION_5_3 (5u << 16 | 3)
#define VMBUS_MESSAGE 1 /* the type of all posts */
#define CONNECTION_OLD 1
#define CONNECTION_NEW 4 /* from 5.0 on, for INITIATE_CONTACT */

#define NETWORK_INTERFACE 0xf8615163u
#define SCSI_INTERFACE 0xba6163d9u /* the first words of interface GUIDs */

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

struct open_result {
    struct header header;
    u32 channel;
    u32 open_id;
    u32 status;
};

/* The guest's own. */
struct message *message_slot(u32 sint);
volatile u64 *event_flags(u32 sint);
u32 post_message(u32 connection, u32 type, const void *payload, u32 size); /* retries while the host has no room */

/* hypercall.S */
extern u8 hypercall_page[PAGE_SIZE];
u64 hypercall_64(u64 control, u64 input, u64 output);

/* messages.c */
extern u32 vmbus_connection; /* that the host takes messages on */
bool vmbus_await(u32 type, void *to, u32 size); /* take messages off the slot until one of `type` came */
u32 vmbus_send(const void *message, u32 size);  /* the hypercall's status */
bool vmbus_contact(u32 version, u32 on_connection, struct version_response *response); /* whether the host answered */
bool vmbus_next_offer(struct offer *offer, bool *more); /* after REQUEST_OFFERS; false if no message came */
u32 vmbus_share(u32 channel, u32 gpadl, const void *memory, u32 pages); /* make a GPADL; the host's status */
bool vmbus_unshare(u32 channel, u32 gpadl);
bool vmbus_open(u32 channel, u32 open_id, u32 gpadl, u32 downstream_page, struct open_result *result);
u32 vmbus_close(u32 channel);
bool vmbus_unload(void);

/* ring.c: one channel's two rings, guest side. */
struct ring {
    volatile u32 in, out, mask, pending_send_size;
    u32 reserved[12];
    volatile u32 features;
    u32 padding[1007];
    u8 data[];
};

struct channel {
    u32 id;
    u32 connection; /* for HvSignalEvent */
    u32 ring_size;  /* data bytes in one direction */
    struct ring *send, *receive;
    u32 written, read; /* up to where packets were put and taken, which the host need not know yet */
    u32 signals;
};

struct packet {
    u16 type;
    u16 data_offset8;
    u16 length8;
    u16 flags;
    u64 transaction;
};

#define PACKET_IN_BAND 6
#define PACKET_TRANSFER_PAGES 7
#define PACKET_GPA_DIRECT 9
#define PACKET_COMPLETION 11

/* Put a packet into the ring, which has room for it; `extra_size` and `size` are multiples of 8 together. */
void ring_put(struct channel *channel, struct packet head, const void *extra, u32 extra_size, const void *payload,
              u32 size);
void ring_publish(struct channel *channel); /* show the host what was put, and signal if it may be asleep */
u32 ring_take(struct channel *channel, struct packet *head, void *payload, u32 room); /* payload bytes, 0 if empty */
u32 ring_take_whole(struct channel *channel, struct packet *head, void *rest, u32 room); /* from the extra header on */
void ring_release(struct channel *channel); /* give the host the room of what was taken, and signal if it waits */

/* storvsc.c */
enum {
    COMPLETE_IO = 1,
    EXECUTE_SRB = 3,
    BEGIN_INITIALIZATION = 7,
    END_INITIALIZATION = 8,
    QUERY_PROTOCOL_VERSION = 9,
    QUERY_PROPERTIES = 10,
};

enum {
    DATA_OUT = 0,
    DATA_IN = 1,
    DATA_NONE = 2,
};

enum {
    SRB_SUCCESS = 1,
    SRB_ERROR = 4,
    SRB_INVALID_LUN = 0x20,
    SRB_STATUS_MASK = 0x3f,
};

struct srb {
    u16 length;
    u8 srb_status;
    u8 scsi_status;
    u8 port, path, target, lun;
    u8 cdb_length;
    u8 sense_length;
    u8 direction;
    u8 properties;
    u32 transfer;
    u8 cdb[20]; /* sense data in the answer */
    u16 reserved;
    u8 queue_tag, queue_action;
    u32 flags;
    u32 timeout;
    u32 sort_key;
};

struct storage_packet {
    u32 operation;
    u32 flags;
    u32 status;
    union {
        struct srb srb;
        u16 version[2];
        struct {
            u32 reserved;
            u16 max_channels;
            u16 reserved2;
            u32 flags;
            u32 max_transfer;
        } properties;
    };
};

_Static_assert(sizeof(struct storage_packet) == 12 + 0x34, "the wire size since Windows 8");

#define STORVSC_PAGES 32u

/* The header of a GPA-direct packet with one range, which begins with a page. */
struct one_range {
    u32 reserved;
    u32 count;
    u32 bytes;
    u32 offset;
    u64 pages[STORVSC_PAGES];
};

void storvsc_put(struct channel *channel, const struct storage_packet *packet, const void *data, u32 bytes,
                 u64 transaction); /* with `bytes` of physically contiguous data */
bool storvsc_exchange(struct channel *channel, struct storage_packet *packet, const void *data,
                      u32 bytes); /* and wait for the completion of this very packet */
struct srb storvsc_srb(u8 lun, const u8 *cdb, u8 cdb_length, u8 direction, u32 bytes);
bool storvsc_succeeded(const struct srb *srb);

#endif
