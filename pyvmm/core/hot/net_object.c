// A channel's queue of a synthetic NIC as Python sees it.

#include "net.h"

#include <errno.h>
#include <structmember.h>
#include <sys/epoll.h>
#include <unistd.h>

static PyObject *queue_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	PyObject *device, *memory, *incoming, *outgoing;
	unsigned index;
	int doorbell, error;
	if (kwargs && PyDict_GET_SIZE(kwargs)) {
		PyErr_SetString(PyExc_TypeError, "NetQueue takes no keyword arguments");
		return NULL;
	}
	if (!PyArg_ParseTuple(args, "O!IO!O!O!i:NetQueue", &NetDevice_Type, &device, &index, &Memory_Type, &memory,
			      &Ring_Type, &incoming, &Ring_Type, &outgoing, &doorbell))
		return NULL;
	if (index >= NET_QUEUES)
		return PyErr_Format(PyExc_ValueError, "there is no channel %u", index);
	NetQueueObject *self = (NetQueueObject *)type->tp_alloc(type, 0);
	if (!self)
		return NULL;
	visit_init(&self->lock);
	self->device = (NetDeviceObject *)Py_NewRef(device);
	self->index = index;
	self->incoming = (RingObject *)Py_NewRef(incoming);
	self->outgoing = (RingObject *)Py_NewRef(outgoing);
	self->doorbell = doorbell;
	self->watched = -1;
	self->event = epoll_create1(EPOLL_CLOEXEC);
	error = self->event < 0 ? errno : 0;
	if (!error) {
		Py_BEGIN_ALLOW_THREADS
		error = net_device_attach(self->device, self);
		Py_END_ALLOW_THREADS
	}
	if (!error)
		return (PyObject *)self;
	Py_DECREF(self);
	errno = error;
	return PyErr_SetFromErrno(PyExc_OSError);
}

