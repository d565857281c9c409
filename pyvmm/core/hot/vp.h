// What vp.c, hypercall.c and interrupt.c share: one VP.

#ifndef PYVMM_VP_H
#define PYVMM_VP_H

#include "hot.h"

#include <linux/kvm.h>
#include <time.h>

enum {
	EXIT_REASONS = 64,

	SYNTHETIC_MSR_BASE = 0x40000000,
	SYNTHETIC_MSR_COUNT = 0x200,

	// Slots: calls by code, then extended calls.
	PLAIN_HYPERCALLS = 0x200,
	FIRST_EXTENDED_HYPERCALL = 0x8000,
	EXTENDED_HYPERCALLS = 0x10,
	HYPERCALL_SLOTS = PLAIN_HYPERCALLS + EXTENDED_HYPERCALLS,
	MAX_LAYOUTS = 32,
	MAX_KVM_MSRS = 18,
	MAX_PEERS = 64, // flushes and IPIs keep sets of VPs in 64 bits

	// 500 us: how long a timer that has fired leaves the guest alone until it has shown that it runs. With shorter
	// periods the next one would be due before the VP is back in the guest.
	TICKS_APART = 5000,
};

// The parameters of a hypercall, in bytes. A call with elements is a rep call.
struct hypercall_layout {
	uint16_t code;
	uint16_t header;
	uint16_t element_in;
	uint16_t element_out;
	uint16_t output;
	bool variable; // more header may follow the fixed one
};

// How often something went wrong for the guest, and the last time: reference time, and the value written to an MSR or
// the result of a hypercall.
struct errors {
	uint64_t count;
	uint64_t time;
	uint64_t value;
};

struct gil {
	PyThreadState *saved;
};

struct VpObject {
	PyObject_HEAD
	int fd;
	unsigned index;
	struct kvm_run *run;
	Py_buffer run_buffer;
	MemoryObject *memory;
	SynICObject *synic;
	DoorbellsObject *doorbells;
	ReferenceTimeObject *reference;
	PyObject *pio;
	PyObject *mmio;
	PyObject *hypervisor;
	unsigned peer_count; // all VPs of the partition by index, this one too
	VpObject *peers[MAX_PEERS];

	atomic_bool stop_requested;
	atomic_bool scan_requested;
	pthread_mutex_t thread_lock; // the two below
	bool running;
	pthread_t thread;

	timer_t timer; // exists while the VP runs
	atomic_bool timer_fired;
	uint64_t timer_deadline; // 0 while it is not armed
	uint64_t quiet_until; // the timer has fired, and the guest has given no other sign of life since; 0 otherwise
	pthread_t direct_thread; // see direct.c
	int direct_fd; // -1: it has no thread yet
	atomic_bool direct_ends;
	uint64_t retry_time; // when to look again whether the guest can take an auto-EOI interrupt; 0 if none waits
	uint64_t retry_wait;

	// Whoever wants the TLB flushed draws a ticket; the VP's own thread flushes before it next enters the guest.
	atomic_bool in_guest;
	_Atomic uint64_t flush_wanted;
	_Atomic uint64_t flush_done;

	uint8_t msr_offered[SYNTHETIC_MSR_COUNT / 8];
	struct hypercall_layout layouts[MAX_LAYOUTS];
	uint8_t layout_of[HYPERCALL_SLOTS]; // position in `layouts` and 1; 0 for a call that is not offered
	char hypercalls_enabled;
	char xmm_input;
	char extended_ranges;
	char trace_msr;
	char trace_hypercall;

	uint64_t exits[EXIT_REASONS];
	uint64_t msr_reads[SYNTHETIC_MSR_COUNT];
	uint64_t msr_writes[SYNTHETIC_MSR_COUNT];
	uint64_t hypercalls[HYPERCALL_SLOTS];
	uint64_t hypercalls_unknown;
	struct errors msr_read_errors[SYNTHETIC_MSR_COUNT];
	struct errors msr_write_errors[SYNTHETIC_MSR_COUNT];
	struct errors hypercall_errors[HYPERCALL_SLOTS];
};

// vp.c: wants the GIL.
PyObject *hot_vp_call(PyObject *object, const char *method, const char *format, ...);
bool hot_vp_call_done(PyObject *result);
// vp.c: takes the VP out of the guest; any thread.
void hot_vp_kick(VpObject *self);

// hypercall.c: the port access of the hypercall page. False with a Python exception set.
bool hot_vp_hypercall(VpObject *self, struct gil *gil, bool caller_64);
PyObject *hot_vp_hypercall_method(VpObject *self, PyObject *args);
PyObject *hot_vp_offer_hypercalls(VpObject *self, PyObject *args);
// Flushes the TLB if somebody wants it. The VP's own thread, right before the guest.
void hot_vp_flush_tlb(VpObject *self);

// counts.c: a call code's position in the arrays above, or -1 for one that no hypervisor has.
int hot_vp_hypercall_slot(uint64_t code);
void hot_vp_count_error(const VpObject *self, struct errors *errors, uint64_t value);
PyObject *hot_vp_counts(VpObject *self, PyObject *ignored);

// direct.c: makes the thread that expires the VP's direct timers, if that can be; ends it.
void hot_vp_start_direct(VpObject *self);
void hot_vp_end_direct(VpObject *self);

// interrupt.c: has the guest take an interrupt that needs no EOI. False if one waits that it cannot take now.
bool hot_vp_inject(VpObject *self);
// Waits for an interrupt, for the GUEST_IDLE MSR, but not for ever.
void hot_vp_idle(VpObject *self);
// Reads or writes MSRs that KVM keeps, at most MAX_KVM_MSRS. False if KVM refuses one, or while the VP runs on another
// thread, which KVM would keep this one waiting for.
bool hot_vp_kvm_msrs(VpObject *self, bool write, struct kvm_msr_entry *entries, unsigned count);
// EOI, ICR and TPR by MSR. False where the guest must get #GP.
bool hot_vp_owns_apic_msr(uint32_t index);
bool hot_vp_apic_msr(VpObject *self, bool write, uint32_t index, uint64_t *value);
PyObject *hot_vp_set_lazy_eoi(VpObject *self, PyObject *args);

#endif
