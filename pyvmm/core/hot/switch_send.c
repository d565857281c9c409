// What goes out to a port: the list of a batch, and what waits.

#include "switch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// What the kernel said of messages to one port.
struct sent {
	unsigned messages; // that are gone, or that it will never take
	size_t part;       // of the next one, on a stream
};

static size_t size_of(const struct msghdr *message)
{
	size_t size = 0;
	for (size_t i = 0; i < message->msg_iovlen; i++)
		size += message->msg_iov[i].iov_len;
	return size;
}

static void count_sent(struct switch_port *port, size_t size)
{
	port->sent_frames++;
	port->sent_bytes += size;
}

// Whether it is worth going on after an error.
static bool handle_error(SwitchObject *self, struct switch_port *port)
{
	switch (errno) {
	case EINTR:
		return true;
	case EAGAIN:
		port->blocked = true;
		return false;
	case EPIPE:
	case ECONNRESET:
	case ENOTCONN:
	case ENXIO:  // the interface is gone
	case EBADFD: // the TAP is gone
		port_lose(self, port, "its other end is gone", errno);
		return false;
	default: // of this frame, or the interface is down
		port->dropped[DROP_REFUSED]++;
		return true;
	}
}

static struct sent send_messages(SwitchObject *self, struct switch_port *port, struct mmsghdr *messages, unsigned count)
{
	struct sent sent = {0};
	while (sent.messages < count) {
		struct msghdr *next = &messages[sent.messages].msg_hdr;
		int done;
		if (port->kind != KIND_TAP)
			done = sendmmsg(port->fd, &messages[sent.messages], count - sent.messages, MSG_DONTWAIT | MSG_NOSIGNAL);
		else
			done = writev(port->fd, next->msg_iov, (int)next->msg_iovlen) < 0 ? -1 : 1;
		for (int i = 0; i < done; i++)
			count_sent(port, size_of(&messages[sent.messages++].msg_hdr) - port->head);
		if (done < 0) {
			bool interrupted = errno == EINTR;
			if (!handle_error(self, port))
				break;
			sent.messages += !interrupted;
		}
	}
	return sent;
}

static struct sent send_stream(SwitchObject *self, struct switch_port *port, struct mmsghdr *messages, unsigned count,
			       size_t already)
{
	struct iovec parts[2 * SWITCH_LISTED];
	struct msghdr all = {.msg_iov = parts};
	struct sent sent = {.part = already};
	for (unsigned i = 0; i < count; i++) {
		const struct msghdr *message = &messages[i].msg_hdr;
		memcpy(&parts[all.msg_iovlen], message->msg_iov, message->msg_iovlen * sizeof(parts[0]));
		all.msg_iovlen += message->msg_iovlen;
	}
	ssize_t done;
	while ((done = sendmsg(port->fd, &all, MSG_DONTWAIT | MSG_NOSIGNAL)) < 0 && errno == EINTR)
		;
	if (done < 0) {
		// An error that isn't the port's end would lose the place in the stream.
		if (errno != EAGAIN)
			errno = EPIPE;
		handle_error(self, port);
		return sent;
	}
	sent.part += (size_t)done;
	for (size_t size; sent.messages < count && sent.part >= (size = already + size_of(&messages[sent.messages].msg_hdr));) {
		count_sent(port, size - port->head);
		sent.part -= size;
		sent.messages++;
		already = 0;
	}
	port->blocked = sent.messages < count;
	return sent;
}

// Sends as many as the limit and the kernel let pass. `already` are bytes of the first one that are not in it any more.
static struct sent send_some(SwitchObject *self, struct switch_port *port, struct mmsghdr *messages, unsigned count,
			     size_t already)
{
	struct sent all = {.part = already};
	while (all.messages < count && !port->blocked && port->fd >= 0 && limit_passes(&port->out, self->now)) {
		unsigned most = port->out.rate ? 1 : count - all.messages;
		struct mmsghdr *next = &messages[all.messages];
		size_t size = all.part + size_of(&next->msg_hdr);
		struct sent now = port->kind == KIND_STREAM ? send_stream(self, port, next, most, all.part)
							     : send_messages(self, port, next, most);
		all.messages += now.messages;
		all.part = now.part;
		if (now.messages)
			limit_charge(&port->out, self->now, size);
		if (now.messages < most)
			break;
	}
	return all;
}

// What waits ---------------------------------------------------------------------------------------

