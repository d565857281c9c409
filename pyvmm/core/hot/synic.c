// The synthetic interrupt controller of one VP: message slots, event flags and SINTs (TLFS v6.0b, chapter 11).
// Its four synthetic timers are in stimer.c, what Python sees of both in synic_object.c.

#include "synic.h"

#include <errno.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum {
	MSR_SCONTROL = 0x40000080,
	MSR_SVERSION = 0x40000081,
	MSR_SIEFP = 0x40000082,
	MSR_SIMP = 0x40000083,
	MSR_EOM = 0x40000084,
	MSR_SINT0 = 0x40000090,
	MSR_STIMER0_CONFIG = 0x400000b0,

	SYNIC_VERSION = 1,
	FIRST_VALID_VECTOR = 16,
	MESSAGE_FLAG_PENDING = 1,
};

static const uint64_t PAGE_ENABLE = 1;
static const uint64_t PAGE_ADDRESS = ~0xfffull;
static const uint64_t SINT_MASKED = 1 << 16;
static const uint64_t SINT_AUTO_EOI = 1 << 17;
static const uint64_t SINT_POLLING = 1 << 18;
static const uint64_t SINT_PROXY = 1 << 20;

// struct hv_message_header of the TLFS. The type is last to be written and tells whether the slot is taken.
struct message_slot {
	_Atomic uint32_t type;
	uint8_t size;
	_Atomic uint8_t flags;
	uint16_t reserved;
	uint64_t sender;
	uint8_t payload[MESSAGE_PAYLOAD];
};
_Static_assert(sizeof(struct message_slot) == 256, "a message slot has 256 bytes");

void synic_interrupt(SynICObject *self, uint8_t vector)
{
	self->interrupts_raised++;
	if (self->vm_fd < 0) {
		if (self->kept_count < KEPT_INTERRUPTS)
			self->kept[self->kept_count++] = vector;
		return;
	}
	struct kvm_msi msi = {
		.address_lo = 0xfee00000u | self->apic_id << 12,
		.data = vector,
	};
	ioctl(self->vm_fd, KVM_SIGNAL_MSI, &msi);
}

void hot_synic_interrupt(SynICObject *self, uint8_t vector)
{
	pthread_mutex_lock(&self->lock);
	synic_interrupt(self, vector);
	pthread_mutex_unlock(&self->lock);
}

// A LAPIC of KVM's that knows nothing of our SINTs wants an EOI for all that it delivers: a vector without one goes to the
// VP's own thread.
void synic_raise(SynICObject *self, unsigned sint)
{
	uint64_t value = self->sint[sint];
	uint8_t vector = (uint8_t)value;
	if (value & SINT_POLLING)
		return;
	if (!(value & SINT_AUTO_EOI) || self->kvm_timers) {
		synic_interrupt(self, vector);
		return;
	}
	self->interrupts_raised++;
	atomic_fetch_or(&self->auto_eoi[vector / 64], 1ull << vector % 64);
	if (self->vp)
		hot_vp_request_scan(self->vp);
}

int hot_synic_auto_eoi(SynICObject *self)
{
	for (int i = AUTO_EOI_WORDS - 1; i >= 0; i--) {
		uint64_t waiting = atomic_load(&self->auto_eoi[i]);
		if (waiting)
			return 64 * i + 63 - __builtin_clzll(waiting);
	}
	return -1;
}

void hot_synic_auto_eoi_done(SynICObject *self, int vector)
{
	atomic_fetch_and(&self->auto_eoi[vector / 64], ~(1ull << vector % 64));
}

bool synic_sint_open(const SynICObject *self, unsigned sint)
{
	return (self->scontrol & 1) && !(self->sint[sint] & (SINT_MASKED | SINT_PROXY));
}

enum delivery synic_deliver(SynICObject *self, unsigned sint, uint32_t type, uint64_t sender, const void *payload,
			    uint8_t size)
{
	if (!synic_sint_open(self, sint) || !(self->simp & PAGE_ENABLE))
		return CLOSED;
	struct message_slot *slot = hot_memory_ptr(
		self->memory, (self->simp & PAGE_ADDRESS) + sint * sizeof(struct message_slot), sizeof(*slot), true);
	if (!slot)
		return CLOSED;
	if (atomic_load(&slot->type)) {
		// The guest reads the flag after it has cleared the type: set it, then look again.
		atomic_fetch_or(&slot->flags, MESSAGE_FLAG_PENDING);
		if (atomic_load(&slot->type))
			return BUSY;
	}
	memcpy(slot->payload, payload, size);
	slot->size = size;
	atomic_store_explicit(&slot->flags, 0, memory_order_relaxed);
	slot->reserved = 0;
	slot->sender = sender;
	atomic_store(&slot->type, type);
	synic_raise(self, sint);
	self->messages_delivered++;
	return DELIVERED;
}

