// What comes in from a port: batches into the switch's buffers.

#include "switch.h"

#include <errno.h>
#include <linux/if_packet.h>
#include <string.h>
#include <unistd.h>

static uint8_t *buffer_of(const SwitchObject *self, unsigned index)
{
	return self->buffers + (size_t)index * SWITCH_BUFFER;
}

static void take_frame(SwitchObject *self, struct switch_port *port, struct switch_frame *frame, size_t size, int tag)
{
	limit_charge(&port->in, self->now, size);
	if (switch_admit(self, port, frame, size, tag))
		switch_forward(self, port, frame);
}

static void take_message(SwitchObject *self, struct switch_port *port, uint8_t *message, size_t size, int tag)
{
	if (size < VNET_SIZE || size > SWITCH_MESSAGE) {
		port->dropped[size < VNET_SIZE ? DROP_MALFORMED : DROP_OVERSIZED]++;
		return;
	}
	struct switch_frame frame = {.data = message + VNET_SIZE, .headed = true};
	memcpy(&frame.vnet, message, VNET_SIZE);
	take_frame(self, port, &frame, size - VNET_SIZE, tag);
}

// After a read that gave nothing. Whether it may be tried again at once.
static bool read_failed(SwitchObject *self, struct switch_port *port, int error)
{
	switch (error) {
	case EINTR:
		return true;
	case EAGAIN:
		return false;
	case ENETDOWN: // said once when a packet socket's interface goes down; it may come up again
	case EINVAL:   // a packet that virtio_net_hdr has no words for
		if (port->kind == KIND_PACKET)
			return true;
		break;
	}
	port_lose(self, port, error ? "it cannot be read" : "its other end is gone", error);
	return false;
}

// Whether the port may have one more frame of its batch.
static bool may_go_on(const SwitchObject *self, const struct switch_port *port, unsigned done)
{
	return port->fd >= 0 && done < SWITCH_BATCH && self->work < SWITCH_WORK && limit_passes(&port->in, self->now);
}

static void receive_tap(SwitchObject *self, struct switch_port *port)
{
	for (unsigned i = 0; may_go_on(self, port, i); i++) {
		ssize_t size = read(port->fd, buffer_of(self, i), SWITCH_MESSAGE);
		if (size > 0)
			take_message(self, port, buffer_of(self, i), (size_t)size, TAG_NONE);
		else if (!read_failed(self, port, size ? errno : 0))
			return;
	}
}

// The tag that the kernel took out of a packet.
static int tag_of(struct msghdr *message)
{
	for (struct cmsghdr *at = CMSG_FIRSTHDR(message); at; at = CMSG_NXTHDR(message, at)) {
		if (at->cmsg_level == SOL_PACKET && at->cmsg_type == PACKET_AUXDATA) {
			struct tpacket_auxdata data;
			memcpy(&data, CMSG_DATA(at), sizeof(data));
			if (!(data.tp_status & TP_STATUS_VLAN_VALID))
				return TAG_NONE;
			bool other = data.tp_status & TP_STATUS_VLAN_TPID_VALID && data.tp_vlan_tpid != ETHERTYPE_VLAN;
			return other ? TAG_OF_PROVIDER : data.tp_vlan_tci;
		}
	}
	return TAG_NONE;
}

static void receive_messages(SwitchObject *self, struct switch_port *port)
{
	unsigned most = port->in.rate || port->heavy ? 1 : SWITCH_BATCH;
	for (unsigned i = 0; may_go_on(self, port, i); i += most) {
		struct mmsghdr *messages = &self->received[i];
		for (unsigned j = 0; j < most; j++) {
			messages[j].msg_hdr.msg_flags = 0;
			messages[j].msg_hdr.msg_controllen = port->kind == KIND_PACKET ? sizeof(self->control[0]) : 0;
		}
		int count = recvmmsg(port->fd, messages, most, MSG_DONTWAIT, NULL);
		if (count < 0 && !read_failed(self, port, errno))
			return;
		for (int j = 0; j < count; j++) {
			struct mmsghdr *message = &messages[j];
			size_t size = message->msg_hdr.msg_flags & MSG_TRUNC ? SWITCH_MESSAGE + 1 : message->msg_len;
			if (!size) {
				read_failed(self, port, 0);
				return;
			}
			int tag = port->kind == KIND_PACKET ? tag_of(&message->msg_hdr) : TAG_NONE;
			take_message(self, port, buffer_of(self, i + (unsigned)j), size, tag);
			if (port->fd < 0)
				return;
		}
		if (count < (int)most)
			return;
	}
}

static void receive_stream(SwitchObject *self, struct switch_port *port)
{
	ssize_t done = read(port->fd, port->stream + port->stream_used, STREAM_BUFFER - port->stream_used);
	if (done <= 0) {
		read_failed(self, port, done ? errno : 0);
		return;
	}
	port->stream_used += (size_t)done;
	uint8_t *at = port->stream;
	size_t left = port->stream_used;
	while (left >= STREAM_LENGTH && port->fd >= 0) {
		size_t size = net_get32(at);
		if (size < NET_ETHERNET || size > NET_MAX_FRAME) {
			port_lose(self, port, "it sends no frames", 0);
			return;
		}
		if (left < STREAM_LENGTH + size)
			break;
		take_frame(self, port, &(struct switch_frame){.data = at + STREAM_LENGTH}, size, TAG_NONE);
		at += STREAM_LENGTH + size;
		left -= STREAM_LENGTH + size;
	}
	switch_send_all(self); // before the rest moves over what is listed
	memmove(port->stream, at, left);
	port->stream_used = left;
}

void port_receive(SwitchObject *self, struct switch_port *port)
{
	self->work = 0;
	if (port->kind == KIND_TAP)
		receive_tap(self, port);
	else if (port->kind == KIND_STREAM)
		receive_stream(self, port);
	else
		receive_messages(self, port);
	port->heavy = self->work > SWITCH_WORK;
	switch_send_all(self);
}
