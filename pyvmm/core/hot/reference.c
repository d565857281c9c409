// Reference time: 100 ns units since the partition was made, read off the TSC (TLFS v6.0b, chapter 12.4).

#include "hot.h"

#include <structmember.h>
#include <x86intrin.h>

static uint64_t scaled(uint64_t tsc, uint64_t scale)
{
	return (uint64_t)(((unsigned __int128)tsc * scale) >> 64);
}

uint64_t hot_reference_now(const ReferenceTimeObject *reference)
{
	return scaled(__rdtsc() + reference->tsc_offset, reference->scale) + (uint64_t)reference->offset;
}

static int reference_init(ReferenceTimeObject *self, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
	unsigned long long tsc_khz, tsc_offset, elapsed = 0;
	if (!PyArg_ParseTuple(args, "KK|K:ReferenceTime", &tsc_khz, &tsc_offset, &elapsed))
		return -1;
	if (tsc_khz <= 10000) {
		PyErr_Format(PyExc_ValueError, "a TSC of %llu kHz is too slow for reference time", tsc_khz);
		return -1;
	}
	self->tsc_offset = tsc_offset;
	self->scale = (uint64_t)(((unsigned __int128)10000 << 64) / tsc_khz);
	self->offset = (int64_t)(elapsed - scaled(__rdtsc() + tsc_offset, self->scale));
	return 0;
}

static PyObject *reference_now(ReferenceTimeObject *self, PyObject *Py_UNUSED(ignored))
{
	return PyLong_FromUnsignedLongLong(hot_reference_now(self));
}

static PyMethodDef reference_methods[] = {
	{"now", (PyCFunction)reference_now, METH_NOARGS, NULL},
	{0},
};

static PyMemberDef reference_members[] = {
	{"scale", T_ULONGLONG, offsetof(ReferenceTimeObject, scale), READONLY, NULL},
	{"offset", T_LONGLONG, offsetof(ReferenceTimeObject, offset), READONLY, NULL},
	{0},
};

PyTypeObject ReferenceTime_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvmm.core._hot.ReferenceTime",
	.tp_basicsize = sizeof(ReferenceTimeObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = PyType_GenericNew,
	.tp_init = (initproc)reference_init,
	.tp_methods = reference_methods,
	.tp_members = reference_members,
};
