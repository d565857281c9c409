// The fast path of the synthetic NIC: its device, which its channels share, and a queue for each channel. Only functions
// that have to do with Python objects need the GIL.
//
// A queue takes RNDIS packets off its channel's incoming ring and writes their frames to the port, straight from guest
// memory. Queue 0 also reads frames from the port into sections of the guest's receive buffer, and tells of them in the
// outgoing rings. What is neither of that stays in the ring for Python.
//
// Who locks what: a queue's lock is held while it serves. What the device says of itself changes only while the locks of
// all its queues are held, so queues read it freely. Whoever writes into the ring of another queue has the ring's own lock.

#ifndef PYVMM_NET_H
#define PYVMM_NET_H

#include "net_frame.h"
#include "ring.h"
#include "visit.h"
#include "watch.h"

#include <sys/uio.h>

enum {
	NET_QUEUES = 64,
	NET_CONTROL_SECTIONS = 16, // so many sections of the receive buffer are for control messages
	NET_CONTROLS = 64,	   // control messages that wait for one
	NET_GROUPS = 64,
	NET_MAC = 6,
	NET_KEY = 40,
	NET_HASHED = 36, // most bytes of a frame that are hashed
	NET_TABLE = 128,

	NET_BATCH = 64, // frames from the port, or completions, before the guest gets to know
	NET_MAX_RANGES = 375,
	NET_MAX_PACKET = 8192, // what follows a packet's descriptor
	NET_MAX_PIECES = 512,  // of guest memory that one packet names
	NET_MESSAGE_MAX = 40,
	NET_READY = 128,	   // sections that queue 0 has at hand
	NET_MIN_SECTION = 1280,	   // makes that enough for the largest frame
	NET_MAX_SECTION = 1 << 16,
	NET_TAIL = 36, // bytes at a section's end that some guests have no use of (openvmm netvsp)

	// Where a frame begins in its section: behind the RNDIS header and four 16-byte pieces of per-packet information.
	NET_RNDIS_HEADER = 44,
	NET_PPI = 16,
	NET_ROOM = NET_RNDIS_HEADER + 4 * NET_PPI + 4,

	NVSP_RNDIS = 107,
	NVSP_RNDIS_COMPLETE = 108,
	NVSP_SUCCESS = 1,
	NVSP_INVALID_RNDIS = 5,
	NVSP_NO_SECTION = -1,

	RNDIS_PACKET = 1,

	// Per-packet information (hyperv_net.h, enum ndis_per_pkt_info_type); the last one is of the internal kind.
	PPI_CHECKSUM = 0,
	PPI_LSO = 2,
	PPI_VLAN = 6,
	PPI_HASH = 8,
	PPI_PACKET_ID = 1,
};

_Static_assert(NET_ROOM % 8 == 0, "frames begin on a word's boundary");

enum net_receive_offload {
	RECEIVE_TCP4 = 1,
	RECEIVE_UDP4 = 2,
	RECEIVE_TCP6 = 4,
	RECEIVE_UDP6 = 8,
	RECEIVE_IP4 = 0x10,
	RECEIVE_RSC4 = 0x20,
	RECEIVE_RSC6 = 0x40,
	RECEIVE_VLAN = 0x80,
	RECEIVE_ALL = 0xff,
};

enum net_counter {
	NET_SENT_FRAMES,
	NET_SENT_BYTES,
	NET_SENT_INVALID,    // RNDIS packets that make no sense
	NET_SENT_UNPLUGGED,  // while there was no port, or no link
	NET_SENT_ERRORS,     // the port took them not
	NET_RECEIVED_FRAMES, // to the guest; a coalesced one is one
	NET_RECEIVED_BYTES,
	NET_RECEIVED_COALESCED,
	NET_RECEIVED_FILTERED,
	NET_RECEIVED_RUNTS,
	NET_RECEIVED_OVERSIZED,
	NET_RECEIVED_NO_ROOM, // in another queue's ring
	NET_RECEIVED_ERRORS,
	NET_COUNTERS,
};

// A buffer that the guest has lent, by its pages, and cut into sections.
struct net_buffer {
	uint8_t **pages;
	uint32_t start, size; // where in the first page it begins, and its bytes
	uint32_t section_size, sections;
};

