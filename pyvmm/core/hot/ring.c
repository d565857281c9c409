// One direction of a VMBus channel. The other side is a guest that may write anything, anywhere in the ring, at any
// time: everything is copied out before it is checked, and what was checked is what is used. Our own index is kept
// here and only published to the guest.
//
// Facts: Linux 6.1 drivers/hv/ring_buffer.c and hyperv.h (hv_ring_buffer), openvmm vmbus_ring.

#include "hot.h"

#include <stddef.h>
#include <string.h>

enum {
	DESCRIPTOR_SIZE = 16,
	FOOTER_SIZE = 8,
	RESERVED = 8, // never filled, so that a full ring differs from an empty one
	MAX_PAGES = 1 << 16,
	FLAG_COMPLETION_REQUESTED = 1,
	FEATURE_PENDING_SEND_SIZE = 1,
};

struct control {
	_Atomic uint32_t in;
	_Atomic uint32_t out;
	_Atomic uint32_t interrupt_mask;
	_Atomic uint32_t pending_send_size;
	uint32_t reserved[12];
	_Atomic uint32_t feature_bits;
};

struct descriptor {
	uint16_t type;
	uint16_t offset8;
	uint16_t length8;
	uint16_t flags;
	uint64_t transaction_id;
};

_Static_assert(offsetof(struct control, feature_bits) == 64, "layout of the control page");
_Static_assert(sizeof(struct descriptor) == DESCRIPTOR_SIZE, "layout of a packet descriptor");

typedef struct {
	PyObject_HEAD
	MemoryObject *memory; // keeps the pages mapped
	struct control *control;
	uint8_t **pages; // of the data area
	uint32_t size;
	uint32_t in;  // ours when the host writes
	uint32_t out; // ours when the host reads
} RingObject;

// Arithmetic of the data area ----------------------------------------------------------------------

static uint32_t ring_used(const RingObject *self, uint32_t in, uint32_t out)
{
	return in >= out ? in - out : self->size - (out - in);
}

static uint32_t ring_free(const RingObject *self, uint32_t in, uint32_t out)
{
	return self->size - ring_used(self, in, out) - RESERVED;
}

static uint32_t ring_advance(const RingObject *self, uint32_t offset, uint32_t by)
{
	offset += by;
	return offset >= self->size ? offset - self->size : offset;
}

static bool index_valid(const RingObject *self, uint32_t index)
{
	return index < self->size && index % 8 == 0;
}

// Reads an index of the other side, once.
static bool load_index(const RingObject *self, _Atomic uint32_t *index, const char *name, uint32_t *ret)
{
	*ret = atomic_load_explicit(index, memory_order_acquire);
	if (index_valid(self, *ret))
		return true;
	PyErr_Format(RingError, "%s index %u is not an offset in a ring of %u bytes", name, *ret, self->size);
	return false;
}

// `offset` is below the ring's size and `length` at most that; returns the offset after what was copied.
static uint32_t ring_copy_out(const RingObject *self, uint32_t offset, void *to, uint32_t length)
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

static uint32_t ring_copy_in(const RingObject *self, uint32_t offset, const void *from, uint32_t length)
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

// Life ---------------------------------------------------------------------------------------------

