// The block allocation table of a VHDX image, as the fast path reads it.

#ifndef PYVMM_TABLE_H
#define PYVMM_TABLE_H

#include "hot.h"

// States of an entry (MS-VHDX 2.5.1.1); its other bits from 20 on are an offset in the file in MiB.
enum {
	TABLE_ABSENT = 0,
	TABLE_UNDEFINED = 1,
	TABLE_ZERO = 2,
	TABLE_UNMAPPED = 3,
	TABLE_PRESENT = 6,
	TABLE_PARTIAL = 7,
	TABLE_STATE_MASK = 7,
};

#define TABLE_OFFSET_MASK (~0xfffffULL)

typedef struct {
	PyObject_HEAD
	uint32_t count;
	_Atomic uint64_t *entries;
} BlockTableObject;

// Any thread, no GIL.
static inline uint64_t hot_table_get(const BlockTableObject *table, uint32_t index)
{
	return atomic_load_explicit(&table->entries[index], memory_order_acquire);
}

#endif