static void queue(SwitchObject *self, struct switch_port *port, const struct msghdr *message, size_t sent)
{
	size_t size = size_of(message);
	size_t cost = sizeof(struct switch_waiting) + size;
	// What a stream has begun it must end.
	struct switch_waiting *waiting =
		sent || port->waiting + cost <= port->most ? malloc(sizeof(*waiting) + size) : NULL;
	if (!waiting) {
		port->dropped[DROP_QUEUE_FULL]++;
		if (sent)
			port_lose(self, port, "no memory", ENOMEM);
		return;
	}
	*waiting = (struct switch_waiting){.size = (uint32_t)size, .sent = (uint32_t)sent};
	net_gather(message->msg_iov, (unsigned)message->msg_iovlen, 0, waiting->data, size);
	*port->last = waiting;
	port->last = &waiting->next;
	port->waiting += cost;
}

static void drop_first(struct switch_port *port)
{
	struct switch_waiting *first = port->first;
	port->first = first->next;
	if (!port->first)
		port->last = &port->first;
	port->waiting -= sizeof(*first) + first->size;
	free(first);
}

void port_drop_waiting(struct switch_port *port)
{
	struct switch_waiting *begun = port->first && port->first->sent && port->fd >= 0 ? port->first : NULL;
	if (begun) {
		port->first = begun->next;
		port->waiting -= sizeof(*begun) + begun->size;
	}
	while (port->first)
		drop_first(port);
	port->last = &port->first;
	if (begun) {
		begun->next = NULL;
		*port->last = begun;
		port->last = &begun->next;
		port->waiting += sizeof(*begun) + begun->size;
	}
}

void port_send_waiting(SwitchObject *self, struct switch_port *port)
{
	struct iovec parts[SWITCH_BATCH];
	struct mmsghdr messages[SWITCH_BATCH];
	struct sent sent;
	unsigned count;
	do {
		count = 0;
		size_t already = port->first ? port->first->sent : 0;
		for (struct switch_waiting *at = port->first; at && count < SWITCH_BATCH; at = at->next, count++) {
			parts[count] = (struct iovec){at->data + at->sent, at->size - at->sent};
			messages[count] = (struct mmsghdr){.msg_hdr = {.msg_iov = &parts[count], .msg_iovlen = 1}};
		}
		sent = send_some(self, port, messages, count, already);
		if (port->fd < 0)
			return;
		for (unsigned i = 0; i < sent.messages; i++)
			drop_first(port);
		if (port->first)
			port->first->sent = (uint32_t)sent.part;
	} while (count && sent.messages == count);
	port_arm(self, port);
}

// The list -----------------------------------------------------------------------------------------

static void send_list(SwitchObject *self, struct switch_port *port)
{
	struct sent sent = {0};
	unsigned count = port->listed;
	port->listed = 0;
	if (!port->first)
		sent = send_some(self, port, port->messages, count, 0);
	if (port->fd < 0)
		return;
	for (unsigned i = sent.messages; i < count && port->fd >= 0; i++)
		queue(self, port, &port->messages[i].msg_hdr, i == sent.messages ? sent.part : 0);
	port_arm(self, port);
}

void switch_send_all(SwitchObject *self)
{
	for (unsigned i = 0; i < self->listed_count; i++) {
		self->listed[i]->on_list = false;
		send_list(self, self->listed[i]);
	}
	self->listed_count = 0;
	self->arena_used = 0;
}

uint8_t *switch_arena(SwitchObject *self, size_t size)
{
	if (self->arena_used + size > SWITCH_ARENA)
		switch_send_all(self);
	uint8_t *room = self->arena + self->arena_used;
	self->arena_used += size;
	return room;
}

void port_list(SwitchObject *self, struct switch_port *port, uint8_t *first, size_t first_size, const uint8_t *second,
	       size_t second_size)
{
	if (port->listed == SWITCH_LISTED)
		send_list(self, port);
	if (port->fd < 0)
		return;
	if (!port->on_list)
		self->listed[self->listed_count++] = port;
	port->on_list = true;
	struct iovec *parts = port->parts[port->listed];
	parts[0] = (struct iovec){first, first_size};
	parts[1] = (struct iovec){(uint8_t *)second, second_size};
	port->messages[port->listed].msg_hdr = (struct msghdr){.msg_iov = parts, .msg_iovlen = second_size ? 2 : 1};
	port->listed++;
	self->work++;
}
