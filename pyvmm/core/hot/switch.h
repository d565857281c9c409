// The in-process data plane of one virtual switch. One thread carries frames from port to port; others change the ports.
// No function here needs the GIL.
//
// A turn of the worker: it receives a batch of frames from a port into buffers, decides of each where it goes, lists it at
// those ports, and hands each port its list with one system call. What a port doesn't take at once is copied to its
// queue, which is bounded; then the buffers are free for the next batch. So nothing waits for a slow port, and a frame is
// copied by the switch only for those.
//
// A frame's headers are written anew per port where they must differ: a tag, virtio_net_hdr, a segment's headers. Those
// go to an arena, from which with the frame's rest they are gathered.

#ifndef PYVMM_SWITCH_H
#define PYVMM_SWITCH_H

#include "hot.h"
#include "net_frame.h"
#include "visit.h"

#include <sys/socket.h>

enum {
	SWITCH_PORTS = 1024,
	SWITCH_BATCH = 32,  // frames received at once
	SWITCH_LISTED = 64, // frames sent at once
	// Messages that one port may cause before it is another one's turn: what a batch of large frames is cut into. A port
	// that wants more is read frame by frame.
	SWITCH_WORK = 2048,
	SWITCH_VLANS = 4096,
	SWITCH_MAC = 6,

	// A buffer: virtio_net_hdr and frame. Not whole pages, so that the heads of all buffers share the cache well.
	SWITCH_MESSAGE = VNET_SIZE + NET_MAX_FRAME,
	SWITCH_BUFFER = (SWITCH_MESSAGE / 4096 + 1) * 4096 + 128,
	SWITCH_ARENA = 1 << 16,
	SWITCH_MAX_HEAD = VNET_SIZE + NET_TAG + NET_MAX_HEADERS,
	STREAM_LENGTH = 4,
	STREAM_BUFFER = 4 * (STREAM_LENGTH + NET_MAX_FRAME),

	// What may wait for a port: all of this, or where there is a limit what that passes in QUEUE_NS, but some.
	QUEUE_BYTES = 512 << 10,
	QUEUE_LEAST = 128 << 10,
	// Of a patient switch, which reads no more from others once half of it waits: the windows of a guest's TCP, and a
	// batch of the largest frames cut into segments.
	QUEUE_PATIENT = 8 << 20,

	TABLE_SETS = 1024,
	TABLE_WAYS = 8,
	TABLE_OF_NIC = 1024, // addresses that one port may have in the table, so that others find room
	FIXED_BUCKETS = 256,

	MIRROR_BUFFER = 128 << 10,

	TAG_NONE = -1,
	TAG_OF_PROVIDER = 1 << 16, // one of 802.1ad

	OFFLOAD_CHECKSUM = 1,
	OFFLOAD_TSO4 = 2,
	OFFLOAD_TSO6 = 4,
	OFFLOAD_TSO_ECN = 8,
	OFFLOAD_ALL = 15,
};

#define QUEUE_NS 100000000ull
#define TABLE_NS 300000000000ull // IEEE 802.1D, table 7-5
// A limit lets so much time's worth through at once, and is looked at again no earlier than that.
#define LIMIT_BURST_NS 10000000ull
#define LIMIT_LOOK_NS 500000ull

enum switch_kind { KIND_SOCKET, KIND_TAP, KIND_PACKET, KIND_STREAM };

enum switch_drop {
	DROP_MALFORMED,
	DROP_OVERSIZED,
	DROP_LINK,
	DROP_VLAN,
	DROP_SPOOFED,
	DROP_DHCP_GUARD,
	DROP_ROUTER_GUARD,
	DROP_RESERVED,
	DROP_QUEUE_FULL,
	DROP_REFUSED, // by the host, when it was sent
	DROPS,
};

// A limit of bandwidth, by the time at which what has passed would have passed at just that rate (GCRA).
struct switch_limit {
	uint64_t rate; // bytes per second; 0: none
	uint64_t next;
};

// A message that waits for its port.
struct switch_waiting {
	struct switch_waiting *next;
	uint32_t size, sent; // sent: of a stream's
	uint8_t data[];
};

struct switch_mirror {
	int fd;
	uint64_t left;
	size_t used;
	uint8_t buffer[MIRROR_BUFFER];
};

struct switch_port {
	int number;
	enum switch_kind kind;
	int fd; // -1: lost
	uint32_t armed; // what epoll looks for
	unsigned head; // bytes before a frame on this port

	// Settings.
	uint16_t vlan;
	uint64_t tagged[SWITCH_VLANS / 64];
	bool has_mac, spoofing, dhcp_guard, router_guard, link;
	uint8_t mac[SWITCH_MAC];
	unsigned offloads;
	struct switch_limit in, out;

	struct switch_port *next_fixed, *next_dead;
	unsigned learned; // addresses in the table
	bool heavy;	  // its last batch was more than its share of work

	// Frames of this batch.
	unsigned listed;
	bool on_list; // of the switch
	struct mmsghdr messages[SWITCH_LISTED];
	struct iovec parts[SWITCH_LISTED][2];

	// Frames that wait; `blocked` until epoll says that the port takes more.
	struct switch_waiting *first, **last;
	size_t waiting, most;
	bool blocked;

	uint8_t *stream;
	size_t stream_used;
	struct switch_mirror *mirror;
	const char *lost, *mirror_ended; // for Python to hear of
	int lost_error, mirror_error;

	uint64_t received_frames, received_bytes, sent_frames, sent_bytes;
	uint64_t dropped[DROPS];
};