static void ring_dealloc(RingObject *self)
{
	PyMem_Free(self->pages);
	Py_XDECREF(self->memory);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static void *resolve_page(const MemoryObject *memory, PyObject *number)
{
	unsigned long long page = PyLong_AsUnsignedLongLong(number);
	if (page == (unsigned long long)-1 && PyErr_Occurred()) {
		if (!PyErr_ExceptionMatches(PyExc_OverflowError))
			return NULL;
		PyErr_Clear();
	} else if (page <= UINT64_MAX / HOT_PAGE_SIZE) {
		void *host = hot_memory_ptr(memory, page * HOT_PAGE_SIZE, HOT_PAGE_SIZE, true);
		if (host)
			return host;
	}
	PyErr_Format(PyExc_ValueError, "ring page %R is not guest RAM", number);
	return NULL;
}

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	MemoryObject *memory;
	PyObject *numbers;
	if (kwargs && PyDict_GET_SIZE(kwargs)) {
		PyErr_SetString(PyExc_TypeError, "Ring takes no keyword arguments");
		return NULL;
	}
	if (!PyArg_ParseTuple(args, "O!O:Ring", &Memory_Type, &memory, &numbers))
		return NULL;
	PyObject *fast = PySequence_Fast(numbers, "Ring needs a sequence of page numbers");
	if (!fast)
		return NULL;
	Py_ssize_t count = PySequence_Fast_GET_SIZE(fast);
	RingObject *self = NULL;
	if (count < 2 || count > MAX_PAGES) {
		PyErr_Format(PyExc_ValueError, "a ring of %zd pages: it needs a control page and a data page", count);
		goto fail;
	}
	self = (RingObject *)type->tp_alloc(type, 0);
	if (!self)
		goto fail;
	Py_INCREF(memory);
	self->memory = memory;
	self->size = (uint32_t)(count - 1) * HOT_PAGE_SIZE;
	self->pages = PyMem_New(uint8_t *, (size_t)count - 1);
	if (!self->pages) {
		PyErr_NoMemory();
		goto fail;
	}
	for (Py_ssize_t i = 0; i < count; i++) {
		void *host = resolve_page(memory, PySequence_Fast_GET_ITEM(fast, i));
		if (!host)
			goto fail;
		if (i == 0)
			self->control = host;
		else
			self->pages[i - 1] = host;
	}
	// What we publish from now on continues from what the ring says; a saved channel goes on where it was.
	if (!load_index(self, &self->control->in, "write", &self->in) ||
	    !load_index(self, &self->control->out, "read", &self->out))
		goto fail;
	Py_DECREF(fast);
	return (PyObject *)self;
fail:
	Py_DECREF(fast);
	Py_XDECREF(self);
	return NULL;
}

static PyObject *ring_init_incoming(RingObject *self, PyObject *Py_UNUSED(ignored))
{
	atomic_store(&self->control->interrupt_mask, 1);
	Py_RETURN_NONE;
}

static PyObject *ring_init_outgoing(RingObject *self, PyObject *Py_UNUSED(ignored))
{
	atomic_fetch_or(&self->control->feature_bits, FEATURE_PENDING_SEND_SIZE);
	atomic_store(&self->control->pending_send_size, 0);
	Py_RETURN_NONE;
}

// The host as reader ---------------------------------------------------------------------------------

// Copies one packet at `*offset` out, of which at most `available` bytes are in the ring.
static PyObject *read_packet(const RingObject *self, uint32_t *offset, uint32_t *available)
{
	struct descriptor descriptor;
	if (*available < DESCRIPTOR_SIZE + FOOTER_SIZE)
		return PyErr_Format(RingError, "%u bytes in the ring are too few for a packet", *available);
	uint32_t next = ring_copy_out(self, *offset, &descriptor, DESCRIPTOR_SIZE);
	uint32_t header = descriptor.offset8 * 8U;
	uint32_t length = descriptor.length8 * 8U;
	if (header < DESCRIPTOR_SIZE || length < header || length > *available - FOOTER_SIZE)
		return PyErr_Format(RingError, "packet of %u bytes with its data at %u, of %u bytes in the ring", length,
				    header, *available);
	if (descriptor.flags & ~FLAG_COMPLETION_REQUESTED)
		return PyErr_Format(RingError, "packet with unknown flags 0x%x", descriptor.flags);

	PyObject *extra = PyBytes_FromStringAndSize(NULL, header - DESCRIPTOR_SIZE);
	PyObject *payload = PyBytes_FromStringAndSize(NULL, length - header);
	if (!extra || !payload) {
		Py_XDECREF(extra);
		Py_XDECREF(payload);
		return NULL;
	}
	next = ring_copy_out(self, next, PyBytes_AS_STRING(extra), header - DESCRIPTOR_SIZE);
	next = ring_copy_out(self, next, PyBytes_AS_STRING(payload), length - header);
	*offset = ring_advance(self, next, FOOTER_SIZE);
	*available -= length + FOOTER_SIZE;
	return Py_BuildValue("iiKNN", (int)descriptor.type, (int)descriptor.flags,
			     (unsigned long long)descriptor.transaction_id, extra, payload);
}