// Messages that wait for their slot ------------------------------------------------------------------

static void tell_of_space(const SynICObject *self, struct message_queue *queue)
{
	uint64_t one = 1;
	while (queue->refused && self->space_event >= 0 && write(self->space_event, &one, sizeof(one)) < 0 &&
	       errno == EINTR)
		;
	queue->refused = false;
}

static void queue_drain(SynICObject *self, unsigned sint)
{
	struct message_queue *queue = self->queues[sint];
	while (queue && queue->count) {
		const struct queued_message *message = &queue->messages[queue->head];
		enum delivery delivery =
			synic_deliver(self, sint, message->type, 0, message->payload, message->size);
		if (delivery == BUSY)
			return;
		if (delivery == CLOSED)
			self->messages_dropped++;
		queue->head = (queue->head + 1) % QUEUE_LENGTH;
		queue->count--;
		tell_of_space(self, queue);
	}
}

bool synic_queue_waits(const SynICObject *self, unsigned sint)
{
	return self->queues[sint] && self->queues[sint]->count;
}

uint64_t hot_synic_scan(SynICObject *self, uint64_t now)
{
	pthread_mutex_lock(&self->lock);
	for (unsigned sint = 0; sint < SINT_COUNT; sint++)
		queue_drain(self, sint);
	uint64_t deadline = self->kvm_timers ? 0 : stimers_scan(self, now, false);
	uint64_t direct = self->kvm_timers ? 0 : stimers_scan(self, now, true);
	if (self->direct_fd >= 0)
		direct_arm(self, direct, now);
	else if (direct && (!deadline || direct < deadline))
		deadline = direct;
	pthread_mutex_unlock(&self->lock);
	return deadline;
}

bool synic_enqueue(SynICObject *self, unsigned sint, uint32_t type, const void *payload, uint8_t size)
{
	struct message_queue *queue = self->queues[sint];
	if (!queue) {
		queue = self->queues[sint] = PyMem_RawCalloc(1, sizeof(*queue));
		if (!queue)
			return false;
	}
	if (queue->count == QUEUE_LENGTH) {
		queue->refused = true;
		return false;
	}
	struct queued_message *message = &queue->messages[(queue->head + queue->count) % QUEUE_LENGTH];
	message->type = type;
	message->size = size;
	memcpy(message->payload, payload, size);
	queue->count++;
	return true;
}

// MSRs ---------------------------------------------------------------------------------------------

bool hot_synic_owns_msr(uint32_t index)
{
	return (index >= MSR_SCONTROL && index <= MSR_EOM) ||
	       (index >= MSR_SINT0 && index < MSR_SINT0 + SINT_COUNT) ||
	       (index >= MSR_STIMER0_CONFIG && index < MSR_STIMER0_CONFIG + 2 * STIMER_COUNT);
}

bool hot_synic_read_msr(SynICObject *self, uint32_t index, uint64_t *value)
{
	bool known = true;
	pthread_mutex_lock(&self->lock);
	switch (index) {
	case MSR_SCONTROL:
		*value = self->scontrol;
		break;
	case MSR_SVERSION:
		*value = SYNIC_VERSION;
		break;
	case MSR_SIEFP:
		*value = self->siefp;
		break;
	case MSR_SIMP:
		*value = self->simp;
		break;
	case MSR_EOM:
		*value = 0;
		break;
	default:
		if (index >= MSR_SINT0 && index < MSR_SINT0 + SINT_COUNT)
			*value = self->sint[index - MSR_SINT0];
		else if (index >= MSR_STIMER0_CONFIG && index < MSR_STIMER0_CONFIG + 2 * STIMER_COUNT)
			*value = stimer_read(self, index - MSR_STIMER0_CONFIG);
		else
			known = false;
	}
	pthread_mutex_unlock(&self->lock);
	return known;
}

// SIMP and SIEFP are overlay pages: a page that comes to stand somewhere is all zero, whatever was in RAM there.
// Stale bytes would look like an occupied slot.
static bool write_page_msr(SynICObject *self, uint64_t *msr, uint64_t value)
{
	if ((value & PAGE_ENABLE) && (value & (PAGE_ENABLE | PAGE_ADDRESS)) != (*msr & (PAGE_ENABLE | PAGE_ADDRESS))) {
		void *page = hot_memory_ptr(self->memory, value & PAGE_ADDRESS, HOT_PAGE_SIZE, true);
		if (!page)
			return false;
		memset(page, 0, HOT_PAGE_SIZE);
	}
	*msr = value;
	return true;
}

