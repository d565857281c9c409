// A storage queue over guest memory that changes under its hands: packets that are nearly right, rings that are not, disks
// that come, go, shrink and fail. What was taken off the ring has to come out once, one way or another.

#include "world.h"

#include "../../../pyvmm/core/hot/storage.h"

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
	STEPS = 60,
	RING_PAGES = 3,
	INCOMING = 1, // the first page of each ring
	OUTGOING = INCOMING + RING_PAGES,
	BLOCKS = 4,
	BLOCK = 1 << 20,
	FILE_SIZE = 3 * BLOCK, // too small for some of the blocks
};

static PyObject *queue, *incoming, *outgoing, *disks[2], *table;
static uint64_t handed; // requests and completions that came back to Python
static int file, doorbell;

static PyObject *called(PyObject *object, const char *name)
{
	PyObject *result = PyObject_CallMethod(object, name, NULL);
	if (!result)
		fail("a method of a storage queue raises");
	return result;
}

static PyObject *ring_at(unsigned page)
{
	memset(world.ram + page * HOT_PAGE_SIZE, 0, HOT_PAGE_SIZE);
	PyObject *ring =
		PyObject_CallFunction((PyObject *)&Ring_Type, "O(III)", world.memory, page, page + 1, page + 2);
	if (!ring)
		fail("no ring");
	return ring;
}

static void plug(unsigned lun, PyObject *disk)
{
	PyObject *result = PyObject_CallMethod(queue, "set_disk", "IO", lun, disk);
	if (!result)
		fail("no disk can be set");
	Py_DECREF(result);
}

static void begin(void)
{
	file = memfd_create("disk", MFD_CLOEXEC);
	doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (file < 0 || doorbell < 0 || ftruncate(file, FILE_SIZE) < 0)
		fail("no file");
	table = PyObject_CallFunction((PyObject *)&BlockTable_Type, "I", BLOCKS + 1);
	incoming = ring_at(INCOMING);
	outgoing = ring_at(OUTGOING);
	PyObject *how = Py_BuildValue("{s:O}", "io_uring", one_in(2) ? Py_True : Py_False);
	PyObject *with = Py_BuildValue("(OOOi)", world.memory, incoming, outgoing, doorbell);
	queue = PyObject_Call((PyObject *)&StorageQueue_Type, with, how);
	Py_DECREF(how);
	Py_DECREF(with);
	how = Py_BuildValue("{s:O,s:I,s:I,s:O}", "table", table, "block_size", BLOCK, "chunk_ratio", 2,
			    "zero_when_absent", one_in(2) ? Py_True : Py_False);
	disks[0] = PyObject_CallFunction((PyObject *)&FastDisk_Type, "iIIO", file, FILE_SIZE, 512, Py_True);
	with = Py_BuildValue("(iIIO)", file, BLOCKS * BLOCK, 512, Py_True);
	disks[1] = PyObject_Call((PyObject *)&FastDisk_Type, with, how);
	Py_DECREF(how);
	Py_DECREF(with);
	if (!queue || !disks[0] || !disks[1] || !table)
		fail("no storage queue");
	plug(0, disks[0]);
	plug(1, disks[1]);
	handed = 0;
}

static void end(void)
{
	Py_CLEAR(queue);
	Py_CLEAR(incoming);
	Py_CLEAR(outgoing);
	Py_CLEAR(disks[0]);
	Py_CLEAR(disks[1]);
	Py_CLEAR(table);
	close(doorbell);
	close(file);
}

// The guest ------------------------------------------------------------------------------------------------

// A CDB with an address near a boundary that matters, and its data's direction.
static unsigned some_cdb(uint8_t *cdb, uint32_t blocks)
{
	static const uint8_t codes[] = {0x08, 0x0a, 0x28, 0x2a, 0xa8, 0xaa, 0x88, 0x8a, 0x35, 0x91, 0x12, 0x00};
	unsigned code = codes[below(one_in(4) ? sizeof(codes) : 8)];
	uint64_t lba = below(BLOCKS + 1) * (BLOCK / 512) + below(9) - 4;
	bool long_address = code == 0x88 || code == 0x8a || code == 0x91;
	cdb[0] = (uint8_t)code;
	cdb[1] = one_in(8) ? (uint8_t)draw() : 0;
	for (unsigned i = 0; i < (long_address ? 8 : 4); i++)
		cdb[2 + i] = (uint8_t)(lba >> 8 * ((long_address ? 7 : 3) - i));
	if (code < 0x20) {
		cdb[1] = (uint8_t)(lba >> 16);
		cdb[2] = (uint8_t)(lba >> 8);
		cdb[3] = (uint8_t)lba;
		cdb[4] = (uint8_t)blocks;
	} else if (code < 0x60) {
		cdb[7] = (uint8_t)(blocks >> 8);
		cdb[8] = (uint8_t)blocks;
	} else {
		cdb[(code & 0xe0) == 0xa0 ? 9 : 13] = (uint8_t)blocks;
	}
	return code & 2 ? 0 : 1;
}

