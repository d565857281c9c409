// A storage channel's queue as Python sees it.

#include "storage.h"

#include <stdlib.h>
#include <structmember.h>

static PyObject *queue_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"memory", "incoming", "outgoing", "doorbell", "io_uring", NULL};
	PyObject *memory, *incoming, *outgoing;
	int doorbell, io_uring = 1;
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!O!i|$p:StorageQueue", names, &Memory_Type, &memory, &Ring_Type,
					 &incoming, &Ring_Type, &outgoing, &doorbell, &io_uring))
		return NULL;
	StorageQueueObject *self = (StorageQueueObject *)type->tp_alloc(type, 0);
	if (!self)
		return NULL;
	visit_init(&self->lock);
	self->memory = (MemoryObject *)Py_NewRef(memory);
	self->incoming = (RingObject *)Py_NewRef(incoming);
	self->outgoing = (RingObject *)Py_NewRef(outgoing);
	self->doorbell = doorbell;
	self->uring.fd = -1;
	// Large, so from the kernel, and slots are used from the first one on: what few requests never reach stays untouched.
	self->slots = calloc(STORAGE_SLOTS, sizeof(*self->slots));
	if (!self->slots) {
		Py_DECREF(self);
		return PyErr_NoMemory();
	}
	for (unsigned i = STORAGE_SLOTS; i--;)
		storage_release(self, (uint16_t)i);
	if (io_uring)
		uring_init(&self->uring, STORAGE_SLOTS * DISK_PARTS, doorbell);
	Py_BEGIN_ALLOW_THREADS
	storage_enlist(self);
	Py_END_ALLOW_THREADS
	return (PyObject *)self;
}

