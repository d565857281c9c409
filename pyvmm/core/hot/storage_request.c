// What the fast path knows of the storage protocol and of SCSI: reads, writes and flushes that are in order. It checks all
// that vsp.py, lun.py and scsi.py of devices/synthetic/storvsp check, and leaves to them whatever is not so.

#include "bytes.h"
#include "storage.h"

#include <string.h>

enum {
	PACKET_INBAND = 6,
	PACKET_GPA_DIRECT = 9,
	PACKET_COMPLETION = 0xb,

	COMPLETE_IO = 1,
	EXECUTE_SRB = 3,

	HEADER_SIZE = 12,
	SRB_SIZE = 36,
	SRB_SIZE_MAX = 0x34,
	// Offsets in the SRB.
	SRB_STATUS = 2,
	SRB_PATH = 5,
	SRB_TARGET = 6,
	SRB_LUN = 7,
	SRB_CDB_LENGTH = 8,
	SRB_SENSE_LENGTH = 9,
	SRB_DIRECTION = 10,
	SRB_DATA_LENGTH = 12,
	SRB_CDB = 16,

	CDB_SIZE_MAX = 16,
	SENSE_SIZE = 18,
	STATUS_SUCCESS = 1,
	DIRECTION_OUT = 0,

	CDB_FUA = 0x08,
	CDB_PROTECT = 0xe0,
};

static uint32_t be16(const uint8_t *from)
{
	return (uint32_t)from[0] << 8 | from[1];
}

static uint32_t be32(const uint8_t *from)
{
	return be16(from) << 16 | be16(from + 2);
}

static uint64_t be64(const uint8_t *from)
{
	return (uint64_t)be32(from) << 32 | be32(from + 4);
}

static const uint8_t *payload_of(const struct storage_request *request, uint32_t *length)
{
	*length = request->head.length - request->head.header;
	return request->packet + (request->head.header - RING_DESCRIPTOR_SIZE);
}

bool storage_is_command(const struct storage_request *request)
{
	uint32_t length;
	const uint8_t *payload = payload_of(request, &length);
	return length >= HEADER_SIZE && get_le32(payload) == EXECUTE_SRB;
}

// The command ---------------------------------------------------------------------------------------

struct command {
	enum storage_kind kind;
	uint8_t flags;
	uint64_t lba;
	uint32_t blocks;
};

// SBC-3 5.6 to 5.19 and 5.30 to 5.33: where address and length stand.
static bool parse_cdb(const uint8_t *cdb, unsigned length, struct command *ret)
{
	switch (cdb[0]) {
	case 0x08: // READ (6)
	case 0x0a: // WRITE (6)
		*ret = (struct command){cdb[0] == 0x08 ? STORAGE_READ : STORAGE_WRITE, 0, be32(cdb) & 0x1fffff,
					cdb[4] ? cdb[4] : 256};
		return length >= 6;
	case 0x28: // READ (10)
	case 0x2a: // WRITE (10)
		*ret = (struct command){cdb[0] == 0x28 ? STORAGE_READ : STORAGE_WRITE, cdb[1], be32(cdb + 2),
					be16(cdb + 7)};
		return length >= 10;
	case 0xa8: // READ (12)
	case 0xaa: // WRITE (12)
		*ret = (struct command){cdb[0] == 0xa8 ? STORAGE_READ : STORAGE_WRITE, cdb[1], be32(cdb + 2),
					be32(cdb + 6)};
		return length >= 12;
	case 0x88: // READ (16)
	case 0x8a: // WRITE (16)
		*ret = (struct command){cdb[0] == 0x88 ? STORAGE_READ : STORAGE_WRITE, cdb[1], be64(cdb + 2),
					be32(cdb + 10)};
		return length >= 16;
	case 0x35: // SYNCHRONIZE CACHE (10)
		*ret = (struct command){STORAGE_FLUSH, 0, be32(cdb + 2), be16(cdb + 7)};
		return length >= 10;
	case 0x91: // SYNCHRONIZE CACHE (16)
		*ret = (struct command){STORAGE_FLUSH, 0, be64(cdb + 2), be32(cdb + 10)};
		return length >= 16;
	default:
		return false;
	}
}

// The data buffer -----------------------------------------------------------------------------------

// Adds `length` bytes at `host` to the pieces, cut where the parts meet.
static void add_pieces(struct storage_request *request, uint8_t *host, uint32_t length, unsigned *part, uint32_t *room)
{
	while (length && *part < request->parts_count) {
		struct storage_part *to = &request->parts[*part];
		uint32_t step = length < *room ? length : *room;
		if (!to->count++)
			to->first = request->pieces_count;
		request->pieces[request->pieces_count++] = (struct iovec){host, step};
		host += step;
		length -= step;
		*room -= step;
		if (!*room && ++*part < request->parts_count)
			*room = request->parts[*part].length;
	}
}

