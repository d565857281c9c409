// Frames to the guest: read from the port into sections of the receive buffer, which the guest holds until it completes
// the packet that told of them.
//
// Facts: Linux 6.1 drivers/net/hyperv (hyperv_net.h, rndis_filter.c, netvsc.c), openvmm netvsp. What the guest does to its
// buffer meanwhile concerns only itself: what is decided here comes from copies.

#include "bytes.h"
#include "net.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
	PACKET_TRANSFER_PAGES = 7,
	CHANNEL_CONTROL = 1,

	FILTER_DIRECTED = 1,
	FILTER_MULTICAST = 2,
	FILTER_ALL_MULTICAST = 4,
	FILTER_BROADCAST = 8,
	FILTER_PROMISCUOUS = 0x20,

	// PPI_CHECKSUM's value.
	CHECKSUM_TCP_GOOD = 1 << 3,
	CHECKSUM_UDP_GOOD = 1 << 4,
	CHECKSUM_IP_GOOD = 1 << 5,
	CHECKSUM_TCP_UNSET = 1 << 7,
	// PPI_PACKET_ID's flags, and its bit in the type.
	ID_VERSION = 1,
	ID_SECTIONS = 1 << 8,
	ID_FIRST = 2 << 8,
	ID_LAST = 4 << 8,
	PPI_INTERNAL = (int)(1U << 31),
	FRAGMENT_ROOM = NET_RNDIS_HEADER + NET_PPI,

	// Frames that may have come in while nobody was to have them: more than a TAP queues.
	DISCARD = 4096,
};

void net_message(uint8_t message[NET_MESSAGE_MAX], uint32_t type, uint32_t first, uint32_t second, uint32_t third)
{
	memset(message, 0, NET_MESSAGE_MAX);
	put_le32(message, type);
	put_le32(message + 4, first);
	put_le32(message + 8, second);
	put_le32(message + 12, third);
}

// Sections -----------------------------------------------------------------------------------------

// Has at least `count` sections at hand. Returns false, and sees that queue 0 is told, if there are not so many.
static bool provide_sections(NetDeviceObject *device, unsigned count)
{
	if (device->ready_count >= count)
		return true;
	pthread_mutex_lock(&device->sections_lock);
	unsigned more = NET_READY - device->ready_count;
	if (more > device->free_count)
		more = device->free_count;
	device->free_count -= more;
	memcpy(device->ready + device->ready_count, device->free + device->free_count, more * sizeof(*device->ready));
	device->ready_count += more;
	device->starved = device->ready_count < count;
	pthread_mutex_unlock(&device->sections_lock);
	return device->ready_count >= count;
}

// Gives a chain of sections back. Called with their lock held.
static void release_chain(NetDeviceObject *device, uint32_t section)
{
	for (;;) {
		uint32_t next = device->next[section];
		if (section < NET_CONTROL_SECTIONS)
			device->free_controls[device->free_controls_count++] = section;
		else
			device->free[device->free_count++] = section;
		if (next == section)
			return;
		section = next;
	}
}

bool net_receive_completed(NetQueueObject *queue, uint64_t id)
{
	NetDeviceObject *device = queue->device;
	uint32_t generation = (uint32_t)(id >> 32), section = (uint32_t)id;
	bool wake = false, known = false;
	pthread_mutex_lock(&device->sections_lock);
	if (generation == device->generation) {
		known = section < device->receive.sections && device->owner[section] == queue->index + 1;
		if (known) {
			device->owner[section] = 0;
			release_chain(device, section);
			wake = (device->starved && queue->index) || atomic_load(&device->controls_wait);
			device->starved = false;
		}
	} else {
		// Of a receive buffer that the guest has taken back meanwhile.
		known = generation && generation < device->generation;
	}
	pthread_mutex_unlock(&device->sections_lock);
	NetQueueObject *first = device->queues[0];
	if (wake && first && first != queue) {
		pthread_mutex_lock(&first->outgoing->write_lock);
		if (first->running)
			net_queue_kick(first);
		pthread_mutex_unlock(&first->outgoing->write_lock);
	}
	return known;
}

// Telling the guest ---------------------------------------------------------------------------------

