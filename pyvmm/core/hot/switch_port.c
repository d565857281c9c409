// Ports come and go.

#include "switch.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

static bool has_room(const SwitchObject *self, int number)
{
	if (!port_find(self, number) && self->count < SWITCH_PORTS)
		return true;
	errno = EEXIST;
	return false;
}

struct switch_port *port_add(SwitchObject *self, int number, enum switch_kind kind, int fd)
{
	struct switch_port *port = has_room(self, number) ? calloc(1, sizeof(*port)) : NULL;
	if (!port) {
		close(fd);
		return NULL;
	}
	*port = (struct switch_port){
		.number = number,
		.kind = kind,
		.fd = fd,
		.head = kind == KIND_STREAM ? STREAM_LENGTH : VNET_SIZE,
		.spoofing = true,
		.offloads = kind == KIND_TAP || kind == KIND_PACKET ? OFFLOAD_ALL : 0,
		.most = self->patient ? QUEUE_PATIENT : QUEUE_BYTES,
	};
	port->last = &port->first;
	self->ports[self->count++] = port;
	struct epoll_event event = {.events = EPOLLIN, .data.ptr = port};
	port->armed = EPOLLIN;
	if (kind == KIND_STREAM && !(port->stream = malloc(STREAM_BUFFER)))
		goto fail;
	int flags = fcntl(fd, F_GETFL);
	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 || epoll_ctl(self->epoll, EPOLL_CTL_ADD, fd, &event) < 0)
		goto fail;
	return port;
fail:;
	int error = errno;
	port_remove(self, port);
	errno = error;
	return NULL;
}

struct switch_port *port_find(const SwitchObject *self, int number)
{
	for (unsigned i = 0; i < self->count; i++) {
		if (self->ports[i]->number == number)
			return self->ports[i];
	}
	return NULL;
}

static void disconnect(SwitchObject *self, struct switch_port *port)
{
	// Closing alone doesn't if somebody has a copy of the descriptor, such as a process just forked.
	epoll_ctl(self->epoll, EPOLL_CTL_DEL, port->fd, NULL);
	close(port->fd);
	port->fd = -1;
	port->listed = 0;
	port_drop_waiting(port);
	table_forget(self, port);
	if (port->mirror)
		mirror_flush(self, port);
	mirror_stop(port);
}

void port_lose(SwitchObject *self, struct switch_port *port, const char *why, int error)
{
	if (port->fd < 0)
		return;
	disconnect(self, port);
	port->lost = why;
	port->lost_error = error;
	self->ended = true;
}

void port_remove(SwitchObject *self, struct switch_port *port)
{
	if (port->fd >= 0)
		disconnect(self, port);
	if (port->has_mac)
		fixed_remove(self, port);
	unsigned at = 0;
	while (self->ports[at] != port)
		at++;
	self->ports[at] = self->ports[--self->count];
	port->next_dead = self->dead;
	self->dead = port;
	if (!self->running)
		port_bury(self);
	switch_watch(self);
}

void port_bury(SwitchObject *self)
{
	while (self->dead) {
		struct switch_port *port = self->dead;
		self->dead = port->next_dead;
		free(port->stream);
		free(port);
	}
}

void switch_watch(SwitchObject *self)
{
	self->watched = false;
	for (unsigned i = 0; i < self->count; i++)
		self->watched |= self->ports[i]->in.rate || self->ports[i]->out.rate || self->ports[i]->mirror;
}

bool port_held(const SwitchObject *self, const struct switch_port *port)
{
	for (unsigned i = 0; self->patient && i < self->count; i++) {
		if (self->ports[i] != port && self->ports[i]->waiting > self->ports[i]->most / 2)
			return true;
	}
	return false;
}

void port_arm(SwitchObject *self, struct switch_port *port)
{
	bool in = limit_passes(&port->in, self->now) && !port_held(self, port);
	uint32_t wanted = (in ? EPOLLIN : 0u) | (port->blocked ? EPOLLOUT : 0u);
	if (port->fd < 0 || wanted == port->armed)
		return;
	struct epoll_event event = {.events = wanted, .data.ptr = port};
	if (epoll_ctl(self->epoll, EPOLL_CTL_MOD, port->fd, &event) < 0)
		port_lose(self, port, "it cannot be waited for", errno);
	else
		port->armed = wanted;
}
