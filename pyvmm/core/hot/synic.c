// The synthetic interrupt controller of one VP: message slots, event flags and SINTs (TLFS v6.0b, chapter 11).
// Its four synthetic timers are in stimer.c.

#include "synic.h"

#include <errno.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum {
	MSR_SCONTROL = 0x40000080,
	MSR_SVERSION = 0x40000081,
	MSR_SIEFP = 0x40000082,
	MSR_SIMP = 0x40000083,
	MSR_EOM = 0x40000084,
	MSR_SINT0 = 0x40000090,
	MSR_STIMER0_CONFIG = 0x400000b0,

	SYNIC_VERSION = 1,
	FIRST_VALID_VECTOR = 16,
	MESSAGE_FLAG_PENDING = 1,
};

static const uint64_t PAGE_ENABLE = 1;
static const uint64_t PAGE_ADDRESS = ~0xfffull;
static const uint64_t SINT_MASKED = 1 << 16;
static const uint64_t SINT_POLLING = 1 << 18;
static const uint64_t SINT_PROXY = 1 << 20;

// struct hv_message_header of the TLFS. The type is last to be written and tells whether the slot is taken.
struct message_slot {
	_Atomic uint32_t type;
	uint8_t size;
	_Atomic uint8_t flags;
	uint16_t reserved;
	uint64_t sender;
	uint8_t payload[MESSAGE_PAYLOAD];
};
_Static_assert(sizeof(struct message_slot) == 256, "a message slot has 256 bytes");

void synic_interrupt(SynICObject *self, uint8_t vector)
{
	self->interrupts_raised++;
	if (self->vm_fd < 0) {
		if (self->kept_count < KEPT_INTERRUPTS)
			self->kept[self->kept_count++] = vector;
		return;
	}
	struct kvm_msi msi = {
		.address_lo = 0xfee00000u | self->apic_id << 12,
		.data = vector,
	};
	ioctl(self->vm_fd, KVM_SIGNAL_MSI, &msi);
}

static bool sint_open(const SynICObject *self, unsigned sint)
{
	return (self->scontrol & 1) && !(self->sint[sint] & (SINT_MASKED | SINT_PROXY));
}

enum delivery synic_deliver(SynICObject *self, unsigned sint, uint32_t type, uint64_t sender, const void *payload,
			    uint8_t size)
{
	if (!sint_open(self, sint) || !(self->simp & PAGE_ENABLE))
		return CLOSED;
	struct message_slot *slot = hot_memory_ptr(
		self->memory, (self->simp & PAGE_ADDRESS) + sint * sizeof(struct message_slot), sizeof(*slot), true);
	if (!slot)
		return CLOSED;
	if (atomic_load(&slot->type)) {
		// The guest reads the flag after it has cleared the type: set it, then look again.
		atomic_fetch_or(&slot->flags, MESSAGE_FLAG_PENDING);
		if (atomic_load(&slot->type))
			return BUSY;
	}
	memcpy(slot->payload, payload, size);
	slot->size = size;
	atomic_store_explicit(&slot->flags, 0, memory_order_relaxed);
	slot->reserved = 0;
	slot->sender = sender;
	atomic_store(&slot->type, type);
	if (!(self->sint[sint] & SINT_POLLING))
		synic_interrupt(self, (uint8_t)self->sint[sint]);
	self->messages_delivered++;
	return DELIVERED;
}

// Messages that wait for their slot ------------------------------------------------------------------

static void queue_drain(SynICObject *self, unsigned sint)
{
	struct message_queue *queue = self->queues[sint];
	while (queue && queue->count) {
		const struct queued_message *message = &queue->messages[queue->head];
		enum delivery delivery =
			synic_deliver(self, sint, message->type, 0, message->payload, message->size);
		if (delivery == BUSY)
			return;
		if (delivery == CLOSED)
			self->messages_dropped++;
		queue->head = (queue->head + 1) % QUEUE_LENGTH;
		queue->count--;
		if (queue->refused) {
			queue->refused = false;
			uint64_t one = 1;
			while (self->space_event >= 0 && write(self->space_event, &one, sizeof(one)) < 0 &&
			       errno == EINTR)
				;
		}
	}
}

