// A synthetic NIC's device as Python sees it.

#include "net.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <structmember.h>
#include <sys/epoll.h>

enum {
	DEFAULT_FRAME_SIZE = 1514,
	MESSAGE_SIZE = 28,
};

// The lock -----------------------------------------------------------------------------------------

void net_device_lock(NetDeviceObject *device)
{
	pthread_mutex_lock(&device->lock);
	for (unsigned i = 0; i < NET_QUEUES; i++)
		if (device->queues[i])
			visit_lock(&device->queues[i]->lock);
}

void net_device_unlock(NetDeviceObject *device)
{
	for (unsigned i = 0; i < NET_QUEUES; i++) {
		NetQueueObject *queue = device->queues[i];
		if (queue) {
			if (queue->running)
				net_queue_kick(queue);
			visit_unlock(&queue->lock);
		}
	}
	pthread_mutex_unlock(&device->lock);
}

int net_device_attach(NetDeviceObject *device, NetQueueObject *queue)
{
	net_device_lock(device);
	NetQueueObject *before = device->queues[queue->index];
	visit_lock(&queue->lock);
	int error = net_queue_watch(queue, device->fd);
	if (!error) {
		if (before)
			before->attached = false;
		queue->attached = true;
		device->queues[queue->index] = queue;
	}
	if (error || before)
		visit_unlock(&(error ? queue : before)->lock);
	net_device_unlock(device);
	return error;
}

void net_device_detach(NetDeviceObject *device, NetQueueObject *queue)
{
	net_device_lock(device);
	if (queue->attached) {
		device->queues[queue->index] = NULL;
		visit_unlock(&queue->lock);
	}
	net_device_unlock(device);
}

void net_device_kick(NetDeviceObject *device)
{
	pthread_mutex_lock(&device->lock); // keeps the queue
	NetQueueObject *queue = device->queues[0];
	if (queue) {
		pthread_mutex_lock(&queue->outgoing->write_lock);
		if (queue->running)
			net_queue_kick(queue);
		pthread_mutex_unlock(&queue->outgoing->write_lock);
	}
	pthread_mutex_unlock(&device->lock);
}

// Around a change after which frames may be received that were not before.
static bool begin_change(NetDeviceObject *device)
{
	net_device_lock(device);
	return net_receiving(device);
}

static void end_change(NetDeviceObject *device, bool received)
{
	if (!received && net_receiving(device))
		net_receive_discard(device);
	net_device_unlock(device);
}

// Life ---------------------------------------------------------------------------------------------

static PyObject *device_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	PyObject *memory;
	if (kwargs && PyDict_GET_SIZE(kwargs)) {
		PyErr_SetString(PyExc_TypeError, "NetDevice takes no keyword arguments");
		return NULL;
	}
	if (!PyArg_ParseTuple(args, "O!:NetDevice", &Memory_Type, &memory))
		return NULL;
	NetDeviceObject *self = (NetDeviceObject *)type->tp_alloc(type, 0);
	if (!self)
		return NULL;
	pthread_mutex_init(&self->lock, NULL);
	pthread_mutex_init(&self->sections_lock, NULL);
	self->memory = (MemoryObject *)Py_NewRef(memory);
	self->fd = -1;
	self->frame_size = DEFAULT_FRAME_SIZE;
	self->message_size = MESSAGE_SIZE;
	self->controls_end = &self->controls;
	return (PyObject *)self;
}

static void free_sections(NetDeviceObject *self)
{
	free(self->free);
	free(self->next);
	free(self->owner);
	self->free = self->next = NULL;
	self->owner = NULL;
	self->free_count = self->free_controls_count = self->ready_count = 0;
	self->starved = false;
}

