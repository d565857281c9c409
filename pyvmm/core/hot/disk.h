// A disk whose data C code reaches without Python: a file, and the table that says where in it each block is.

#ifndef PYVMM_DISK_H
#define PYVMM_DISK_H

#include "table.h"

enum {
	// No transfer is longer than a block, so it crosses one boundary between blocks at most.
	DISK_PARTS = 2,
	DISK_MIN_BLOCK = 1 << 20,
};

typedef struct {
	PyObject_HEAD
	BlockTableObject *table; // NULL for a raw image
	uint64_t block_size;
	uint32_t chunk_ratio;
	uint32_t sector_size;
	bool zero_when_absent;
	bool in_memory; // the file is on tmpfs: nothing waits, but the kernel doesn't say so
	_Atomic bool writable;
	_Atomic bool writes_wait; // the file system cannot say whether a write would wait
	_Atomic bool flush_failed; // a flush or durable write did, and none may succeed any more
	_Atomic int fd;           // -1 once closed
	_Atomic uint64_t size;
} FastDiskObject;

// Where a part of a transfer is in the file; DISK_ZEROS where it reads as zeros.
struct disk_part {
	uint64_t where;
	uint32_t length;
};

#define DISK_ZEROS UINT64_MAX

// Finds a range of at most DISK_MIN_BLOCK bytes inside the disk. Returns the number of parts, or 0 if only Python knows.
// What it found holds as long as the caller's queue is locked or has the request in flight.
unsigned hot_disk_find(const FastDiskObject *disk, bool write, uint64_t offset, uint32_t length,
		       struct disk_part parts[DISK_PARTS]);

#endif