bool synic_queue_waits(const SynICObject *self, unsigned sint)
{
	return self->queues[sint] && self->queues[sint]->count;
}

uint64_t hot_synic_scan(SynICObject *self, uint64_t now)
{
	pthread_mutex_lock(&self->lock);
	for (unsigned sint = 0; sint < SINT_COUNT; sint++)
		queue_drain(self, sint);
	uint64_t deadline = stimers_scan(self, now);
	pthread_mutex_unlock(&self->lock);
	return deadline;
}

static enum delivery enqueue(SynICObject *self, unsigned sint, uint32_t type, const void *payload, uint8_t size)
{
	struct message_queue *queue = self->queues[sint];
	if (!queue) {
		queue = self->queues[sint] = PyMem_RawCalloc(1, sizeof(*queue));
		if (!queue)
			return BUSY;
	}
	if (queue->count == QUEUE_LENGTH) {
		queue->refused = true;
		return BUSY;
	}
	struct queued_message *message = &queue->messages[(queue->head + queue->count) % QUEUE_LENGTH];
	message->type = type;
	message->size = size;
	memcpy(message->payload, payload, size);
	queue->count++;
	return DELIVERED;
}

// MSRs ---------------------------------------------------------------------------------------------

bool hot_synic_owns_msr(uint32_t index)
{
	return (index >= MSR_SCONTROL && index <= MSR_EOM) ||
	       (index >= MSR_SINT0 && index < MSR_SINT0 + SINT_COUNT) ||
	       (index >= MSR_STIMER0_CONFIG && index < MSR_STIMER0_CONFIG + 2 * STIMER_COUNT);
}

bool hot_synic_read_msr(SynICObject *self, uint32_t index, uint64_t *value)
{
	bool known = true;
	pthread_mutex_lock(&self->lock);
	switch (index) {
	case MSR_SCONTROL:
		*value = self->scontrol;
		break;
	case MSR_SVERSION:
		*value = SYNIC_VERSION;
		break;
	case MSR_SIEFP:
		*value = self->siefp;
		break;
	case MSR_SIMP:
		*value = self->simp;
		break;
	case MSR_EOM:
		*value = 0;
		break;
	default:
		if (index >= MSR_SINT0 && index < MSR_SINT0 + SINT_COUNT)
			*value = self->sint[index - MSR_SINT0];
		else if (index >= MSR_STIMER0_CONFIG && index < MSR_STIMER0_CONFIG + 2 * STIMER_COUNT)
			*value = stimer_read(self, index - MSR_STIMER0_CONFIG);
		else
			known = false;
	}
	pthread_mutex_unlock(&self->lock);
	return known;
}

// SIMP and SIEFP are overlay pages: a page that comes to stand somewhere is all zero, whatever was in RAM there.
// Stale bytes would look like an occupied slot.
static bool write_page_msr(SynICObject *self, uint64_t *msr, uint64_t value)
{
	if ((value & PAGE_ENABLE) && (value & (PAGE_ENABLE | PAGE_ADDRESS)) != (*msr & (PAGE_ENABLE | PAGE_ADDRESS))) {
		void *page = hot_memory_ptr(self->memory, value & PAGE_ADDRESS, HOT_PAGE_SIZE, true);
		if (!page)
			return false;
		memset(page, 0, HOT_PAGE_SIZE);
	}
	*msr = value;
	return true;
}

static bool write_sint(SynICObject *self, unsigned sint, uint64_t value)
{
	if (!(value & SINT_MASKED) && (value & 0xff) < FIRST_VALID_VECTOR)
		return false;
	self->sint[sint] = value;
	return true;
}

