// Frames as networks carry them: where their headers are, their checksums, and segments cut to size. Whoever sent them
// is hostile. No Python, no memory of its own, no locks.
//
// Sources: IEEE 802.3 and 802.1Q; RFC 791, 8200 (IP), 9293 (TCP), 768 (UDP), 1071 (checksum), 4302 (AH); struct
// virtio_net_hdr is OASIS virtio 1.2, section 5.1.6.

#ifndef PYVMM_NET_FRAME_H
#define PYVMM_NET_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

enum {
	NET_ETHERNET = 14,
	NET_TAG = 4,
	NET_MAX_TAGS = 2,
	// All headers are looked for in so many bytes from a frame's start.
	NET_MAX_HEADERS = 256,
	NET_MAX_FRAME = NET_ETHERNET + NET_MAX_TAGS * NET_TAG + 65535,
	// The least that TCP is cut into: what Linux' own TCP goes down to (TCP_MIN_SND_MSS).
	NET_MIN_SEGMENT = 48,

	ETHERTYPE_IPV4 = 0x0800,
	ETHERTYPE_ARP = 0x0806,
	ETHERTYPE_VLAN = 0x8100,
	ETHERTYPE_IPV6 = 0x86dd,
	ETHERTYPE_SERVICE_VLAN = 0x88a8,

	PROTOCOL_ICMPV4 = 1,
	PROTOCOL_TCP = 6,
	PROTOCOL_UDP = 17,
	PROTOCOL_ICMPV6 = 58,
	PROTOCOL_NOTHING = 59,

	VNET_SIZE = 10,
	VNET_NEEDS_CSUM = 1,
	VNET_DATA_VALID = 2,
	VNET_GSO_NONE = 0,
	VNET_GSO_TCPV4 = 1,
	VNET_GSO_TCPV6 = 4,
	VNET_GSO_UDP_L4 = 5,
	VNET_GSO_ECN = 0x80,

	TCP_FIN = 1,
	TCP_PSH = 8,
	TCP_CWR = 0x80,
	TCP_FLAGS = 13, // where in the TCP header they are
};

struct net_vnet {
	uint8_t flags, gso_type;
	uint16_t header_size, gso_size, csum_start, csum_offset; // little-endian, as is this host
};
_Static_assert(sizeof(struct net_vnet) == VNET_SIZE, "virtio_net_hdr without num_buffers");

// A frame's headers, as offsets from its start.
struct net_frame {
	uint32_t size;      // of the whole frame
	uint16_t ethertype; // behind the tags; below 0x600 a length
	uint16_t tci[NET_MAX_TAGS];
	uint16_t network;   // what follows the Ethernet header and tags
	uint16_t transport; // what follows the IP headers; 0 if nothing does, or a later fragment's data
	uint16_t payload;   // what follows the TCP or UDP header; 0 if there is none
	uint8_t tags;
	uint8_t version;  // 4 or 6, or 0 if it isn't IP
	uint8_t protocol; // IP's number of what is at `transport`
	bool fragment;    // of an IP packet, the first or a later one
	bool obscured;    // its headers are wrong, cut off, or go on for too long; what was found before that is right
};

static inline uint16_t net_get16(const uint8_t *from)
{
	return (uint16_t)(from[0] << 8 | from[1]);
}

static inline void net_put16(uint8_t *to, unsigned value)
{
	to[0] = (uint8_t)(value >> 8);
	to[1] = (uint8_t)value;
}

static inline uint32_t net_get32(const uint8_t *from)
{
	return (uint32_t)net_get16(from) << 16 | net_get16(from + 2);
}

static inline void net_put32(uint8_t *to, uint32_t value)
{
	net_put16(to, value >> 16);
	net_put16(to + 2, value & 0xffff);
}

// Finds the headers of a frame of `size` bytes, of which the first `have` are at `head`; more than NET_MAX_HEADERS aren't
// looked at. Returns false for what has no whole Ethernet header with its tags, or is too long.
bool net_frame_parse(struct net_frame *frame, const uint8_t *head, size_t have, size_t size);

// Whether a frame's virtio_net_hdr makes sense: what it says of checksums lies inside, and segmentation is of TCP or of UDP
// datagrams, as the frame's headers have it too. Until it does neither of the functions below may be called with it.
bool net_vnet_valid(const struct net_vnet *vnet, const struct net_frame *frame);
// Whether the partial checksum, if there is one, is that of the frame's own TCP or UDP header.
bool net_vnet_plain(const struct net_vnet *vnet, const struct net_frame *frame);

// Adds bytes to a sum of 16-bit words, which is as long as a word in the end: `net_fold`. All is in memory's order.
uint64_t net_sum(const void *data, size_t size, uint64_t sum);
// The same for `size` bytes from `offset` in scattered parts, which are that long.
uint64_t net_sum_parts(const struct iovec *parts, unsigned count, size_t offset, size_t size, uint64_t sum);
uint16_t net_fold(uint64_t sum);
// The sum of the pseudo header for the TCP or UDP packet at `transport`, which is `length` bytes long. Folded and not
// inverted it is what VNET_NEEDS_CSUM expects in the checksum field.
uint64_t net_pseudo_sum(const struct net_frame *frame, const uint8_t *head, size_t length);
// Sets IP's length from the frame's, for IPv4 with its checksum. `head` has the network header.
void net_set_length(const struct net_frame *frame, uint8_t *head);
void net_set_ipv4_checksum(const struct net_frame *frame, uint8_t *head);
// Sets the checksum that VNET_NEEDS_CSUM asks for. The parts are the frame.
void net_complete_checksum(const struct net_vnet *vnet, const struct iovec *parts, unsigned count);

// Copies `size` bytes from `offset` out of scattered parts; returns how many there were.
size_t net_gather(const struct iovec *parts, unsigned count, size_t offset, void *to, size_t size);

// One segment: its headers, to be copied, then `length` bytes from `offset` of the frame that is cut. False ends it.
typedef bool net_emit_segment(void *context, const uint8_t *headers, size_t headers_size, size_t offset, size_t length);
// Cuts a frame whose gso_type is not NONE into complete frames of at most gso_size bytes of payload. `head` has all of its
// headers, `parts` are the whole frame. Returns false if `emit` did.
bool net_segment(const struct net_vnet *vnet, const struct net_frame *frame, const uint8_t *head,
		 const struct iovec *parts, unsigned count, net_emit_segment *emit, void *context);

#endif
