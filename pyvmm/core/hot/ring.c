#include "ring.h"

static bool index_valid(const RingObject *self, uint32_t index)
{
	return index < self->size && index % 8 == 0;
}

bool ring_load_index(const RingObject *self, _Atomic uint32_t *index, uint32_t *ret)
{
	*ret = atomic_load_explicit(index, memory_order_acquire);
	return index_valid(self, *ret);
}

uint32_t ring_copy_out_pages(const RingObject *self, uint32_t offset, void *to, uint32_t length)
{
	uint8_t *next = to;
	while (length) {
		uint32_t chunk = HOT_PAGE_SIZE - offset % HOT_PAGE_SIZE;
		if (chunk > length)
			chunk = length;
		memcpy(next, self->pages[offset / HOT_PAGE_SIZE] + offset % HOT_PAGE_SIZE, chunk);
		next += chunk;
		length -= chunk;
		offset = ring_advance(self, offset, chunk);
	}
	return offset;
}

uint32_t ring_copy_in_pages(const RingObject *self, uint32_t offset, const void *from, uint32_t length)
{
	const uint8_t *next = from;
	while (length) {
		uint32_t chunk = HOT_PAGE_SIZE - offset % HOT_PAGE_SIZE;
		if (chunk > length)
			chunk = length;
		memcpy(self->pages[offset / HOT_PAGE_SIZE] + offset % HOT_PAGE_SIZE, next, chunk);
		next += chunk;
		length -= chunk;
		offset = ring_advance(self, offset, chunk);
	}
	return offset;
}

// The host as reader ---------------------------------------------------------------------------------

bool ring_peek(const RingObject *self, uint32_t offset, uint32_t available, struct ring_packet *ret)
{
	memset(ret, 0, sizeof(*ret));
	if (available < RING_DESCRIPTOR_SIZE + RING_FOOTER_SIZE)
		return false;
	ring_copy_out(self, offset, &ret->descriptor, RING_DESCRIPTOR_SIZE);
	ret->header = ret->descriptor.offset8 * 8U;
	ret->length = ret->descriptor.length8 * 8U;
	return ret->header >= RING_DESCRIPTOR_SIZE && ret->length >= ret->header &&
	       ret->length <= available - RING_FOOTER_SIZE &&
	       !(ret->descriptor.flags & ~RING_FLAG_COMPLETION_REQUESTED);
}

bool ring_publish_out(RingObject *self, uint32_t out)
{
	uint32_t consumed = ring_used(self, out, self->out);
	self->out = out;
	atomic_store(&self->control->out, out);
	// The writer sets pending_send_size, then looks at our index; we do it the other way round. Both in one
	// total order, so one of the two sees the other.
	atomic_thread_fence(memory_order_seq_cst);
	uint32_t wanted = atomic_load(&self->control->pending_send_size) & ~7U;
	if (!wanted)
		return false;
	if (wanted > self->size - RING_RESERVED)
		wanted = self->size - RING_RESERVED;
	uint32_t in;
	if (!ring_load_index(self, &self->control->in, &in))
		return false; // the next read tells
	int64_t now = ring_free(self, in, out);
	return now - consumed < wanted && wanted <= now;
}

void ring_set_mask(RingObject *self, bool masked)
{
	atomic_store(&self->control->interrupt_mask, masked);
	// The writer publishes, then looks at the mask.
	atomic_thread_fence(memory_order_seq_cst);
}

// The host as writer ---------------------------------------------------------------------------------

uint32_t ring_put(const RingObject *self, uint32_t start, const struct ring_descriptor *descriptor, const void *extra,
		  const void *payload, uint32_t payload_length)
{
	static const uint8_t zeros[8];
	uint32_t footer[2] = {0, start};
	uint32_t header = descriptor->offset8 * 8U;
	uint32_t in = ring_copy_in(self, start, descriptor, RING_DESCRIPTOR_SIZE);
	if (header > RING_DESCRIPTOR_SIZE)
		in = ring_copy_in(self, in, extra, header - RING_DESCRIPTOR_SIZE);
	in = ring_copy_in(self, in, payload, payload_length);
	in = ring_copy_in(self, in, zeros, descriptor->length8 * 8U - header - payload_length);
	return ring_copy_in(self, in, footer, RING_FOOTER_SIZE);
}

bool ring_publish_in(RingObject *self, uint32_t in)
{
	uint32_t old = self->in;
	self->in = in;
	atomic_store(&self->control->in, in);
	// The reader clears its mask, then looks at our index.
	atomic_thread_fence(memory_order_seq_cst);
	if (atomic_load(&self->control->interrupt_mask))
		return false;
	return atomic_load(&self->control->out) == old;
}