uint32_t net_indication_packet(const NetQueueObject *queue, struct ring_descriptor *descriptor,
			       uint8_t extra[8 + 8 * NET_MAX_RANGES], uint8_t message[NET_MESSAGE_MAX])
{
	const struct net_indication *indication = &queue->indication;
	uint32_t size = 8 + 8 * indication->count, payload = (queue->device->message_size + 7) & ~7U;
	put_le32(extra, queue->device->buffer_id);
	put_le32(extra + 4, indication->count);
	memcpy(extra + 8, indication->ranges, 8 * indication->count);
	*descriptor = (struct ring_descriptor){
		PACKET_TRANSFER_PAGES, (uint16_t)((RING_DESCRIPTOR_SIZE + size) / 8),
		(uint16_t)((RING_DESCRIPTOR_SIZE + size + payload) / 8), RING_FLAG_COMPLETION_REQUESTED,
		(uint64_t)queue->device->generation << 32 | indication->head};
	net_message(message, NVSP_RNDIS, indication->control ? CHANNEL_CONTROL : 0, (uint32_t)NVSP_NO_SECTION, 0);
	return size;
}

static void set_owner(NetQueueObject *queue, bool release)
{
	NetDeviceObject *device = queue->device;
	pthread_mutex_lock(&device->sections_lock);
	device->owner[queue->indication.head] = release ? 0 : (uint8_t)(queue->index + 1);
	if (release)
		release_chain(device, queue->indication.head);
	pthread_mutex_unlock(&device->sections_lock);
}

// Writes the packet that tells of the sections gathered for `queue`. `own` says that this is its worker; then false is
// returned if there is no room for it.
static bool indicate(NetQueueObject *queue, bool own, struct net_outcome *outcome)
{
	struct net_indication *indication = &queue->indication;
	RingObject *ring = queue->outgoing;
	uint8_t extra[8 + 8 * NET_MAX_RANGES], message[NET_MESSAGE_MAX];
	struct ring_descriptor descriptor;
	bool done = false, signal = false;
	uint32_t out;
	if (!indication->count)
		return true;
	net_indication_packet(queue, &descriptor, extra, message);
	set_owner(queue, false); // the guest may complete it before we look again
	pthread_mutex_lock(&ring->write_lock);
	if (queue->running && ring_load_index(ring, &ring->control->out, &out) &&
	    descriptor.length8 * 8U + RING_FOOTER_SIZE <= ring_free(ring, ring->in, out)) {
		uint32_t in = ring_put(ring, ring->in, &descriptor, extra, message, queue->device->message_size);
		signal = ring_publish_in(ring, in);
		done = true;
		if (signal)
			net_queue_signal(queue);
		if (signal && !own && !queue->target.synic)
			net_queue_kick(queue);
	}
	pthread_mutex_unlock(&ring->write_lock);
	if (done) {
		atomic_fetch_add_explicit(&queue->packets_out, 1, memory_order_relaxed);
	} else if (own) {
		outcome->stuck = true;
		return false;
	} else {
		set_owner(queue, true);
		net_count(queue->device, NET_RECEIVED_NO_ROOM, indication->frames);
	}
	indication->count = indication->frames = 0;
	return true;
}

// Most ranges that a packet in this ring may have.
static unsigned max_ranges(const NetQueueObject *queue)
{
	unsigned most = (queue->outgoing->size / 2 - 128) / 8;
	return most < NET_MAX_RANGES ? most : NET_MAX_RANGES;
}

static void add_range(NetQueueObject *queue, uint32_t section, uint32_t size)
{
	struct net_indication *indication = &queue->indication;
	NetDeviceObject *device = queue->device;
	// Nobody else knows these sections, so their chain needs no lock.
	device->next[section] = section;
	if (indication->count)
		device->next[indication->tail] = section;
	else
		indication->head = section;
	indication->tail = section;
	indication->ranges[indication->count].size = size;
	indication->ranges[indication->count++].offset = section * device->receive.section_size;
}

