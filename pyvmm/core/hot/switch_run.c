// The worker's loop.

#include "switch.h"

#include <errno.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { EVENTS = 64 };

#define SWEEP_NS 10000000000ull
#define NEVER UINT64_MAX

void switch_wake(SwitchObject *self)
{
	uint64_t one = 1;
	while (write(self->wake, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

void switch_look_at_clocks(SwitchObject *self)
{
	clock_gettime(CLOCK_REALTIME, &self->wall);
	if (self->manual_time)
		return;
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	self->now = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

// When a limit lets the port go on, or NEVER.
static uint64_t deadline_of(const SwitchObject *self, const struct switch_port *port)
{
	uint64_t deadline = NEVER;
	if (port->fd < 0)
		return NEVER;
	if (!(port->armed & EPOLLIN) && !port_held(self, port))
		deadline = port->in.next;
	if (port->first && !port->blocked && port->out.next < deadline)
		deadline = port->out.next;
	return deadline;
}

static int wait_for_events(SwitchObject *self, uint64_t now, uint64_t deadline, struct epoll_event *events)
{
	uint64_t wait = 0;
	if (deadline > now) {
		if (deadline == NEVER || self->manual_time)
			return epoll_pwait2(self->epoll, events, EVENTS, NULL, NULL);
		wait = deadline - now < LIMIT_LOOK_NS ? LIMIT_LOOK_NS : deadline - now;
	}
	struct timespec span = {(time_t)(wait / 1000000000), (long)(wait % 1000000000)};
	return epoll_pwait2(self->epoll, events, EVENTS, &span, NULL);
}

static void attend(SwitchObject *self, struct switch_port *port, uint32_t events)
{
	if (!port) {
		uint64_t count;
		while (read(self->wake, &count, sizeof(count)) < 0 && errno == EINTR)
			;
		return;
	}
	if (port->fd >= 0 && events & EPOLLOUT) {
		port->blocked = false;
		port_send_waiting(self, port);
	}
	if (port->fd >= 0 && events & (EPOLLIN | EPOLLHUP | EPOLLERR))
		port_receive(self, port);
	port_arm(self, port);
}

// Lets go on who may again; returns when that is for the next one.
static uint64_t look_at_limits(SwitchObject *self)
{
	uint64_t next = NEVER;
	for (unsigned i = 0; i < self->count; i++) {
		struct switch_port *port = self->ports[i];
		if (deadline_of(self, port) <= self->now) {
			port_send_waiting(self, port);
			port_arm(self, port);
		}
		uint64_t deadline = deadline_of(self, port);
		if (deadline < next)
			next = deadline;
	}
	return next;
}

static void flush_mirrors(SwitchObject *self)
{
	for (unsigned i = 0; i < self->count; i++) {
		if (self->ports[i]->mirror)
			mirror_flush(self, self->ports[i]);
	}
}

bool switch_run(SwitchObject *self)
{
	struct epoll_event events[EVENTS];
	uint64_t deadline = 0; // there may be something to say already
	visit_lock_worker(&self->lock);
	bool free = !self->running;
	self->running = true;
	while (free) {
		uint64_t now = self->now;
		visit_unlock_worker(&self->lock);
		int count = wait_for_events(self, now, deadline, events);
		visit_lock_worker(&self->lock);
		switch_look_at_clocks(self);
		for (int i = 0; i < count; i++)
			attend(self, events[i].data.ptr, events[i].events);
		for (unsigned i = 0; self->patient && i < self->count; i++)
			port_arm(self, self->ports[i]);
		port_bury(self);
		deadline = NEVER;
		if (self->watched) {
			deadline = look_at_limits(self);
			flush_mirrors(self);
		}
		if (self->now - self->swept >= SWEEP_NS) {
			table_sweep(self);
			self->swept = self->now;
		}
		if (self->stopping || self->ended)
			break;
	}
	if (free)
		self->running = false;
	visit_unlock_worker(&self->lock);
	return free;
}
