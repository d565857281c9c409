// Frames from the guest: RNDIS packets in guest memory, written to the port.
//
// What is looked at is copied out first, and what was looked at is what is sent: the guest may change its memory meanwhile.
//
// Facts: Linux 6.1 drivers/net/hyperv (hyperv_net.h, rndis_filter.c, netvsc_drv.c), openvmm netvsp, NDIS's
// NDIS_TCP_IP_CHECKSUM_NET_BUFFER_LIST_INFO and NDIS_TCP_LARGE_SEND_OFFLOAD_NET_BUFFER_LIST_INFO.

#include "bytes.h"
#include "net.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

enum {
	PPI_HEADER = 12, // bytes, type, offset of the value
	MAX_PPIS = 256,
	MAX_COPY = 2048, // bytes of a frame
	// So much of an RNDIS packet is copied at once: its header, and most often what there is of per-packet information.
	FIRST_COPY = NET_RNDIS_HEADER + 4 * NET_PPI,

	CHECKSUM_TCP = 4,
	CHECKSUM_UDP = 8,
	CHECKSUM_IP_HEADER = 0x10,
	CHECKSUM_ANY = CHECKSUM_TCP | CHECKSUM_UDP | CHECKSUM_IP_HEADER,

	LSO_MSS = 0xfffff,
	LSO_V2 = 1 << 30,
	LSO_IPV6 = (int)(1U << 31),

	TCP_CHECKSUM = 16,
	UDP_CHECKSUM = 6,
};

// Guest memory -------------------------------------------------------------------------------------

// Adds what the ranges of a GPA-direct packet name (Linux hyperv.h, struct gpa_range).
static bool add_ranges(NetQueueObject *queue)
{
	const uint8_t *extra = queue->packet;
	uint32_t size = queue->head.header - RING_DESCRIPTOR_SIZE, at = 8;
	if (size < at)
		return false;
	for (uint32_t ranges = get_le32(extra + 4); ranges; ranges--) {
		if (size - at < 8)
			return false;
		uint32_t length = get_le32(extra + at), start = get_le32(extra + at + 4);
		at += 8;
		if (length > NET_MAX_PIECES * HOT_PAGE_SIZE || start >= HOT_PAGE_SIZE)
			return false;
		uint32_t pages = (start + length + HOT_PAGE_SIZE - 1) / HOT_PAGE_SIZE;
		if (8 * pages > size - at)
			return false;
		for (; length; at += 8) {
			uint64_t number = get_le64(extra + at);
			uint32_t step = length < HOT_PAGE_SIZE - start ? length : HOT_PAGE_SIZE - start;
			uint8_t *host = number > UINT64_MAX / HOT_PAGE_SIZE
						? NULL
						: hot_memory_ptr(queue->device->memory, number * HOT_PAGE_SIZE + start, step, false);
			if (!host || queue->pieces_count == NET_MAX_PIECES)
				return false;
			queue->pieces_count = net_piece_add(queue->pieces, queue->pieces_count, host, step);
			length -= step;
			start = 0;
		}
	}
	return true;
}

static size_t gather(const NetQueueObject *queue, size_t offset, void *to, size_t size)
{
	if (offset + size <= queue->pieces[0].iov_len) {
		memcpy(to, (const uint8_t *)queue->pieces[0].iov_base + offset, size);
		return size;
	}
	return net_gather(queue->pieces, queue->pieces_count, offset, to, size);
}

// Appends the pieces of `size` bytes from `offset`, which are there; returns how many there are then.
static unsigned slice(const NetQueueObject *queue, size_t offset, size_t size, struct iovec *to, unsigned count)
{
	for (unsigned i = 0; size; i++) {
		const struct iovec *piece = &queue->pieces[i];
		if (offset >= piece->iov_len) {
			offset -= piece->iov_len;
			continue;
		}
		size_t length = piece->iov_len - offset < size ? piece->iov_len - offset : size;
		to[count++] = (struct iovec){(uint8_t *)piece->iov_base + offset, length};
		size -= length;
		offset = 0;
	}
	return count;
}