// KVM knows neither SINTs that are proxies, which no message reaches, nor polled ones: no LAPIC ever delivers vector 0.
// Those that it has no business with it must not know, for on some processors it wants an exit for each of their EOIs.
uint64_t synic_sint_for_kvm(const SynICObject *self, unsigned sint, bool timer)
{
	uint64_t value = self->sint[sint];
	if ((value & SINT_PROXY) || (!timer && !(value & SINT_AUTO_EOI)))
		return SINT_MASKED;
	return value & SINT_POLLING ? value & SINT_MASKED : value;
}

bool synic_sint_valid(uint64_t value)
{
	return (value & SINT_MASKED) || (value & 0xff) >= FIRST_VALID_VECTOR;
}

static bool write_sint(SynICObject *self, unsigned sint, uint64_t value)
{
	if (!synic_sint_valid(value))
		return false;
	self->sint[sint] = value;
	return true;
}

bool hot_synic_write_msr(SynICObject *self, uint32_t index, uint64_t value, uint64_t now)
{
	bool valid = true;
	pthread_mutex_lock(&self->lock);
	switch (index) {
	case MSR_SCONTROL:
		self->scontrol = value;
		break;
	case MSR_SIEFP:
		valid = write_page_msr(self, &self->siefp, value);
		break;
	case MSR_SIMP:
		valid = write_page_msr(self, &self->simp, value);
		break;
	case MSR_EOM: // the scan that follows every write delivers what waits
		break;
	default:
		if (index >= MSR_SINT0 && index < MSR_SINT0 + SINT_COUNT)
			valid = write_sint(self, index - MSR_SINT0, value);
		else if (index >= MSR_STIMER0_CONFIG && index < MSR_STIMER0_CONFIG + 2 * STIMER_COUNT)
			valid = stimer_write(self, index - MSR_STIMER0_CONFIG, value, now);
		else
			valid = false;
	}
	if (valid && self->kvm_timers) {
		if (index == MSR_EOM)
			kvm_timers_eom(self);
		else
			kvm_timers_connect(self);
	}
	pthread_mutex_unlock(&self->lock);
	return valid;
}

// Any thread ---------------------------------------------------------------------------------------

bool synic_set_event_flag(SynICObject *self, unsigned sint, unsigned flag)
{
	if (!synic_sint_open(self, sint) || !(self->siefp & PAGE_ENABLE))
		return false;
	uint64_t gpa = (self->siefp & PAGE_ADDRESS) + sint * (EVENT_FLAGS / 8) + flag / 32 * 4;
	_Atomic uint32_t *word = hot_memory_ptr(self->memory, gpa, sizeof(*word), true);
	if (!word)
		return false;
	uint32_t bit = 1u << flag % 32;
	if (!(atomic_fetch_or(word, bit) & bit))
		synic_raise(self, sint);
	return true;
}

bool hot_synic_has_event(unsigned sint, unsigned flag)
{
	return sint < SINT_COUNT && flag < EVENT_FLAGS;
}

bool hot_synic_signal_event(SynICObject *self, unsigned sint, unsigned flag)
{
	pthread_mutex_lock(&self->lock);
	bool open = synic_set_event_flag(self, sint, flag);
	pthread_mutex_unlock(&self->lock);
	return open;
}

bool synic_raise_sint(SynICObject *self, unsigned sint)
{
	if (!synic_sint_open(self, sint))
		return false;
	synic_raise(self, sint);
	return true;
}

void hot_synic_attach(SynICObject *self, VpObject *vp)
{
	pthread_mutex_lock(&self->lock);
	self->vp = vp;
	pthread_mutex_unlock(&self->lock);
}

void synic_power_on(SynICObject *self)
{
	self->scontrol = self->siefp = self->simp = 0;
	for (unsigned i = 0; i < SINT_COUNT; i++) {
		self->sint[i] = SINT_MASKED;
		if (self->queues[i]) {
			self->queues[i]->head = self->queues[i]->count = 0;
			tell_of_space(self, self->queues[i]);
		}
	}
	memset(self->timers, 0, sizeof(self->timers));
	for (unsigned i = 0; i < AUTO_EOI_WORDS; i++)
		atomic_store(&self->auto_eoi[i], 0);
}
