// The synthetic interrupt controller as Python sees it.

#include "synic.h"

#include <structmember.h>

static PyObject *synic_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
	PyObject *memory;
	int vm_fd;
	unsigned vp_index, apic_id;
	if (!PyArg_ParseTuple(args, "O!iII:SynIC", &Memory_Type, &memory, &vm_fd, &vp_index, &apic_id))
		return NULL;
	SynICObject *self = (SynICObject *)type->tp_alloc(type, 0);
	if (!self)
		return NULL;
	self->memory = (MemoryObject *)Py_NewRef(memory);
	self->vm_fd = vm_fd;
	self->vp_index = vp_index;
	self->apic_id = apic_id;
	self->space_event = -1;
	self->direct_fd = -1;
	pthread_mutex_init(&self->lock, NULL);
	synic_power_on(self);
	return (PyObject *)self;
}

static void synic_dealloc(SynICObject *self)
{
	pthread_mutex_destroy(&self->lock);
	for (unsigned i = 0; i < SINT_COUNT; i++)
		PyMem_RawFree(self->queues[i]);
	Py_DECREF(self->memory);
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
	bool queued = synic_enqueue(self, sint, type, payload.buf, (uint8_t)payload.len);
	if (queued && self->vp)
		hot_vp_request_scan(self->vp);
	pthread_mutex_unlock(&self->lock);
	result = PyBool_FromLong(queued);
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
	return PyBool_FromLong(hot_synic_signal_event(self, sint, flag));
}

static PyObject *synic_raise_sint_method(SynICObject *self, PyObject *args)
{
	unsigned sint;
	if (!PyArg_ParseTuple(args, "I:raise_sint", &sint) || !check_sint(sint))
		return NULL;
	pthread_mutex_lock(&self->lock);
	bool open = synic_raise_sint(self, sint);
	pthread_mutex_unlock(&self->lock);
	return PyBool_FromLong(open);
}

