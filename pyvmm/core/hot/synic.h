// What synic.c, stimer.c and synic_object.c share.

#ifndef PYVMM_SYNIC_H
#define PYVMM_SYNIC_H

#include "hot.h"

enum {
	SINT_COUNT = 16,
	STIMER_COUNT = 4,
	EVENT_FLAGS = 2048,
	MESSAGE_PAYLOAD = 240,
	QUEUE_LENGTH = 32,
	KEPT_INTERRUPTS = 64,
	AUTO_EOI_WORDS = 256 / 64,
};

struct queued_message {
	uint32_t type;
	uint8_t size;
	uint8_t payload[MESSAGE_PAYLOAD];
};

struct message_queue {
	unsigned head;
	unsigned count;
	bool refused; // somebody was turned away and waits for the space event
	struct queued_message messages[QUEUE_LENGTH];
};

struct stimer {
	uint64_t config;
	uint64_t count;
	uint64_t due; // reference time of the next expiration; 0 while the timer is not armed
};

struct SynICObject {
	PyObject_HEAD
	MemoryObject *memory;
	VpObject *vp; // wakes up when a message is queued
	int vm_fd;
	unsigned vp_index;
	unsigned apic_id;
	int space_event;
	pthread_mutex_t lock; // all below; its holder never waits for the GIL
	uint64_t scontrol;
	uint64_t siefp;
	uint64_t simp;
	uint64_t sint[SINT_COUNT];
	struct stimer timers[STIMER_COUNT];
	struct message_queue *queues[SINT_COUNT]; // made at a SINT's first message
	uint64_t messages_delivered;
	uint64_t messages_dropped;
	uint64_t interrupts_raised;
	_Atomic uint64_t auto_eoi[AUTO_EOI_WORDS]; // vectors that wait to be taken; set with the lock, read without
	int direct_fd; // the timerfd of the thread that expires direct timers, or -1
	uint64_t direct_deadline; // what it is armed for; 0 for nothing
	char direct_timers; // whether a timer may interrupt without a message
	char kvm_timers; // see kvm_timers.c: `timers` is a copy then, and what the guest has written to COUNT may be missing
	unsigned kept_count; // with no VM to interrupt
	uint8_t kept[KEPT_INTERRUPTS];
};

// All of these want the lock.

enum delivery {
	DELIVERED,
	BUSY,   // try again after the guest has written EOM
	CLOSED, // SynIC, message page or SINT are off
};

enum delivery synic_deliver(SynICObject *synic, unsigned sint, uint32_t type, uint64_t sender, const void *payload,
			    uint8_t size);
// False if the queue is full.
bool synic_enqueue(SynICObject *synic, unsigned sint, uint32_t type, const void *payload, uint8_t size);
bool synic_queue_waits(const SynICObject *synic, unsigned sint);
// False if the SynIC, the event flags page or the SINT is off.
bool synic_set_event_flag(SynICObject *synic, unsigned sint, unsigned flag);
bool synic_sint_open(const SynICObject *synic, unsigned sint);
// False if the SynIC or the SINT is off.
bool synic_raise_sint(SynICObject *synic, unsigned sint);
void synic_power_on(SynICObject *synic);
void synic_interrupt(SynICObject *synic, uint8_t vector);
// Raises a SINT, unless it is polled.
void synic_raise(SynICObject *synic, unsigned sint);

// `reg` counts MSRs from STIMER0_CONFIG: even numbers are CONFIG, odd ones COUNT.
uint64_t stimer_read(SynICObject *synic, unsigned reg);
bool stimer_write(SynICObject *synic, unsigned reg, uint64_t value, uint64_t now);
// Expires the timers that are due, the direct ones or those that send messages. Returns the next deadline, 0 for none.
uint64_t stimers_scan(SynICObject *synic, uint64_t now, bool direct);

// Sets when a timer is due.
void stimer_arm(struct stimer *timer, uint64_t now);
// Whether a timer is enabled, or will be when COUNT is written.
bool stimers_on(const SynICObject *synic);
// The SINTs that such timers send messages to, a bit for each.
unsigned stimers_sints(const SynICObject *synic);
// Whether a direct timer is armed.
bool stimers_wait_direct(const SynICObject *synic);
// Has the thread of direct.c wake at `deadline`; 0 for never.
void direct_arm(SynICObject *synic, uint64_t deadline, uint64_t now);

// kvm_timers.c, for timers that KVM runs. Takes them over from KVM, unless the VP is in the guest now.
void kvm_timers_load(SynICObject *synic);
// Gives `count` timers from `first` to KVM.
void kvm_timers_store(SynICObject *synic, unsigned first, unsigned count);
// Tells KVM of SINTs and message page, and has it try again what it could not deliver.
void kvm_timers_connect(SynICObject *synic);
void kvm_timers_eom(SynICObject *synic);
// What KVM is to make of a SINT, to which a timer sends or none.
uint64_t synic_sint_for_kvm(const SynICObject *synic, unsigned sint, bool timer);

// These want the GIL or nothing, and no lock.

bool synic_sint_valid(uint64_t value);
PyObject *stimers_save(const struct stimer *timers);
bool stimers_parse(PyObject *saved, struct stimer *timers);

#endif
