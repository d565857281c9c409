// The hot paths of pyvmm: what the C files share. `_hot.pyi` is the contract towards Python.

#ifndef PYVMM_HOT_H
#define PYVMM_HOT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

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

// Reference time ----------------------------------------------------------------------------------

typedef struct {
	PyObject_HEAD
	uint64_t tsc_offset; // guest TSC - host TSC
	uint64_t scale;      // 100 ns units per TSC tick, as a 64-bit binary fraction
	int64_t offset;      // so that reference time was 0 when this object was made
} ReferenceTimeObject;

uint64_t hot_reference_now(const ReferenceTimeObject *reference);

// What to arm a timer of the host with for a time in the future, or at once if that has passed; 0 disarms it.
static inline struct itimerspec hot_wait_for(uint64_t deadline, uint64_t now)
{
	uint64_t wait = !deadline ? 0 : deadline > now ? deadline - now : 1; // 100 ns
	struct itimerspec spec = {.it_value = {(time_t)(wait / 10000000), (long)(wait % 10000000 * 100)}};
	return spec;
}

extern PyTypeObject ReferenceTime_Type;

// Rings -------------------------------------------------------------------------------------------

extern PyTypeObject Ring_Type;
extern PyObject *RingError;

// Disks -------------------------------------------------------------------------------------------

extern PyTypeObject BlockTable_Type;
extern PyTypeObject FastDisk_Type;
extern PyTypeObject StorageQueue_Type;

extern PyTypeObject NetDevice_Type;
extern PyTypeObject NetQueue_Type;
// Adds what `NetDevice.set_offloads` takes; false with an exception set.
bool hot_net_add_constants(PyObject *module);

PyObject *hot_crc32c(PyObject *module, PyObject *args);

// Networks ----------------------------------------------------------------------------------------

extern PyTypeObject Switch_Type;

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

// Event ports -------------------------------------------------------------------------------------

typedef struct DoorbellsObject DoorbellsObject;

// HvSignalEvent's work: returns a hypercall status. Needs no GIL.
int hot_doorbells_signal(DoorbellsObject *doorbells, uint32_t connection_id, uint32_t flag);

extern PyTypeObject Doorbells_Type;

// SynIC -------------------------------------------------------------------------------------------

typedef struct SynICObject SynICObject;
typedef struct VpObject VpObject;

// The functions below need no GIL. MSR access and scan belong to the VP's own thread.
bool hot_synic_owns_msr(uint32_t index);
bool hot_synic_read_msr(SynICObject *synic, uint32_t index, uint64_t *value);
bool hot_synic_write_msr(SynICObject *synic, uint32_t index, uint64_t value, uint64_t now);
// Returns the next deadline in reference time, 0 for none.
uint64_t hot_synic_scan(SynICObject *synic, uint64_t now);
// direct.c: has another thread, which waits for the timerfd, expire direct timers; -1 for none: then the scan does.
void hot_synic_set_direct_fd(SynICObject *synic, int fd);
void hot_synic_expire_direct(SynICObject *synic, uint64_t now);
bool hot_synic_has_direct(SynICObject *synic);
// Sets an event flag and interrupts on 0 to 1; any thread. False if the SynIC, its event page or the SINT is off.
bool hot_synic_has_event(unsigned sint, unsigned flag);
bool hot_synic_signal_event(SynICObject *synic, unsigned sint, unsigned flag);
// Whom to signal: an event flag of a SynIC, or nobody that C knows of if that is NULL.
struct hot_target {
	SynICObject *synic;
	unsigned sint, flag;
};
// Reads the arguments of a method `set_target`; the SynIC is a new reference. False with an exception set.
bool hot_target_parse(PyObject *args, struct hot_target *target);
// Interrupts the VP past all SINTs.
void hot_synic_interrupt(SynICObject *synic, uint8_t vector);
// The highest vector of an auto-EOI SINT that waits for its VP, or -1; and that it has been taken.
int hot_synic_auto_eoi(SynICObject *synic);
void hot_synic_auto_eoi_done(SynICObject *synic, int vector);
// Whether KVM runs a timer that may expire.
bool hot_synic_kvm_timer_on(const SynICObject *synic);
// Names the VP that must wake up when a message is queued; NULL for none.
void hot_synic_attach(SynICObject *synic, VpObject *vp);

extern PyTypeObject SynIC_Type;

// VP ----------------------------------------------------------------------------------------------

// Makes the VP look at its SynIC before it goes on in the guest. Any thread, no GIL.
void hot_vp_request_scan(VpObject *vp);
// Installs the signal handler that takes a VP out of the guest. Returns false with errno set.
bool hot_vp_install_kick(void);

extern PyTypeObject Vp_Type;

// Zeros --------------------------------------------------------------------------------------------

PyObject *hot_data_runs(PyObject *module, PyObject *args);

#endif
