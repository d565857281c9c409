// Where a frame goes, and in which form.

#include "switch.h"

#include <string.h>

// A frame that becomes messages for one port.
struct delivery {
	SwitchObject *self;
	struct switch_port *port;
	const struct switch_frame *frame;
	bool tagged;
};

size_t switch_retag(const struct switch_frame *frame, bool tagged, const uint8_t *headers, size_t size, uint8_t *to)
{
	size_t addresses = 2 * SWITCH_MAC, rest = addresses + frame->tag;
	memcpy(to, headers, addresses);
	to += addresses;
	if (tagged) {
		net_put16(to, ETHERTYPE_VLAN);
		net_put16(to + 2, frame->priority | frame->vlan);
		to += NET_TAG;
	}
	memcpy(to, headers + rest, size - rest);
	return size - frame->tag + (tagged ? NET_TAG : 0);
}

// What the port has before its frames.
static void put_head(const struct switch_port *port, uint8_t *to, const struct net_vnet *vnet, size_t size)
{
	if (port->kind == KIND_STREAM)
		net_put32(to, (uint32_t)size);
	else
		memcpy(to, vnet, VNET_SIZE);
}

static bool list_segment(void *context, const uint8_t *headers, size_t size, size_t offset, size_t length)
{
	const struct delivery *delivery = context;
	struct switch_port *port = delivery->port;
	uint8_t *first = switch_arena(delivery->self, SWITCH_MAX_HEAD);
	size = switch_retag(delivery->frame, delivery->tagged, headers, size, first + port->head);
	put_head(port, first, &(struct net_vnet){0}, size + length);
	port_list(delivery->self, port, first, port->head + size, delivery->frame->data + offset, length);
	return port->fd >= 0;
}

static bool must_cut(const struct switch_port *port, const struct switch_frame *frame)
{
	unsigned wanted = OFFLOAD_CHECKSUM;
	if (!frame->vnet.gso_type)
		return false;
	if (frame->vnet.gso_type == VNET_GSO_UDP_L4)
		return true; // no NIC of ours takes such
	wanted |= frame->parsed.version == 4 ? OFFLOAD_TSO4 : OFFLOAD_TSO6;
	if (frame->vnet.gso_type & VNET_GSO_ECN)
		wanted |= OFFLOAD_TSO_ECN;
	return wanted & ~port->offloads;
}

static void complete(struct switch_frame *frame)
{
	net_complete_checksum(&frame->vnet, &(struct iovec){frame->data, frame->parsed.size}, 1);
	frame->vnet = (struct net_vnet){0};
	if (frame->headed)
		memset(frame->data - VNET_SIZE, 0, VNET_SIZE);
}

static void deliver(SwitchObject *self, struct switch_port *port, struct switch_frame *frame)
{
	struct delivery delivery = {self, port, frame, port->vlan != frame->vlan};
	if (!delivery.tagged && frame->inner) {
		port->dropped[DROP_VLAN]++; // on this link the inner tag would name another VLAN
		return;
	}
	if (port->mirror)
		mirror_frame(self, port, frame, delivery.tagged);
	if (must_cut(port, frame)) {
		net_segment(&frame->vnet, &frame->parsed, frame->data,
			    &(struct iovec){frame->data, frame->parsed.size}, 1, list_segment, &delivery);
		return;
	}
	if (frame->vnet.flags & VNET_NEEDS_CSUM && !(port->offloads & OFFLOAD_CHECKSUM))
		complete(frame);
	struct net_vnet vnet = frame->vnet;
	if (!(port->offloads & OFFLOAD_CHECKSUM))
		vnet.flags = 0;
	bool same = delivery.tagged ? frame->kept : !frame->tag;
	if (same && frame->headed && port->kind != KIND_STREAM && vnet.flags == frame->vnet.flags) {
		port_list(self, port, frame->data - VNET_SIZE, VNET_SIZE + frame->parsed.size, NULL, 0);
		return;
	}
	size_t begin = 2 * SWITCH_MAC + frame->tag, rest = frame->parsed.size - begin;
	uint8_t *first = switch_arena(self, SWITCH_MAX_HEAD);
	size_t size = switch_retag(frame, delivery.tagged, frame->data, begin, first + port->head);
	int moved = (int)size - (int)begin;
	if (vnet.header_size)
		vnet.header_size = (uint16_t)(vnet.header_size + moved);
	if (vnet.flags & VNET_NEEDS_CSUM)
		vnet.csum_start = (uint16_t)(vnet.csum_start + moved);
	put_head(port, first, &vnet, size + rest);
	port_list(self, port, first, port->head + size, frame->data + begin, rest);
}

void switch_forward(SwitchObject *self, struct switch_port *from, struct switch_frame *frame)
{
	if (frame->headed)
		memcpy(frame->data - VNET_SIZE, &frame->vnet, VNET_SIZE);
	struct switch_port *to = NULL;
	if (!(frame->data[0] & 1)) {
		to = fixed_find(self, frame->vlan, frame->data);
		if (!to)
			to = table_find(self, frame->vlan, frame->data);
	}
	if (to == from)
		return;
	if (to) {
		if (to->link && to->fd >= 0)
			deliver(self, to, frame);
		else
			to->dropped[DROP_LINK]++;
		return;
	}
	// Before the first one has it listed.
	if (frame->vnet.flags & VNET_NEEDS_CSUM && !frame->vnet.gso_type)
		complete(frame);
	for (unsigned i = 0; i < self->count; i++) {
		struct switch_port *port = self->ports[i];
		if (port == from || !port->link || port->fd < 0 || !switch_carries(port, frame->vlan))
			continue;
		// Cutting is much work, and a NIC that has no address but its own would throw all of it away.
		if (frame->vnet.gso_type && !(frame->data[0] & 1) && !port->spoofing)
			continue;
		deliver(self, port, frame);
	}
}
