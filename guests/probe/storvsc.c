/* A SCSI disk behind storvsp: handshake and a few commands (Linux drivers/scsi/storvsc_drv.c; SPC-4 and SBC-3). */
#include "probe.h"

#define VMBUS_SINT 2
#define PATIENCE 2000ull
#define SECTOR_SIZE 512u

#define PACKET_IN_BAND 6
#define PACKET_GPA_DIRECT 9
#define PACKET_COMPLETION 11

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
    SCSI_CHECK_CONDITION = 2,
    SENSE_ILLEGAL_REQUEST = 5,
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

struct one_range {
    u32 reserved;
    u32 count;
    u32 bytes;
    u32 offset;
    u64 page;
};

_Static_assert(sizeof(struct storage_packet) == 12 + 0x34, "the wire size since Windows 8");

static struct channel *channel;
static u64 next_transaction = 0x1000;
static u8 buffer[PAGE_SIZE] __attribute__((aligned(4096)));

/* Send and wait for the completion of this very request. */
static bool exchange(struct storage_packet *packet, struct one_range *range)
{
    struct packet head = {
        .type = range ? PACKET_GPA_DIRECT : PACKET_IN_BAND,
        .flags = 1,
        .transaction = ++next_transaction,
    };
    struct packet answer;
    volatile u64 *flags = event_flags(VMBUS_SINT) + channel->id / 64;
    struct ring *receive = channel->receive;

    packet->flags = 1;
    ring_send(channel, head, range, range ? sizeof(*range) : 0, packet, sizeof(*packet));
    while (WAIT_UNTIL(receive->in != receive->out, PATIENCE)) {
        __atomic_and_fetch(flags, ~(1ull << (channel->id % 64)), __ATOMIC_SEQ_CST);
        ring_receive(channel, &answer, packet, sizeof(*packet));
        if (answer.type == PACKET_COMPLETION && answer.transaction == next_transaction)
            return true;
    }
    return false;
}

static bool handshake(void)
{
    static const u16 versions[] = {0x602, 0x600, 0x501};
    struct storage_packet packet = {.operation = BEGIN_INITIALIZATION};
    bool ok;

    ok = exchange(&packet, NULL) && packet.operation == COMPLETE_IO && packet.status == 0;
    expect("storage.begin", packet.status, ok, "0");
    if (!ok)
        return false;
    for (u32 i = 0; i < sizeof(versions) / sizeof(versions[0]); i++) {
        packet = (struct storage_packet){.operation = QUERY_PROTOCOL_VERSION, .version = {versions[i], 0}};
        ok = exchange(&packet, NULL) && packet.status == 0;
        if (ok) {
            expect("storage.version", versions[i], true, "");
            break;
        }
    }
    if (!ok) {
        expect("storage.version", packet.status, false, "0x602, 0x600 or 0x501");
        return false;
    }
    packet = (struct storage_packet){.operation = QUERY_PROPERTIES};
    ok = exchange(&packet, NULL) && packet.status == 0;
    expect("storage.max_transfer", packet.properties.max_transfer, ok && packet.properties.max_transfer >= PAGE_SIZE,
           "a page or more");
    packet = (struct storage_packet){.operation = END_INITIALIZATION};
    ok = exchange(&packet, NULL) && packet.status == 0;
    expect("storage.end", packet.status, ok, "0");
    return ok;
}

/* One SCSI command; `srb` gets the answer. */
static bool command(struct srb *srb, u8 lun, const u8 *cdb, u8 cdb_length, u8 direction, u32 bytes)
{
    struct storage_packet packet = {.operation = EXECUTE_SRB};
    struct one_range range = {.count = 1, .bytes = bytes, .page = address_of(buffer) / PAGE_SIZE};
    bool answered;

    packet.srb = (struct srb){
        .length = sizeof(struct srb),
        .lun = lun,
        .cdb_length = cdb_length,
        .sense_length = 20,
        .direction = direction,
        .transfer = bytes,
        .timeout = 60,
    };
    memcpy(packet.srb.cdb, cdb, cdb_length);
    answered = exchange(&packet, bytes ? &range : NULL) && packet.operation == COMPLETE_IO;
    *srb = packet.srb;
    return answered;
}

static bool succeeded(const struct srb *srb)
{
    return (srb->srb_status & SRB_STATUS_MASK) == SRB_SUCCESS && srb->scsi_status == 0;
}

static bool read_sector(u8 lba)
{
    const u8 cdb[10] = {0x28, 0, 0, 0, 0, lba, 0, 0, 1, 0};
    struct srb srb;

    return command(&srb, 0, cdb, sizeof(cdb), DATA_IN, SECTOR_SIZE) && succeeded(&srb) && srb.transfer == SECTOR_SIZE;
}