// Publishes our read index; returns whether a writer waits for what this freed.
static bool publish_out(RingObject *self, uint32_t out)
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
	if (wanted > self->size - RESERVED)
		wanted = self->size - RESERVED;
	uint32_t in = atomic_load(&self->control->in);
	if (!index_valid(self, in))
		return false; // the next read tells
	int64_t now = ring_free(self, in, out);
	return now - consumed < wanted && wanted <= now;
}

static PyObject *ring_read(RingObject *self, PyObject *arg)
{
	Py_ssize_t limit = PyNumber_AsSsize_t(arg, NULL);
	if (limit == -1 && PyErr_Occurred())
		return NULL;
	uint32_t in;
	if (!load_index(self, &self->control->in, "write", &in))
		return NULL;
	PyObject *packets = PyList_New(0);
	if (!packets)
		return NULL;
	uint32_t out = self->out;
	uint32_t available = ring_used(self, in, out);
	while (available && PyList_GET_SIZE(packets) < limit) {
		PyObject *packet = read_packet(self, &out, &available);
		if (!packet || PyList_Append(packets, packet) < 0) {
			Py_XDECREF(packet);
			Py_DECREF(packets);
			return NULL;
		}
		Py_DECREF(packet);
	}
	bool signal = out != self->out && publish_out(self, out);
	return Py_BuildValue("NN", packets, PyBool_FromLong(signal));
}

static PyObject *ring_mask(RingObject *self, PyObject *arg)
{
	int masked = PyObject_IsTrue(arg);
	if (masked < 0)
		return NULL;
	atomic_store(&self->control->interrupt_mask, masked);
	// The writer publishes, then looks at the mask.
	atomic_thread_fence(memory_order_seq_cst);
	uint32_t in;
	if (!load_index(self, &self->control->in, "write", &in))
		return NULL;
	return PyBool_FromLong(in != self->out);
}

// The host as writer ---------------------------------------------------------------------------------

struct outgoing_packet {
	struct descriptor descriptor;
	Py_buffer extra;
	Py_buffer payload;
	uint32_t padding;
	uint32_t total;
};

static void outgoing_packet_deinit(struct outgoing_packet *packet)
{
	PyBuffer_Release(&packet->extra);
	PyBuffer_Release(&packet->payload);
}

static bool outgoing_packet_init(struct outgoing_packet *packet, const RingObject *self, PyObject *tuple)
{
	unsigned long long transaction_id;
	unsigned short type, flags;
	if (!PyTuple_Check(tuple)) {
		PyErr_SetString(PyExc_TypeError, "a packet is a tuple");
		return false;
	}
	if (!PyArg_ParseTuple(tuple, "HHKy*y*:packet", &type, &flags, &transaction_id, &packet->extra,
			      &packet->payload))
		return false;
	uint64_t header = DESCRIPTOR_SIZE + (uint64_t)packet->extra.len;
	uint64_t length = (header + (uint64_t)packet->payload.len + 7) & ~7ULL;
	if (header % 8 || length / 8 > UINT16_MAX || length + FOOTER_SIZE > self->size - RESERVED) {
		PyErr_Format(PyExc_ValueError, "packet with %zd + %zd bytes does not fit a ring of %u bytes",
			     packet->extra.len, packet->payload.len, self->size);
		outgoing_packet_deinit(packet);
		return false;
	}
	packet->padding = (uint32_t)(length - header - (uint64_t)packet->payload.len);
	packet->total = (uint32_t)length + FOOTER_SIZE;
	packet->descriptor = (struct descriptor){
		.type = type,
		.offset8 = (uint16_t)(header / 8),
		.length8 = (uint16_t)(length / 8),
		.flags = flags,
		.transaction_id = transaction_id,
	};
	return true;
}

