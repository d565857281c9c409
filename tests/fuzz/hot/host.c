// The host around the run loop: what it asks Python for, and what other threads do meanwhile.

#include "world.h"

static const char INJECTED[] = "a handler's own fault";

// What the run loop asks Python for -----------------------------------------------------------------------

static PyObject *answer_value(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
	if (one_in(500))
		return PyErr_Format(PyExc_LookupError, INJECTED);
	return one_in(4) ? Py_NewRef(Py_None) : PyLong_FromUnsignedLongLong(draw());
}

static PyObject *answer_read(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
	return PyLong_FromUnsignedLongLong(draw());
}

static PyObject *answer_string(PyObject *Py_UNUSED(module), PyObject *args)
{
	unsigned long long address;
	unsigned size, count;
	if (!PyArg_ParseTuple(args, "KII", &address, &size, &count))
		fail("a string access's arguments are not what they should be");
	if (one_in(500))
		return PyErr_Format(PyExc_LookupError, INJECTED);
	return PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size * count);
}

static PyObject *answer_done(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
	if (one_in(500))
		return PyErr_Format(PyExc_LookupError, INJECTED);
	return PyBool_FromLong(one_in(2));
}

static PyObject *answer_hypercall(PyObject *Py_UNUSED(module), PyObject *args)
{
	static const uint8_t output[2 * HOT_PAGE_SIZE];
	unsigned vp, code, start, count;
	Py_buffer input;
	if (!PyArg_ParseTuple(args, "IIy*II", &vp, &code, &input, &start, &count))
		fail("a hypercall's arguments are not what they should be");
	if (input.len > HOT_PAGE_SIZE || start > count)
		fail("a hypercall's input is larger than a page, or begins after its end");
	PyBuffer_Release(&input);
	unsigned done = start + (unsigned)below(count - start + 1);
	Py_ssize_t size = one_in(8) ? (Py_ssize_t)below(sizeof(output)) : (Py_ssize_t)(16 * (done - start));
	if (size > (Py_ssize_t)sizeof(output))
		size = sizeof(output);
	return Py_BuildValue("(IIy#)", (unsigned)below(0x60), done, (const char *)output, size);
}

static PyMethodDef stub_methods[] = {
	{"read", answer_read, METH_VARARGS, NULL},
	{"write", answer_done, METH_VARARGS, NULL},
	{"read_string", answer_string, METH_VARARGS, NULL},
	{"write_string", answer_done, METH_VARARGS, NULL},
	{"read_msr", answer_value, METH_VARARGS, NULL},
	{"write_msr", answer_done, METH_VARARGS, NULL},
	{"hypercall", answer_hypercall, METH_VARARGS, NULL},
	{"trace_msr", answer_done, METH_VARARGS, NULL},
	{"trace_hypercall", answer_done, METH_VARARGS, NULL},
	{0},
};
struct PyModuleDef stubs = {PyModuleDef_HEAD_INIT, .m_name = "stubs", .m_size = -1, .m_methods = stub_methods};

// What other threads do ------------------------------------------------------------------------------------

// Drops a result, or the exception of an argument that cannot be.
static void drop(PyObject *result)
{
	if (!result && !PyErr_ExceptionMatches(PyExc_ValueError) && !PyErr_ExceptionMatches(PyExc_RuntimeError))
		fail("an exception that is not documented");
	PyErr_Clear();
	Py_XDECREF(result);
}

static PyObject *some_packets(void)
{
	static const char content[300];
	PyObject *list = PyList_New(0);
	for (uint64_t count = below(5); count--;) {
		PyObject *packet = Py_BuildValue("(IIKy#y#)", (unsigned)below(16), (unsigned)below(2), draw(), content,
						 (Py_ssize_t)below(40), content, (Py_ssize_t)below(sizeof(content)));
		if (!packet || PyList_Append(list, packet) < 0)
			fail("no packet");
		Py_DECREF(packet);
	}
	return list;
}

static void use_ring(void)
{
	if (!world.ring || one_in(20)) {
		Py_CLEAR(world.ring);
		PyObject *pages = PyList_New(0);
		for (uint64_t count = 1 + below(5); count--;) {
			PyObject *page = PyLong_FromUnsignedLongLong(one_in(50) ? draw() : below(RAM_SIZE / HOT_PAGE_SIZE));
			if (PyList_Append(pages, page) < 0)
				fail("no page");
			Py_DECREF(page);
		}
		world.ring = PyObject_CallFunction((PyObject *)&Ring_Type, "OO", world.memory, pages);
		Py_DECREF(pages);
		if (!world.ring) {
			drop(NULL);
			return;
		}
	}
	switch (below(7)) {
	case 0:
		drop(PyObject_CallMethod(world.ring, one_in(2) ? "init_incoming" : "init_outgoing", NULL));
		break;
	case 1:
		drop(PyObject_CallMethod(world.ring, "mask", "O", one_in(2) ? Py_True : Py_False));
		break;
	case 2:
		drop(PyObject_CallMethod(world.ring, "await_space", "I", (unsigned)some_value()));
		break;
	case 3:
		drop(PyObject_CallMethod(world.ring, "write", "N", some_packets()));
		break;
	case 4:
		drop(PyObject_CallMethod(world.ring, "inspect", NULL));
		break;
	default:
		drop(PyObject_CallMethod(world.ring, "read", "I", (unsigned)below(9)));
	}
}

// With the GIL, while the VP is in the guest.
void others_act(void)
{
	static const char payload[300];
	static const char *const members[] = {"hypercalls_enabled", "xmm_input", "extended_ranges", "trace_msr",
					      "trace_hypercall"};
	PyObject *synic = world.synics[below(VPS)], *vp = world.vps[below(VPS)];
	unsigned sint = (unsigned)below(17);
	switch (below(10)) {
	case 0:
		drop(PyObject_CallMethod(synic, "post", "IIy#", sint, (unsigned)below(4), payload,
					 (Py_ssize_t)below(242)));
		break;
	case 1:
		drop(PyObject_CallMethod(synic, "signal_event", "II", sint, (unsigned)below(2049)));
		break;
	case 2:
		drop(PyObject_CallMethod(synic, "raise_sint", "I", sint));
		break;
	case 3:
		drop(PyObject_CallMethod(synic, "interrupt", "I", (unsigned)below(256)));
		break;
	case 4:
		drop(PyObject_CallMethod(world.doorbells, "connect", "Ii", (unsigned)below(8), -1));
		break;
	case 5:
		drop(PyObject_CallMethod(world.doorbells, "disconnect", "I", (unsigned)below(8)));
		break;
	case 6:
		if (PyObject_SetAttrString(vp, members[below(5)], one_in(4) ? Py_False : Py_True) < 0)
			fail("a member of Vp is not there");
		break;
	case 7:
		drop(PyObject_CallMethod(synic, "take_interrupts", NULL));
		drop(PyObject_CallMethod(one_in(2) ? synic : world.doorbells, "inspect", NULL));
		drop(PyObject_CallMethod(vp, "counts", NULL));
		break;
	case 8:
		if (one_in(20))
			drop(PyObject_CallMethod(vp, "stop", NULL));
		break;
	default:
		use_ring();
	}
}
