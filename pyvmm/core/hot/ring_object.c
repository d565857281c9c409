// One direction of a VMBus channel as Python sees it.

#include "ring.h"

#include <string.h>

enum {
	MAX_PAGES = 1 << 16,
	FEATURE_PENDING_SEND_SIZE = 1,
};

// Reads an index of the other side, once. Raises RingError if it is none.
static bool load_index(const RingObject *self, _Atomic uint32_t *index, const char *name, uint32_t *ret)
{
	if (ring_load_index(self, index, ret))
		return true;
	PyErr_Format(RingError, "%s index %u is not an offset in a ring of %u bytes", name, *ret, self->size);
	return false;
}

// Life ---------------------------------------------------------------------------------------------

static void ring_dealloc(RingObject *self)
{
	pthread_mutex_destroy(&self->write_lock);
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
	pthread_mutex_init(&self->write_lock, NULL);
	self->memory = (MemoryObject *)Py_NewRef(memory);
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

// Copies one packet at `*offset` out, of which at most `*available` bytes are in the ring.
static PyObject *read_packet(const RingObject *self, uint32_t *offset, uint32_t *available)
{
	struct ring_packet packet;
	if (*available < RING_DESCRIPTOR_SIZE + RING_FOOTER_SIZE)
		return PyErr_Format(RingError, "%u bytes in the ring are too few for a packet", *available);
	if (!ring_peek(self, *offset, *available, &packet)) {
		if (packet.descriptor.flags & ~RING_FLAG_COMPLETION_REQUESTED)
			return PyErr_Format(RingError, "packet with unknown flags 0x%x", packet.descriptor.flags);
		return PyErr_Format(RingError, "packet of %u bytes with its data at %u, of %u bytes in the ring",
				    packet.length, packet.header, *available);
	}
	PyObject *extra = PyBytes_FromStringAndSize(NULL, packet.header - RING_DESCRIPTOR_SIZE);
	PyObject *payload = PyBytes_FromStringAndSize(NULL, packet.length - packet.header);
	if (!extra || !payload) {
		Py_XDECREF(extra);
		Py_XDECREF(payload);
		return NULL;
	}
	uint32_t next = ring_advance(self, *offset, RING_DESCRIPTOR_SIZE);
	next = ring_copy_out(self, next, PyBytes_AS_STRING(extra), packet.header - RING_DESCRIPTOR_SIZE);
	next = ring_copy_out(self, next, PyBytes_AS_STRING(payload), packet.length - packet.header);
	*offset = ring_advance(self, next, RING_FOOTER_SIZE);
	*available -= packet.length + RING_FOOTER_SIZE;
	return Py_BuildValue("iiKNN", (int)packet.descriptor.type, (int)packet.descriptor.flags,
			     (unsigned long long)packet.descriptor.transaction_id, extra, payload);
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
	bool signal = out != self->out && ring_publish_out(self, out);
	return Py_BuildValue("NN", packets, PyBool_FromLong(signal));
}

static PyObject *ring_mask(RingObject *self, PyObject *arg)
{
	int masked = PyObject_IsTrue(arg);
	if (masked < 0)
		return NULL;
	ring_set_mask(self, masked);
	uint32_t in;
	if (!load_index(self, &self->control->in, "write", &in))
		return NULL;
	return PyBool_FromLong(in != self->out);
}

// The host as writer ---------------------------------------------------------------------------------

// Whoever waits for the lock must not hold the GIL, which its holder may be waiting for.
static void lock_writer(RingObject *self)
{
	if (pthread_mutex_trylock(&self->write_lock) == 0)
		return;
	Py_BEGIN_ALLOW_THREADS
	pthread_mutex_lock(&self->write_lock);
	Py_END_ALLOW_THREADS
}

struct outgoing_packet {
	struct ring_descriptor descriptor;
	Py_buffer extra;
	Py_buffer payload;
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
	uint64_t header = RING_DESCRIPTOR_SIZE + (uint64_t)packet->extra.len;
	uint64_t length = (header + (uint64_t)packet->payload.len + 7) & ~7ULL;
	if (header % 8 || length / 8 > UINT16_MAX || length + RING_FOOTER_SIZE > self->size - RING_RESERVED) {
		PyErr_Format(PyExc_ValueError, "packet with %zd + %zd bytes does not fit a ring of %u bytes",
			     packet->extra.len, packet->payload.len, self->size);
		outgoing_packet_deinit(packet);
		return false;
	}
	packet->descriptor = (struct ring_descriptor){
		.type = type,
		.offset8 = (uint16_t)(header / 8),
		.length8 = (uint16_t)(length / 8),
		.flags = flags,
		.transaction_id = transaction_id,
	};
	return true;
}

// Writes what fits. Returns how many packets, or -1 with an exception set; nothing is published then.
static Py_ssize_t write_packets(RingObject *self, PyObject *fast, bool *signal)
{
	uint32_t out;
	if (!load_index(self, &self->control->out, "read", &out))
		return -1;
	uint32_t in = self->in;
	uint32_t free = ring_free(self, in, out);
	Py_ssize_t written = 0;
	for (; written < PySequence_Fast_GET_SIZE(fast); written++) {
		struct outgoing_packet packet;
		if (!outgoing_packet_init(&packet, self, PySequence_Fast_GET_ITEM(fast, written)))
			return -1;
		uint32_t total = packet.descriptor.length8 * 8U + RING_FOOTER_SIZE;
		bool fits = total <= free;
		if (fits) {
			in = ring_put(self, in, &packet.descriptor, packet.extra.buf, packet.payload.buf,
				      (uint32_t)packet.payload.len);
			free -= total;
		}
		outgoing_packet_deinit(&packet);
		if (!fits)
			break;
	}
	*signal = written && ring_publish_in(self, in);
	return written;
}

static PyObject *ring_write(RingObject *self, PyObject *arg)
{
	PyObject *fast = PySequence_Fast(arg, "write needs a sequence of packets");
	if (!fast)
		return NULL;
	bool signal = false;
	lock_writer(self);
	Py_ssize_t written = write_packets(self, fast, &signal);
	pthread_mutex_unlock(&self->write_lock);
	Py_DECREF(fast);
	return written < 0 ? NULL : Py_BuildValue("nN", written, PyBool_FromLong(signal));
}

static PyObject *ring_await_space(RingObject *self, PyObject *arg)
{
	unsigned long needed = PyLong_AsUnsignedLong(arg);
	if (needed == (unsigned long)-1 && PyErr_Occurred())
		return NULL;
	if (needed > self->size - RING_RESERVED)
		return PyErr_Format(PyExc_ValueError, "a ring of %u bytes never has %lu free", self->size, needed);
	atomic_store(&self->control->pending_send_size, (uint32_t)needed);
	atomic_thread_fence(memory_order_seq_cst);
	uint32_t out;
	if (!load_index(self, &self->control->out, "read", &out))
		return NULL;
	lock_writer(self);
	uint32_t in = self->in;
	pthread_mutex_unlock(&self->write_lock);
	return PyBool_FromLong(ring_free(self, in, out) >= needed);
}

static PyObject *ring_inspect(RingObject *self, PyObject *Py_UNUSED(ignored))
{
	uint32_t in, out;
	bool valid = ring_load_index(self, &self->control->in, &in);
	valid &= ring_load_index(self, &self->control->out, &out);
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