// RNDIS packets ------------------------------------------------------------------------------------

struct request {
	uint32_t data, size; // where the frame is in the packet's data, and its bytes
	uint32_t checksum, lso, vlan;
};

// Reads per-packet information. What the guest says here of where headers are is not used: they are looked for.
static bool parse_ppis(const uint8_t *ppis, uint32_t size, struct request *request)
{
	for (uint32_t at = 0; at < size;) {
		if (size - at < PPI_HEADER)
			return false;
		uint32_t length = get_le32(ppis + at), type = get_le32(ppis + at + 4), offset = get_le32(ppis + at + 8);
		if (length < PPI_HEADER || length > size - at)
			return false;
		bool known = type == PPI_CHECKSUM || type == PPI_LSO || type == PPI_VLAN;
		if (known && (offset < PPI_HEADER || offset > length - 4 || length < 4))
			return false;
		if (type == PPI_CHECKSUM)
			request->checksum = get_le32(ppis + at + offset);
		else if (type == PPI_LSO)
			request->lso = get_le32(ppis + at + offset);
		else if (type == PPI_VLAN)
			request->vlan = get_le32(ppis + at + offset) & 0xffff;
		at += length;
	}
	return true;
}

// Reads the RNDIS packet at `at`, of which `left` bytes are there; returns its length, or 0 if it makes no sense.
static uint32_t parse_rndis(const NetQueueObject *queue, size_t at, size_t left, struct request *request)
{
	uint8_t first[FIRST_COPY], all_ppis[MAX_PPIS];
	size_t have = gather(queue, at, first, left < FIRST_COPY ? left : FIRST_COPY);
	if (have < NET_RNDIS_HEADER)
		return 0;
	// Offsets count from behind type and length.
	uint32_t length = get_le32(first + 4), data = get_le32(first + 8), size = get_le32(first + 12);
	uint32_t ppis = get_le32(first + 28), ppis_size = get_le32(first + 32);
	if (get_le32(first) != RNDIS_PACKET || length < NET_RNDIS_HEADER || length > left)
		return 0;
	uint32_t body = length - 8;
	if (data > body || size > body - data)
		return 0;
	*request = (struct request){.data = (uint32_t)at + 8 + data, .size = size};
	if (!ppis_size)
		return length;
	if (ppis > body || ppis_size > body - ppis || ppis_size > MAX_PPIS)
		return 0;
	const uint8_t *found = first + 8 + ppis;
	if (8 + ppis + ppis_size > have) {
		gather(queue, at + 8 + ppis, all_ppis, ppis_size);
		found = all_ppis;
	}
	return parse_ppis(found, ppis_size, request) ? length : 0;
}

// Frames -------------------------------------------------------------------------------------------

// What is written: a virtio_net_hdr, and as much of the frame as is copied out of guest memory. Copying a frame of usual
// size costs less than to have the kernel gather it.
struct outgoing {
	uint8_t *frame; // in `bytes`, behind the header
	uint32_t have;	// bytes of it; the rest stays in guest memory
	struct net_vnet vnet;
	uint8_t bytes[NET_TAG + VNET_SIZE + MAX_COPY];
};

// Bytes of the tags that stand in a frame already, of one more than the network knows at most.
static uint32_t tags_size(const struct outgoing *out)
{
	uint32_t size = 0;
	for (; size <= NET_MAX_TAGS * NET_TAG && NET_ETHERNET + size <= out->have; size += NET_TAG) {
		uint16_t type = net_get16(out->frame + 12 + size);
		if (type != ETHERTYPE_VLAN && type != ETHERTYPE_SERVICE_VLAN)
			break;
	}
	return size;
}

// Takes the frame's size from the length in its IP header, as what is behind that is padding, and says how much of it is
// TCP or UDP. Returns false if it lies.
static bool fit_length(struct net_frame *frame, const uint8_t *head, uint32_t *transport_size)
{
	const uint8_t *ip = head + frame->network;
	uint32_t size = frame->version == 4 ? net_get16(ip + 2) : net_get16(ip + 4) + 40U;
	if (size > frame->size - frame->network || frame->network + size < frame->payload)
		return false;
	frame->size = frame->network + size;
	*transport_size = frame->size - frame->transport;
	return true;
}