bool hot_synic_write_msr(SynICObject *self, uint32_t index, uint64_t value, uint64_t now)
{
	bool valid = true;
	pthread_mutex_lock(&self->lock);
	switch (index) {
	case MSR_SCONTROL:
		self->scontrol = value;
		break;
	case MSR_SIEFP:
		valid = write_page_msr(self, &self->siefp, value);
		break;
	case MSR_SIMP:
		valid = write_page_msr(self, &self->simp, value);
		break;
	case MSR_EOM: // the scan that follows every write delivers what waits
		break;
	default:
		if (index >= MSR_SINT0 && index < MSR_SINT0 + SINT_COUNT)
			valid = write_sint(self, index - MSR_SINT0, value);
		else if (index >= MSR_STIMER0_CONFIG && index < MSR_STIMER0_CONFIG + 2 * STIMER_COUNT)
			valid = stimer_write(self, index - MSR_STIMER0_CONFIG, value, now);
		else
			valid = false;
	}
	pthread_mutex_unlock(&self->lock);
	return valid;
}

// Any thread ---------------------------------------------------------------------------------------

static bool signal_event(SynICObject *self, unsigned sint, unsigned flag)
{
	bool open = false;
	pthread_mutex_lock(&self->lock);
	if (sint_open(self, sint) && (self->siefp & PAGE_ENABLE)) {
		uint64_t gpa = (self->siefp & PAGE_ADDRESS) + sint * (EVENT_FLAGS / 8) + flag / 32 * 4;
		_Atomic uint32_t *word = hot_memory_ptr(self->memory, gpa, sizeof(*word), true);
		if (word) {
			open = true;
			uint32_t bit = 1u << flag % 32;
			if (!(atomic_fetch_or(word, bit) & bit) && !(self->sint[sint] & SINT_POLLING))
				synic_interrupt(self, (uint8_t)self->sint[sint]);
		}
	}
	pthread_mutex_unlock(&self->lock);
	return open;
}

void hot_synic_attach(SynICObject *self, VpObject *vp)
{
	pthread_mutex_lock(&self->lock);
	self->vp = vp;
	pthread_mutex_unlock(&self->lock);
}

// Python -------------------------------------------------------------------------------------------

static void set_power_on_state(SynICObject *self)
{
	self->scontrol = self->siefp = self->simp = 0;
	for (unsigned i = 0; i < SINT_COUNT; i++) {
		self->sint[i] = SINT_MASKED;
		if (self->queues[i])
			self->queues[i]->head = self->queues[i]->count = 0;
	}
	memset(self->timers, 0, sizeof(self->timers));
}

static int synic_init(SynICObject *self, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
	PyObject *memory;
	int vm_fd;
	unsigned vp_index, apic_id;
	if (!PyArg_ParseTuple(args, "O!iII:SynIC", &Memory_Type, &memory, &vm_fd, &vp_index, &apic_id))
		return -1;
	if (self->memory) {
		PyErr_SetString(PyExc_RuntimeError, "a SynIC is initialised once");
		return -1;
	}
	self->memory = (MemoryObject *)Py_NewRef(memory);
	self->vm_fd = vm_fd;
	self->vp_index = vp_index;
	self->apic_id = apic_id;
	self->space_event = -1;
	pthread_mutex_init(&self->lock, NULL);
	set_power_on_state(self);
	return 0;
}