bool net_receive_controls(NetQueueObject *queue, struct net_outcome *outcome)
{
	NetDeviceObject *device = queue->device;
	while (atomic_load(&device->controls_wait)) {
		struct net_control *control = NULL;
		uint32_t section = 0;
		pthread_mutex_lock(&device->sections_lock);
		if (device->controls && device->free_controls_count) {
			control = device->controls;
			device->controls = control->next;
			if (!control->next)
				device->controls_end = &device->controls;
			device->controls_count--;
			section = device->free_controls[--device->free_controls_count];
		}
		atomic_store(&device->controls_wait, device->controls != NULL);
		pthread_mutex_unlock(&device->sections_lock);
		if (!control)
			return true;
		net_buffer_copy_in(&device->receive, section * device->receive.section_size, control->message,
				   control->size);
		add_range(queue, section, control->size);
		free(control);
		queue->indication.control = true;
		bool told = indicate(queue, true, outcome);
		queue->indication.control = !told;
		if (!told)
			return false;
	}
	return true;
}

// Frames -------------------------------------------------------------------------------------------

// A frame read from the port, in the device's `incoming`: room for an RNDIS header, then the frame.
struct incoming {
	struct net_vnet vnet;
	struct net_frame frame;
	uint8_t *start, *head; // of the room, and of the frame
	uint32_t size;	       // of the frame
	uint32_t moved;	       // a tag taken out moves the addresses by so much
	uint32_t ppis_size;
};

static bool wanted(const NetDeviceObject *device, const uint8_t *mac)
{
	static const uint8_t broadcast[NET_MAC] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
	uint32_t filter = device->filter;
	if (filter & FILTER_PROMISCUOUS)
		return true;
	if (!(mac[0] & 1))
		return filter & FILTER_DIRECTED && !memcmp(mac, device->mac, NET_MAC);
	if (!memcmp(mac, broadcast, NET_MAC))
		return filter & FILTER_BROADCAST;
	if (filter & FILTER_ALL_MULTICAST)
		return true;
	for (unsigned i = 0; filter & FILTER_MULTICAST && i < device->groups_count; i++)
		if (!memcmp(mac, device->groups[i], NET_MAC))
			return true;
	return false;
}

static void put_ppi(uint8_t *ppi, uint32_t type, uint32_t value)
{
	put_le32(ppi, NET_PPI);
	put_le32(ppi + 4, type);
	put_le32(ppi + 8, NET_PPI - 4);
	put_le32(ppi + 12, value);
}

static void add_ppi(struct incoming *in, uint32_t type, uint32_t value)
{
	put_ppi(in->start + NET_RNDIS_HEADER + in->ppis_size, type, value);
	in->ppis_size += NET_PPI;
}

// Which of the guest's offloads a TCP or UDP frame is a matter of.
static uint32_t offload_of(const struct net_frame *frame)
{
	if (frame->version == 4)
		return frame->protocol == PROTOCOL_TCP ? RECEIVE_TCP4 : RECEIVE_UDP4;
	return frame->protocol == PROTOCOL_TCP ? RECEIVE_TCP6 : RECEIVE_UDP6;
}

// Deals with what the port says of checksums and segments. Returns false if it is wrong.
static bool settle_offloads(const NetDeviceObject *device, struct incoming *in)
{
	const struct net_frame *frame = &in->frame;
	bool large = in->vnet.gso_type != VNET_GSO_NONE;
	if (!net_vnet_valid(&in->vnet, frame))
		return false;
	bool known = frame->payload && !frame->fragment && !frame->obscured;
	uint32_t taken = known ? device->offloads & offload_of(frame) : 0;
	uint32_t value = 0;
	if (taken)
		value = frame->protocol == PROTOCOL_TCP ? CHECKSUM_TCP_GOOD : CHECKSUM_UDP_GOOD;
	if (in->vnet.flags & VNET_NEEDS_CSUM) {
		if (large && taken)
			value |= CHECKSUM_TCP_UNSET;
		else
			net_complete_checksum(&in->vnet, &(struct iovec){in->head, in->size}, 1);
	}
	const uint8_t *ip = in->head + frame->network;
	if (known && frame->version == 4 && device->offloads & RECEIVE_IP4 &&
	    net_fold(net_sum(ip, (ip[0] & 15) * 4U, 0)) == 0xffff)
		value |= CHECKSUM_IP_GOOD;
	if (value)
		add_ppi(in, PPI_CHECKSUM, value);
	return true;
}

