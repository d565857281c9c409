// Buffers that the guest has lent to the NIC, and pieces of guest memory.

#include "net.h"

#include <string.h>

unsigned net_piece_add(struct iovec *pieces, unsigned count, uint8_t *at, size_t size)
{
	if (count && (uint8_t *)pieces[count - 1].iov_base + pieces[count - 1].iov_len == at) {
		pieces[count - 1].iov_len += size;
		return count;
	}
	pieces[count] = (struct iovec){at, size};
	return count + 1;
}

// What lies in one page, of `size` bytes from `offset`.
static uint32_t step(const struct net_buffer *buffer, uint32_t offset, uint32_t size, uint8_t **at)
{
	uint32_t place = buffer->start + offset, in_page = place % HOT_PAGE_SIZE;
	*at = buffer->pages[place / HOT_PAGE_SIZE] + in_page;
	return size < HOT_PAGE_SIZE - in_page ? size : HOT_PAGE_SIZE - in_page;
}

unsigned net_buffer_pieces(const struct net_buffer *buffer, uint32_t offset, uint32_t size, struct iovec *pieces,
			   unsigned count)
{
	while (size) {
		uint8_t *at;
		uint32_t length = step(buffer, offset, size, &at);
		count = net_piece_add(pieces, count, at, length);
		offset += length;
		size -= length;
	}
	return count;
}

void net_buffer_copy_in(const struct net_buffer *buffer, uint32_t offset, const void *from, uint32_t size)
{
	const uint8_t *next = from;
	while (size) {
		uint8_t *at;
		uint32_t length = step(buffer, offset, size, &at);
		memcpy(at, next, length);
		next += length;
		offset += length;
		size -= length;
	}
}