static void synic_dealloc(SynICObject *self)
{
	if (self->memory)
		pthread_mutex_destroy(&self->lock);
	for (unsigned i = 0; i < SINT_COUNT; i++)
		PyMem_RawFree(self->queues[i]);
	Py_XDECREF(self->memory);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *synic_set_space_event(SynICObject *self, PyObject *args)
{
	int eventfd;
	if (!PyArg_ParseTuple(args, "i:set_space_event", &eventfd))
		return NULL;
	pthread_mutex_lock(&self->lock);
	self->space_event = eventfd;
	pthread_mutex_unlock(&self->lock);
	Py_RETURN_NONE;
}

static PyObject *synic_read_msr(SynICObject *self, PyObject *args)
{
	unsigned index;
	uint64_t value;
	if (!PyArg_ParseTuple(args, "I:read_msr", &index))
		return NULL;
	if (!hot_synic_read_msr(self, index, &value))
		Py_RETURN_NONE;
	return PyLong_FromUnsignedLongLong(value);
}

static PyObject *synic_write_msr(SynICObject *self, PyObject *args)
{
	unsigned index;
	unsigned long long value, now;
	if (!PyArg_ParseTuple(args, "IKK:write_msr", &index, &value, &now))
		return NULL;
	return PyBool_FromLong(hot_synic_write_msr(self, index, value, now));
}

static bool check_sint(unsigned sint)
{
	if (sint >= SINT_COUNT)
		PyErr_Format(PyExc_ValueError, "there is no SINT %u", sint);
	return sint < SINT_COUNT;
}

static PyObject *synic_post(SynICObject *self, PyObject *args)
{
	unsigned sint, type;
	Py_buffer payload;
	if (!PyArg_ParseTuple(args, "IIy*:post", &sint, &type, &payload))
		return NULL;
	PyObject *result = NULL;
	if (!check_sint(sint))
		goto out;
	if (payload.len > MESSAGE_PAYLOAD || !type) {
		PyErr_SetString(PyExc_ValueError, "a message has a type and at most 240 bytes");
		goto out;
	}
	pthread_mutex_lock(&self->lock);
	enum delivery delivery = enqueue(self, sint, type, payload.buf, (uint8_t)payload.len);
	if (delivery == DELIVERED && self->vp)
		hot_vp_request_scan(self->vp);
	pthread_mutex_unlock(&self->lock);
	result = PyBool_FromLong(delivery == DELIVERED);
out:
	PyBuffer_Release(&payload);
	return result;
}

static PyObject *synic_signal_event(SynICObject *self, PyObject *args)
{
	unsigned sint, flag;
	if (!PyArg_ParseTuple(args, "II:signal_event", &sint, &flag) || !check_sint(sint))
		return NULL;
	if (flag >= EVENT_FLAGS) {
		PyErr_Format(PyExc_ValueError, "there is no event flag %u", flag);
		return NULL;
	}
	return PyBool_FromLong(signal_event(self, sint, flag));
}

static PyObject *synic_scan(SynICObject *self, PyObject *args)
{
	unsigned long long now;
	if (!PyArg_ParseTuple(args, "K:scan", &now))
		return NULL;
	return PyLong_FromUnsignedLongLong(hot_synic_scan(self, now));
}

static PyObject *synic_take_interrupts(SynICObject *self, PyObject *Py_UNUSED(ignored))
{
	uint8_t kept[KEPT_INTERRUPTS];
	pthread_mutex_lock(&self->lock);
	unsigned count = self->kept_count;
	memcpy(kept, self->kept, count);
	self->kept_count = 0;
	pthread_mutex_unlock(&self->lock);
	PyObject *list = PyList_New(count);
	for (unsigned i = 0; list && i < count; i++)
		PyList_SET_ITEM(list, i, PyLong_FromLong(kept[i])); // small integers are never made anew
	return list;
}

static PyObject *synic_reset(SynICObject *self, PyObject *Py_UNUSED(ignored))
{
	pthread_mutex_lock(&self->lock);
	set_power_on_state(self);
	pthread_mutex_unlock(&self->lock);
	Py_RETURN_NONE;
}

// A copy of all state, so that Python objects are only made without the lock: making one may run other threads.
struct snapshot {
	SynICObject synic;
	struct message_queue queues[SINT_COUNT];
};

static struct snapshot *take_snapshot(SynICObject *self)
{
	struct snapshot *snapshot = PyMem_RawCalloc(1, sizeof(*snapshot));
	if (!snapshot) {
		PyErr_NoMemory();
		return NULL;
	}
	pthread_mutex_lock(&self->lock);
	snapshot->synic = *self;
	for (unsigned i = 0; i < SINT_COUNT; i++) {
		if (self->queues[i])
			snapshot->queues[i] = *self->queues[i];
	}
	pthread_mutex_unlock(&self->lock);
	return snapshot;
}

static PyObject *sint_list(const struct snapshot *snapshot)
{
	PyObject *list = PyList_New(SINT_COUNT);
	for (unsigned i = 0; list && i < SINT_COUNT; i++) {
		PyObject *value = PyLong_FromUnsignedLongLong(snapshot->synic.sint[i]);
		if (!value)
			Py_CLEAR(list);
		else
			PyList_SET_ITEM(list, i, value);
	}
	return list;
}

static PyObject *waiting_messages(const struct snapshot *snapshot)
{
	PyObject *list = PyList_New(0);
	for (unsigned sint = 0; list && sint < SINT_COUNT; sint++) {
		const struct message_queue *queue = &snapshot->queues[sint];
		for (unsigned i = 0; list && i < queue->count; i++) {
			const struct queued_message *message = &queue->messages[(queue->head + i) % QUEUE_LENGTH];
			PyObject *entry = Py_BuildValue("[IIy#]", sint, message->type, message->payload,
							(Py_ssize_t)message->size);
			if (!entry || PyList_Append(list, entry) < 0)
				Py_CLEAR(list);
			Py_XDECREF(entry);
		}
	}
	return list;
}

static PyObject *synic_save(SynICObject *self, PyObject *Py_UNUSED(ignored))
{
	struct snapshot *snapshot = take_snapshot(self);
	if (!snapshot)
		return NULL;
	const SynICObject *synic = &snapshot->synic;
	PyObject *state = Py_BuildValue("{s:i,s:K,s:K,s:K,s:N,s:N,s:N}", "version", 1, "scontrol", synic->scontrol,
					"siefp", synic->siefp, "simp", synic->simp, "sint", sint_list(snapshot),
					"messages", waiting_messages(snapshot), "timers", stimers_save(synic->timers));
	PyMem_RawFree(snapshot);
	return state;
}

static bool parse_message(PyObject *entry, unsigned *sint, struct queued_message *message)
{
	Py_buffer payload;
	PyObject *fields = PySequence_Tuple(entry);
	bool valid = fields && PyArg_ParseTuple(fields, "IIy*", sint, &message->type, &payload);
	if (valid) {
		valid = *sint < SINT_COUNT && payload.len <= MESSAGE_PAYLOAD;
		if (valid) {
			message->size = (uint8_t)payload.len;
			memcpy(message->payload, payload.buf, message->size);
		}
		PyBuffer_Release(&payload);
	}
	Py_XDECREF(fields);
	return valid;
}

// `values` holds what `keys` names; the state is taken over only if all of it is valid.
static bool restore_values(SynICObject *self, PyObject *values)
{
	PyObject *sints, *messages, *timers;
	unsigned long long scontrol, siefp, simp;
	uint64_t sint[SINT_COUNT];
	struct stimer stimers[STIMER_COUNT];
	int version;
	if (!PyArg_ParseTuple(values, "iKKKO!O!O!", &version, &scontrol, &siefp, &simp, &PyList_Type, &sints,
			      &PyList_Type, &messages, &PyList_Type, &timers))
		return false;
	if (version != 1 || PyList_GET_SIZE(sints) != SINT_COUNT || !stimers_parse(timers, stimers))
		return false;
	for (unsigned i = 0; i < SINT_COUNT; i++)
		sint[i] = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(sints, i));
	if (PyErr_Occurred())
		return false;

	pthread_mutex_lock(&self->lock);
	set_power_on_state(self);
	self->scontrol = scontrol;
	self->siefp = siefp;
	self->simp = simp;
	memcpy(self->sint, sint, sizeof(sint));
	memcpy(self->timers, stimers, sizeof(stimers));
	pthread_mutex_unlock(&self->lock);

	for (Py_ssize_t i = 0; i < PyList_GET_SIZE(messages); i++) {
		unsigned target;
		struct queued_message message;
		if (!parse_message(PyList_GET_ITEM(messages, i), &target, &message))
			return false;
		pthread_mutex_lock(&self->lock);
		enum delivery delivery =
			enqueue(self, target, message.type, message.payload, message.size);
		pthread_mutex_unlock(&self->lock);
		if (delivery != DELIVERED)
			return false;
	}
	return true;
}

