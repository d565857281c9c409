/* A SCSI disk behind storvsp: handshake and a few commands (SPC-4 and SBC-3). */
#include "probe.h"

#define SECTOR_SIZE 512u

enum {
    SCSI_CHECK_CONDITION = 2,
    SENSE_ILLEGAL_REQUEST = 5,
};

static struct channel *channel;
static u8 buffer[PAGE_SIZE] __attribute__((aligned(4096)));

static bool exchange(struct storage_packet *packet)
{
    return storvsc_exchange(channel, packet, NULL, 0);
}

static bool handshake(void)
{
    static const u16 versions[] = {0x602, 0x600, 0x501};
    struct storage_packet packet = {.operation = BEGIN_INITIALIZATION};
    bool ok;

    ok = exchange(&packet) && packet.operation == COMPLETE_IO && packet.status == 0;
    expect("storage.begin", packet.status, ok, "0");
    if (!ok)
        return false;
    for (u32 i = 0; i < sizeof(versions) / sizeof(versions[0]); i++) {
        packet = (struct storage_packet){.operation = QUERY_PROTOCOL_VERSION, .version = {versions[i], 0}};
        ok = exchange(&packet) && packet.status == 0;
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
    ok = exchange(&packet) && packet.status == 0;
    expect("storage.max_transfer", packet.properties.max_transfer, ok && packet.properties.max_transfer >= PAGE_SIZE,
           "a page or more");
    packet = (struct storage_packet){.operation = END_INITIALIZATION};
    ok = exchange(&packet) && packet.status == 0;
    expect("storage.end", packet.status, ok, "0");
    return ok;
}

/* One SCSI command; `srb` gets the answer. */
static bool command(struct srb *srb, u8 lun, const u8 *cdb, u8 cdb_length, u8 direction, u32 bytes)
{
    struct storage_packet packet = {.operation = EXECUTE_SRB};
    bool answered;

    packet.srb = storvsc_srb(lun, cdb, cdb_length, direction, bytes);
    answered = storvsc_exchange(channel, &packet, buffer, bytes) && packet.operation == COMPLETE_IO;
    *srb = packet.srb;
    return answered;
}

static bool read_sector(u8 lba)
{
    const u8 cdb[10] = {0x28, 0, 0, 0, 0, lba, 0, 0, 1, 0};
    struct srb srb;

    return command(&srb, 0, cdb, sizeof(cdb), DATA_IN, SECTOR_SIZE) && storvsc_succeeded(&srb) && srb.transfer == SECTOR_SIZE;
}

static bool write_sector(u8 lba)
{
    const u8 cdb[10] = {0x2a, 0, 0, 0, 0, lba, 0, 0, 1, 0};
    struct srb srb;

    return command(&srb, 0, cdb, sizeof(cdb), DATA_OUT, SECTOR_SIZE) && storvsc_succeeded(&srb);
}

static void identify(void)
{
    const u8 inquiry[6] = {0x12, 0, 0, 0, 36, 0};
    const u8 read_capacity[10] = {0x25};
    struct srb srb;
    char text[25] = {0};
    bool ok;

    ok = command(&srb, 0, inquiry, sizeof(inquiry), DATA_IN, 36) && storvsc_succeeded(&srb);
    memcpy(text, buffer + 8, 24);
    expect_text("storage.inquiry", text, ok && (buffer[0] & 0x1f) == 0, "a direct-access disk");
    ok = command(&srb, 0, read_capacity, sizeof(read_capacity), DATA_IN, 8) && storvsc_succeeded(&srb);
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
    ok = command(&srb, 0, synchronize, sizeof(synchronize), DATA_NONE, 0) && storvsc_succeeded(&srb);
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

    while (good < rounds && command(&srb, 0, test_unit_ready, sizeof(test_unit_ready), DATA_NONE, 0) && storvsc_succeeded(&srb))
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
