#include "net_frame.h"

#include <string.h>

enum {
	IPV4_HEADER = 20,
	IPV6_HEADER = 40,
	TCP_HEADER = 20,
	UDP_HEADER = 8,
	ICMP_HEADER = 4,

	IPV4_MORE_OR_OFFSET = 0x3fff,
	IPV4_OFFSET = 0x1fff,
	IPV6_OFFSET = 0xfff8,

	// IPv6 extension headers (IANA).
	NEXT_HOP_BY_HOP = 0,
	NEXT_ROUTING = 43,
	NEXT_FRAGMENT = 44,
	NEXT_AUTHENTICATION = 51,
	NEXT_DESTINATION = 60,
	NEXT_MOBILITY = 135,
	NEXT_HOST_IDENTITY = 139,
	NEXT_SHIM6 = 140,

	TCP_CHECKSUM = 16,
	UDP_CHECKSUM = 6,
};

// Parsing ------------------------------------------------------------------------------------------

static bool parse_ipv4(struct net_frame *frame, const uint8_t *head, size_t have)
{
	const uint8_t *ip = head + frame->network;
	size_t left = have - frame->network;
	if (left < IPV4_HEADER || ip[0] >> 4 != 4)
		return false;
	size_t header = (ip[0] & 15) * 4u;
	if (header < IPV4_HEADER || left < header)
		return false;
	uint16_t fragment = net_get16(ip + 6);
	frame->version = 4;
	frame->protocol = ip[9];
	frame->fragment = fragment & IPV4_MORE_OR_OFFSET;
	if (!(fragment & IPV4_OFFSET) && frame->network + header < frame->size)
		frame->transport = (uint16_t)(frame->network + header);
	return true;
}

static bool parse_ipv6(struct net_frame *frame, const uint8_t *head, size_t have)
{
	const uint8_t *ip = head + frame->network;
	if (have - frame->network < IPV6_HEADER || ip[0] >> 4 != 6)
		return false;
	frame->version = 6;
	uint8_t next = ip[6];
	// Each turn takes 8 bytes or more.
	for (size_t at = frame->network + IPV6_HEADER;;) {
		frame->protocol = next;
		const uint8_t *extension = head + at;
		size_t size;
		switch (next) {
		case NEXT_HOP_BY_HOP:
		case NEXT_ROUTING:
		case NEXT_DESTINATION:
		case NEXT_MOBILITY:
		case NEXT_HOST_IDENTITY:
		case NEXT_SHIM6:
			if (have < at + 8)
				return false;
			size = (extension[1] + 1u) * 8;
			break;
		case NEXT_AUTHENTICATION:
			if (have < at + 8)
				return false;
			size = (extension[1] + 2u) * 4;
			break;
		case NEXT_FRAGMENT:
			if (have < at + 8)
				return false;
			frame->fragment = true;
			size = 8;
			if (net_get16(extension + 2) & IPV6_OFFSET) {
				frame->protocol = extension[0];
				return true;
			}
			break;
		default:
			if (next != PROTOCOL_NOTHING && at < frame->size)
				frame->transport = (uint16_t)at;
			return true;
		}
		if (have - at < size)
			return false;
		next = extension[0];
		at += size;
	}
}

static bool parse_transport(struct net_frame *frame, const uint8_t *head, size_t have)
{
	const uint8_t *transport = head + frame->transport;
	size_t left = have - frame->transport;
	size_t header;
	switch (frame->protocol) {
	case PROTOCOL_TCP:
		if (left < TCP_HEADER)
			return false;
		header = (transport[12] >> 4) * 4u;
		if (header < TCP_HEADER || left < header)
			return false;
		break;
	case PROTOCOL_UDP:
		header = UDP_HEADER;
		if (left < header)
			return false;
		break;
	case PROTOCOL_ICMPV4:
	case PROTOCOL_ICMPV6:
		return left >= ICMP_HEADER;
	default:
		return true;
	}
	frame->payload = (uint16_t)(frame->transport + header);
	return true;
}

bool net_frame_parse(struct net_frame *frame, const uint8_t *head, size_t have, size_t size)
{
	*frame = (struct net_frame){.size = (uint32_t)size};
	if (have > size)
		have = size;
	if (have > NET_MAX_HEADERS)
		have = NET_MAX_HEADERS;
	if (have < NET_ETHERNET || size > NET_MAX_FRAME)
		return false;
	size_t at = NET_ETHERNET;
	frame->ethertype = net_get16(head + 12);
	while (frame->ethertype == ETHERTYPE_VLAN || frame->ethertype == ETHERTYPE_SERVICE_VLAN) {
		if (size < at + NET_TAG)
			return false;
		if (frame->tags == NET_MAX_TAGS || have < at + NET_TAG) {
			frame->network = (uint16_t)at;
			frame->obscured = true;
			return true;
		}
		frame->tci[frame->tags++] = net_get16(head + at);
		frame->ethertype = net_get16(head + at + 2);
		at += NET_TAG;
	}
	frame->network = (uint16_t)at;
	bool clear = true;
	if (frame->ethertype == ETHERTYPE_IPV4)
		clear = parse_ipv4(frame, head, have);
	else if (frame->ethertype == ETHERTYPE_IPV6)
		clear = parse_ipv6(frame, head, have);
	if (clear && frame->transport)
		clear = have > frame->transport && parse_transport(frame, head, have);
	frame->obscured = !clear;
	return true;
}