static uint32_t write_packet(const RingObject *self, uint32_t start, const struct outgoing_packet *packet)
{
	static const uint8_t zeros[8];
	uint32_t footer[2] = {0, start};
	uint32_t in = ring_copy_in(self, start, &packet->descriptor, DESCRIPTOR_SIZE);
	in = ring_copy_in(self, in, packet->extra.buf, (uint32_t)packet->extra.len);
	in = ring_copy_in(self, in, packet->payload.buf, (uint32_t)packet->payload.len);
	in = ring_copy_in(self, in, zeros, packet->padding);
	return ring_copy_in(self, in, footer, FOOTER_SIZE);
}

// Publishes our write index; returns whether the reader may be asleep.
static bool publish_in(RingObject *self, uint32_t in)
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

static PyObject *ring_write(RingObject *self, PyObject *arg)
{
	uint32_t out;
	if (!load_index(self, &self->control->out, "read", &out))
		return NULL;
	PyObject *fast = PySequence_Fast(arg, "write needs a sequence of packets");
	if (!fast)
		return NULL;
	uint32_t in = self->in;
	uint32_t free = ring_free(self, in, out);
	Py_ssize_t written = 0;
	for (; written < PySequence_Fast_GET_SIZE(fast); written++) {
		struct outgoing_packet packet;
		if (!outgoing_packet_init(&packet, self, PySequence_Fast_GET_ITEM(fast, written))) {
			Py_DECREF(fast);
			return NULL;
		}
		bool fits = packet.total <= free;
		if (fits) {
			in = write_packet(self, in, &packet);
			free -= packet.total;
		}
		outgoing_packet_deinit(&packet);
		if (!fits)
			break;
	}
	Py_DECREF(fast);
	bool signal = written && publish_in(self, in);
	return Py_BuildValue("nN", written, PyBool_FromLong(signal));
}

static PyObject *ring_await_space(RingObject *self, PyObject *arg)
{
	unsigned long needed = PyLong_AsUnsignedLong(arg);
	if (needed == (unsigned long)-1 && PyErr_Occurred())
		return NULL;
	if (needed > self->size - RESERVED)
		return PyErr_Format(PyExc_ValueError, "a ring of %u bytes never has %lu free", self->size, needed);
	atomic_store(&self->control->pending_send_size, (uint32_t)needed);
	atomic_thread_fence(memory_order_seq_cst);
	uint32_t out;
	if (!load_index(self, &self->control->out, "read", &out))
		return NULL;
	return PyBool_FromLong(ring_free(self, self->in, out) >= needed);
}

static PyObject *ring_inspect(RingObject *self, PyObject *Py_UNUSED(ignored))
{
	uint32_t in = atomic_load(&self->control->in);
	uint32_t out = atomic_load(&self->control->out);
	bool valid = index_valid(self, in) && index_valid(self, out);
	return Py_BuildValue("{sI sI sI sI sI sI}", "in", in, "out", out, "mask",
			     atomic_load(&self->control->interrupt_mask), "pending_send_size",
			     atomic_load(&self->control->pending_send_size), "size", self->size, "free",
			     valid ? ring_free(self, in, out) : 0);
}

static PyObject *ring_get_size(RingObject *self, void *Py_UNUSED(closure))
{
	return PyLong_FromUnsignedLong(self->size);
}

static PyMethodDef ring_methods[] = {
	{"init_incoming", (PyCFunction)ring_init_incoming, METH_NOARGS, NULL},
	{"init_outgoing", (PyCFunction)ring_init_outgoing, METH_NOARGS, NULL},
	{"read", (PyCFunction)ring_read, METH_O, NULL},
	{"mask", (PyCFunction)ring_mask, METH_O, NULL},
	{"write", (PyCFunction)ring_write, METH_O, NULL},
	{"await_space", (PyCFunction)ring_await_space, METH_O, NULL},
	{"inspect", (PyCFunction)ring_inspect, METH_NOARGS, NULL},
	{0},
};

static PyGetSetDef ring_getset[] = {
	{"size", (getter)ring_get_size, NULL, NULL, NULL},
	{0},
};

PyTypeObject Ring_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvmm.core._hot.Ring",
	.tp_basicsize = sizeof(RingObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = ring_new,
	.tp_dealloc = (destructor)ring_dealloc,
	.tp_methods = ring_methods,
	.tp_getset = ring_getset,
};