static void queue_dealloc(StorageQueueObject *self)
{
	Py_BEGIN_ALLOW_THREADS
	storage_delist(self);
	storage_finish(self, NULL);
	uring_deinit(&self->uring);
	Py_END_ALLOW_THREADS
	for (unsigned i = 0; i < STORAGE_LUNS; i++)
		Py_XDECREF(self->disks[i]);
	Py_XDECREF(self->target.synic);
	Py_DECREF(self->incoming);
	Py_DECREF(self->outgoing);
	Py_DECREF(self->memory);
	free(self->slots);
	visit_destroy(&self->lock);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

// Packets ------------------------------------------------------------------------------------------

static PyObject *request_packet(const struct storage_request *request)
{
	const struct ring_packet *head = &request->head;
	const char *payload = (const char *)request->packet + (head->header - RING_DESCRIPTOR_SIZE);
	return Py_BuildValue("iiKy#y#", (int)head->descriptor.type, (int)head->descriptor.flags,
			     (unsigned long long)head->descriptor.transaction_id, (const char *)request->packet,
			     (Py_ssize_t)(head->header - RING_DESCRIPTOR_SIZE), payload,
			     (Py_ssize_t)(head->length - head->header));
}

static PyObject *answer_packet(const struct storage_request *request)
{
	struct ring_descriptor descriptor;
	uint8_t payload[64];
	storage_answer(request, &descriptor, payload);
	return Py_BuildValue("iiKy#y#", (int)descriptor.type, (int)descriptor.flags,
			     (unsigned long long)descriptor.transaction_id, "", (Py_ssize_t)0, (const char *)payload,
			     (Py_ssize_t)request->answer);
}

// Empties a list of slots into a Python list of packets. Called with the queue locked, and with the GIL: whoever waits
// for the lock has not got that.
static PyObject *take_packets(StorageQueueObject *self, const uint16_t *slots, unsigned *count,
			      PyObject *(*packet_of)(const struct storage_request *))
{
	PyObject *result = PyList_New(0);
	for (unsigned i = 0; i < *count; i++) {
		PyObject *packet = result ? packet_of(&self->slots[slots[i]]) : NULL;
		if (!packet || PyList_Append(result, packet) < 0)
			Py_CLEAR(result);
		Py_XDECREF(packet);
		storage_release(self, slots[i]);
	}
	*count = 0;
	return result;
}

// Methods ------------------------------------------------------------------------------------------

static PyObject *queue_serve(StorageQueueObject *self, PyObject *Py_UNUSED(ignored))
{
	struct storage_outcome outcome = {0};
	Py_BEGIN_ALLOW_THREADS
	visit_lock_worker(&self->lock);
	storage_serve(self, &outcome);
	Py_END_ALLOW_THREADS
	unsigned none = 0;
	PyObject *failed = take_packets(self, self->failed, &self->failed_count, request_packet);
	PyObject *unsent = take_packets(self, self->done, outcome.stuck ? &self->done_count : &none, answer_packet);
	visit_unlock_worker(&self->lock);
	if (!failed || !unsent) {
		Py_XDECREF(failed);
		Py_XDECREF(unsent);
		return NULL;
	}
	return Py_BuildValue("NINNN", PyBool_FromLong(outcome.idle), outcome.slow, failed, unsent,
			     PyBool_FromLong(outcome.signal));
}

static PyObject *queue_quiesce(StorageQueueObject *self, PyObject *Py_UNUSED(ignored))
{
	Py_BEGIN_ALLOW_THREADS
	visit_lock(&self->lock);
	storage_finish(self, NULL);
	Py_END_ALLOW_THREADS
	PyObject *failed = take_packets(self, self->failed, &self->failed_count, request_packet);
	PyObject *unsent = take_packets(self, self->done, &self->done_count, answer_packet);
	visit_unlock(&self->lock);
	if (!failed || !unsent) {
		Py_XDECREF(failed);
		Py_XDECREF(unsent);
		return NULL;
	}
	return Py_BuildValue("NN", failed, unsent);
}

static PyObject *queue_drain(StorageQueueObject *self, PyObject *Py_UNUSED(ignored))
{
	Py_BEGIN_ALLOW_THREADS
	visit_lock(&self->lock);
	storage_finish(self, NULL);
	visit_unlock(&self->lock);
	Py_END_ALLOW_THREADS
	Py_RETURN_NONE;
}

static PyObject *queue_set_disk(StorageQueueObject *self, PyObject *args)
{
	unsigned lun;
	PyObject *disk;
	if (!PyArg_ParseTuple(args, "IO:set_disk", &lun, &disk))
		return NULL;
	if (lun >= STORAGE_LUNS)
		return PyErr_Format(PyExc_ValueError, "there is no LUN %u", lun);
	if (disk != Py_None && !PyObject_TypeCheck(disk, &FastDisk_Type)) {
		PyErr_SetString(PyExc_TypeError, "set_disk takes a FastDisk or None");
		return NULL;
	}
	FastDiskObject *now = disk == Py_None ? NULL : (FastDiskObject *)Py_NewRef(disk), *before;
	Py_BEGIN_ALLOW_THREADS
	visit_lock(&self->lock);
	if (self->disks[lun])
		storage_finish(self, self->disks[lun]);
	before = self->disks[lun];
	self->disks[lun] = now;
	visit_unlock(&self->lock);
	Py_END_ALLOW_THREADS
	Py_XDECREF(before);
	Py_RETURN_NONE;
}

static PyObject *queue_set_target(StorageQueueObject *self, PyObject *args)
{
	struct hot_target now, before;
	if (!hot_target_parse(args, &now))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	visit_lock(&self->lock);
	before = self->target;
	self->target = now;
	visit_unlock(&self->lock);
	Py_END_ALLOW_THREADS
	Py_XDECREF(before.synic);
	Py_RETURN_NONE;
}

// Counters -----------------------------------------------------------------------------------------

static unsigned long long take_counter(_Atomic uint64_t *counter)
{
	return atomic_exchange(counter, 0);
}

static PyObject *take_kind(struct storage_counters *counters)
{
	PyObject *latency = PyList_New(STORAGE_BUCKETS);
	for (unsigned i = 0; latency && i < STORAGE_BUCKETS; i++) {
		PyObject *number = PyLong_FromUnsignedLongLong(take_counter(&counters->latency[i]));
		if (!number)
			Py_CLEAR(latency);
		else
			PyList_SET_ITEM(latency, i, number);
	}
	if (!latency)
		return NULL;
	return Py_BuildValue("KKN", take_counter(&counters->count), take_counter(&counters->bytes), latency);
}

static PyObject *queue_take_counters(StorageQueueObject *self, PyObject *args)
{
	unsigned lun;
	if (!PyArg_ParseTuple(args, "I:take_counters", &lun))
		return NULL;
	if (lun >= STORAGE_LUNS)
		return PyErr_Format(PyExc_ValueError, "there is no LUN %u", lun);
	struct storage_counters *counters = self->counters[lun];
	return Py_BuildValue("NNN", take_kind(&counters[STORAGE_READ]), take_kind(&counters[STORAGE_WRITE]),
			     take_kind(&counters[STORAGE_FLUSH]));
}

static PyObject *queue_inspect(StorageQueueObject *self, PyObject *Py_UNUSED(ignored))
{
	return Py_BuildValue("{sK sK sK}", "packets_in", (unsigned long long)atomic_load(&self->packets_in),
			     "packets_out", (unsigned long long)atomic_load(&self->packets_out), "signals",
			     (unsigned long long)atomic_load(&self->signals));
}

static PyObject *queue_get_io_uring(StorageQueueObject *self, void *Py_UNUSED(closure))
{
	return PyBool_FromLong(self->uring.fd >= 0);
}

static PyObject *queue_get_name(StorageQueueObject *self, void *Py_UNUSED(closure))
{
	return PyUnicode_FromString(self->uring.fd >= 0 ? "io_uring" : "synchronous");
}

static PyMethodDef queue_methods[] = {
	{"serve", (PyCFunction)queue_serve, METH_NOARGS, NULL},
	{"quiesce", (PyCFunction)queue_quiesce, METH_NOARGS, NULL},
	{"drain", (PyCFunction)queue_drain, METH_NOARGS, NULL},
	{"set_disk", (PyCFunction)queue_set_disk, METH_VARARGS, NULL},
	{"set_target", (PyCFunction)queue_set_target, METH_VARARGS, NULL},
	{"take_counters", (PyCFunction)queue_take_counters, METH_VARARGS, NULL},
	{"inspect", (PyCFunction)queue_inspect, METH_NOARGS, NULL},
	{0},
};

static PyMemberDef queue_members[] = {
	{"any_target", T_BOOL, offsetof(StorageQueueObject, any_target), 0, NULL},
	{0},
};

static PyGetSetDef queue_getset[] = {
	{"io_uring", (getter)queue_get_io_uring, NULL, NULL, NULL},
	{"name", (getter)queue_get_name, NULL, NULL, NULL},
	{0},
};

PyTypeObject StorageQueue_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvmm.core._hot.StorageQueue",
	.tp_basicsize = sizeof(StorageQueueObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = queue_new,
	.tp_dealloc = (destructor)queue_dealloc,
	.tp_methods = queue_methods,
	.tp_members = queue_members,
	.tp_getset = queue_getset,
};
