// The four synthetic timers of a VP (TLFS v6.0b, chapter 12.3).

#include "synic.h"

enum {
	MESSAGE_TIMER_EXPIRED = 0x80000010u,
};

static const uint64_t CONFIG_ENABLE = 1 << 0;
static const uint64_t CONFIG_PERIODIC = 1 << 1;
static const uint64_t CONFIG_AUTO_ENABLE = 1 << 3;
static const uint64_t CONFIG_DIRECT = 1 << 12;
static const uint64_t CONFIG_RESERVED = ~0xf1fffull;

static unsigned config_vector(uint64_t config)
{
	return config >> 4 & 0xff;
}

static unsigned config_sint(uint64_t config)
{
	return config >> 16 & 0xf;
}

static uint64_t after(uint64_t time, uint64_t count)
{
	return time + count < time ? UINT64_MAX : time + count;
}

void stimer_arm(struct stimer *timer, uint64_t now)
{
	timer->due = 0;
	if (!(timer->config & CONFIG_ENABLE) || !timer->count)
		return;
	timer->due = timer->config & CONFIG_PERIODIC ? after(now, timer->count) : timer->count;
}

uint64_t stimer_read(SynICObject *self, unsigned reg)
{
	if (self->kvm_timers)
		kvm_timers_load(self);
	const struct stimer *timer = &self->timers[reg / 2];
	return reg % 2 ? timer->count : timer->config;
}

bool stimer_write(SynICObject *self, unsigned reg, uint64_t value, uint64_t now)
{
	struct stimer *timer = &self->timers[reg / 2];
	if (self->kvm_timers)
		kvm_timers_load(self);
	if (reg % 2) {
		timer->count = value;
		if (!value)
			timer->config &= ~CONFIG_ENABLE;
		else if (timer->config & CONFIG_AUTO_ENABLE)
			timer->config |= CONFIG_ENABLE;
	} else {
		if (value & (CONFIG_RESERVED | (self->direct_timers ? 0 : CONFIG_DIRECT)))
			return false;
		// A message needs a SINT other than 0, which belongs to the hypervisor.
		if (!(value & CONFIG_DIRECT) && !config_sint(value))
			value &= ~CONFIG_ENABLE;
		timer->config = value;
	}
	stimer_arm(timer, now);
	if (self->kvm_timers)
		kvm_timers_store(self, reg / 2, 1);
	return true;
}

static bool expire(SynICObject *self, unsigned index, uint64_t now)
{
	struct stimer *timer = &self->timers[index];
	if (timer->config & CONFIG_DIRECT) {
		synic_interrupt(self, (uint8_t)config_vector(timer->config));
		return true;
	}
	unsigned sint = config_sint(timer->config);
	if (synic_queue_waits(self, sint))
		return false; // others were there first
	struct {
		uint32_t index;
		uint32_t reserved;
		uint64_t expiration;
		uint64_t delivery;
	} payload = {.index = index, .expiration = timer->due, .delivery = now};
	// Not delivered, for whatever reason: the timer stays due, and the next scan tries again.
	return synic_deliver(self, sint, MESSAGE_TIMER_EXPIRED, 0, &payload, sizeof(payload)) == DELIVERED;
}

uint64_t stimers_scan(SynICObject *self, uint64_t now, bool direct)
{
	uint64_t next = 0;
	for (unsigned i = 0; i < STIMER_COUNT; i++) {
		struct stimer *timer = &self->timers[i];
		if (!!(timer->config & CONFIG_DIRECT) != direct)
			continue;
		if (timer->due && timer->due <= now) {
			if (!expire(self, i, now))
				continue; // the guest's next EOM or SynIC access brings another scan
			if (timer->config & CONFIG_PERIODIC) {
				// Ticks that nobody could take are not made up for, but the phase stays.
				timer->due = after(now - (now - timer->due) % timer->count, timer->count);
			} else {
				timer->config &= ~CONFIG_ENABLE;
				timer->due = 0;
			}
		}
		if (timer->due && (!next || timer->due < next))
			next = timer->due;
	}
	return next;
}

bool stimers_wait_direct(const SynICObject *self)
{
	for (unsigned i = 0; i < STIMER_COUNT; i++) {
		if (self->timers[i].due && (self->timers[i].config & CONFIG_DIRECT))
			return true;
	}
	return false;
}

bool stimers_on(const SynICObject *self)
{
	for (unsigned i = 0; i < STIMER_COUNT; i++) {
		if (self->timers[i].config & (CONFIG_ENABLE | CONFIG_AUTO_ENABLE))
			return true;
	}
	return false;
}

unsigned stimers_sints(const SynICObject *self)
{
	unsigned sints = 0;
	for (unsigned i = 0; i < STIMER_COUNT; i++) {
		uint64_t config = self->timers[i].config;
		if ((config & (CONFIG_ENABLE | CONFIG_AUTO_ENABLE)) && !(config & CONFIG_DIRECT))
			sints |= 1u << config_sint(config);
	}
	return sints;
}

PyObject *stimers_save(const struct stimer *timers)
{
	PyObject *list = PyList_New(STIMER_COUNT);
	for (unsigned i = 0; list && i < STIMER_COUNT; i++) {
		PyObject *entry = Py_BuildValue("[KKK]", timers[i].config, timers[i].count, timers[i].due);
		if (!entry)
			Py_CLEAR(list);
		else
			PyList_SET_ITEM(list, i, entry);
	}
	return list;
}

bool stimers_parse(PyObject *saved, struct stimer *timers)
{
	if (PyList_GET_SIZE(saved) != STIMER_COUNT)
		return false;
	for (unsigned i = 0; i < STIMER_COUNT; i++) {
		unsigned long long config, count, due;
		PyObject *entry = PySequence_Tuple(PyList_GET_ITEM(saved, i));
		bool valid = entry && PyArg_ParseTuple(entry, "KKK", &config, &count, &due) &&
			     !(config & CONFIG_RESERVED) && (!due || count);
		Py_XDECREF(entry);
		if (!valid)
			return false;
		timers[i] = (struct stimer){.config = config, .count = count, .due = due};
	}
	return true;
}
