// One direction of a VMBus channel, as C code uses it. No function here needs the GIL.
//
// The other side is a guest that may write anything, anywhere in the ring, at any time: everything is copied out
// before it is checked, and what was checked is what is used. Our own index is kept here and only published to the guest.
//
// Facts: Linux 6.1 drivers/hv/ring_buffer.c and hyperv.h (hv_ring_buffer), openvmm vmbus_ring.

#ifndef PYVMM_RING_H
#define PYVMM_RING_H

#include "hot.h"

#include <stddef.h>
#include <string.h>

enum {
	RING_DESCRIPTOR_SIZE = 16,
	RING_FOOTER_SIZE = 8,
	RING_RESERVED = 8, // never filled, so that a full ring differs from an empty one
	RING_FLAG_COMPLETION_REQUESTED = 1,
};

struct ring_control {
	_Atomic uint32_t in;
	_Atomic uint32_t out;
	_Atomic uint32_t interrupt_mask;
	_Atomic uint32_t pending_send_size;
	uint32_t reserved[12];
	_Atomic uint32_t feature_bits;
};

struct ring_descriptor {
	uint16_t type;
	uint16_t offset8;
	uint16_t length8;
	uint16_t flags;
	uint64_t transaction_id;
};

_Static_assert(offsetof(struct ring_control, feature_bits) == 64, "layout of the control page");
_Static_assert(sizeof(struct ring_descriptor) == RING_DESCRIPTOR_SIZE, "layout of a packet descriptor");

typedef struct {
	PyObject_HEAD
	MemoryObject *memory; // keeps the pages mapped
	struct ring_control *control;
	uint8_t **pages; // of the data area
	uint32_t size;
	pthread_mutex_t write_lock; // guards `in` and what is written
	uint32_t in;                // ours when the host writes
	uint32_t out;               // ours when the host reads
} RingObject;

// A packet at the head of a ring: its sizes in bytes are inside what the ring holds.
struct ring_packet {
	struct ring_descriptor descriptor;
	uint32_t header; // the descriptor and the extra header
	uint32_t length; // that and the payload
};

static inline uint32_t ring_used(const RingObject *self, uint32_t in, uint32_t out)
{
	return in >= out ? in - out : self->size - (out - in);
}

static inline uint32_t ring_free(const RingObject *self, uint32_t in, uint32_t out)
{
	return self->size - ring_used(self, in, out) - RING_RESERVED;
}

static inline uint32_t ring_advance(const RingObject *self, uint32_t offset, uint32_t by)
{
	offset += by;
	return offset >= self->size ? offset - self->size : offset;
}

// Reads an index of the other side, once. Returns whether it is an offset in the ring.
bool ring_load_index(const RingObject *self, _Atomic uint32_t *index, uint32_t *ret);
// `offset` is below the ring's size and `length` at most that; all return the offset after what was copied.
uint32_t ring_copy_out_pages(const RingObject *self, uint32_t offset, void *to, uint32_t length);
uint32_t ring_copy_in_pages(const RingObject *self, uint32_t offset, const void *from, uint32_t length);

// Most often it is inside one page, and of a length that the compiler knows.
static inline uint32_t ring_copy_out(const RingObject *self, uint32_t offset, void *to, uint32_t length)
{
	uint32_t in_page = offset % HOT_PAGE_SIZE;
	if (length > HOT_PAGE_SIZE - in_page)
		return ring_copy_out_pages(self, offset, to, length);
	memcpy(to, self->pages[offset / HOT_PAGE_SIZE] + in_page, length);
	return ring_advance(self, offset, length);
}

static inline uint32_t ring_copy_in(const RingObject *self, uint32_t offset, const void *from, uint32_t length)
{
	uint32_t in_page = offset % HOT_PAGE_SIZE;
	if (length > HOT_PAGE_SIZE - in_page)
		return ring_copy_in_pages(self, offset, from, length);
	memcpy(self->pages[offset / HOT_PAGE_SIZE] + in_page, from, length);
	return ring_advance(self, offset, length);
}

// Host as reader: copies a packet's descriptor from `offset`, where at most `available` bytes are in the ring.
// Returns whether the whole packet is in the ring and its flags are known.
bool ring_peek(const RingObject *self, uint32_t offset, uint32_t available, struct ring_packet *ret);
// Publishes our read index; returns whether a writer waits for what this freed.
bool ring_publish_out(RingObject *self, uint32_t out);
// Sets the interrupt mask. Whoever writes meanwhile either sees it, or is seen by a look at the ring after this.
void ring_set_mask(RingObject *self, bool masked);

// Host as writer, under the lock: copies a packet to `start`, where it must fit; returns the offset after it.
uint32_t ring_put(const RingObject *self, uint32_t start, const struct ring_descriptor *descriptor, const void *extra,
		  const void *payload, uint32_t payload_length);
// Publishes our write index; returns whether the reader may be asleep.
bool ring_publish_in(RingObject *self, uint32_t in);

#endif
