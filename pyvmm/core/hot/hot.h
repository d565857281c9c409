// The hot paths of pyvmm: what the C files share. `_hot.pyi` is the contract towards Python.

#ifndef PYVMM_HOT_H
#define PYVMM_HOT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum {
	HOT_PAGE_SIZE = 4096,
	HOT_MAX_REGIONS = 8,
};

// Guest memory ------------------------------------------------------------------------------------

struct hot_region {
	uint64_t gpa;
	uint64_t size;
	uint8_t *host;
	bool readonly;
};

typedef struct {
	PyObject_HEAD
	unsigned count;
	struct hot_region regions[HOT_MAX_REGIONS];
	Py_buffer buffers[HOT_MAX_REGIONS];
} MemoryObject;

// The only way from a guest physical address to a host address. Returns NULL unless all of [gpa, gpa + size)
// lies in one region, which must not be read-only when `write` is set.
static inline void *hot_memory_ptr(const MemoryObject *memory, uint64_t gpa, uint64_t size, bool write)
{
	for (unsigned i = 0; i < memory->count; i++) {
		const struct hot_region *region = &memory->regions[i];
		if (gpa >= region->gpa && gpa - region->gpa < region->size &&
		    size <= region->size - (gpa - region->gpa))
			return write && region->readonly ? NULL : region->host + (gpa - region->gpa);
	}
	return NULL;
}

extern PyTypeObject Memory_Type;

// Rings -------------------------------------------------------------------------------------------

extern PyTypeObject Ring_Type;
extern PyObject *RingError;

// Hypercall statuses of the TLFS that C code returns ------------------------------------------------

enum {
	HV_STATUS_SUCCESS = 0,
	HV_STATUS_INVALID_HYPERCALL_CODE = 2,
	HV_STATUS_INVALID_HYPERCALL_INPUT = 3,
	HV_STATUS_INVALID_ALIGNMENT = 4,
	HV_STATUS_INVALID_PARAMETER = 5,
	HV_STATUS_INVALID_PORT_ID = 0x11,
	HV_STATUS_INVALID_CONNECTION_ID = 0x12,
	HV_STATUS_INSUFFICIENT_BUFFERS = 0x13,
};

#endif