// Turns the one range of a GPA-direct packet into pieces of host memory (Linux hyperv.h, struct gpa_range). Returns
// whether all of it is RAM and holds `needed` bytes; pieces are made of the first `request->length` of them.
static bool parse_buffer(struct storage_request *request, const MemoryObject *memory, uint32_t needed)
{
	uint32_t size = request->head.header - RING_DESCRIPTOR_SIZE;
	const uint8_t *extra = request->packet;
	if (size < 16 || get_le32(extra + 4) != 1)
		return false;
	uint32_t length = get_le32(extra + 8), start = get_le32(extra + 12);
	if (length > STORAGE_MAX_TRANSFER || length < needed || start >= HOT_PAGE_SIZE)
		return false;
	uint32_t pages = (start + length + HOT_PAGE_SIZE - 1) / HOT_PAGE_SIZE;
	if (8 * pages > size - 16)
		return false;
	unsigned part = 0;
	uint32_t room = request->parts[0].length, at = 0;
	// One look-up for each run of neighbours.
	while (at < length) {
		uint32_t page = (start + at) / HOT_PAGE_SIZE, in_page = (start + at) % HOT_PAGE_SIZE;
		uint64_t number = get_le64(extra + 16 + 8 * page);
		uint32_t run = HOT_PAGE_SIZE - in_page;
		while (run < length - at && get_le64(extra + 16 + 8 * (page + 1)) == get_le64(extra + 16 + 8 * page) + 1) {
			page++;
			run += HOT_PAGE_SIZE;
		}
		if (run > length - at)
			run = length - at;
		uint8_t *host = NULL;
		if (number <= UINT64_MAX / HOT_PAGE_SIZE)
			host = hot_memory_ptr(memory, number * HOT_PAGE_SIZE + in_page, run,
					      request->kind == STORAGE_READ);
		if (!host)
			return false;
		add_pieces(request, host, run, &part, &room);
		at += run;
	}
	return true;
}

// The whole -----------------------------------------------------------------------------------------

static bool parse_transfer(struct storage_request *request, const MemoryObject *memory, const struct command *command,
			   bool data_in, uint32_t data_length)
{
	FastDiskObject *disk = request->disk;
	bool write = command->kind == STORAGE_WRITE;
	uint32_t most = STORAGE_MAX_TRANSFER / disk->sector_size;
	if (request->head.descriptor.type != PACKET_GPA_DIRECT || command->flags & CDB_PROTECT || !command->blocks ||
	    command->blocks > most || data_in == write || (write && !atomic_load(&disk->writable)))
		return false;
	request->length = command->blocks * disk->sector_size;
	if (request->length > data_length)
		return false;
	struct disk_part parts[DISK_PARTS];
	unsigned count = hot_disk_find(disk, write, command->lba * disk->sector_size, request->length, parts);
	request->parts_count = (uint8_t)count;
	for (unsigned i = 0; i < count; i++)
		request->parts[i] = (struct storage_part){.where = parts[i].where, .length = parts[i].length};
	return count && parse_buffer(request, memory, data_length);
}

bool storage_parse(struct storage_request *request, const StorageQueueObject *queue)
{
	uint32_t length;
	const uint8_t *payload = payload_of(request, &length);
	const uint8_t *srb = payload + HEADER_SIZE, *cdb = srb + SRB_CDB;
	if (!(request->head.descriptor.flags & RING_FLAG_COMPLETION_REQUESTED) || length < HEADER_SIZE + SRB_SIZE ||
	    !storage_is_command(request))
		return false;
	unsigned cdb_length = srb[SRB_CDB_LENGTH];
	struct command command;
	bool ours = queue->any_target || (!srb[SRB_PATH] && !srb[SRB_TARGET]);
	FastDiskObject *disk = ours && srb[SRB_LUN] < STORAGE_LUNS ? queue->disks[srb[SRB_LUN]] : NULL;
	if (!disk || cdb_length > CDB_SIZE_MAX || !parse_cdb(cdb, cdb_length, &command))
		return false;
	uint64_t blocks = atomic_load(&disk->size) / disk->sector_size;
	if (atomic_load(&disk->fd) < 0 || command.lba >= blocks || command.blocks > blocks - command.lba)
		return false;
	request->kind = command.kind;
	request->durable = command.kind == STORAGE_FLUSH || (command.kind == STORAGE_WRITE && command.flags & CDB_FUA);
	// A table's own changes may not be on stable storage yet. Without io_uring Python has threads to wait on.
	if (request->durable && (queue->uring.fd < 0 || disk->table))
		return false;
	request->failed = false;
	request->lun = srb[SRB_LUN];
	uint32_t body = length - HEADER_SIZE < SRB_SIZE_MAX ? length - HEADER_SIZE : SRB_SIZE_MAX;
	request->answer = (uint8_t)(HEADER_SIZE + body);
	request->waiting = request->parts_count = 0;
	request->pieces_count = 0;
	request->length = 0;
	request->disk = disk;
	uint32_t data_length = get_le32(srb + SRB_DATA_LENGTH);
	if (command.kind == STORAGE_FLUSH)
		return request->head.descriptor.type == PACKET_INBAND && !data_length;
	return parse_transfer(request, queue->memory, &command, srb[SRB_DIRECTION] != DIRECTION_OUT, data_length);
}

void storage_answer(const struct storage_request *request, struct ring_descriptor *descriptor, uint8_t payload[64])
{
	uint32_t operation = COMPLETE_IO;
	*descriptor = (struct ring_descriptor){
		.type = PACKET_COMPLETION,
		.offset8 = RING_DESCRIPTOR_SIZE / 8,
		.length8 = (uint16_t)((RING_DESCRIPTOR_SIZE + request->answer + 7) / 8),
		.transaction_id = request->head.descriptor.transaction_id,
	};
	memset(payload, 0, 64);
	memcpy(payload, &operation, sizeof(operation));
	uint8_t *srb = payload + HEADER_SIZE;
	srb[0] = (uint8_t)(request->answer - HEADER_SIZE);
	srb[SRB_STATUS] = STATUS_SUCCESS;
	srb[SRB_CDB_LENGTH] = CDB_SIZE_MAX;
	srb[SRB_SENSE_LENGTH] = SENSE_SIZE;
	memcpy(srb + SRB_DATA_LENGTH, &request->length, sizeof(request->length));
}
