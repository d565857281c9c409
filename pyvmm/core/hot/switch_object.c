// A switch as Python sees it.

#include "switch.h"

#include <errno.h>
#include <linux/if_packet.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

enum {
	MIN_MTU = 576,
	MAX_MTU = 65535,
	ENDED_AT_ONCE = 64,
};

#define FASTEST 100000000000 // bytes per second

static const char *const drop_names[DROPS] = {
	[DROP_MALFORMED] = "malformed",       [DROP_OVERSIZED] = "oversized",
	[DROP_LINK] = "link_down",            [DROP_VLAN] = "vlan",
	[DROP_SPOOFED] = "mac_spoofing",      [DROP_DHCP_GUARD] = "dhcp_guard",
	[DROP_ROUTER_GUARD] = "router_guard", [DROP_RESERVED] = "reserved",
	[DROP_QUEUE_FULL] = "queue_full",     [DROP_REFUSED] = "refused",
};

static bool make(SwitchObject *self)
{
	self->epoll = epoll_create1(EPOLL_CLOEXEC);
	self->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	self->buffers = malloc((size_t)SWITCH_BATCH * SWITCH_BUFFER);
	struct epoll_event event = {.events = EPOLLIN}; // without a port
	if (self->epoll < 0 || self->wake < 0 || !self->buffers ||
	    epoll_ctl(self->epoll, EPOLL_CTL_ADD, self->wake, &event) < 0 ||
	    getrandom(&self->secret, sizeof(self->secret), 0) != sizeof(self->secret))
		return false;
	self->secret |= 1;
	for (unsigned i = 0; i < SWITCH_BATCH; i++) {
		self->received_parts[i] = (struct iovec){self->buffers + (size_t)i * SWITCH_BUFFER, SWITCH_MESSAGE};
		self->received[i].msg_hdr = (struct msghdr){
			.msg_iov = &self->received_parts[i],
			.msg_iovlen = 1,
			.msg_control = self->control[i],
		};
	}
	return true;
}

static PyObject *switch_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"", "manual_time", "patient", NULL};
	unsigned mtu = 1500;
	int manual_time = 0, patient = 0;
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|I$pp:Switch", names, &mtu, &manual_time, &patient))
		return NULL;
	if (mtu < MIN_MTU || mtu > MAX_MTU)
		return PyErr_Format(PyExc_ValueError, "an MTU is %d to %d", MIN_MTU, MAX_MTU);
	SwitchObject *self = (SwitchObject *)type->tp_alloc(type, 0);
	if (!self)
		return NULL;
	visit_init(&self->lock);
	self->mtu = mtu;
	self->manual_time = manual_time;
	self->patient = patient;
	self->epoll = self->wake = -1;
	if (!make(self)) {
		PyErr_SetFromErrno(PyExc_OSError);
		Py_DECREF(self);
		return NULL;
	}
	return (PyObject *)self;
}

