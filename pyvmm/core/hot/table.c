// The block allocation table of a VHDX image, shared by Python, which changes it, and the fast path, which reads it.
//
// Facts: MS-VHDX 2.5 (BAT), 2.5.1 (entries), 2.5.1.1 (payload blocks), 2.5.1.2 (sector bitmap blocks).

#include "storage.h"

#include <stdlib.h>

enum {
	MIB_SHIFT = 20,
	// Enough for 64 TiB in blocks of 1 MiB with their bitmaps.
	MAX_ENTRIES = 1 << 27,
	// No image of 64 TiB needs a file of twice that; it bounds the map of what is taken in `check`.
	MAX_FILE_MIB = 1 << 27,
	MAX_RESERVED = 64,
};

// Life ---------------------------------------------------------------------------------------------

static PyObject *table_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	Py_ssize_t count;
	if (kwargs && PyDict_GET_SIZE(kwargs)) {
		PyErr_SetString(PyExc_TypeError, "BlockTable takes no keyword arguments");
		return NULL;
	}
	if (!PyArg_ParseTuple(args, "n:BlockTable", &count))
		return NULL;
	if (count < 1 || count > MAX_ENTRIES)
		return PyErr_Format(PyExc_ValueError, "a table of %zd entries is not one of 1 to %d", count, MAX_ENTRIES);
	BlockTableObject *self = (BlockTableObject *)type->tp_alloc(type, 0);
	if (!self)
		return NULL;
	// The C library takes large ones from the kernel, whose zero pages cost nothing until they are written.
	self->entries = calloc((size_t)count, sizeof(*self->entries));
	if (!self->entries) {
		Py_DECREF(self);
		return PyErr_NoMemory();
	}
	self->count = (uint32_t)count;
	return (PyObject *)self;
}

