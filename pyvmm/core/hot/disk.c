#include "disk.h"

#include "storage.h"

#include <linux/magic.h>
#include <structmember.h>
#include <sys/vfs.h>

unsigned hot_disk_find(const FastDiskObject *disk, bool write, uint64_t offset, uint32_t length,
		       struct disk_part parts[DISK_PARTS])
{
	const BlockTableObject *table = disk->table;
	if (!table) {
		parts[0] = (struct disk_part){offset, length};
		return 1;
	}
	unsigned count = 0;
	while (length) {
		uint64_t block = offset / disk->block_size, at = offset % disk->block_size;
		uint64_t index = block + block / disk->chunk_ratio;
		uint32_t part = length < disk->block_size - at ? length : (uint32_t)(disk->block_size - at);
		if (index >= table->count || count == DISK_PARTS)
			return 0;
		uint64_t entry = hot_table_get(table, (uint32_t)index);
		unsigned state = entry & TABLE_STATE_MASK;
		if (state == TABLE_PRESENT)
			parts[count++] = (struct disk_part){(entry & TABLE_OFFSET_MASK) + at, part};
		else if (state <= TABLE_UNMAPPED && disk->zero_when_absent && !write)
			parts[count++] = (struct disk_part){DISK_ZEROS, part};
		else
			return 0;
		offset += part;
		length -= part;
	}
	return count;
}

// The object ---------------------------------------------------------------------------------------

static PyObject *disk_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"fd",         "size",        "sector_size",      "writable", "table",
				"block_size", "chunk_ratio", "zero_when_absent", NULL};
	int fd, writable, zero_when_absent = 0;
	unsigned long long size, block_size = 0;
	unsigned sector_size, chunk_ratio = 0;
	PyObject *table = Py_None;
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iKIp|$OKIp:FastDisk", names, &fd, &size, &sector_size, &writable,
					 &table, &block_size, &chunk_ratio, &zero_when_absent))
		return NULL;
	if (table != Py_None && !PyObject_TypeCheck(table, &BlockTable_Type)) {
		PyErr_SetString(PyExc_TypeError, "table is a BlockTable or None");
		return NULL;
	}
	bool blocks = table == Py_None || (block_size >= DISK_MIN_BLOCK && chunk_ratio);
	if (fd < 0 || size > INT64_MAX || !sector_size || sector_size > HOT_PAGE_SIZE || !blocks) {
		PyErr_SetString(PyExc_ValueError, "a disk has a file, sectors of at most 4096 bytes and blocks of 1 MiB or more");
		return NULL;
	}
	FastDiskObject *self = (FastDiskObject *)type->tp_alloc(type, 0);
	if (!self)
		return NULL;
	self->table = table == Py_None ? NULL : (BlockTableObject *)Py_NewRef(table);
	self->block_size = block_size;
	self->chunk_ratio = chunk_ratio;
	self->sector_size = sector_size;
	self->zero_when_absent = zero_when_absent;
	struct statfs where;
	self->in_memory = fstatfs(fd, &where) == 0 && where.f_type == TMPFS_MAGIC;
	self->writable = writable;
	self->fd = fd;
	self->size = size;
	return (PyObject *)self;
}

static void disk_dealloc(FastDiskObject *self)
{
	Py_XDECREF(self->table);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *disk_close(FastDiskObject *self, PyObject *Py_UNUSED(ignored))
{
	atomic_store(&self->fd, -1);
	Py_BEGIN_ALLOW_THREADS
	hot_storage_drain(self);
	Py_END_ALLOW_THREADS
	Py_RETURN_NONE;
}

static PyObject *disk_get_size(FastDiskObject *self, void *Py_UNUSED(closure))
{
	return PyLong_FromUnsignedLongLong(atomic_load(&self->size));
}

static int disk_set_size(FastDiskObject *self, PyObject *value, void *Py_UNUSED(closure))
{
	unsigned long long size = value ? PyLong_AsUnsignedLongLong(value) : 0;
	if (PyErr_Occurred())
		return -1;
	if (!value || size > INT64_MAX) {
		PyErr_SetString(PyExc_ValueError, "a disk has a size that is an offset in a file");
		return -1;
	}
	atomic_store(&self->size, size);
	return 0;
}

static PyObject *disk_get_writable(FastDiskObject *self, void *Py_UNUSED(closure))
{
	return PyBool_FromLong(atomic_load(&self->writable));
}

static int disk_set_writable(FastDiskObject *self, PyObject *value, void *Py_UNUSED(closure))
{
	int writable = value ? PyObject_IsTrue(value) : 0;
	if (writable < 0)
		return -1;
	atomic_store(&self->writable, writable);
	return 0;
}

static PyObject *disk_get_flush_failed(FastDiskObject *self, void *Py_UNUSED(closure))
{
	return PyBool_FromLong(atomic_load(&self->flush_failed));
}

static PyMethodDef disk_methods[] = {
	{"close", (PyCFunction)disk_close, METH_NOARGS, NULL},
	{0},
};

static PyGetSetDef disk_getset[] = {
	{"size", (getter)disk_get_size, (setter)disk_set_size, NULL, NULL},
	{"flush_failed", (getter)disk_get_flush_failed, NULL, NULL, NULL},
	{"writable", (getter)disk_get_writable, (setter)disk_set_writable, NULL, NULL},
	{0},
};

PyTypeObject FastDisk_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvmm.core._hot.FastDisk",
	.tp_basicsize = sizeof(FastDiskObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = disk_new,
	.tp_dealloc = (destructor)disk_dealloc,
	.tp_methods = disk_methods,
	.tp_getset = disk_getset,
};
