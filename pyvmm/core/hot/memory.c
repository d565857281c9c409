#include "hot.h"

static PyObject *memory_add(MemoryObject *self, PyObject *args)
{
	unsigned long long gpa;
	PyObject *source;
	int readonly;
	if (!PyArg_ParseTuple(args, "KOp:add", &gpa, &source, &readonly))
		return NULL;
	if (self->count == HOT_MAX_REGIONS) {
		PyErr_SetString(PyExc_RuntimeError, "too many memory regions");
		return NULL;
	}
	Py_buffer *buffer = &self->buffers[self->count];
	if (PyObject_GetBuffer(source, buffer, PyBUF_WRITABLE) < 0)
		return NULL;
	uint64_t size = (uint64_t)buffer->len;
	if (!size || gpa + size < gpa) {
		PyBuffer_Release(buffer);
		PyErr_SetString(PyExc_ValueError, "memory region is empty or wraps around");
		return NULL;
	}
	for (unsigned i = 0; i < self->count; i++) {
		const struct hot_region *other = &self->regions[i];
		if (gpa < other->gpa + other->size && other->gpa < gpa + size) {
			PyBuffer_Release(buffer);
			PyErr_Format(PyExc_ValueError, "memory region at 0x%llx overlaps the one at 0x%llx", gpa,
				     (unsigned long long)other->gpa);
			return NULL;
		}
	}
	self->regions[self->count++] = (struct hot_region){
		.gpa = gpa, .size = size, .host = buffer->buf, .readonly = readonly};
	Py_RETURN_NONE;
}

static void memory_dealloc(MemoryObject *self)
{
	for (unsigned i = 0; i < self->count; i++)
		PyBuffer_Release(&self->buffers[i]);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef memory_methods[] = {
	{"add", (PyCFunction)memory_add, METH_VARARGS, NULL},
	{0},
};

PyTypeObject Memory_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvmm.core._hot.Memory",
	.tp_basicsize = sizeof(MemoryObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = PyType_GenericNew,
	.tp_dealloc = (destructor)memory_dealloc,
	.tp_methods = memory_methods,
};