static void device_dealloc(NetDeviceObject *self)
{
	// Its queues are gone: each has a reference.
	net_controls_drop(self);
	free_sections(self);
	free(self->receive.pages);
	free(self->send.pages);
	Py_DECREF(self->memory);
	pthread_mutex_destroy(&self->sections_lock);
	pthread_mutex_destroy(&self->lock);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

// The port -----------------------------------------------------------------------------------------

static PyObject *device_set_port(NetDeviceObject *self, PyObject *args)
{
	int fd, error = 0;
	if (!PyArg_ParseTuple(args, "i:set_port", &fd))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	net_device_lock(self);
	for (unsigned i = 0; i < NET_QUEUES && !error; i++)
		if (self->queues[i])
			error = net_queue_watch(self->queues[i], fd);
	for (unsigned i = 0; i < NET_QUEUES && error; i++)
		if (self->queues[i])
			net_queue_watch(self->queues[i], -1);
	self->fd = error ? -1 : fd;
	self->lost = false;
	net_device_unlock(self);
	Py_END_ALLOW_THREADS
	if (error) {
		errno = error;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	Py_RETURN_NONE;
}

static PyObject *device_set_link(NetDeviceObject *self, PyObject *args)
{
	int up;
	if (!PyArg_ParseTuple(args, "p:set_link", &up))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	bool received = begin_change(self);
	self->link = up;
	end_change(self, received);
	Py_END_ALLOW_THREADS
	Py_RETURN_NONE;
}

// Buffers ------------------------------------------------------------------------------------------

// Makes the sections of a new receive buffer, all of them free. Returns false without memory.
static bool make_sections(NetDeviceObject *self)
{
	uint32_t count = self->receive.sections;
	self->generation++;
	if (!count)
		return true;
	self->free = calloc(count, sizeof(*self->free));
	self->next = calloc(count, sizeof(*self->next));
	self->owner = calloc(count, sizeof(*self->owner));
	if (!self->free || !self->next || !self->owner)
		return false;
	for (uint32_t i = count; i-- > NET_CONTROL_SECTIONS;)
		self->free[self->free_count++] = i;
	for (uint32_t i = NET_CONTROL_SECTIONS; i--;)
		self->free_controls[self->free_controls_count++] = i;
	self->room = self->receive.section_size - NET_ROOM - NET_TAIL;
	return true;
}

static void count_needed(NetDeviceObject *self)
{
	self->sections_needed = 1;
	if (self->offloads & (RECEIVE_RSC4 | RECEIVE_RSC6) && self->receive.sections) {
		uint32_t most = self->receive.sections - NET_CONTROL_SECTIONS;
		self->sections_needed = (NET_MAX_FRAME + self->room - 1) / self->room;
		if (self->sections_needed > most)
			self->sections_needed = most;
	}
}

static PyObject *device_set_receive_buffer(NetDeviceObject *self, PyObject *args)
{
	PyObject *runs;
	unsigned buffer_id = 0, section_size = 0;
	if (!PyArg_ParseTuple(args, "O|II:set_receive_buffer", &runs, &buffer_id, &section_size))
		return NULL;
	struct net_buffer buffer;
	bool good = net_buffer_find(self->memory, runs, section_size, true, &buffer);
	if (good && runs != Py_None && (section_size < NET_MIN_SECTION || buffer.sections <= NET_CONTROL_SECTIONS)) {
		PyErr_Format(PyExc_ValueError, "a receive buffer of %u sections of %u bytes is too small", buffer.sections,
			     section_size);
		good = false;
	}
	if (!good) {
		free(buffer.pages);
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS
	bool received = begin_change(self);
	pthread_mutex_lock(&self->sections_lock);
	free_sections(self);
	free(self->receive.pages);
	self->receive = buffer;
	self->buffer_id = (uint16_t)buffer_id;
	good = make_sections(self);
	if (!good) {
		free_sections(self);
		free(self->receive.pages);
		self->receive = (struct net_buffer){0};
	}
	net_controls_drop(self); // they may be longer than its sections
	count_needed(self);
	pthread_mutex_unlock(&self->sections_lock);
	end_change(self, received);
	Py_END_ALLOW_THREADS
	return good ? PyLong_FromUnsignedLong(buffer.sections) : PyErr_NoMemory();
}

static PyObject *device_set_send_buffer(NetDeviceObject *self, PyObject *args)
{
	PyObject *runs;
	unsigned section_size = 0;
	if (!PyArg_ParseTuple(args, "O|I:set_send_buffer", &runs, &section_size))
		return NULL;
	struct net_buffer buffer;
	if (!net_buffer_find(self->memory, runs, section_size, false, &buffer)) {
		free(buffer.pages);
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS
	net_device_lock(self);
	free(self->send.pages);
	self->send = buffer;
	net_device_unlock(self);
	Py_END_ALLOW_THREADS
	return PyLong_FromUnsignedLong(buffer.sections);
}

// What is received ---------------------------------------------------------------------------------

static bool take_mac(PyObject *from, uint8_t to[NET_MAC])
{
	if (!PyBytes_Check(from) || PyBytes_GET_SIZE(from) != NET_MAC) {
		PyErr_SetString(PyExc_ValueError, "a MAC address is six bytes");
		return false;
	}
	memcpy(to, PyBytes_AS_STRING(from), NET_MAC);
	return true;
}

static PyObject *device_set_filter(NetDeviceObject *self, PyObject *args)
{
	unsigned filter, count = 0;
	PyObject *mac, *multicast = NULL;
	uint8_t own[NET_MAC], groups[NET_GROUPS][NET_MAC];
	if (!PyArg_ParseTuple(args, "IO|O:set_filter", &filter, &mac, &multicast) || !take_mac(mac, own))
		return NULL;
	if (multicast) {
		PyObject *fast = PySequence_Fast(multicast, "groups are a sequence of addresses");
		if (!fast)
			return NULL;
		Py_ssize_t length = PySequence_Fast_GET_SIZE(fast);
		bool good = length <= NET_GROUPS;
		if (!good)
			PyErr_Format(PyExc_ValueError, "%zd groups are more than %d", length, NET_GROUPS);
		for (; good && count < length; count++)
			good = take_mac(PySequence_Fast_GET_ITEM(fast, count), groups[count]);
		Py_DECREF(fast);
		if (!good)
			return NULL;
	}
	Py_BEGIN_ALLOW_THREADS
	bool received = begin_change(self);
	self->filter = filter;
	memcpy(self->mac, own, NET_MAC);
	memcpy(self->groups, groups, count * sizeof(groups[0]));
	self->groups_count = count;
	end_change(self, received);
	Py_END_ALLOW_THREADS
	Py_RETURN_NONE;
}

static PyObject *device_set_frame_size(NetDeviceObject *self, PyObject *args)
{
	unsigned size;
	if (!PyArg_ParseTuple(args, "I:set_frame_size", &size))
		return NULL;
	if (size < NET_ETHERNET || size > NET_MAX_FRAME)
		return PyErr_Format(PyExc_ValueError, "frames of %u bytes", size);
	Py_BEGIN_ALLOW_THREADS
	net_device_lock(self);
	self->frame_size = size;
	net_device_unlock(self);
	Py_END_ALLOW_THREADS
	Py_RETURN_NONE;
}

static PyObject *device_set_offloads(NetDeviceObject *self, PyObject *args)
{
	unsigned receive;
	if (!PyArg_ParseTuple(args, "I:set_offloads", &receive))
		return NULL;
	if (receive & ~(unsigned)RECEIVE_ALL)
		return PyErr_Format(PyExc_ValueError, "there are no offloads 0x%x", receive);
	Py_BEGIN_ALLOW_THREADS
	net_device_lock(self);
	self->offloads = receive;
	count_needed(self);
	net_device_unlock(self);
	Py_END_ALLOW_THREADS
	Py_RETURN_NONE;
}

static PyObject *device_set_rss(NetDeviceObject *self, PyObject *args)
{
	const char *key;
	Py_ssize_t key_size;
	PyObject *table;
	unsigned hashes;
	uint8_t entries[NET_TABLE];
	if (!PyArg_ParseTuple(args, "y#OI:set_rss", &key, &key_size, &table, &hashes))
		return NULL;
	PyObject *fast = PySequence_Fast(table, "an indirection table is a sequence");
	if (!fast)
		return NULL;
	Py_ssize_t count = PySequence_Fast_GET_SIZE(fast);
	bool good = count <= NET_TABLE && (!count || key_size == NET_KEY);
	if (!good)
		PyErr_Format(PyExc_ValueError, "a key of %zd bytes and a table of %zd entries", key_size, count);
	for (Py_ssize_t i = 0; good && i < count; i++) {
		unsigned long index = PyLong_AsUnsignedLong(PySequence_Fast_GET_ITEM(fast, i));
		good = index < NET_QUEUES;
		if (!good && !PyErr_Occurred())
			PyErr_Format(PyExc_ValueError, "there is no channel %lu", index);
		entries[i] = (uint8_t)index;
	}
	Py_DECREF(fast);
	if (!good)
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	net_device_lock(self);
	if (count)
		net_hash_set_key(self, (const uint8_t *)key);
	memcpy(self->table, entries, (size_t)count);
	self->table_count = (unsigned)count;
	self->hashes = hashes;
	net_device_unlock(self);
	Py_END_ALLOW_THREADS
	Py_RETURN_NONE;
}

static PyMethodDef device_methods[] = {
	{"set_port", (PyCFunction)device_set_port, METH_VARARGS, NULL},
	{"set_link", (PyCFunction)device_set_link, METH_VARARGS, NULL},
	{"set_receive_buffer", (PyCFunction)device_set_receive_buffer, METH_VARARGS, NULL},
	{"set_send_buffer", (PyCFunction)device_set_send_buffer, METH_VARARGS, NULL},
	{"set_filter", (PyCFunction)device_set_filter, METH_VARARGS, NULL},
	{"set_frame_size", (PyCFunction)device_set_frame_size, METH_VARARGS, NULL},
	{"set_offloads", (PyCFunction)device_set_offloads, METH_VARARGS, NULL},
	{"set_rss", (PyCFunction)device_set_rss, METH_VARARGS, NULL},
	{"statistics", (PyCFunction)net_device_statistics, METH_NOARGS, NULL},
	{"save", (PyCFunction)net_device_save, METH_NOARGS, NULL},
	{"restore", (PyCFunction)net_device_restore, METH_O, NULL},
	{0},
};

static PyObject *device_get_message_size(NetDeviceObject *self, void *Py_UNUSED(closure))
{
	return PyLong_FromUnsignedLong(self->message_size);
}

static int device_set_message_size(NetDeviceObject *self, PyObject *value, void *Py_UNUSED(closure))
{
	unsigned long size = value ? PyLong_AsUnsignedLong(value) : 0;
	if (size < 16 || size > NET_MESSAGE_MAX) {
		if (!PyErr_Occurred())
			PyErr_Format(PyExc_ValueError, "NVSP messages of %lu bytes", size);
		return -1;
	}
	Py_BEGIN_ALLOW_THREADS
	net_device_lock(self);
	self->message_size = (unsigned)size;
	net_device_unlock(self);
	Py_END_ALLOW_THREADS
	return 0;
}

static PyGetSetDef device_getset[] = {
	{"message_size", (getter)device_get_message_size, (setter)device_set_message_size, NULL, NULL},
	{0},
};

PyTypeObject NetDevice_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvmm.core._hot.NetDevice",
	.tp_basicsize = sizeof(NetDeviceObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = device_new,
	.tp_dealloc = (destructor)device_dealloc,
	.tp_methods = device_methods,
	.tp_getset = device_getset,
};

bool hot_net_add_constants(PyObject *module)
{
	static const struct {
		const char *name;
		int value;
	} constants[] = {
		{"RECEIVE_TCP4", RECEIVE_TCP4}, {"RECEIVE_UDP4", RECEIVE_UDP4}, {"RECEIVE_TCP6", RECEIVE_TCP6},
		{"RECEIVE_UDP6", RECEIVE_UDP6}, {"RECEIVE_IP4", RECEIVE_IP4},   {"RECEIVE_RSC4", RECEIVE_RSC4},
		{"RECEIVE_RSC6", RECEIVE_RSC6}, {"RECEIVE_VLAN", RECEIVE_VLAN},
	};
	for (size_t i = 0; i < sizeof(constants) / sizeof(constants[0]); i++)
		if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value) < 0)
			return false;
	return true;
}