// Takes the tag out of a frame, for the guest to find it beside.
static void take_tag(struct incoming *in)
{
	uint16_t tci = net_get16(in->head + 14);
	add_ppi(in, PPI_VLAN, (tci >> 13) | (tci >> 9 & 8) | (uint32_t)(tci & 0xfff) << 4);
	memmove(in->head + NET_TAG, in->head, 12);
	in->moved = NET_TAG;
}

// Writes the RNDIS header in front of `size` bytes of a frame from `data` on.
static void put_rndis(uint8_t *start, uint32_t data, uint32_t size, uint32_t ppis_size)
{
	memset(start, 0, NET_RNDIS_HEADER);
	put_le32(start, RNDIS_PACKET);
	put_le32(start + 4, data + size);
	put_le32(start + 8, data - 8); // offsets count from behind type and length
	put_le32(start + 12, size);
	put_le32(start + 28, ppis_size ? NET_RNDIS_HEADER - 8 : 0);
	put_le32(start + 32, ppis_size);
}

// Writes what follows a frame's first section into sections of their own: fragments, which the guest puts together.
static void put_rest(NetQueueObject *target, const uint8_t *rest, uint32_t size, uint32_t id)
{
	NetDeviceObject *device = target->device;
	uint8_t start[FRAGMENT_ROOM];
	while (size) {
		uint32_t length = size < device->room ? size : device->room;
		uint32_t section = device->ready[--device->ready_count];
		uint32_t offset = section * device->receive.section_size;
		put_rndis(start, FRAGMENT_ROOM, length, NET_PPI);
		put_ppi(start + NET_RNDIS_HEADER, (uint32_t)PPI_INTERNAL | PPI_PACKET_ID,
			id | ID_VERSION | ID_SECTIONS | (length == size ? ID_LAST : 0));
		net_buffer_copy_in(&device->receive, offset, start, FRAGMENT_ROOM);
		net_buffer_copy_in(&device->receive, offset + FRAGMENT_ROOM, rest, length);
		add_range(target, section, FRAGMENT_ROOM + length);
		rest += length;
		size -= length;
	}
}

static NetQueueObject *target_of(NetQueueObject *queue, struct incoming *in)
{
	NetDeviceObject *device = queue->device;
	uint32_t hash;
	if (!device->table_count || !net_hash(device, &in->frame, in->head, &hash))
		return queue;
	add_ppi(in, PPI_HASH, hash);
	NetQueueObject *target = device->queues[device->table[hash % device->table_count]];
	return target && target->running ? target : queue;
}

// Whether the guest takes a frame that is still to be cut.
static bool takes_large(const NetDeviceObject *device, const struct net_frame *frame)
{
	uint32_t coalesce = frame->version == 4 ? RECEIVE_RSC4 : RECEIVE_RSC6;
	return frame->protocol == PROTOCOL_TCP && device->offloads & coalesce;
}

// Returns NET_RECEIVED_FRAMES for a frame that the guest is to have, or else what to count it as.
static enum net_counter judge(const NetDeviceObject *device, struct incoming *in)
{
	bool large = in->vnet.gso_type != VNET_GSO_NONE;
	uint32_t limit = device->frame_size < device->room ? device->frame_size : device->room;
	if (in->size < NET_ETHERNET)
		return NET_RECEIVED_RUNTS;
	if (!wanted(device, in->head))
		return NET_RECEIVED_FILTERED;
	if (!in->vnet.flags && !large && !device->table_count && in->size <= limit)
		return NET_RECEIVED_FRAMES;
	if (!net_frame_parse(&in->frame, in->head, in->size < NET_MAX_HEADERS ? in->size : NET_MAX_HEADERS, in->size))
		return NET_RECEIVED_OVERSIZED;
	limit = device->frame_size + in->frame.tags * NET_TAG;
	if (limit > device->room)
		limit = device->room;
	if (large && in->frame.protocol == PROTOCOL_TCP && in->size <= limit) {
		in->vnet.gso_type = VNET_GSO_NONE; // as good in one piece
		large = false;
	}
	if (large ? !takes_large(device, &in->frame) : in->size > limit)
		return NET_RECEIVED_OVERSIZED;
	if ((in->vnet.flags || large) && !settle_offloads(device, in))
		return NET_RECEIVED_ERRORS;
	return NET_RECEIVED_FRAMES;
}

