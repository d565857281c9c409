// What comes in from a port: whether it is a frame, which VLAN it is in, and whether that port may send it.
//
// Sources: IEEE 802.1Q, sections 6.9 (tags), 8.6.3 (reserved addresses); RFC 826 (ARP), 2131 and 8415 (DHCP), 4861 (RA and
// redirects), 792 and 1256 (ICMPv4's). Guards judge by the header that a receiver would see; what they cannot see is
// dropped, as RFC 7113 recommends.

#include "switch.h"

#include <string.h>

enum {
	ARP_SENDER = 8,
	DHCP_SERVER = 67,
	DHCP_CLIENT = 68,
	DHCPV6_CLIENT = 546,
	DHCPV6_SERVER = 547,
	ICMPV4_REDIRECT = 5,
	ICMPV4_ROUTER = 9,
	ICMPV6_ROUTER = 134,
	ICMPV6_REDIRECT = 137,
	VLAN_ID = 0xfff,
};

static bool drop(struct switch_port *port, enum switch_drop why)
{
	port->dropped[why]++;
	return false;
}

// Makes of virtio_net_hdr what a switch can rely on. False for what no receiver should see.
static bool take_header(const struct switch_port *port, struct switch_frame *frame, size_t size)
{
	struct net_vnet *vnet = &frame->vnet;
	struct net_frame *parsed = &frame->parsed;
	if (!net_frame_parse(parsed, frame->data, size, size) || !net_vnet_valid(vnet, parsed))
		return false;
	if (vnet->gso_type == VNET_GSO_UDP_L4 && port->kind != KIND_PACKET)
		return false; // only hosts' kernels make such
	// A partial checksum elsewhere would be written after the guards have looked.
	if (!net_vnet_plain(vnet, parsed)) {
		net_complete_checksum(vnet, &(struct iovec){frame->data, size}, 1);
		vnet->flags = 0;
		if (!net_frame_parse(parsed, frame->data, size, size))
			return false;
	}
	uint8_t flags = vnet->flags & VNET_NEEDS_CSUM;
	// That a checksum is right is what only the host's kernel may say.
	if (!flags && (port->kind == KIND_TAP || port->kind == KIND_PACKET))
		flags = vnet->flags & VNET_DATA_VALID;
	*vnet = (struct net_vnet){
		.flags = flags,
		.gso_type = vnet->gso_type,
		.header_size = vnet->gso_type ? parsed->payload : 0,
		.gso_size = vnet->gso_type ? vnet->gso_size : 0,
		.csum_start = flags & VNET_NEEDS_CSUM ? vnet->csum_start : 0,
		.csum_offset = flags & VNET_NEEDS_CSUM ? vnet->csum_offset : 0,
	};
	return true;
}

static bool fits(const SwitchObject *self, const struct switch_frame *frame)
{
	const struct net_frame *parsed = &frame->parsed;
	size_t size = frame->vnet.gso_type ? (size_t)parsed->payload + frame->vnet.gso_size : parsed->size;
	return size - parsed->network <= self->mtu;
}

static bool find_vlan(const struct switch_port *port, struct switch_frame *frame, int outside)
{
	const struct net_frame *parsed = &frame->parsed;
	bool inside = outside < 0 && parsed->tags;
	if (outside == TAG_OF_PROVIDER || (inside && net_get16(frame->data + 12) != ETHERTYPE_VLAN))
		return false;
	uint16_t tci = inside ? parsed->tci[0] : outside < 0 ? 0 : (uint16_t)outside;
	uint16_t id = tci & VLAN_ID;
	frame->tag = inside ? NET_TAG : 0;
	frame->priority = tci & ~VLAN_ID;
	frame->vlan = id ? id : port->vlan;
	frame->kept = inside && id;
	frame->inner = parsed->tags > inside;
	if (id)
		return port->tagged[id / 64] >> id % 64 & 1;
	return true;
}

static bool is_spoofed(const struct switch_port *port, const struct switch_frame *frame)
{
	const struct net_frame *parsed = &frame->parsed;
	if (memcmp(frame->data + SWITCH_MAC, port->mac, SWITCH_MAC) != 0)
		return true;
	if (parsed->ethertype != ETHERTYPE_ARP)
		return false;
	size_t sender = (size_t)parsed->network + ARP_SENDER;
	return parsed->size < sender + SWITCH_MAC || memcmp(frame->data + sender, port->mac, SWITCH_MAC) != 0;
}

static bool is_server_dhcp(const struct switch_frame *frame)
{
	const struct net_frame *parsed = &frame->parsed;
	if (parsed->protocol != PROTOCOL_UDP || !parsed->payload)
		return false;
	const uint8_t *udp = frame->data + parsed->transport;
	uint16_t from = net_get16(udp), to = net_get16(udp + 2);
	if (parsed->version == 4)
		return from == DHCP_SERVER || to == DHCP_CLIENT;
	return from == DHCPV6_SERVER || to == DHCPV6_CLIENT;
}

static bool is_routers(const struct switch_frame *frame)
{
	const struct net_frame *parsed = &frame->parsed;
	if (!parsed->transport)
		return false;
	uint8_t type = frame->data[parsed->transport];
	if (parsed->version == 4)
		return parsed->protocol == PROTOCOL_ICMPV4 && (type == ICMPV4_REDIRECT || type == ICMPV4_ROUTER);
	return parsed->protocol == PROTOCOL_ICMPV6 && (type == ICMPV6_ROUTER || type == ICMPV6_REDIRECT);
}

bool switch_admit(SwitchObject *self, struct switch_port *port, struct switch_frame *frame, size_t size, int tag)
{
	port->received_frames++;
	port->received_bytes += size;
	if (!take_header(port, frame, size))
		return drop(port, DROP_MALFORMED);
	if (port->mirror) { // as it is
		frame->priority = (uint16_t)tag & ~VLAN_ID;
		frame->vlan = (uint16_t)tag & VLAN_ID;
		mirror_frame(self, port, frame, tag >= 0);
	}
	bool known = find_vlan(port, frame, tag);
	const uint8_t *to = frame->data, *from = to + SWITCH_MAC;
	// Nobody has the address of a group, and TCP doesn't go to one.
	if (from[0] & 1 || (to[0] & 1 && frame->vnet.gso_type && frame->parsed.protocol == PROTOCOL_TCP))
		return drop(port, DROP_MALFORMED);
	if (!fits(self, frame))
		return drop(port, DROP_OVERSIZED);
	if (!port->link)
		return drop(port, DROP_LINK);
	static const uint8_t reserved[] = {0x01, 0x80, 0xc2, 0, 0};
	if (memcmp(to, reserved, sizeof(reserved)) == 0 && to[5] < 16)
		return drop(port, DROP_RESERVED);
	if (!known)
		return drop(port, DROP_VLAN);
	if (!port->spoofing && is_spoofed(port, frame))
		return drop(port, DROP_SPOOFED);
	if (port->dhcp_guard && (frame->parsed.obscured || is_server_dhcp(frame)))
		return drop(port, DROP_DHCP_GUARD);
	if (port->router_guard && (frame->parsed.obscured || is_routers(frame)))
		return drop(port, DROP_ROUTER_GUARD);
	table_learn(self, port, frame->vlan, from);
	return true;
}