static bool write_sector(u8 lba)
{
    const u8 cdb[10] = {0x2a, 0, 0, 0, 0, lba, 0, 0, 1, 0};
    struct srb srb;

    return command(&srb, 0, cdb, sizeof(cdb), DATA_OUT, SECTOR_SIZE) && succeeded(&srb);
}

static void identify(void)
{
    const u8 inquiry[6] = {0x12, 0, 0, 0, 36, 0};
    const u8 read_capacity[10] = {0x25};
    struct srb srb;
    char text[25] = {0};
    bool ok;

    ok = command(&srb, 0, inquiry, sizeof(inquiry), DATA_IN, 36) && succeeded(&srb);
    memcpy(text, buffer + 8, 24);
    expect_text("storage.inquiry", text, ok && (buffer[0] & 0x1f) == 0, "a direct-access disk");
    ok = command(&srb, 0, read_capacity, sizeof(read_capacity), DATA_IN, 8) && succeeded(&srb);
    expect("storage.last_sector", (u64)__builtin_bswap32(*(u32 *)buffer), ok && *(u32 *)buffer, "not 0");
    expect_equal("storage.sector_size", ok ? __builtin_bswap32(*(u32 *)(buffer + 4)) : 0, SECTOR_SIZE);
}

static void read_and_write(void)
{
    const u8 synchronize[10] = {0x35};
    struct srb srb;
    char text[33] = {0};
    bool ok;

    ok = read_sector(0);
    for (u32 i = 0; i < 16; i++) {
        text[2 * i] = "0123456789abcdef"[buffer[i] >> 4];
        text[2 * i + 1] = "0123456789abcdef"[buffer[i] & 15];
    }
    expect_text("storage.sector0", text, ok, "a sector");
    for (u32 i = 0; i < SECTOR_SIZE; i += 8)
        *(u64 *)(buffer + i) = 0x70796d6d2d6f6b00ull + i;
    expect_equal("storage.write", write_sector(1), 1);
    ok = command(&srb, 0, synchronize, sizeof(synchronize), DATA_NONE, 0) && succeeded(&srb);
    expect_equal("storage.synchronize_cache", ok, 1);
    memset(buffer, 0, SECTOR_SIZE);
    ok = read_sector(1);
    for (u32 i = 0; ok && i < SECTOR_SIZE; i += 8)
        ok = *(u64 *)(buffer + i) == 0x70796d6d2d6f6b00ull + i;
    expect_equal("storage.read_back", ok, 1);
}

static void refusals(void)
{
    const u8 beyond[10] = {0x28, 0, 0xff, 0xff, 0xff, 0xf0, 0, 0, 1, 0};
    const u8 unknown[6] = {0xfe};
    const u8 test_unit_ready[6] = {0};
    struct srb srb;
    bool ok;

    ok = command(&srb, 0, beyond, sizeof(beyond), DATA_IN, SECTOR_SIZE) && srb.scsi_status == SCSI_CHECK_CONDITION &&
         (srb.cdb[2] & 15) == SENSE_ILLEGAL_REQUEST;
    expect("storage.read_beyond_end", srb.cdb[12], ok && srb.cdb[12] == 0x21, "check condition, sense 5/21");
    ok = command(&srb, 0, unknown, sizeof(unknown), DATA_NONE, 0) && srb.scsi_status == SCSI_CHECK_CONDITION &&
         (srb.cdb[2] & 15) == SENSE_ILLEGAL_REQUEST;
    expect("storage.unknown_command", srb.cdb[12], ok && srb.cdb[12] == 0x20, "check condition, sense 5/20");
    ok = command(&srb, 63, test_unit_ready, sizeof(test_unit_ready), DATA_NONE, 0);
    expect_equal("storage.absent_lun", ok ? srb.srb_status & SRB_STATUS_MASK : 0, SRB_INVALID_LUN);
}

/* More requests than the small rings hold, so that packets wrap in both directions. */
static void wrap_rings(void)
{
    const u8 test_unit_ready[6] = {0};
    const u64 rounds = RING_SIZE / sizeof(struct storage_packet) + 2;
    struct srb srb;
    u64 good = 0;

    while (good < rounds && command(&srb, 0, test_unit_ready, sizeof(test_unit_ready), DATA_NONE, 0) && succeeded(&srb))
        good++;
    expect_equal("storage.test_unit_ready", good, rounds);
}

void probe_storage(struct channel *on)
{
    u32 interrupts = this_vp()->interrupts[VECTOR_VMBUS];

    channel = on;
    if (!handshake())
        return;
    identify();
    read_and_write();
    refusals();
    wrap_rings();
    /* Completions may all have been there before a halt; the interrupt then still waits for idle(). */
    WAIT_UNTIL(this_vp()->interrupts[VECTOR_VMBUS] != interrupts, 100);
    interrupts = this_vp()->interrupts[VECTOR_VMBUS] - interrupts;
    expect("storage.interrupts", interrupts, interrupts != 0, "not 0");
}