// A frame on its way. Its tag is in `data`, or was taken out by the kernel.
struct switch_frame {
	uint8_t *data;
	bool headed; // `vnet` is before `data` too
	struct net_vnet vnet;
	struct net_frame parsed;
	uint16_t vlan;
	uint16_t priority; // of the tag: PCP and DEI, in their places
	uint8_t tag;       // bytes of the tag in data: 0 or NET_TAG
	bool kept; // the tag in data is what a link would carry
	bool inner; // what follows is another tag
};

struct table_entry {
	uint64_t key; // 0: free
	uint64_t seen;
	struct switch_port *port;
};

typedef struct SwitchObject {
	PyObject_HEAD
	struct visit_lock lock;
	unsigned mtu;
	int epoll, wake;
	bool stopping, running;
	bool manual_time, patient;
	uint64_t now; // ns
	struct timespec wall;

	unsigned count;
	struct switch_port *ports[SWITCH_PORTS];
	struct switch_port *dead;
	bool watched;
	struct switch_port *fixed[FIXED_BUCKETS];
	struct table_entry table[TABLE_SETS][TABLE_WAYS];
	uint64_t secret, swept;
	bool ended; // some port has news for Python

	uint8_t *buffers; // SWITCH_BATCH of them
	struct mmsghdr received[SWITCH_BATCH];
	struct iovec received_parts[SWITCH_BATCH];
	uint8_t control[SWITCH_BATCH][64];
	struct switch_port *listed[SWITCH_PORTS]; // the ports with lists
	unsigned listed_count;
	unsigned work; // messages listed since the port that is being read was turned to
	uint8_t arena[SWITCH_ARENA];
	size_t arena_used;
} SwitchObject;

static inline bool switch_carries(const struct switch_port *port, uint16_t vlan)
{
	return port->vlan == vlan || port->tagged[vlan / 64] >> vlan % 64 & 1;
}

static inline bool limit_passes(const struct switch_limit *limit, uint64_t now)
{
	return !limit->rate || limit->next <= now;
}

static inline void limit_charge(struct switch_limit *limit, uint64_t now, size_t size)
{
	if (!limit->rate)
		return;
	if (limit->next + LIMIT_BURST_NS < now)
		limit->next = now - LIMIT_BURST_NS;
	limit->next += size * 1000000000ull / limit->rate;
}

// switch_table.c
// Whose address this is for certain, or NULL.
struct switch_port *fixed_find(const SwitchObject *self, uint16_t vlan, const uint8_t *mac);
void fixed_add(SwitchObject *self, struct switch_port *port);
void fixed_remove(SwitchObject *self, struct switch_port *port);
// Where the address was seen, or NULL.
struct switch_port *table_find(SwitchObject *self, uint16_t vlan, const uint8_t *mac);
void table_learn(SwitchObject *self, struct switch_port *port, uint16_t vlan, const uint8_t *mac);
void table_forget(SwitchObject *self, const struct switch_port *port);
void table_sweep(SwitchObject *self);

// switch_admit.c
// Looks at a frame from `port`, `vnet` and `data` set; `tag` is a TCI that the kernel took out, or a TAG_*. False: dropped.
bool switch_admit(SwitchObject *self, struct switch_port *port, struct switch_frame *frame, size_t size, int tag);

// switch_forward.c
void switch_forward(SwitchObject *self, struct switch_port *from, struct switch_frame *frame);
// Writes the frame's addresses and the tag that it shall have, then the rest of these `size` bytes of headers.
size_t switch_retag(const struct switch_frame *frame, bool tagged, const uint8_t *headers, size_t size, uint8_t *to);

// switch_send.c
// Lists a message of two parts, the first of which has the port's own header.
void port_list(SwitchObject *self, struct switch_port *port, uint8_t *first, size_t first_size, const uint8_t *second,
	       size_t second_size);
// Room for headers until the lists are sent.
uint8_t *switch_arena(SwitchObject *self, size_t size);
void switch_send_all(SwitchObject *self);
// Sends what waits, as far as it goes.
void port_send_waiting(SwitchObject *self, struct switch_port *port);
void port_drop_waiting(struct switch_port *port);

// switch_receive.c
void port_receive(SwitchObject *self, struct switch_port *port);

// switch_mirror.c
// Takes `fd` over, and ends the mirror before.
bool mirror_start(struct switch_port *port, int fd, uint64_t limit);
void mirror_stop(struct switch_port *port);
void mirror_frame(SwitchObject *self, struct switch_port *port, const struct switch_frame *frame, bool tagged);
void mirror_flush(SwitchObject *self, struct switch_port *port);

// switch_port.c
// Takes `fd` over. NULL with errno set.
struct switch_port *port_add(SwitchObject *self, int number, enum switch_kind kind, int fd);
struct switch_port *port_find(const SwitchObject *self, int number);
void port_remove(SwitchObject *self, struct switch_port *port);
// Frees ports that were removed, which events may still have named.
void port_bury(SwitchObject *self);
// After a change: whether there are limits or mirrors that each turn has to look at.
void switch_watch(SwitchObject *self);
// Of a patient switch: whether the port isn't read because something waits for another one.
bool port_held(const SwitchObject *self, const struct switch_port *port);
// Has epoll look for what the port waits for.
void port_arm(SwitchObject *self, struct switch_port *port);
void port_lose(SwitchObject *self, struct switch_port *port, const char *why, int error);

// switch_run.c
void switch_wake(SwitchObject *self);
void switch_look_at_clocks(SwitchObject *self);
// Carries frames until it is stopped or something has ended. False if another thread does.
bool switch_run(SwitchObject *self);

#endif
