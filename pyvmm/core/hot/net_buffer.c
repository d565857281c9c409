// Buffers that the guest has lent to the NIC, and pieces of guest memory. Only the last function needs the GIL.

#include "net.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_BUFFER = 1 << 30 };

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

static bool take_run(const MemoryObject *memory, struct net_buffer *buffer, unsigned *pages, unsigned long long gpa,
		     unsigned long long size, bool write, bool last)
{
	bool first = !buffer->size;
	if (!size || (!first && gpa % HOT_PAGE_SIZE) || (!last && (gpa + size) % HOT_PAGE_SIZE)) {
		PyErr_SetString(PyExc_ValueError, "the runs of a buffer meet at ends of pages, and none is empty");
		return false;
	}
	uint8_t *host = hot_memory_ptr(memory, gpa, size, write);
	if (!host || size > MAX_BUFFER - buffer->size) {
		PyErr_Format(PyExc_ValueError, "a buffer of %llu bytes at 0x%llx is not in guest RAM", size, gpa);
		return false;
	}
	if (first)
		buffer->start = gpa % HOT_PAGE_SIZE;
	uint32_t in_page = gpa % HOT_PAGE_SIZE;
	unsigned count = (unsigned)((in_page + size + HOT_PAGE_SIZE - 1) / HOT_PAGE_SIZE);
	uint8_t **grown = realloc(buffer->pages, (*pages + count) * sizeof(*grown));
	if (!grown) {
		PyErr_NoMemory();
		return false;
	}
	buffer->pages = grown;
	for (unsigned i = 0; i < count; i++)
		grown[(*pages)++] = host - in_page + (size_t)i * HOT_PAGE_SIZE;
	buffer->size += (uint32_t)size;
	return true;
}

bool net_buffer_find(const MemoryObject *memory, PyObject *runs, uint32_t section_size, bool write,
		     struct net_buffer *buffer)
{
	*buffer = (struct net_buffer){0};
	if (runs == Py_None)
		return true;
	PyObject *fast = PySequence_Fast(runs, "a buffer is a sequence of runs");
	if (!fast)
		return false;
	Py_ssize_t count = PySequence_Fast_GET_SIZE(fast);
	unsigned pages = 0;
	bool good = section_size && section_size <= NET_MAX_SECTION;
	if (!good)
		PyErr_Format(PyExc_ValueError, "sections of %u bytes", section_size);
	for (Py_ssize_t i = 0; good && i < count; i++) {
		unsigned long long gpa, size;
		good = PyArg_ParseTuple(PySequence_Fast_GET_ITEM(fast, i), "KK;a run is (GPA, bytes)", &gpa, &size) &&
		       take_run(memory, buffer, &pages, gpa, size, write, i == count - 1);
	}
	Py_DECREF(fast);
	if (!good)
		return false;
	buffer->section_size = section_size;
	buffer->sections = buffer->size / section_size;
	return true;
}