static PyObject *synic_restore(SynICObject *self, PyObject *args)
{
	static const char *const keys[] = {"version", "scontrol", "siefp", "simp", "sint", "messages", "timers"};
	PyObject *state;
	if (!PyArg_ParseTuple(args, "O!:restore", &PyDict_Type, &state))
		return NULL;
	PyObject *values = PyTuple_New(7);
	if (!values)
		return NULL;
	for (Py_ssize_t i = 0; i < 7; i++) {
		PyObject *value = PyDict_GetItemString(state, keys[i]);
		PyTuple_SET_ITEM(values, i, Py_NewRef(value ? value : Py_None));
	}
	bool valid = restore_values(self, values);
	Py_DECREF(values);
	if (!valid) {
		PyErr_Clear();
		PyErr_SetString(PyExc_ValueError, "saved SynIC state is not one of version 1");
		return NULL;
	}
	Py_RETURN_NONE;
}

static PyObject *synic_inspect(SynICObject *self, PyObject *Py_UNUSED(ignored))
{
	struct snapshot *snapshot = take_snapshot(self);
	if (!snapshot)
		return NULL;
	const SynICObject *synic = &snapshot->synic;
	unsigned queued = 0;
	for (unsigned i = 0; i < SINT_COUNT; i++)
		queued += snapshot->queues[i].count;
	PyObject *result =
		Py_BuildValue("{s:K,s:K,s:K,s:N,s:K,s:K,s:K,s:I,s:N}", "scontrol", synic->scontrol, "siefp",
			      synic->siefp, "simp", synic->simp, "sint", sint_list(snapshot), "messages_delivered",
			      synic->messages_delivered, "messages_dropped", synic->messages_dropped, "interrupts",
			      synic->interrupts_raised, "messages_queued", queued, "timers",
			      stimers_save(synic->timers));
	PyMem_RawFree(snapshot);
	return result;
}