// Hands a frame to the guest, or drops it.
static void accept(NetQueueObject *queue, struct incoming *in, struct net_outcome *outcome)
{
	NetDeviceObject *device = queue->device;
	enum net_counter judged = judge(device, in);
	if (judged != NET_RECEIVED_FRAMES) {
		net_count(device, judged, 1);
		return;
	}
	NetQueueObject *target = target_of(queue, in);
	if (device->offloads & RECEIVE_VLAN && in->size >= NET_ETHERNET + NET_TAG &&
	    net_get16(in->head + 12) == ETHERTYPE_VLAN)
		take_tag(in);
	uint32_t first = in->size < device->room ? in->size : device->room, rest = in->size - first;
	unsigned more = (rest + device->room - 1) / device->room;
	if (more >= device->ready_count || more >= max_ranges(target)) {
		net_count(device, NET_RECEIVED_NO_ROOM, 1);
		return;
	}
	if (target->indication.count + more >= max_ranges(target))
		indicate(target, false, outcome);
	uint32_t id = (uint32_t)device->next_id << 16;
	if (rest) {
		device->next_id++;
		add_ppi(in, (uint32_t)PPI_INTERNAL | PPI_PACKET_ID, id | ID_VERSION | ID_SECTIONS | ID_FIRST);
		net_count(device, NET_RECEIVED_COALESCED, 1);
	}
	put_rndis(in->start, NET_ROOM + in->moved, first - in->moved, in->ppis_size);
	uint32_t section = device->ready[--device->ready_count];
	net_buffer_copy_in(&device->receive, section * device->receive.section_size, in->start, NET_ROOM + first);
	add_range(target, section, NET_ROOM + first);
	if (rest)
		put_rest(target, in->head + first, rest, id);
	target->indication.frames++;
	net_count(device, NET_RECEIVED_FRAMES, 1);
	net_count(device, NET_RECEIVED_BYTES, in->size - in->moved);
}

static ssize_t read_frame(int fd, void *to, size_t size)
{
	ssize_t done;
	do
		done = read(fd, to, size);
	while (done < 0 && errno == EINTR);
	return done;
}

bool net_receiving(const NetDeviceObject *device)
{
	return device->fd >= 0 && !device->lost && device->link && device->filter && device->receive.sections;
}

void net_receive_discard(NetDeviceObject *device)
{
	uint8_t some[VNET_SIZE]; // less a TAP refuses
	for (unsigned i = 0; i < DISCARD && read_frame(device->fd, some, sizeof(some)) > 0; i++)
		;
}

unsigned net_receive(NetQueueObject *queue, struct net_outcome *outcome)
{
	NetDeviceObject *device = queue->device;
	struct incoming in;
	unsigned count = 0;
	if (!net_receiving(device))
		return 0;
	for (; count < NET_BATCH; count++) {
		if (queue->indication.count + device->sections_needed > max_ranges(queue) ||
		    !provide_sections(device, device->sections_needed))
			break;
		in.start = device->incoming;
		in.head = in.start + NET_ROOM;
		ssize_t size = read_frame(device->fd, in.head - VNET_SIZE, VNET_SIZE + NET_MAX_FRAME);
		if (size <= 0) {
			if (!size || errno == ECONNRESET || errno == ENOTCONN || errno == EBADFD)
				device->lost = true;
			else if (errno != EAGAIN)
				net_count(device, NET_RECEIVED_ERRORS, 1);
			outcome->drained = true;
			break;
		}
		if (size < VNET_SIZE) {
			net_count(device, NET_RECEIVED_RUNTS, 1);
			continue;
		}
		memcpy(&in.vnet, in.head - VNET_SIZE, VNET_SIZE);
		in.size = (uint32_t)size - VNET_SIZE;
		in.moved = in.ppis_size = 0;
		accept(queue, &in, outcome);
	}
	for (unsigned i = 0; count && i < NET_QUEUES; i++)
		if (device->queues[i])
			indicate(device->queues[i], i == 0, outcome);
	return count;
}