bool net_vnet_valid(const struct net_vnet *vnet, const struct net_frame *frame)
{
	if (vnet->flags & VNET_NEEDS_CSUM) {
		size_t field = (size_t)vnet->csum_start + vnet->csum_offset;
		if (vnet->csum_start < NET_ETHERNET || field + 2 > frame->size)
			return false;
	}
	unsigned version = frame->version, protocol = PROTOCOL_TCP;
	switch (vnet->gso_type) {
	case VNET_GSO_NONE:
		return true;
	case VNET_GSO_TCPV4:
	case VNET_GSO_TCPV4 | VNET_GSO_ECN:
		version = 4;
		break;
	case VNET_GSO_TCPV6:
	case VNET_GSO_TCPV6 | VNET_GSO_ECN:
		version = 6;
		break;
	case VNET_GSO_UDP_L4:
		protocol = PROTOCOL_UDP;
		break;
	default: // among others UDP's older one, which makes fragments
		return false;
	}
	return frame->version == version && frame->protocol == protocol && frame->payload && !frame->fragment &&
	       frame->payload < frame->size && vnet->gso_size >= NET_MIN_SEGMENT && net_vnet_plain(vnet, frame);
}

bool net_vnet_plain(const struct net_vnet *vnet, const struct net_frame *frame)
{
	if (!(vnet->flags & VNET_NEEDS_CSUM))
		return true;
	unsigned offset = frame->protocol == PROTOCOL_TCP ? TCP_CHECKSUM : UDP_CHECKSUM;
	return frame->payload && vnet->csum_start == frame->transport && vnet->csum_offset == offset;
}

// Sums ---------------------------------------------------------------------------------------------

// One's complement addition: a carry comes in again at the other end.
static inline uint64_t add(uint64_t sum, uint64_t value)
{
	uint64_t result;
	return __builtin_add_overflow(sum, value, &result) ? result + 1 : result;
}

uint64_t net_sum(const void *data, size_t size, uint64_t sum)
{
	const uint8_t *at = data;
	// Halves of words into words of their own, which carry nothing out before 2^32 of them.
	uint64_t low = 0, high = 0;
	for (; size >= 32; at += 32, size -= 32) {
		uint64_t words[4];
		memcpy(words, at, sizeof(words));
		for (unsigned i = 0; i < 4; i++) {
			low += (uint32_t)words[i];
			high += words[i] >> 32;
		}
	}
	sum = add(add(sum, low), high);
	for (; size >= 8; at += 8, size -= 8) {
		uint64_t word;
		memcpy(&word, at, sizeof(word));
		sum = add(sum, word);
	}
	uint64_t rest = 0;
	memcpy(&rest, at, size);
	return add(sum, rest);
}

uint16_t net_fold(uint64_t sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)((sum & 0xffff) + (sum >> 16));
}

uint64_t net_sum_parts(const struct iovec *parts, unsigned count, size_t offset, size_t size, uint64_t sum)
{
	bool odd = false;
	for (unsigned i = 0; i < count && size; i++) {
		if (offset >= parts[i].iov_len) {
			offset -= parts[i].iov_len;
			continue;
		}
		size_t length = parts[i].iov_len - offset < size ? parts[i].iov_len - offset : size;
		const uint8_t *data = (const uint8_t *)parts[i].iov_base + offset;
		if (odd) // each byte is in the other half of its word
			sum = add(sum, __builtin_bswap16(net_fold(net_sum(data, length, 0))));
		else
			sum = net_sum(data, length, sum);
		odd ^= length & 1;
		size -= length;
		offset = 0;
	}
	return sum;
}

uint64_t net_pseudo_sum(const struct net_frame *frame, const uint8_t *head, size_t length)
{
	const uint8_t *ip = head + frame->network;
	uint8_t rest[8] = {0};
	net_put32(rest, (uint32_t)length);
	rest[7] = frame->protocol;
	uint64_t sum = net_sum(rest, sizeof(rest), 0);
	return frame->version == 4 ? net_sum(ip + 12, 8, sum) : net_sum(ip + 8, 32, sum);
}

static void put_checksum(uint8_t *to, uint64_t sum)
{
	uint16_t checksum = (uint16_t)~net_fold(sum);
	memcpy(to, &checksum, sizeof(checksum));
}