static PyObject *synic_interrupt_method(SynICObject *self, PyObject *args)
{
	unsigned char vector;
	if (!PyArg_ParseTuple(args, "b:interrupt", &vector))
		return NULL;
	hot_synic_interrupt(self, vector);
	Py_RETURN_NONE;
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

static void tell_kvm(SynICObject *self)
{
	if (!self->kvm_timers)
		return;
	kvm_timers_store(self, 0, STIMER_COUNT);
	kvm_timers_connect(self);
}

static PyObject *synic_reset(SynICObject *self, PyObject *Py_UNUSED(ignored))
{
	pthread_mutex_lock(&self->lock);
	synic_power_on(self);
	tell_kvm(self);
	pthread_mutex_unlock(&self->lock);
	Py_RETURN_NONE;
}

static PyObject *auto_eoi_list(const SynICObject *self)
{
	PyObject *list = PyList_New(0);
	for (unsigned vector = 0; list && vector < 64 * AUTO_EOI_WORDS; vector++) {
		if (!(atomic_load(&self->auto_eoi[vector / 64]) >> vector % 64 & 1))
			continue;
		PyObject *number = PyLong_FromUnsignedLong(vector);
		if (!number || PyList_Append(list, number) < 0)
			Py_CLEAR(list);
		Py_XDECREF(number);
	}
	return list;
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
	if (self->kvm_timers)
		kvm_timers_load(self);
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
	PyObject *state = Py_BuildValue("{s:i,s:K,s:K,s:K,s:N,s:N,s:N,s:N}", "version", 1, "scontrol", synic->scontrol,
					"siefp", synic->siefp, "simp", synic->simp, "sint", sint_list(snapshot),
					"messages", waiting_messages(snapshot), "timers", stimers_save(synic->timers),
					"auto_eoi", auto_eoi_list(synic));
	PyMem_RawFree(snapshot);
	return state;
}

static bool parse_message(PyObject *entry, struct snapshot *snapshot)
{
	unsigned sint, type;
	Py_buffer payload;
	PyObject *fields = PySequence_Tuple(entry);
	bool valid = fields && PyArg_ParseTuple(fields, "IIy*", &sint, &type, &payload);
	if (valid) {
		valid = sint < SINT_COUNT && type && payload.len <= MESSAGE_PAYLOAD &&
			snapshot->queues[sint].count < QUEUE_LENGTH;
		if (valid) {
			struct message_queue *queue = &snapshot->queues[sint];
			struct queued_message *message = &queue->messages[queue->count++];
			message->type = type;
			message->size = (uint8_t)payload.len;
			memcpy(message->payload, payload.buf, message->size);
		}
		PyBuffer_Release(&payload);
	}
	Py_XDECREF(fields);
	return valid;
}

static bool parse_state(PyObject *state, struct snapshot *snapshot)
{
	static const char *const keys[] = {"version", "scontrol", "siefp", "simp", "sint",
					    "messages", "timers", "auto_eoi"};
	enum { KEYS = sizeof(keys) / sizeof(keys[0]) };
	SynICObject *synic = &snapshot->synic;
	PyObject *sints, *messages, *timers, *auto_eoi;
	unsigned long long scontrol, siefp, simp;
	int version;
	PyObject *values = PyTuple_New(KEYS);
	if (!values)
		return false;
	for (Py_ssize_t i = 0; i < KEYS; i++) {
		PyObject *value = PyDict_GetItemString(state, keys[i]);
		PyTuple_SET_ITEM(values, i, Py_NewRef(value ? value : Py_None));
	}
	bool valid = PyArg_ParseTuple(values, "iKKKO!O!O!O!", &version, &scontrol, &siefp, &simp, &PyList_Type, &sints,
				      &PyList_Type, &messages, &PyList_Type, &timers, &PyList_Type, &auto_eoi) &&
		     version == 1 && PyList_GET_SIZE(sints) == SINT_COUNT && stimers_parse(timers, synic->timers);
	if (valid) {
		synic->scontrol = scontrol;
		synic->siefp = siefp;
		synic->simp = simp;
	}
	for (unsigned i = 0; valid && i < SINT_COUNT; i++) {
		synic->sint[i] = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(sints, i));
		valid = !PyErr_Occurred() && synic_sint_valid(synic->sint[i]);
	}
	for (Py_ssize_t i = 0; valid && i < PyList_GET_SIZE(messages); i++)
		valid = parse_message(PyList_GET_ITEM(messages, i), snapshot);
	for (Py_ssize_t i = 0; valid && i < PyList_GET_SIZE(auto_eoi); i++) {
		unsigned long vector = PyLong_AsUnsignedLong(PyList_GET_ITEM(auto_eoi, i));
		valid = !PyErr_Occurred() && vector < 64 * AUTO_EOI_WORDS;
		if (valid)
			atomic_fetch_or(&synic->auto_eoi[vector / 64], 1ull << vector % 64);
	}
	Py_DECREF(values);
	return valid;
}

static bool apply_state(SynICObject *self, const struct snapshot *snapshot)
{
	const SynICObject *synic = &snapshot->synic;
	bool done = true;
	pthread_mutex_lock(&self->lock);
	synic_power_on(self);
	self->scontrol = synic->scontrol;
	self->siefp = synic->siefp;
	self->simp = synic->simp;
	memcpy(self->sint, synic->sint, sizeof(self->sint));
	memcpy(self->timers, synic->timers, sizeof(self->timers));
	for (unsigned i = 0; i < AUTO_EOI_WORDS; i++)
		atomic_store(&self->auto_eoi[i], atomic_load(&synic->auto_eoi[i]));
	for (unsigned sint = 0; sint < SINT_COUNT; sint++) {
		const struct message_queue *queue = &snapshot->queues[sint];
		for (unsigned i = 0; done && i < queue->count; i++)
			done = synic_enqueue(self, sint, queue->messages[i].type, queue->messages[i].payload,
					     queue->messages[i].size);
	}
	tell_kvm(self);
	pthread_mutex_unlock(&self->lock);
	return done;
}