// net_buffer.c
// Appends the pieces of host memory behind `size` bytes from `offset`, which are inside; returns how many there are then.
unsigned net_buffer_pieces(const struct net_buffer *buffer, uint32_t offset, uint32_t size, struct iovec *pieces,
			   unsigned count);
void net_buffer_copy_in(const struct net_buffer *buffer, uint32_t offset, const void *from, uint32_t size);
// Appends a piece, joined with the last one if they are neighbours; returns how many there are then.
unsigned net_piece_add(struct iovec *pieces, unsigned count, uint8_t *at, size_t size);
// Finds the pages of a buffer: a sequence of (GPA, bytes), or None for no buffer. False with an exception set.
bool net_buffer_find(const MemoryObject *memory, PyObject *runs, uint32_t section_size, bool write,
		     struct net_buffer *buffer);

struct net_control {
	struct net_control *next;
	uint32_t size;
	uint8_t message[];
};

struct NetQueueObject;

typedef struct {
	PyObject_HEAD
	MemoryObject *memory;
	pthread_mutex_t lock; // comes before those of the queues
	struct NetQueueObject *queues[NET_QUEUES];

	// Changed as said above.
	int fd;
	bool link;
	_Atomic bool lost; // the port's other end is gone, as queue 0 has seen
	unsigned message_size;
	struct net_buffer receive, send;
	uint16_t buffer_id;
	uint32_t generation; // of the receive buffer
	uint32_t frame_size, offloads, filter, hashes;
	uint8_t mac[NET_MAC];
	unsigned groups_count;
	uint8_t groups[NET_GROUPS][NET_MAC];
	unsigned table_count;
	uint8_t table[NET_TABLE];
	uint32_t toeplitz[2 * NET_HASHED][16];

	// Sections of the receive buffer: those that are free, and those that the guest holds, by transaction. A transaction
	// is known by the first section of its chain.
	pthread_mutex_t sections_lock;
	uint32_t *free, free_count;
	uint32_t free_controls[NET_CONTROL_SECTIONS], free_controls_count;
	uint32_t *next;
	uint8_t *owner; // of a chain that begins here: the queue, counted from 1; 0 if there is none
	bool starved;	// queue 0 waits for sections

	// Queue 0's own.
	uint32_t ready[NET_READY], ready_count;
	uint32_t room;		  // bytes of a frame that fit a section
	uint32_t sections_needed; // for the largest frame
	uint16_t next_id;
	uint8_t incoming[NET_ROOM + NET_MAX_FRAME];

	struct net_control *controls, **controls_end; // messages that wait, under sections_lock
	unsigned controls_count;
	_Atomic bool controls_wait;

	_Atomic uint64_t counters[NET_COUNTERS];
} NetDeviceObject;

static inline void net_count(NetDeviceObject *device, enum net_counter counter, uint64_t by)
{
	atomic_fetch_add_explicit(&device->counters[counter], by, memory_order_relaxed);
}

// A transfer-page packet in the making: a chain of sections, one range for each.
struct net_indication {
	uint32_t head, tail;
	unsigned count, frames;
	bool control; // of one control message
	struct {
		uint32_t size, offset;
	} ranges[NET_MAX_RANGES];
};

struct net_completion {
	uint64_t id;
	uint32_t status;
};

typedef struct NetQueueObject {
	PyObject_HEAD
	NetDeviceObject *device;
	unsigned index;
	RingObject *incoming, *outgoing;
	int doorbell;
	int event;	// an epoll file with the port's in it,
	int watched;	// which is this one
	bool attached;	// to the device, whose other queues know it
	// Whom to interrupt without Python; NULL: serve says so. Changes as the device does.
	struct hot_target target;

	// Held by the worker while it serves, which ends soon once there are visitors.
	struct visit_lock lock;

	_Atomic bool running;	   // others may write into the outgoing ring; changed under its lock
	_Atomic bool owes_signal;  // others did, and have left it to Python to tell the guest
	bool masked;		   // the guest need not signal
	struct watch watch;
	bool blocked;		   // the port takes nothing for now
	// What is sent already of the packet at the head of the ring, and how that ended.
	uint32_t resume_at, resume_status;
	uint64_t done_since; // the oldest of these waits
	unsigned done_count;
	struct net_completion done[NET_BATCH];
	struct net_indication indication; // queue 0's work, whose packet it will be
	struct ring_packet head;
	uint8_t packet[NET_MAX_PACKET];
	unsigned pieces_count;
	struct iovec pieces[NET_MAX_PIECES];
	_Atomic uint64_t packets_in, packets_out, signals;
} NetQueueObject;

