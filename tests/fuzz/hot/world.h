// What the files of the harness share: one world, and chance.

#ifndef PYVMM_FUZZ_WORLD_H
#define PYVMM_FUZZ_WORLD_H

#include "../../../pyvmm/core/hot/bytes.h"
#include "../../../pyvmm/core/hot/synic.h"
#include "../../../pyvmm/core/hot/vp.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
	VPS = 3,
	RAM_SIZE = 16 * HOT_PAGE_SIZE,
	ROM_BASE = 0xfffff000,
	IO_DATA = HOT_PAGE_SIZE, // KVM gives one page for the data of port accesses
	RUN_SIZE = sizeof(struct kvm_run) + IO_DATA,
	FIRST_VP_FD = 100,
	VM_FD = 99,
};

struct world {
	PyObject *memory, *doorbells, *reference, *stubs, *ring;
	PyObject *synics[VPS], *vps[VPS];
	struct kvm_run *runs[VPS];
	uint8_t *ram, *rom;
	uint64_t now;
	unsigned budget; // exits until the run ends
	bool timer_made;
	uint64_t timer_due; // reference time; 0 while the host's timer is not armed
	enum { NOTHING, MSR, CALL_32, CALL_64, SIGNAL } answered; // what the last exit asked for
	uint64_t control;
	uint64_t exits, hypercalls, requests, frames, switched;
};

extern struct world world;

// chance.c: all that is decided is drawn from the life's seed.
void set_seed(uint64_t seed);
uint64_t draw(void);
uint64_t below(uint64_t limit);
bool one_in(unsigned count);
uint64_t some_gpa(void);
uint64_t some_value(void);
void fill(void *to, size_t size);

// host.c
extern struct PyModuleDef stubs; // what the run loop asks Python for
void others_act(void);		 // what other threads do, with the GIL

// disks.c
void use_disks(void); // what a storage controller does, with the GIL

// nics.c
void use_nics(void); // what a synthetic NIC does, with the GIL

// switches.c
void use_switches(void); // what the ports of a switch do, with the GIL

// lives.c
_Noreturn void fail(const char *what);

#endif
