// How long a worker that has found its ring empty watches it before it sleeps: a guest whose packets are seen in time saves
// the exit for its signal, and the worker the way out of its sleep.
//
// The while grows as long as packets come before the longest one is over, and is nothing otherwise, as with KVM's polling in
// HLT (Documentation/virt/kvm/halt-polling.rst).

#ifndef PYVMM_WATCH_H
#define PYVMM_WATCH_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

enum {
	// KVM's own halt_poll_ns has the same bound.
	WATCH_MIN_NS = 20 * 1000,
	WATCH_MAX_NS = 200 * 1000,
	// After so many times in vain nothing is watched for the next times: the guest may want this very CPU.
	WATCH_TRIES = 8,
	WATCH_RESTS = 256,
};

struct watch {
	uint64_t idle_since, limit_ns;
	unsigned vain; // times that it was watched, or not, since it last paid
};

static inline uint64_t watch_clock_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

// Whether to watch at all, from `now` on.
static inline bool watch_begin(struct watch *watch, uint64_t now)
{
	if (!watch->idle_since)
		watch->idle_since = now;
	if (!watch->limit_ns)
		return false;
	if (watch->vain >= WATCH_TRIES) {
		watch->vain = watch->vain < WATCH_TRIES + WATCH_RESTS ? watch->vain + 1 : 0;
		return false;
	}
	return true;
}

static inline bool watch_goes_on(const struct watch *watch, uint64_t now)
{
	return now - watch->idle_since < watch->limit_ns;
}

// There is work.
static inline void watch_worked(struct watch *watch)
{
	if (!watch->idle_since)
		return;
	uint64_t idle = watch_clock_ns() - watch->idle_since;
	if (idle > WATCH_MAX_NS)
		watch->limit_ns = 0;
	else if (idle > watch->limit_ns)
		watch->limit_ns = !watch->limit_ns		       ? WATCH_MIN_NS
				  : watch->limit_ns < WATCH_MAX_NS / 2 ? 2 * watch->limit_ns
								       : WATCH_MAX_NS;
	watch->idle_since = 0;
}

#endif