static void switch_dealloc(SwitchObject *self)
{
	while (self->count)
		port_remove(self, self->ports[0]);
	if (self->epoll >= 0)
		close(self->epoll);
	if (self->wake >= 0)
		close(self->wake);
	free(self->buffers);
	visit_destroy(&self->lock);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

// Visits -------------------------------------------------------------------------------------------

static void enter(SwitchObject *self)
{
	Py_BEGIN_ALLOW_THREADS
	visit_lock(&self->lock);
	Py_END_ALLOW_THREADS
	switch_look_at_clocks(self);
}

static void leave(SwitchObject *self)
{
	visit_unlock(&self->lock);
}

// NULL with the lock not held and KeyError set, or the port.
static struct switch_port *enter_port(SwitchObject *self, int number)
{
	enter(self);
	struct switch_port *port = port_find(self, number);
	if (port)
		return port;
	leave(self);
	PyErr_Format(PyExc_KeyError, "%d", number);
	return NULL;
}

// Settings -----------------------------------------------------------------------------------------

struct settings {
	int vlan, mac_spoofing, dhcp_guard, router_guard, link;
	uint64_t tagged[SWITCH_VLANS / 64];
	const uint8_t *mac;
	uint64_t rate;
};

static bool parse_tagged(PyObject *object, uint64_t *tagged)
{
	PyObject *list = PySequence_Fast(object, "tagged is a sequence of VLANs");
	for (Py_ssize_t i = 0; list && i < PySequence_Fast_GET_SIZE(list); i++) {
		long vlan = PyLong_AsLong(PySequence_Fast_GET_ITEM(list, i));
		if (vlan < 1 || vlan >= SWITCH_VLANS - 1) {
			if (!PyErr_Occurred())
				PyErr_Format(PyExc_ValueError, "there is no VLAN %ld", vlan);
			Py_CLEAR(list);
			break;
		}
		tagged[vlan / 64] |= 1ull << vlan % 64;
	}
	Py_XDECREF(list);
	return list;
}

static void set_port(SwitchObject *self, struct switch_port *port, const struct settings *settings)
{
	bool passes = port->vlan == settings->vlan && memcmp(port->tagged, settings->tagged, sizeof(port->tagged)) == 0 &&
		      settings->link;
	if (!passes) {
		port_drop_waiting(port);
		table_forget(self, port);
	}
	if (port->has_mac)
		fixed_remove(self, port);
	port->vlan = (uint16_t)settings->vlan;
	memcpy(port->tagged, settings->tagged, sizeof(port->tagged));
	port->has_mac = settings->mac;
	if (settings->mac) {
		memcpy(port->mac, settings->mac, SWITCH_MAC);
		fixed_add(self, port);
	}
	port->spoofing = settings->mac_spoofing;
	port->dhcp_guard = settings->dhcp_guard;
	port->router_guard = settings->router_guard;
	port->link = settings->link;
	if (port->in.rate != settings->rate) {
		uint64_t most = settings->rate * QUEUE_NS / 1000000000;
		port->in = port->out = (struct switch_limit){.rate = settings->rate};
		uint64_t all = self->patient ? QUEUE_PATIENT : QUEUE_BYTES;
		port->most = !most || most > all ? all : most < QUEUE_LEAST ? QUEUE_LEAST : most;
	}
	switch_watch(self);
	port_send_waiting(self, port); // which nothing may hold up any more
}

static bool parse_settings(PyObject *kwargs, struct settings *settings)
{
	static char *names[] = {"vlan",         "tagged",    "mac",  "mac_spoofing", "dhcp_guard",
				"router_guard", "bandwidth", "link", NULL};
	*settings = (struct settings){.mac_spoofing = 1, .link = 1};
	unsigned long long bandwidth = 0;
	Py_ssize_t mac_size = 0;
	PyObject *tagged = NULL, *nothing = PyTuple_New(0);
	bool right = nothing && PyArg_ParseTupleAndKeywords(
		nothing, kwargs, "|$iOz#pppKp", names, &settings->vlan, &tagged, &settings->mac, &mac_size,
		&settings->mac_spoofing, &settings->dhcp_guard, &settings->router_guard, &bandwidth, &settings->link);
	Py_XDECREF(nothing);
	if (!right)
		return false;
	if (settings->vlan < 0 || settings->vlan >= SWITCH_VLANS - 1) {
		PyErr_Format(PyExc_ValueError, "there is no VLAN %d", settings->vlan);
		return false;
	}
	if (settings->mac ? mac_size != SWITCH_MAC : !settings->mac_spoofing) {
		PyErr_SetString(PyExc_ValueError, "an address has six bytes, and is needed against spoofing");
		return false;
	}
	// No faster than what a nanosecond's count can tell apart.
	settings->rate = bandwidth / 8 > FASTEST ? 0 : bandwidth && bandwidth < 8 ? 1 : bandwidth / 8;
	return !tagged || parse_tagged(tagged, settings->tagged);
}

static PyObject *switch_set_port(SwitchObject *self, PyObject *args, PyObject *kwargs)
{
	struct settings settings;
	int number;
	if (!PyArg_ParseTuple(args, "i:set_port", &number) || !parse_settings(kwargs, &settings))
		return NULL;
	struct switch_port *port = enter_port(self, number);
	if (!port)
		return NULL;
	set_port(self, port, &settings);
	leave(self);
	switch_wake(self);
	Py_RETURN_NONE;
}

static PyObject *switch_add_port(SwitchObject *self, PyObject *args, PyObject *kwargs)
{
	static const char *const kinds[] = {
		[KIND_SOCKET] = "socket", [KIND_TAP] = "tap", [KIND_PACKET] = "packet", [KIND_STREAM] = "stream"};
	int number, fd;
	const char *name;
	if (!PyArg_ParseTuple(args, "isi:add_port", &number, &name, &fd))
		return NULL;
	unsigned kind = 0;
	while (kind < sizeof(kinds) / sizeof(kinds[0]) && strcmp(kinds[kind], name) != 0)
		kind++;
	struct settings settings;
	if (kind == sizeof(kinds) / sizeof(kinds[0]))
		PyErr_Format(PyExc_ValueError, "there is no kind %s of ports", name);
	if (PyErr_Occurred() || !parse_settings(kwargs, &settings)) {
		close(fd);
		return NULL;
	}
	enter(self);
	struct switch_port *port = port_add(self, number, kind, fd);
	int error = errno;
	if (port)
		set_port(self, port, &settings);
	leave(self);
	if (port)
		Py_RETURN_NONE;
	if (error == EEXIST)
		return PyErr_Format(PyExc_ValueError, "port %d is taken, or there are %d already", number, SWITCH_PORTS);
	errno = error;
	return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *switch_remove_port(SwitchObject *self, PyObject *args)
{
	int number;
	if (!PyArg_ParseTuple(args, "i:remove_port", &number))
		return NULL;
	struct switch_port *port = enter_port(self, number);
	if (!port)
		return NULL;
	port_remove(self, port);
	leave(self);
	Py_RETURN_NONE;
}

static PyObject *switch_set_offloads(SwitchObject *self, PyObject *args)
{
	int number;
	unsigned offloads;
	if (!PyArg_ParseTuple(args, "iI:set_offloads", &number, &offloads))
		return NULL;
	struct switch_port *port = enter_port(self, number);
	if (!port)
		return NULL;
	port->offloads = port->kind == KIND_STREAM ? 0 : offloads;
	leave(self);
	Py_RETURN_NONE;
}

static PyObject *switch_mirror(SwitchObject *self, PyObject *args)
{
	int number, fd;
	unsigned long long limit;
	if (!PyArg_ParseTuple(args, "iiK:mirror", &number, &fd, &limit))
		return NULL;
	struct switch_port *port = enter_port(self, number);
	if (!port) {
		close(fd);
		return NULL;
	}
	if (port->mirror)
		mirror_flush(self, port);
	mirror_stop(port);
	bool started = fd < 0 || mirror_start(port, fd, limit);
	switch_watch(self);
	leave(self);
	switch_wake(self); // it writes the head of the file
	return started ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

// What there is to know ----------------------------------------------------------------------------

static PyObject *switch_statistics(SwitchObject *self, PyObject *args)
{
	int number;
	if (!PyArg_ParseTuple(args, "i:statistics", &number))
		return NULL;
	struct switch_port *port = enter_port(self, number);
	if (!port)
		return NULL;
	unsigned long long numbers[] = {port->received_frames, port->received_bytes, port->sent_frames, port->sent_bytes};
	uint64_t dropped[DROPS];
	memcpy(dropped, port->dropped, sizeof(dropped));
	leave(self);
	PyObject *drops = PyDict_New();
	for (unsigned i = 0; drops && i < DROPS; i++) {
		PyObject *count = dropped[i] ? PyLong_FromUnsignedLongLong(dropped[i]) : NULL;
		if (dropped[i] && (!count || PyDict_SetItemString(drops, drop_names[i], count) < 0))
			Py_CLEAR(drops);
		Py_XDECREF(count);
	}
	if (!drops)
		return NULL;
	return Py_BuildValue("{sK sK sK sK sN}", "received_frames", numbers[0], "received_bytes", numbers[1],
			     "sent_frames", numbers[2], "sent_bytes", numbers[3], "dropped", drops);
}

static PyObject *switch_learned(SwitchObject *self, PyObject *Py_UNUSED(ignored))
{
	struct {
		uint64_t key;
		int port;
	} *found = malloc(TABLE_SETS * TABLE_WAYS * sizeof(*found));
	size_t count = 0;
	if (!found)
		return PyErr_NoMemory();
	enter(self);
	table_sweep(self);
	for (unsigned i = 0; i < TABLE_SETS * TABLE_WAYS; i++) {
		const struct table_entry *entry = &self->table[i / TABLE_WAYS][i % TABLE_WAYS];
		if (entry->key) {
			found[count].key = entry->key;
			found[count++].port = entry->port->number;
		}
	}
	leave(self);
	PyObject *list = PyList_New(0);
	for (size_t i = 0; list && i < count; i++) {
		uint8_t mac[SWITCH_MAC];
		net_put16(mac, (unsigned)(found[i].key >> 32));
		net_put32(mac + 2, (uint32_t)found[i].key);
		PyObject *item = Py_BuildValue("(iy#i)", (int)(found[i].key >> 48), mac, (Py_ssize_t)SWITCH_MAC, found[i].port);
		if (!item || PyList_Append(list, item) < 0)
			Py_CLEAR(list);
		Py_XDECREF(item);
	}
	free(found);
	return list;
}

// The worker ---------------------------------------------------------------------------------------

static PyObject *switch_set_time(SwitchObject *self, PyObject *args)
{
	unsigned long long now;
	if (!PyArg_ParseTuple(args, "K:set_time", &now))
		return NULL;
	enter(self);
	bool right = self->manual_time && now >= self->now;
	if (right)
		self->now = now;
	leave(self);
	if (!right)
		return PyErr_Format(PyExc_ValueError, "the time is the host's, or would go back");
	switch_wake(self);
	Py_RETURN_NONE;
}

struct ended {
	int number, error;
	const char *why;
};

static unsigned take_ended(SwitchObject *self, struct ended *ended)
{
	unsigned count = 0;
	for (unsigned i = 0; i < self->count && count + 2 <= ENDED_AT_ONCE; i++) {
		struct switch_port *port = self->ports[i];
		if (port->mirror_ended)
			ended[count++] = (struct ended){port->number, port->mirror_error, port->mirror_ended};
		if (port->lost)
			ended[count++] = (struct ended){port->number, port->lost_error, port->lost};
		port->mirror_ended = port->lost = NULL;
	}
	self->ended = count + 2 > ENDED_AT_ONCE;
	return count;
}

static PyObject *switch_py_run(SwitchObject *self, PyObject *Py_UNUSED(ignored))
{
	struct ended ended[ENDED_AT_ONCE];
	unsigned count = 0;
	bool ran;
	Py_BEGIN_ALLOW_THREADS
	ran = switch_run(self);
	if (ran) {
		visit_lock(&self->lock);
		count = take_ended(self, ended);
		if (!count)
			self->stopping = false;
		visit_unlock(&self->lock);
	}
	Py_END_ALLOW_THREADS
	if (!ran)
		return PyErr_Format(PyExc_RuntimeError, "another thread runs the switch");
	PyObject *list = PyList_New(0);
	for (unsigned i = 0; list && i < count; i++) {
		const char *error = ended[i].error ? strerror(ended[i].error) : "";
		PyObject *item = Py_BuildValue("(iN)", ended[i].number,
					       PyUnicode_FromFormat("%s%s%s", ended[i].why, *error ? ": " : "", error));
		if (!item || PyList_Append(list, item) < 0)
			Py_CLEAR(list);
		Py_XDECREF(item);
	}
	return list;
}

static PyObject *switch_stop(SwitchObject *self, PyObject *Py_UNUSED(ignored))
{
	enter(self);
	self->stopping = true;
	leave(self);
	switch_wake(self);
	Py_RETURN_NONE;
}

static PyMethodDef switch_methods[] = {
	{"add_port", (PyCFunction)(void (*)(void))switch_add_port, METH_VARARGS | METH_KEYWORDS, NULL},
	{"set_port", (PyCFunction)(void (*)(void))switch_set_port, METH_VARARGS | METH_KEYWORDS, NULL},
	{"set_offloads", (PyCFunction)switch_set_offloads, METH_VARARGS, NULL},
	{"remove_port", (PyCFunction)switch_remove_port, METH_VARARGS, NULL},
	{"mirror", (PyCFunction)switch_mirror, METH_VARARGS, NULL},
	{"statistics", (PyCFunction)switch_statistics, METH_VARARGS, NULL},
	{"learned", (PyCFunction)switch_learned, METH_NOARGS, NULL},
	{"set_time", (PyCFunction)switch_set_time, METH_VARARGS, NULL},
	{"run", (PyCFunction)switch_py_run, METH_NOARGS, NULL},
	{"stop", (PyCFunction)switch_stop, METH_NOARGS, NULL},
	{0},
};

PyTypeObject Switch_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvmm.core._hot.Switch",
	.tp_basicsize = sizeof(SwitchObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = switch_new,
	.tp_dealloc = (destructor)switch_dealloc,
	.tp_methods = switch_methods,
};