// What `net_queue_serve` ended with.
struct net_outcome {
	bool idle;
	unsigned slow;	    // packets at the head of the ring that are for Python
	bool stuck;	    // there is no room for what is in `done` and in `indication`
	bool drained;	    // the port had no more just now
	const char *broken; // what the guest did wrong
};

// net_queue.c

// Called with the lock held.
void net_queue_serve(NetQueueObject *queue, struct net_outcome *outcome);
// Makes its worker serve it; for queues that are running.
void net_queue_kick(NetQueueObject *queue);
// Tells the guest that there is something in the outgoing ring.
void net_queue_signal(NetQueueObject *queue);
// Watches this port, or none for -1, in place of the one before. Returns an error number, 0 if all is well.
int net_queue_watch(NetQueueObject *queue, int fd);
void net_completion_packet(const NetQueueObject *queue, const struct net_completion *done,
			   struct ring_descriptor *descriptor, uint8_t message[NET_MESSAGE_MAX]);

// net_send.c: sends the RNDIS packets of the data packet in `head` and `packet`.
enum net_sent {
	NET_SENT,
	NET_SENT_PARTLY, // the port takes nothing for now
	NET_SENT_BROKEN,
};
enum net_sent net_send(NetQueueObject *queue, uint32_t section, uint32_t section_size, uint32_t *status,
		       const char **broken);

// net_receive.c

// Reads a batch of frames from the port, and tells the guest. Returns how many there were.
unsigned net_receive(NetQueueObject *queue, struct net_outcome *outcome);
// Whether frames are read from the port; and drops those that came while they were not.
bool net_receiving(const NetDeviceObject *device);
void net_receive_discard(NetDeviceObject *device);
// Gives the guest the control messages that wait, as far as there are sections; false if the ring has no room.
bool net_receive_controls(NetQueueObject *queue, struct net_outcome *outcome);
// Takes the sections of a transaction back. Returns false if there is no such transaction of this queue.
bool net_receive_completed(NetQueueObject *queue, uint64_t id);
// The packet that tells of an indication; returns the bytes of its extra header.
uint32_t net_indication_packet(const NetQueueObject *queue, struct ring_descriptor *descriptor,
			       uint8_t extra[8 + 8 * NET_MAX_RANGES], uint8_t message[NET_MESSAGE_MAX]);
void net_message(uint8_t message[NET_MESSAGE_MAX], uint32_t type, uint32_t first, uint32_t second, uint32_t third);

// net_hash.c: the hash of a frame that is known by its headers, if it is of a kind that the guest wants hashed.
bool net_hash(const NetDeviceObject *device, const struct net_frame *frame, const uint8_t *head, uint32_t *hash);
void net_hash_set_key(NetDeviceObject *device, const uint8_t key[NET_KEY]);

// net_device.c

// Between these nobody serves, and the device may be changed.
void net_device_lock(NetDeviceObject *device);
void net_device_unlock(NetDeviceObject *device);
// Makes a queue the one of its channel, in place of any before; returns as `net_queue_watch` does. And the reverse.
int net_device_attach(NetDeviceObject *device, NetQueueObject *queue);
void net_device_detach(NetDeviceObject *device, NetQueueObject *queue);
// Makes queue 0 look for work.
void net_device_kick(NetDeviceObject *device);

// net_state.c

// Queues a control message; false if it is too long, or too many wait.
bool net_controls_add(NetDeviceObject *device, const char *message, Py_ssize_t size);
void net_controls_drop(NetDeviceObject *device);
// Methods of the device.
PyObject *net_device_statistics(NetDeviceObject *device, PyObject *ignored);
PyObject *net_device_save(NetDeviceObject *device, PyObject *ignored);
PyObject *net_device_restore(NetDeviceObject *device, PyObject *state);

#endif
