// Telling zeros from data in the buffers of disk tools.

#include "hot.h"

#include <string.h>

static bool all_zero(const uint8_t *data, size_t size)
{
	// Most data shows in its first bytes. A buffer that begins with a zero and equals itself one byte on is zeros.
	return !data[0] && !memcmp(data, data + 1, size - 1);
}

// Fills `ends` with start, end, start, end... of the stretches that are not zeros; returns how many numbers.
static size_t find_runs(const uint8_t *data, size_t size, size_t block, size_t *ends)
{
	size_t count = 0;
	for (size_t at = 0; at < size; at += block) {
		bool zero = all_zero(data + at, size - at < block ? size - at : block);
		if (zero == (count % 2 == 1)) // a run begins, or ends here
			ends[count++] = at;
	}
	if (count % 2)
		ends[count++] = size;
	return count;
}

PyObject *hot_data_runs(PyObject *module, PyObject *args)
{
	(void)module;
	Py_buffer view;
	Py_ssize_t block;
	PyObject *runs = NULL;
	if (!PyArg_ParseTuple(args, "y*n:data_runs", &view, &block))
		return NULL;
	if (block < 1) {
		PyErr_SetString(PyExc_ValueError, "a block has at least one byte");
		goto done;
	}
	size_t *ends = PyMem_RawCalloc((size_t)(view.len / block) + 3, sizeof(*ends));
	if (!ends) {
		PyErr_NoMemory();
		goto done;
	}
	size_t count;
	Py_BEGIN_ALLOW_THREADS
	count = find_runs(view.buf, (size_t)view.len, (size_t)block, ends);
	Py_END_ALLOW_THREADS
	runs = PyList_New((Py_ssize_t)count / 2);
	for (size_t i = 0; runs && i < count; i += 2) {
		PyObject *run = Py_BuildValue("(nn)", (Py_ssize_t)ends[i], (Py_ssize_t)ends[i + 1]);
		if (!run)
			Py_CLEAR(runs);
		else
			PyList_SET_ITEM(runs, (Py_ssize_t)i / 2, run);
	}
	PyMem_RawFree(ends);
done:
	PyBuffer_Release(&view);
	return runs;
}