static void put_packet(void)
{
	uint8_t packet[256] = {0};
	uint32_t blocks = (uint32_t)below(20), size = 512 * blocks, start = one_in(3) ? (uint32_t)below(4100) : 0;
	uint32_t pages = (start + size + HOT_PAGE_SIZE - 1) / HOT_PAGE_SIZE;
	uint32_t header = 16 + 16 + 8 * pages, length = header + 64;
	uint8_t *body = packet + header, *srb = body + 12;
	unsigned way = some_cdb(srb + 16, blocks);
	struct ring_descriptor descriptor = {9, (uint16_t)(header / 8), (uint16_t)(length / 8), 1, draw()};
	memcpy(packet, &descriptor, sizeof(descriptor));
	put_le32(packet + 20, 1);
	put_le32(packet + 24, size);
	put_le32(packet + 28, start);
	for (uint32_t i = 0; i < pages; i++) {
		// Among what a read may overwrite are the rings, now and then.
		uint64_t page = one_in(60) ? draw() : one_in(40) ? ROM_BASE / HOT_PAGE_SIZE : 8 + below(8);
		if (one_in(60))
			page = below(17);
		memcpy(packet + 32 + 8 * i, &page, sizeof(page));
	}
	put_le32(body, one_in(30) ? (uint32_t)below(15) : 3);
	srb[7] = (uint8_t)below(3);
	srb[8] = one_in(20) ? (uint8_t)draw() : 16;
	srb[10] = (uint8_t)(one_in(20) ? below(3) : way);
	put_le32(srb + 12, one_in(10) ? (uint32_t)below(10000) : size);
	while (one_in(6))
		packet[below(length)] = (uint8_t)draw();

	uint8_t *control = world.ram + INCOMING * HOT_PAGE_SIZE, *data = control + HOT_PAGE_SIZE;
	uint32_t ring = (RING_PAGES - 1) * HOT_PAGE_SIZE, in = get_le32(control), out = get_le32(control + 4);
	if (in >= ring || out >= ring || length + 8 > ring - (in - out + ring) % ring - 8)
		return;
	for (uint32_t i = 0; i < length + 8; i++)
		data[(in + i) % ring] = packet[i];
	put_le32(control, (in + length + 8) % ring);
}

// The host -------------------------------------------------------------------------------------------------

// Returns whether there was something for Python.
static bool serve(void)
{
	PyObject *result = called(queue, "serve");
	unsigned left = (unsigned)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(result, 1));
	handed += (uint64_t)(PyList_GET_SIZE(PyTuple_GET_ITEM(result, 2)) +
			     PyList_GET_SIZE(PyTuple_GET_ITEM(result, 3)));
	Py_DECREF(result);
	if (!left)
		return false;
	result = PyObject_CallMethod(incoming, "read", "I", left);
	if (!result) {
		if (!PyErr_ExceptionMatches(RingError))
			fail("a ring raises what is not documented");
		PyErr_Clear();
		// As after a new start: the ring is empty again.
		put_le32(world.ram + INCOMING * HOT_PAGE_SIZE, ((RingObject *)incoming)->out);
	}
	Py_XDECREF(result);
	return true;
}

static void check_account(void)
{
	PyObject *result = called(queue, "quiesce");
	handed += (uint64_t)(PyList_GET_SIZE(PyTuple_GET_ITEM(result, 0)) +
			     PyList_GET_SIZE(PyTuple_GET_ITEM(result, 1)));
	Py_DECREF(result);
	const StorageQueueObject *self = (StorageQueueObject *)queue;
	if (self->packets_in != self->packets_out + handed || self->free_count != STORAGE_SLOTS || self->in_flight)
		fail("requests are lost, or done twice");
	world.requests += self->packets_out;
}

static void step(void)
{
	unsigned lun = (unsigned)below(2);
	PyObject *number;
	switch (below(16)) {
	case 0:
		Py_DECREF(called(queue, "drain"));
		break;
	case 1:
		plug(lun, one_in(4) ? Py_None : disks[lun]);
		break;
	case 2:
		if (PyObject_SetAttrString(disks[lun], "writable", one_in(4) ? Py_False : Py_True) < 0)
			fail("a disk cannot be made writable");
		break;
	case 3:
		number = PyLong_FromUnsignedLongLong(one_in(8) ? draw() >> 1 : below(BLOCKS * BLOCK));
		if (PyObject_SetAttrString(disks[lun], "size", number) < 0)
			fail("a disk has no size");
		Py_DECREF(number);
		break;
	case 4:
		if (ftruncate(file, one_in(4) ? (off_t)below(FILE_SIZE) : FILE_SIZE) < 0)
			fail("a file cannot be cut");
		break;
	case 5:
	case 6:
		number = PyObject_CallMethod(table, "set", "IK", (unsigned)below(BLOCKS + 1),
					     (unsigned long long)(below(8) | (one_in(8) ? draw() : below(5)) << 20));
		if (!number)
			fail("an entry cannot be set");
		Py_DECREF(number);
		break;
	case 7:
		put_le32(world.ram + OUTGOING * HOT_PAGE_SIZE + 4 * below(5), (uint32_t)some_value());
		break;
	case 8:
		if (one_in(4))
			put_le32(world.ram + INCOMING * HOT_PAGE_SIZE + 4 * below(5), (uint32_t)some_value());
		break;
	case 9:
		number = PyObject_CallMethod(queue, "take_counters", "I", lun);
		if (!number)
			fail("no counters");
		Py_DECREF(number);
		break;
	default:
		for (uint64_t count = below(12); count--;)
			put_packet();
		for (unsigned i = 0; i < 12 && serve(); i++)
			;
		if (!one_in(4)) // take what was sent
			put_le32(world.ram + OUTGOING * HOT_PAGE_SIZE + 4, ((RingObject *)outgoing)->in);
	}
}

void use_disks(void)
{
	begin();
	for (unsigned i = 0; i < STEPS; i++)
		step();
	check_account();
	end();
}
