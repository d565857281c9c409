// What a synthetic NIC has counted, and what of it is saved; and the control messages that wait.

#include "net.h"

#include <stdlib.h>
#include <string.h>

// Control messages ---------------------------------------------------------------------------------

void net_controls_drop(NetDeviceObject *self)
{
	while (self->controls) {
		struct net_control *next = self->controls->next;
		free(self->controls);
		self->controls = next;
	}
	self->controls_end = &self->controls;
	self->controls_count = 0;
	atomic_store(&self->controls_wait, false);
}

bool net_controls_add(NetDeviceObject *self, const char *message, Py_ssize_t size)
{
	struct net_control *control = NULL;
	pthread_mutex_lock(&self->sections_lock);
	if (size > 0 && (size_t)size <= self->receive.section_size && self->controls_count < NET_CONTROLS)
		control = malloc(sizeof(*control) + (size_t)size);
	if (control) {
		control->next = NULL;
		control->size = (uint32_t)size;
		memcpy(control->message, message, (size_t)size);
		*self->controls_end = control;
		self->controls_end = &control->next;
		self->controls_count++;
		atomic_store(&self->controls_wait, true);
	}
	pthread_mutex_unlock(&self->sections_lock);
	return control;
}

// Counters -----------------------------------------------------------------------------------------

static const char *const COUNTERS[NET_COUNTERS] = {
	[NET_SENT_FRAMES] = "sent_frames",
	[NET_SENT_BYTES] = "sent_bytes",
	[NET_SENT_INVALID] = "sent_invalid",
	[NET_SENT_UNPLUGGED] = "sent_unplugged",
	[NET_SENT_ERRORS] = "sent_errors",
	[NET_RECEIVED_FRAMES] = "received_frames",
	[NET_RECEIVED_BYTES] = "received_bytes",
	[NET_RECEIVED_COALESCED] = "received_coalesced",
	[NET_RECEIVED_FILTERED] = "received_filtered",
	[NET_RECEIVED_RUNTS] = "received_runts",
	[NET_RECEIVED_OVERSIZED] = "received_oversized",
	[NET_RECEIVED_NO_ROOM] = "received_no_room",
	[NET_RECEIVED_ERRORS] = "received_errors",
};

PyObject *net_device_statistics(NetDeviceObject *self, PyObject *Py_UNUSED(ignored))
{
	PyObject *result = PyDict_New();
	for (unsigned i = 0; result && i < NET_COUNTERS; i++) {
		PyObject *value = PyLong_FromUnsignedLongLong(atomic_load(&self->counters[i]));
		if (!value || PyDict_SetItemString(result, COUNTERS[i], value) < 0)
			Py_CLEAR(result);
		Py_XDECREF(value);
	}
	return result;
}

// State --------------------------------------------------------------------------------------------

static PyObject *chain_list(const NetDeviceObject *self, uint32_t section)
{
	PyObject *list = PyList_New(0);
	for (bool last = false; list && !last; section = self->next[section]) {
		PyObject *number = PyLong_FromUnsignedLong(section);
		last = self->next[section] == section;
		if (!number || PyList_Append(list, number) < 0)
			Py_CLEAR(list);
		Py_XDECREF(number);
	}
	return list;
}

PyObject *net_device_save(NetDeviceObject *self, PyObject *Py_UNUSED(ignored))
{
	PyObject *held = PyList_New(0), *controls = PyList_New(0), *result = NULL;
	for (uint32_t i = 0; held && i < self->receive.sections; i++) {
		if (!self->owner[i])
			continue;
		PyObject *entry = Py_BuildValue("(iN)", self->owner[i] - 1, chain_list(self, i));
		if (!entry || PyList_Append(held, entry) < 0)
			Py_CLEAR(held);
		Py_XDECREF(entry);
	}
	for (const struct net_control *control = self->controls; controls && control; control = control->next) {
		PyObject *message = PyBytes_FromStringAndSize((const char *)control->message, control->size);
		if (!message || PyList_Append(controls, message) < 0)
			Py_CLEAR(controls);
		Py_XDECREF(message);
	}
	if (held && controls)
		result = Py_BuildValue("{sI sO sO}", "generation", self->generation, "held", held, "controls", controls);
	Py_XDECREF(held);
	Py_XDECREF(controls);
	return result;
}

// Makes a chain of free sections one that the guest holds. Returns false if there are none such.
static bool take_chain(NetDeviceObject *self, unsigned queue, PyObject *chain, bool *held)
{
	Py_ssize_t count = PyList_Check(chain) ? PyList_GET_SIZE(chain) : 0;
	uint32_t first = 0, before = 0;
	for (Py_ssize_t i = 0; i < count; i++) {
		unsigned long section = PyLong_AsUnsignedLong(PyList_GET_ITEM(chain, i));
		if (section >= self->receive.sections || held[section])
			return false;
		held[section] = true;
		if (i)
			self->next[before] = (uint32_t)section;
		else
			first = (uint32_t)section;
		before = (uint32_t)section;
		self->next[before] = before;
	}
	if (!count || queue >= NET_QUEUES)
		return false;
	self->owner[first] = (uint8_t)(queue + 1);
	return true;
}

static void keep_free(uint32_t *sections, uint32_t *count, const bool *held)
{
	uint32_t kept = 0;
	for (uint32_t i = 0; i < *count; i++)
		if (!held[sections[i]])
			sections[kept++] = sections[i];
	*count = kept;
}

PyObject *net_device_restore(NetDeviceObject *self, PyObject *state)
{
	PyObject *generation = PyDict_Check(state) ? PyDict_GetItemString(state, "generation") : NULL;
	PyObject *held = generation ? PyDict_GetItemString(state, "held") : NULL;
	PyObject *controls = held ? PyDict_GetItemString(state, "controls") : NULL;
	bool good = controls && PyLong_Check(generation) && PyList_Check(held) && PyList_Check(controls);
	bool *taken = calloc((size_t)self->receive.sections + 1, sizeof(*taken));
	if (!taken)
		return PyErr_NoMemory();
	for (Py_ssize_t i = 0; good && i < PyList_GET_SIZE(held); i++) {
		unsigned queue;
		PyObject *entry = PySequence_Tuple(PyList_GET_ITEM(held, i)), *chain;
		good = entry && PyArg_ParseTuple(entry, "IO", &queue, &chain) && take_chain(self, queue, chain, taken);
		Py_XDECREF(entry);
	}
	keep_free(self->free, &self->free_count, taken);
	keep_free(self->free_controls, &self->free_controls_count, taken);
	free(taken);
	for (Py_ssize_t i = 0; good && i < PyList_GET_SIZE(controls); i++) {
		PyObject *message = PyList_GET_ITEM(controls, i);
		good = PyBytes_Check(message) &&
		       net_controls_add(self, PyBytes_AS_STRING(message), PyBytes_GET_SIZE(message));
	}
	if (good)
		self->generation = (uint32_t)PyLong_AsUnsignedLong(generation);
	if (!good || PyErr_Occurred()) {
		PyErr_Clear();
		PyErr_SetString(PyExc_ValueError, "the saved state of a NIC's receive buffer is damaged");
		return NULL;
	}
	Py_RETURN_NONE;
}
