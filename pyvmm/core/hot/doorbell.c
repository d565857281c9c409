// Event ports: connection id to eventfd. A VP rings one without the GIL.

#include "hot.h"

#include <errno.h>
#include <unistd.h>

enum { MAX_PORTS = 4096 };

struct port {
	uint32_t connection_id;
	int eventfd;
	_Atomic uint64_t signals;
};

struct DoorbellsObject {
	PyObject_HEAD
	pthread_rwlock_t lock; // held for reading while an eventfd is written, so that disconnect can wait for it
	unsigned count;
	struct port *ports[MAX_PORTS]; // sorted by connection id
};

static unsigned find(const DoorbellsObject *self, uint32_t connection_id)
{
	unsigned low = 0, high = self->count;
	while (low < high) {
		unsigned middle = (low + high) / 2;
		if (self->ports[middle]->connection_id < connection_id)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static struct port *lookup(const DoorbellsObject *self, uint32_t connection_id)
{
	unsigned position = find(self, connection_id);
	if (position < self->count && self->ports[position]->connection_id == connection_id)
		return self->ports[position];
	return NULL;
}

int hot_doorbells_signal(DoorbellsObject *self, uint32_t connection_id, uint32_t flag)
{
	int status = HV_STATUS_SUCCESS;
	pthread_rwlock_rdlock(&self->lock);
	struct port *port = lookup(self, connection_id);
	if (!port) {
		status = HV_STATUS_INVALID_CONNECTION_ID;
	} else if (flag) {
		status = HV_STATUS_INVALID_PARAMETER; // every port of ours has the one flag 0
	} else {
		uint64_t one = 1;
		atomic_fetch_add_explicit(&port->signals, 1, memory_order_relaxed);
		// EAGAIN means a full counter: the worker has been told.
		while (write(port->eventfd, &one, sizeof(one)) < 0 && errno == EINTR)
			;
	}
	pthread_rwlock_unlock(&self->lock);
	return status;
}

static PyObject *doorbells_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
	DoorbellsObject *self = (DoorbellsObject *)type->tp_alloc(type, 0);
	if (self) {
		// VPs that ring without a pause must not keep a connect or disconnect waiting for ever.
		pthread_rwlockattr_t attributes;
		pthread_rwlockattr_init(&attributes);
		pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
		pthread_rwlock_init(&self->lock, &attributes);
		pthread_rwlockattr_destroy(&attributes);
	}
	return (PyObject *)self;
}

static void doorbells_dealloc(DoorbellsObject *self)
{
	for (unsigned i = 0; i < self->count; i++)
		PyMem_RawFree(self->ports[i]);
	pthread_rwlock_destroy(&self->lock);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *doorbells_connect(DoorbellsObject *self, PyObject *args)
{
	unsigned connection_id;
	int eventfd;
	if (!PyArg_ParseTuple(args, "Ii:connect", &connection_id, &eventfd))
		return NULL;
	struct port *port = PyMem_RawCalloc(1, sizeof(*port));
	if (!port)
		return PyErr_NoMemory();
	port->connection_id = connection_id;
	port->eventfd = eventfd;
	PyObject *trouble = NULL;
	pthread_rwlock_wrlock(&self->lock);
	unsigned position = find(self, connection_id);
	if (lookup(self, connection_id)) {
		trouble = PyExc_ValueError;
	} else if (self->count == MAX_PORTS) {
		trouble = PyExc_RuntimeError;
	} else {
		memmove(&self->ports[position + 1], &self->ports[position],
			(self->count - position) * sizeof(self->ports[0]));
		self->ports[position] = port;
		self->count++;
	}
	pthread_rwlock_unlock(&self->lock);
	if (trouble) {
		PyMem_RawFree(port);
		PyErr_Format(trouble, "connection id 0x%x is taken, or there are %d already", connection_id, MAX_PORTS);
		return NULL;
	}
	Py_RETURN_NONE;
}

static PyObject *doorbells_disconnect(DoorbellsObject *self, PyObject *args)
{
	unsigned connection_id;
	if (!PyArg_ParseTuple(args, "I:disconnect", &connection_id))
		return NULL;
	pthread_rwlock_wrlock(&self->lock);
	struct port *port = lookup(self, connection_id);
	if (port) {
		unsigned position = find(self, connection_id);
		self->count--;
		memmove(&self->ports[position], &self->ports[position + 1],
			(self->count - position) * sizeof(self->ports[0]));
		PyMem_RawFree(port);
	}
	pthread_rwlock_unlock(&self->lock);
	Py_RETURN_NONE;
}

static PyObject *doorbells_signal(DoorbellsObject *self, PyObject *args)
{
	unsigned connection_id, flag;
	if (!PyArg_ParseTuple(args, "II:signal", &connection_id, &flag))
		return NULL;
	return PyLong_FromLong(hot_doorbells_signal(self, connection_id, flag));
}

static PyObject *doorbells_inspect(DoorbellsObject *self, PyObject *Py_UNUSED(ignored))
{
	struct {
		uint32_t connection_id;
		uint64_t signals;
	} *ports = PyMem_RawMalloc(MAX_PORTS * sizeof(*ports));
	if (!ports)
		return PyErr_NoMemory();
	// A copy, because the lock's holder must not wait for the GIL, as making objects may.
	pthread_rwlock_rdlock(&self->lock);
	unsigned count = self->count;
	for (unsigned i = 0; i < count; i++) {
		ports[i].connection_id = self->ports[i]->connection_id;
		ports[i].signals = atomic_load_explicit(&self->ports[i]->signals, memory_order_relaxed);
	}
	pthread_rwlock_unlock(&self->lock);
	PyObject *result = PyDict_New();
	for (unsigned i = 0; result && i < count; i++) {
		PyObject *key = PyLong_FromUnsignedLong(ports[i].connection_id);
		PyObject *value = PyLong_FromUnsignedLongLong(ports[i].signals);
		if (!key || !value || PyDict_SetItem(result, key, value) < 0)
			Py_CLEAR(result);
		Py_XDECREF(key);
		Py_XDECREF(value);
	}
	PyMem_RawFree(ports);
	return result;
}

static PyMethodDef doorbells_methods[] = {
	{"connect", (PyCFunction)doorbells_connect, METH_VARARGS, NULL},
	{"disconnect", (PyCFunction)doorbells_disconnect, METH_VARARGS, NULL},
	{"signal", (PyCFunction)doorbells_signal, METH_VARARGS, NULL},
	{"inspect", (PyCFunction)doorbells_inspect, METH_NOARGS, NULL},
	{0},
};

PyTypeObject Doorbells_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvmm.core._hot.Doorbells",
	.tp_basicsize = sizeof(DoorbellsObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = doorbells_new,
	.tp_dealloc = (destructor)doorbells_dealloc,
	.tp_methods = doorbells_methods,
};
