// The fast path of storage: what a channel's queue is made of. No function here needs the GIL.
//
// A queue takes a request off its channel's incoming ring into a slot, moves the data between the image's file and guest
// memory, and puts the completion into the outgoing ring. What it doesn't know stays in the ring for Python; what
// goes wrong is handed to Python, which does it again. So all sense data and all messages come from Python.

#ifndef PYVMM_STORAGE_H
#define PYVMM_STORAGE_H

#include "disk.h"
#include "ring.h"
#include "uring.h"
#include "visit.h"
#include "watch.h"

#include <sys/uio.h>

enum {
	STORAGE_LUNS = 64,
	STORAGE_SLOTS = 256,
	// As in devices/synthetic/storvsp/inquiry.py.
	STORAGE_MAX_TRANSFER = 1 << 20,
	// A transfer that begins inside a page has one page more, and one that crosses blocks a cut more.
	STORAGE_MAX_PIECES = STORAGE_MAX_TRANSFER / HOT_PAGE_SIZE + 2,
	// A packet with that many page numbers, and some more.
	STORAGE_MAX_PACKET = 2304,
	STORAGE_BUCKETS = 32,
};

_Static_assert((int)STORAGE_MAX_TRANSFER <= (int)DISK_MIN_BLOCK, "a transfer crosses one boundary at most");

enum storage_kind { STORAGE_READ, STORAGE_WRITE, STORAGE_FLUSH, STORAGE_KINDS };

struct storage_part {
	uint64_t where; // in the file, or DISK_ZEROS
	uint32_t length;
	uint16_t first, count; // of the pieces
};

struct storage_request {
	enum storage_kind kind;
	bool durable; // on stable storage before it is completed
	bool failed;  // Python has to do it again
	uint8_t lun;
	uint8_t answer;   // bytes of the completion's payload
	uint8_t waiting;  // parts that the kernel has
	uint8_t parts_count;
	uint16_t pieces_count;
	uint32_t length;
	uint64_t started; // ns
	FastDiskObject *disk;
	struct storage_part parts[DISK_PARTS];
	struct iovec pieces[STORAGE_MAX_PIECES];
	struct ring_packet head;
	uint8_t packet[STORAGE_MAX_PACKET]; // extra header and payload, copied out of the ring
};

// storage_request.c: whether `request->head` and `packet` are a request that C can carry out; the rest is filled in then.
struct StorageQueueObject;
bool storage_parse(struct storage_request *request, const struct StorageQueueObject *queue);
// Whether a packet is a SCSI command at all.
bool storage_is_command(const struct storage_request *request);
// The completion of a request that went well; its descriptor and payload are returned.
void storage_answer(const struct storage_request *request, struct ring_descriptor *descriptor,
		    uint8_t payload[64]);

struct storage_counters {
	_Atomic uint64_t count, bytes;
	_Atomic uint64_t latency[STORAGE_BUCKETS]; // bucket n: below 2**n us, and not in a lower one
};

typedef struct StorageQueueObject {
	PyObject_HEAD
	struct StorageQueueObject *next; // of all queues
	MemoryObject *memory;
	RingObject *incoming, *outgoing;
	int doorbell;
	bool any_target; // path and target of a request say nothing
	// Whom to interrupt without Python; NULL: serve says so.
	struct hot_target target;

	// Held by the worker while it serves, which ends soon once there are visitors.
	struct visit_lock lock;

	struct uring uring;
	FastDiskObject *disks[STORAGE_LUNS];
	struct storage_counters counters[STORAGE_LUNS][STORAGE_KINDS];
	struct storage_request *slots;
	uint16_t free[STORAGE_SLOTS], done[STORAGE_SLOTS], failed[STORAGE_SLOTS];
	unsigned free_count, done_count, failed_count;
	unsigned in_flight; // requests of which the kernel has a part
	uint16_t in_flight_of[STORAGE_LUNS];
	bool masked;        // the guest need not signal
	struct watch watch;
	_Atomic uint64_t packets_in, packets_out, signals;
} StorageQueueObject;

// storage_queue.c

// What `serve` ended with.
struct storage_outcome {
	bool signal;    // the guest must be signalled
	bool stuck;     // the outgoing ring has no room for what is done
	bool idle;      // the doorbell tells when there is more
	unsigned slow;  // packets at the head of the ring that are for Python
};

// Called with the lock held, as are the next two.
void storage_serve(StorageQueueObject *queue, struct storage_outcome *outcome);
// Waits until the kernel has no request of the queue for `of`, a disk or its table; for any disk if it is NULL.
void storage_finish(StorageQueueObject *queue, const void *of);
void storage_release(StorageQueueObject *queue, uint16_t slot);

// Puts a queue on the list of all, or takes it off.
void storage_enlist(StorageQueueObject *queue);
void storage_delist(StorageQueueObject *queue);
// Returns once I/O that any queue began for `of`, a disk or its table, before this call is over. Any thread.
void hot_storage_drain(const void *of);

#endif