static PyMethodDef synic_methods[] = {
	{"set_space_event", (PyCFunction)synic_set_space_event, METH_VARARGS, NULL},
	{"read_msr", (PyCFunction)synic_read_msr, METH_VARARGS, NULL},
	{"write_msr", (PyCFunction)synic_write_msr, METH_VARARGS, NULL},
	{"post", (PyCFunction)synic_post, METH_VARARGS, NULL},
	{"signal_event", (PyCFunction)synic_signal_event, METH_VARARGS, NULL},
	{"scan", (PyCFunction)synic_scan, METH_VARARGS, NULL},
	{"take_interrupts", (PyCFunction)synic_take_interrupts, METH_NOARGS, NULL},
	{"reset", (PyCFunction)synic_reset, METH_NOARGS, NULL},
	{"save", (PyCFunction)synic_save, METH_NOARGS, NULL},
	{"restore", (PyCFunction)synic_restore, METH_VARARGS, NULL},
	{"inspect", (PyCFunction)synic_inspect, METH_NOARGS, NULL},
	{0},
};

PyTypeObject SynIC_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvmm.core._hot.SynIC",
	.tp_basicsize = sizeof(SynICObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = PyType_GenericNew,
	.tp_init = (initproc)synic_init,
	.tp_dealloc = (destructor)synic_dealloc,
	.tp_methods = synic_methods,
};