static void table_dealloc(BlockTableObject *self)
{
	free(self->entries);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static Py_ssize_t table_length(BlockTableObject *self)
{
	return self->count;
}

// Entries ------------------------------------------------------------------------------------------

static bool inside(const BlockTableObject *self, Py_ssize_t first, Py_ssize_t count)
{
	if (first >= 0 && count >= 0 && first <= self->count && count <= self->count - first)
		return true;
	PyErr_Format(PyExc_IndexError, "%zd entries from %zd on are not in a table of %u", count, first, self->count);
	return false;
}

static PyObject *table_load(BlockTableObject *self, PyObject *args)
{
	Py_ssize_t first;
	Py_buffer data;
	if (!PyArg_ParseTuple(args, "ny*:load", &first, &data))
		return NULL;
	Py_ssize_t count = data.len / 8;
	bool good = data.len % 8 == 0;
	if (!good)
		PyErr_Format(PyExc_ValueError, "%zd bytes are not whole entries", data.len);
	good = good && inside(self, first, count);
	if (good) {
		Py_BEGIN_ALLOW_THREADS
		for (Py_ssize_t i = 0; i < count; i++) {
			uint64_t entry;
			memcpy(&entry, (const char *)data.buf + 8 * i, sizeof(entry));
			// Zeros are not written over zeros, so pages without entries stay the kernel's zero page.
			if (hot_table_get(self, (uint32_t)(first + i)) != entry)
				atomic_store_explicit(&self->entries[first + i], entry, memory_order_release);
		}
		Py_END_ALLOW_THREADS
	}
	PyBuffer_Release(&data);
	if (!good)
		return NULL;
	Py_RETURN_NONE;
}

static PyObject *table_get(BlockTableObject *self, PyObject *args)
{
	Py_ssize_t index;
	if (!PyArg_ParseTuple(args, "n:get", &index) || !inside(self, index, 1))
		return NULL;
	return PyLong_FromUnsignedLongLong(hot_table_get(self, (uint32_t)index));
}

static PyObject *table_set(BlockTableObject *self, PyObject *args)
{
	Py_ssize_t index;
	PyObject *value;
	if (!PyArg_ParseTuple(args, "nO!:set", &index, &PyLong_Type, &value) || !inside(self, index, 1))
		return NULL;
	unsigned long long entry = PyLong_AsUnsignedLongLong(value);
	if (entry == (unsigned long long)-1 && PyErr_Occurred())
		return NULL;
	atomic_store(&self->entries[index], entry);
	Py_RETURN_NONE;
}

static PyObject *table_entries(BlockTableObject *self, PyObject *args)
{
	Py_ssize_t first, count;
	if (!PyArg_ParseTuple(args, "nn:entries", &first, &count) || !inside(self, first, count))
		return NULL;
	PyObject *result = PyBytes_FromStringAndSize(NULL, 8 * count);
	for (Py_ssize_t i = 0; result && i < count; i++) {
		uint64_t entry = hot_table_get(self, (uint32_t)(first + i));
		memcpy(PyBytes_AS_STRING(result) + 8 * i, &entry, sizeof(entry));
	}
	return result;
}

// Checking -----------------------------------------------------------------------------------------

struct range {
	uint64_t start, end; // MiB
};

struct check {
	const BlockTableObject *table;
	uint32_t chunk_ratio, block_mib;
	bool has_parent;
	uint64_t file_mib;
	unsigned reserved_count;
	struct range reserved[MAX_RESERVED];
	uint64_t *taken; // a bit per MiB of the file
	uint32_t found, limit;
	struct finding {
		uint32_t index;
		const char *kind;
	} *findings;
};

static void found(struct check *check, uint32_t index, const char *kind)
{
	if (check->found < check->limit)
		check->findings[check->found++] = (struct finding){index, kind};
}

// Takes [start, start + length); false if some of it is taken already.
static bool take(uint64_t *taken, uint64_t start, uint32_t length)
{
	bool free = true;
	while (length) {
		unsigned bit = start % 64;
		unsigned step = 64 - bit < length ? 64 - bit : length;
		uint64_t bits = (step == 64 ? ~0ULL : (1ULL << step) - 1) << bit;
		free = free && !(taken[start / 64] & bits);
		taken[start / 64] |= bits;
		start += step;
		length -= step;
	}
	return free;
}

static void check_place(struct check *check, uint32_t index, uint64_t entry, uint32_t length)
{
	uint64_t start = entry >> MIB_SHIFT;
	if (start >= check->file_mib || length > check->file_mib - start) {
		found(check, index, "outside");
		return;
	}
	for (unsigned i = 0; i < check->reserved_count; i++) {
		if (start < check->reserved[i].end && check->reserved[i].start < start + length) {
			found(check, index, "reserved");
			return;
		}
	}
	if (!take(check->taken, start, length))
		found(check, index, "overlap");
}

static void check_entries(struct check *check)
{
	const BlockTableObject *table = check->table;
	uint32_t in_chunk = 0, partial = UINT32_MAX; // the chunk's first block that needs a bitmap
	for (uint32_t i = 0; i < table->count && check->found < check->limit; i++) {
		bool bitmap = in_chunk == check->chunk_ratio;
		in_chunk = bitmap ? 0 : in_chunk + 1;
		uint64_t entry = hot_table_get(table, i);
		unsigned state = entry & TABLE_STATE_MASK;
		if (bitmap && partial != UINT32_MAX && state != TABLE_PRESENT)
			found(check, partial, "bitmap");
		if (bitmap)
			partial = UINT32_MAX;
		if (!entry)
			continue;
		bool present = state == TABLE_PRESENT || (!bitmap && check->has_parent && state == TABLE_PARTIAL);
		if (!present && state > (bitmap ? TABLE_ABSENT : TABLE_UNMAPPED)) {
			found(check, i, "state");
			continue;
		}
		if (!bitmap && state == TABLE_PARTIAL && partial == UINT32_MAX)
			partial = i;
		if (present)
			check_place(check, i, entry, bitmap ? 1 : check->block_mib);
	}
	if (partial != UINT32_MAX)
		found(check, partial, "bitmap");
}

static bool parse_reserved(struct check *check, PyObject *sequence)
{
	PyObject *fast = PySequence_Fast(sequence, "reserved ranges are a sequence");
	if (!fast)
		return false;
	Py_ssize_t count = PySequence_Fast_GET_SIZE(fast);
	bool good = count <= MAX_RESERVED;
	if (!good)
		PyErr_Format(PyExc_ValueError, "%zd reserved ranges are more than %d", count, MAX_RESERVED);
	for (Py_ssize_t i = 0; good && i < count; i++) {
		unsigned long long start, length;
		good = PyArg_ParseTuple(PySequence_Fast_GET_ITEM(fast, i), "KK;a reserved range is (offset, length)",
					&start, &length);
		if (!good)
			break;
		unsigned long long end = start + length < start ? UINT64_MAX : start + length;
		check->reserved[check->reserved_count++] = (struct range){
			start >> MIB_SHIFT, (end >> MIB_SHIFT) + ((end & ((1U << MIB_SHIFT) - 1)) != 0)};
	}
	Py_DECREF(fast);
	return good;
}

static PyObject *finding_list(const struct check *check)
{
	PyObject *result = PyList_New(0);
	for (uint32_t i = 0; result && i < check->found; i++) {
		PyObject *item = Py_BuildValue("(Is)", check->findings[i].index, check->findings[i].kind);
		if (!item || PyList_Append(result, item) < 0)
			Py_CLEAR(result);
		Py_XDECREF(item);
	}
	return result;
}

static PyObject *table_check(BlockTableObject *self, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"chunk_ratio", "block_size", "file_size", "reserved", "has_parent", "limit", NULL};
	struct check check = {.table = self, .limit = 1};
	unsigned long long block_size, file_size;
	PyObject *reserved;
	int has_parent = 0;
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "IKKO|$pI:check", names, &check.chunk_ratio, &block_size,
					 &file_size, &reserved, &has_parent, &check.limit))
		return NULL;
	if (!check.chunk_ratio || check.chunk_ratio > MAX_ENTRIES || block_size >> MIB_SHIFT < 1 ||
	    block_size >> MIB_SHIFT > 256 || block_size & ((1U << MIB_SHIFT) - 1)) {
		PyErr_SetString(PyExc_ValueError, "blocks are of 1 to 256 MiB, and a chunk is not empty");
		return NULL;
	}
	if (!parse_reserved(&check, reserved))
		return NULL;
	check.has_parent = has_parent;
	check.block_mib = (uint32_t)(block_size >> MIB_SHIFT);
	check.file_mib = file_size >> MIB_SHIFT;
	if (check.file_mib > MAX_FILE_MIB)
		check.file_mib = MAX_FILE_MIB;
	if (check.limit > 2 * self->count)
		check.limit = 2 * self->count; // a block may be wrong by itself and for want of a bitmap
	check.taken = calloc(check.file_mib / 64 + 1, sizeof(*check.taken));
	check.findings = calloc((size_t)check.limit + 1, sizeof(*check.findings));
	PyObject *result = NULL;
	if (check.taken && check.findings) {
		Py_BEGIN_ALLOW_THREADS
		check_entries(&check);
		Py_END_ALLOW_THREADS
		result = finding_list(&check);
	} else {
		PyErr_NoMemory();
	}
	free(check.taken);
	free(check.findings);
	return result;
}

static PyObject *table_drain(BlockTableObject *self, PyObject *Py_UNUSED(ignored))
{
	Py_BEGIN_ALLOW_THREADS
	hot_storage_drain(self);
	Py_END_ALLOW_THREADS
	Py_RETURN_NONE;
}

static PyMethodDef table_methods[] = {
	{"load", (PyCFunction)table_load, METH_VARARGS, NULL},
	{"get", (PyCFunction)table_get, METH_VARARGS, NULL},
	{"set", (PyCFunction)table_set, METH_VARARGS, NULL},
	{"entries", (PyCFunction)table_entries, METH_VARARGS, NULL},
	{"check", (PyCFunction)(void (*)(void))table_check, METH_VARARGS | METH_KEYWORDS, NULL},
	{"drain", (PyCFunction)table_drain, METH_NOARGS, NULL},
	{0},
};

static PySequenceMethods table_sequence = {.sq_length = (lenfunc)table_length};

PyTypeObject BlockTable_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvmm.core._hot.BlockTable",
	.tp_basicsize = sizeof(BlockTableObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = table_new,
	.tp_dealloc = (destructor)table_dealloc,
	.tp_as_sequence = &table_sequence,
	.tp_methods = table_methods,
};