static void queue_dealloc(NetQueueObject *self)
{
	Py_BEGIN_ALLOW_THREADS
	net_device_detach(self->device, self);
	if (self->event >= 0)
		close(self->event);
	Py_END_ALLOW_THREADS
	Py_XDECREF(self->target.synic);
	Py_DECREF(self->incoming);
	Py_DECREF(self->outgoing);
	Py_DECREF(self->device);
	visit_destroy(&self->lock);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

// Packets ------------------------------------------------------------------------------------------

struct packet {
	struct ring_descriptor descriptor;
	uint8_t message[NET_MESSAGE_MAX];
};

// What was not sent: completions, and one packet that tells of frames, which has an extra header.
struct unsent {
	unsigned count;
	struct packet packets[NET_BATCH + 1];
	uint32_t extra_size, message_size;
	uint8_t extra[8 + 8 * NET_MAX_RANGES];
};

// Forgets what was not sent. Called with the queue locked, so no Python object may be made: to make one may collect garbage,
// and another queue, which goes, waits for the locks of all.
static void take_unsent(NetQueueObject *self, struct unsent *unsent)
{
	unsent->count = self->done_count;
	unsent->extra_size = 0;
	unsent->message_size = self->device->message_size;
	for (unsigned i = 0; i < self->done_count; i++)
		net_completion_packet(self, &self->done[i], &unsent->packets[i].descriptor, unsent->packets[i].message);
	self->done_count = 0;
	// That of another queue is queue 0's work.
	if (!self->index && self->indication.count) {
		struct packet *last = &unsent->packets[unsent->count++];
		unsent->extra_size = net_indication_packet(self, &last->descriptor, unsent->extra, last->message);
		self->indication.count = self->indication.frames = 0;
		self->indication.control = false;
	}
}

static PyObject *unsent_list(const struct unsent *unsent)
{
	PyObject *result = PyList_New(0);
	for (unsigned i = 0; result && i < unsent->count; i++) {
		const struct packet *from = &unsent->packets[i];
		bool last = i + 1 == unsent->count;
		PyObject *packet = Py_BuildValue("iiKy#y#", (int)from->descriptor.type, (int)from->descriptor.flags,
						 (unsigned long long)from->descriptor.transaction_id,
						 (const char *)unsent->extra,
						 last ? (Py_ssize_t)unsent->extra_size : (Py_ssize_t)0,
						 (const char *)from->message, (Py_ssize_t)unsent->message_size);
		if (!packet || PyList_Append(result, packet) < 0)
			Py_CLEAR(result);
		Py_XDECREF(packet);
	}
	return result;
}

// Methods ------------------------------------------------------------------------------------------

static PyObject *queue_serve(NetQueueObject *self, PyObject *Py_UNUSED(ignored))
{
	struct net_outcome outcome = {0};
	struct unsent unsent;
	unsent.count = 0;
	Py_BEGIN_ALLOW_THREADS
	visit_lock_worker(&self->lock);
	net_queue_serve(self, &outcome);
	if (outcome.stuck)
		take_unsent(self, &unsent);
	visit_unlock_worker(&self->lock);
	Py_END_ALLOW_THREADS
	if (outcome.broken)
		return PyErr_Format(RingError, "%s", outcome.broken);
	bool signal = atomic_exchange(&self->owes_signal, false);
	if (signal)
		atomic_fetch_add_explicit(&self->signals, 1, memory_order_relaxed);
	return Py_BuildValue("NI[]NN", PyBool_FromLong(outcome.idle), outcome.slow, unsent_list(&unsent),
			     PyBool_FromLong(signal));
}

static PyObject *queue_quiesce(NetQueueObject *self, PyObject *Py_UNUSED(ignored))
{
	struct unsent unsent;
	Py_BEGIN_ALLOW_THREADS
	visit_lock(&self->lock);
	pthread_mutex_lock(&self->outgoing->write_lock);
	self->running = false;
	pthread_mutex_unlock(&self->outgoing->write_lock);
	take_unsent(self, &unsent);
	visit_unlock(&self->lock);
	Py_END_ALLOW_THREADS
	return Py_BuildValue("[]N", unsent_list(&unsent));
}

static PyObject *queue_set_target(NetQueueObject *self, PyObject *args)
{
	struct hot_target now, before;
	if (!hot_target_parse(args, &now))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	net_device_lock(self->device);
	before = self->target;
	self->target = now;
	net_device_unlock(self->device);
	Py_END_ALLOW_THREADS
	Py_XDECREF(before.synic);
	Py_RETURN_NONE;
}

static PyObject *queue_send_control(NetQueueObject *self, PyObject *args)
{
	const char *message;
	Py_ssize_t size;
	if (!PyArg_ParseTuple(args, "y#:send_control", &message, &size))
		return NULL;
	bool sent = net_controls_add(self->device, message, size);
	if (sent) {
		Py_BEGIN_ALLOW_THREADS
		net_device_kick(self->device);
		Py_END_ALLOW_THREADS
	}
	return PyBool_FromLong(sent);
}

static PyObject *queue_inspect(NetQueueObject *self, PyObject *Py_UNUSED(ignored))
{
	return Py_BuildValue("{sK sK sK}", "packets_in", (unsigned long long)atomic_load(&self->packets_in),
			     "packets_out", (unsigned long long)atomic_load(&self->packets_out), "signals",
			     (unsigned long long)atomic_load(&self->signals));
}

static PyObject *queue_get_name(NetQueueObject *Py_UNUSED(self), void *Py_UNUSED(closure))
{
	return PyUnicode_FromString("direct");
}

static PyMethodDef queue_methods[] = {
	{"serve", (PyCFunction)queue_serve, METH_NOARGS, NULL},
	{"quiesce", (PyCFunction)queue_quiesce, METH_NOARGS, NULL},
	{"set_target", (PyCFunction)queue_set_target, METH_VARARGS, NULL},
	{"send_control", (PyCFunction)queue_send_control, METH_VARARGS, NULL},
	{"inspect", (PyCFunction)queue_inspect, METH_NOARGS, NULL},
	{0},
};

static PyMemberDef queue_members[] = {
	{"event", T_INT, offsetof(NetQueueObject, event), READONLY, NULL},
	{0},
};

static PyGetSetDef queue_getset[] = {
	{"name", (getter)queue_get_name, NULL, NULL, NULL},
	{0},
};

PyTypeObject NetQueue_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvmm.core._hot.NetQueue",
	.tp_basicsize = sizeof(NetQueueObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = queue_new,
	.tp_dealloc = (destructor)queue_dealloc,
	.tp_methods = queue_methods,
	.tp_members = queue_members,
	.tp_getset = queue_getset,
};