void net_set_ipv4_checksum(const struct net_frame *frame, uint8_t *head)
{
	uint8_t *ip = head + frame->network;
	ip[10] = ip[11] = 0;
	put_checksum(ip + 10, net_sum(ip, (ip[0] & 15) * 4u, 0));
}

void net_set_length(const struct net_frame *frame, uint8_t *head)
{
	size_t length = frame->size - frame->network;
	if (frame->version == 4) {
		net_put16(head + frame->network + 2, (unsigned)length);
		net_set_ipv4_checksum(frame, head);
	} else if (frame->version == 6) {
		net_put16(head + frame->network + 4, (unsigned)(length - IPV6_HEADER));
	}
}

static size_t size_of(const struct iovec *parts, unsigned count)
{
	size_t size = 0;
	for (unsigned i = 0; i < count; i++)
		size += parts[i].iov_len;
	return size;
}

static void put_byte(const struct iovec *parts, unsigned count, size_t offset, uint8_t value)
{
	for (unsigned i = 0; i < count; i++) {
		if (offset < parts[i].iov_len) {
			((uint8_t *)parts[i].iov_base)[offset] = value;
			return;
		}
		offset -= parts[i].iov_len;
	}
}

void net_complete_checksum(const struct net_vnet *vnet, const struct iovec *parts, unsigned count)
{
	size_t size = size_of(parts, count), field = (size_t)vnet->csum_start + vnet->csum_offset;
	if (!(vnet->flags & VNET_NEEDS_CSUM) || field + 2 > size)
		return;
	uint16_t sum = net_fold(net_sum_parts(parts, count, vnet->csum_start, size - vnet->csum_start, 0));
	uint8_t bytes[2];
	put_checksum(bytes, sum == 0xffff ? 0 : sum); // a sum of 0 would mean that there is none, to UDP
	put_byte(parts, count, field, bytes[0]);
	put_byte(parts, count, field + 1, bytes[1]);
}

size_t net_gather(const struct iovec *parts, unsigned count, size_t offset, void *to, size_t size)
{
	size_t done = 0;
	for (unsigned i = 0; i < count && done < size; i++) {
		if (offset >= parts[i].iov_len) {
			offset -= parts[i].iov_len;
			continue;
		}
		size_t length = parts[i].iov_len - offset < size - done ? parts[i].iov_len - offset : size - done;
		memcpy((uint8_t *)to + done, (const uint8_t *)parts[i].iov_base + offset, length);
		done += length;
		offset = 0;
	}
	return done;
}

// Segments -----------------------------------------------------------------------------------------

// Sets what differs between the headers of segments, all but checksums.
static void put_segment(const struct net_frame *frame, const uint8_t *head, struct net_frame *segment, uint8_t *headers,
			uint32_t at, uint32_t length, unsigned number)
{
	const uint8_t *ip = head + frame->network, *tcp = head + frame->transport;
	uint8_t *to = headers + frame->transport;
	segment->size = frame->payload + length;
	if (frame->version == 4)
		net_put16(headers + frame->network + 4, net_get16(ip + 4) + number);
	net_set_length(segment, headers);
	if (frame->protocol == PROTOCOL_UDP) {
		net_put16(to + 4, UDP_HEADER + length);
		return;
	}
	bool last = at + length == frame->size;
	net_put32(to + 4, net_get32(tcp + 4) + (at - frame->payload));
	to[TCP_FLAGS] = (uint8_t)(tcp[TCP_FLAGS] & ~((last ? 0 : TCP_FIN | TCP_PSH) | (number ? TCP_CWR : 0)));
}

bool net_segment(const struct net_vnet *vnet, const struct net_frame *frame, const uint8_t *head,
		 const struct iovec *parts, unsigned count, net_emit_segment *emit, void *context)
{
	uint8_t headers[NET_MAX_HEADERS];
	memcpy(headers, head, frame->payload);
	bool udp = frame->protocol == PROTOCOL_UDP;
	uint8_t *transport = headers + frame->transport, *checksum = transport + (udp ? UDP_CHECKSUM : TCP_CHECKSUM);
	struct net_frame segment = *frame;
	for (uint32_t at = frame->payload, number = 0; at < frame->size; number++) {
		uint32_t length = frame->size - at < vnet->gso_size ? frame->size - at : vnet->gso_size;
		put_segment(frame, head, &segment, headers, at, length, number);
		checksum[0] = checksum[1] = 0;
		uint64_t sum = net_pseudo_sum(&segment, headers, segment.size - segment.transport);
		sum = net_sum(transport, (size_t)(frame->payload - frame->transport), sum);
		// A header's length is even, so the payload's first byte is a word's first too.
		uint16_t folded = net_fold(net_sum_parts(parts, count, at, length, sum));
		put_checksum(checksum, udp && folded == 0xffff ? 0 : folded); // as in net_complete_checksum
		if (!emit(context, headers, frame->payload, at, length))
			return false;
		at += length;
	}
	return true;
}