// Has the network cut a frame into segments: its headers become those of one large packet, where the guest leaves the
// length out of the IP header and of the pseudo header's sum.
static bool ask_for_segments(struct net_vnet *vnet, struct net_frame *frame, uint8_t *head, uint32_t lso, uint32_t limit)
{
	uint32_t mss = lso & LSO_MSS, headers = frame->payload;
	if (!(lso & LSO_V2) || frame->version != (lso & LSO_IPV6 ? 6 : 4) || mss < NET_MIN_SEGMENT ||
	    headers + mss > limit || frame->size - frame->network > 65535)
		return false;
	net_set_length(frame, head);
	if (frame->size - headers <= mss)
		return true;
	vnet->gso_type = frame->version == 4 ? VNET_GSO_TCPV4 : VNET_GSO_TCPV6;
	if (head[frame->transport + TCP_FLAGS] & TCP_CWR)
		vnet->gso_type |= VNET_GSO_ECN;
	vnet->gso_size = (uint16_t)mss;
	vnet->header_size = (uint16_t)headers;
	return true;
}

// Does what the guest asked for with the headers. Returns whether that makes sense.
static bool prepare_offloads(struct request *request, struct outgoing *out, uint32_t limit)
{
	struct net_frame frame;
	uint8_t *head = out->frame;
	if (!net_frame_parse(&frame, head, out->have, request->size) || frame.obscured || !frame.version)
		return false;
	if (request->checksum & CHECKSUM_IP_HEADER && frame.version == 4 && !request->lso)
		net_set_ipv4_checksum(&frame, head);
	if (!request->lso && !(request->checksum & (CHECKSUM_TCP | CHECKSUM_UDP)))
		return true;
	bool tcp = request->lso || request->checksum & CHECKSUM_TCP;
	uint32_t transport_size = frame.size - frame.transport;
	if (frame.protocol != (tcp ? PROTOCOL_TCP : PROTOCOL_UDP) || !frame.payload || frame.fragment)
		return false;
	if (request->lso ? !ask_for_segments(&out->vnet, &frame, head, request->lso, limit)
			 : !fit_length(&frame, head, &transport_size))
		return false;
	request->size = frame.size;
	out->vnet.flags = VNET_NEEDS_CSUM;
	out->vnet.csum_start = frame.transport;
	out->vnet.csum_offset = tcp ? TCP_CHECKSUM : UDP_CHECKSUM;
	uint16_t sum = net_fold(net_pseudo_sum(&frame, head, transport_size));
	memcpy(head + frame.transport + out->vnet.csum_offset, &sum, sizeof(sum));
	return true;
}

// Puts a tag into the frame; `vlan` has priority, one bit, and id, from the lowest bit on.
static void insert_tag(struct outgoing *out, uint32_t vlan)
{
	memmove(out->frame - NET_TAG, out->frame, 12);
	out->frame -= NET_TAG;
	out->have += NET_TAG;
	net_put16(out->frame + 12, ETHERTYPE_VLAN);
	net_put16(out->frame + 14, (vlan & 7) << 13 | (vlan & 8) << 9 | vlan >> 4);
	if (out->vnet.flags)
		out->vnet.csum_start += NET_TAG;
	if (out->vnet.gso_type)
		out->vnet.header_size += NET_TAG;
}

enum written { WRITTEN, WRITTEN_NOT, WRITTEN_INVALID };