static PyObject *synic_restore(SynICObject *self, PyObject *args)
{
	PyObject *state;
	if (!PyArg_ParseTuple(args, "O!:restore", &PyDict_Type, &state))
		return NULL;
	struct snapshot *snapshot = PyMem_RawCalloc(1, sizeof(*snapshot));
	if (!snapshot)
		return PyErr_NoMemory();
	if (!parse_state(state, snapshot)) {
		PyErr_Clear();
		PyErr_SetString(PyExc_ValueError, "saved SynIC state is not one of version 1");
	} else if (!apply_state(self, snapshot)) {
		PyErr_NoMemory();
	}
	PyMem_RawFree(snapshot);
	return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
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
		Py_BuildValue("{s:K,s:K,s:K,s:N,s:K,s:K,s:K,s:I,s:N,s:O,s:N}", "scontrol", synic->scontrol, "siefp",
			      synic->siefp, "simp", synic->simp, "sint", sint_list(snapshot), "messages_delivered",
			      synic->messages_delivered, "messages_dropped", synic->messages_dropped, "interrupts",
			      synic->interrupts_raised, "messages_queued", queued, "timers",
			      stimers_save(synic->timers), "kvm_timers", synic->kvm_timers ? Py_True : Py_False,
			      "auto_eoi", auto_eoi_list(synic));
	PyMem_RawFree(snapshot);
	return result;
}

bool hot_target_parse(PyObject *args, struct hot_target *target)
{
	PyObject *synic;
	if (!PyArg_ParseTuple(args, "OII:set_target", &synic, &target->sint, &target->flag))
		return false;
	if (synic != Py_None && !PyObject_TypeCheck(synic, &SynIC_Type)) {
		PyErr_SetString(PyExc_TypeError, "set_target takes a SynIC or None");
		return false;
	}
	if (!hot_synic_has_event(target->sint, target->flag)) {
		PyErr_Format(PyExc_ValueError, "there is no event flag %u of SINT %u", target->flag, target->sint);
		return false;
	}
	target->synic = synic == Py_None ? NULL : (SynICObject *)Py_NewRef(synic);
	return true;
}

static PyMethodDef synic_methods[] = {
	{"set_space_event", (PyCFunction)synic_set_space_event, METH_VARARGS, NULL},
	{"read_msr", (PyCFunction)synic_read_msr, METH_VARARGS, NULL},
	{"write_msr", (PyCFunction)synic_write_msr, METH_VARARGS, NULL},
	{"post", (PyCFunction)synic_post, METH_VARARGS, NULL},
	{"signal_event", (PyCFunction)synic_signal_event, METH_VARARGS, NULL},
	{"raise_sint", (PyCFunction)synic_raise_sint_method, METH_VARARGS, NULL},
	{"interrupt", (PyCFunction)synic_interrupt_method, METH_VARARGS, NULL},
	{"scan", (PyCFunction)synic_scan, METH_VARARGS, NULL},
	{"take_interrupts", (PyCFunction)synic_take_interrupts, METH_NOARGS, NULL},
	{"reset", (PyCFunction)synic_reset, METH_NOARGS, NULL},
	{"save", (PyCFunction)synic_save, METH_NOARGS, NULL},
	{"restore", (PyCFunction)synic_restore, METH_VARARGS, NULL},
	{"inspect", (PyCFunction)synic_inspect, METH_NOARGS, NULL},
	{0},
};

static PyMemberDef synic_members[] = {
	{"direct_timers", T_BOOL, offsetof(SynICObject, direct_timers), 0, NULL},
	{"kvm_timers", T_BOOL, offsetof(SynICObject, kvm_timers), 0, NULL},
	{0},
};

PyTypeObject SynIC_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvmm.core._hot.SynIC",
	.tp_basicsize = sizeof(SynICObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = synic_new,
	.tp_dealloc = (destructor)synic_dealloc,
	.tp_methods = synic_methods,
	.tp_members = synic_members,
};