static enum written write_frame(NetQueueObject *queue, struct request *request)
{
	NetDeviceObject *device = queue->device;
	struct outgoing out;
	if (request->size < NET_ETHERNET)
		return WRITTEN_INVALID;
	out.frame = out.bytes + NET_TAG + VNET_SIZE;
	out.have = request->size < MAX_COPY ? request->size : MAX_COPY;
	out.vnet = (struct net_vnet){0};
	gather(queue, request->data, out.frame, out.have);
	uint32_t tags = tags_size(&out);
	if (request->size < NET_ETHERNET + tags)
		return WRITTEN_INVALID;
	if (tags >= NET_MAX_TAGS * NET_TAG && request->vlan)
		return WRITTEN_INVALID; // nobody looks behind a third tag
	if (tags > NET_MAX_TAGS * NET_TAG)
		tags = NET_MAX_TAGS * NET_TAG;
	uint32_t limit = device->frame_size + tags;
	if (request->size > (request->lso ? NET_ETHERNET + tags + 65535 : limit))
		return WRITTEN_INVALID;
	if ((request->lso || request->checksum & CHECKSUM_ANY) && !prepare_offloads(request, &out, limit))
		return WRITTEN_INVALID;
	size_t rest = request->size > out.have ? request->size - out.have : 0, rest_at = request->data + out.have;
	if (out.have > request->size)
		out.have = request->size;
	if (request->vlan)
		insert_tag(&out, request->vlan);
	if (device->fd < 0 || device->lost || !device->link) {
		net_count(device, NET_SENT_UNPLUGGED, 1);
		return WRITTEN;
	}
	uint8_t *start = out.frame - VNET_SIZE;
	memcpy(start, &out.vnet, VNET_SIZE);
	size_t size = VNET_SIZE + out.have;
	struct iovec parts[1 + NET_MAX_PIECES];
	unsigned count = 1;
	ssize_t done;
	if (rest) {
		parts[0] = (struct iovec){start, size};
		count = slice(queue, rest_at, rest, parts, count);
	}
	do
		done = rest ? writev(device->fd, parts, (int)count) : write(device->fd, start, size);
	while (done < 0 && errno == EINTR);
	if (done < 0 && errno == EAGAIN)
		return WRITTEN_NOT;
	if (done == (ssize_t)(size + rest)) {
		net_count(device, NET_SENT_FRAMES, 1);
		net_count(device, NET_SENT_BYTES, (uint64_t)done - VNET_SIZE);
	} else {
		net_count(device, NET_SENT_ERRORS, 1);
	}
	return WRITTEN;
}

enum net_sent net_send(NetQueueObject *queue, uint32_t section, uint32_t section_size, uint32_t *status,
		       const char **broken)
{
	const struct net_buffer *buffer = &queue->device->send;
	queue->pieces_count = 0;
	if (section != (uint32_t)NVSP_NO_SECTION) {
		if (section >= buffer->sections || section_size > buffer->section_size) {
			*broken = "an RNDIS packet in a section of the send buffer that is not there";
			return NET_SENT_BROKEN;
		}
		queue->pieces_count = net_buffer_pieces(buffer, section * buffer->section_size, section_size, queue->pieces, 0);
	}
	if (queue->head.header > RING_DESCRIPTOR_SIZE && !add_ranges(queue)) {
		*broken = "an RNDIS packet in memory that is not there";
		return NET_SENT_BROKEN;
	}
	size_t left = 0;
	for (unsigned i = 0; i < queue->pieces_count; i++)
		left += queue->pieces[i].iov_len;
	*status = !left ? NVSP_INVALID_RNDIS : queue->resume_at ? queue->resume_status : NVSP_SUCCESS;
	for (size_t at = 0; left;) {
		struct request request;
		uint32_t length = parse_rndis(queue, at, left, &request);
		enum written written = WRITTEN_INVALID;
		if (length && at >= queue->resume_at)
			written = write_frame(queue, &request);
		else if (length)
			written = WRITTEN;
		if (written == WRITTEN_NOT) {
			queue->resume_at = (uint32_t)at;
			queue->resume_status = *status;
			return NET_SENT_PARTLY;
		}
		if (written == WRITTEN_INVALID) {
			net_count(queue->device, NET_SENT_INVALID, 1);
			*status = NVSP_INVALID_RNDIS;
		}
		if (!length)
			break;
		at += length;
		left -= length;
	}
	queue->resume_at = 0;
	return NET_SENT;
}
