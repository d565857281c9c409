// A channel's queue at work: data packets and completions off the ring, completions into the other one.

#include "bytes.h"
#include "net.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum {
	// Batches before the worker looks after other things.
	ROUNDS = 32,
	// After so many the port is asked again, though it had no more.
	PORT_ROUNDS = 4,
	// Packets from the guest before it gets to know: soon enough for it to go on meanwhile.
	BATCH = 32,
	// While the ring is watched, completions wait for more of them: each may cost the guest an interrupt.
	HOLD = 16,
	HOLD_NS = 20 * 1000,

	PACKET_INBAND = 6,
	PACKET_GPA_DIRECT = 9,
	PACKET_COMPLETION = 0xb,

	// NVSP message 107: type, channel type (0 for data), section or NVSP_NO_SECTION, bytes in that section.
	RNDIS_MESSAGE = 16,
	CHANNEL_DATA = 0,
};

// The worker and the guest ------------------------------------------------------------------------

void net_queue_kick(NetQueueObject *queue)
{
	uint64_t one = 1;
	while (write(queue->doorbell, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

void net_queue_signal(NetQueueObject *queue)
{
	if (!queue->target.synic) {
		atomic_store(&queue->owes_signal, true);
		return;
	}
	atomic_fetch_add_explicit(&queue->signals, 1, memory_order_relaxed);
	hot_synic_signal_event(queue->target.synic, queue->target.sint, queue->target.flag);
}

int net_queue_watch(NetQueueObject *queue, int fd)
{
	struct epoll_event event = {.events = queue->index ? 0 : EPOLLIN};
	if (queue->watched >= 0)
		epoll_ctl(queue->event, EPOLL_CTL_DEL, queue->watched, NULL);
	queue->watched = -1;
	queue->blocked = false;
	if (fd >= 0 && epoll_ctl(queue->event, EPOLL_CTL_ADD, fd, &event) < 0)
		return errno;
	queue->watched = fd;
	return 0;
}

// Completions --------------------------------------------------------------------------------------

void net_completion_packet(const NetQueueObject *queue, const struct net_completion *done,
			   struct ring_descriptor *descriptor, uint8_t message[NET_MESSAGE_MAX])
{
	uint32_t length = RING_DESCRIPTOR_SIZE + ((queue->device->message_size + 7) & ~7U);
	*descriptor = (struct ring_descriptor){PACKET_COMPLETION, RING_DESCRIPTOR_SIZE / 8, (uint16_t)(length / 8), 0,
					       done->id};
	net_message(message, NVSP_RNDIS_COMPLETE, done->status, 0, 0);
}

// Writes completions. Returns false if there is no room for all of them.
static bool complete(NetQueueObject *queue)
{
	RingObject *ring = queue->outgoing;
	uint32_t out, size = queue->device->message_size;
	uint8_t message[NET_MESSAGE_MAX];
	unsigned written = 0;
	bool signal = false;
	if (!queue->done_count)
		return true;
	pthread_mutex_lock(&ring->write_lock);
	if (ring_load_index(ring, &ring->control->out, &out)) {
		uint32_t in = ring->in, free = ring_free(ring, in, out);
		for (; written < queue->done_count; written++) {
			struct ring_descriptor descriptor;
			net_completion_packet(queue, &queue->done[written], &descriptor, message);
			uint32_t total = descriptor.length8 * 8U + RING_FOOTER_SIZE;
			if (total > free)
				break;
			in = ring_put(ring, in, &descriptor, NULL, message, size);
			free -= total;
		}
		signal = written && ring_publish_in(ring, in);
	}
	pthread_mutex_unlock(&ring->write_lock);
	queue->done_count -= written;
	memmove(queue->done, queue->done + written, queue->done_count * sizeof(queue->done[0]));
	atomic_fetch_add_explicit(&queue->packets_out, written, memory_order_relaxed);
	if (signal)
		net_queue_signal(queue);
	return !queue->done_count;
}

// The incoming ring --------------------------------------------------------------------------------

enum taken {
	TAKEN_ALL,     // the ring is empty
	TAKEN_SOME,    // there is more
	TAKEN_BLOCKED, // there is more, but the port comes first
	TAKEN_SLOW,    // there is more, and it is for Python
};

// Wakes the worker also when the port takes frames again, or no longer.
static void set_blocked(NetQueueObject *queue, bool blocked)
{
	if (queue->blocked == blocked)
		return;
	queue->blocked = blocked;
	struct epoll_event event = {.events = (queue->index ? 0 : EPOLLIN) | (blocked ? EPOLLOUT : 0)};
	epoll_ctl(queue->event, EPOLL_CTL_MOD, queue->watched, &event);
}

// Deals with the packet in `head` and `packet`.
static enum taken deal(NetQueueObject *queue, struct net_outcome *outcome)
{
	const struct ring_descriptor *descriptor = &queue->head.descriptor;
	const uint8_t *payload = queue->packet + (queue->head.header - RING_DESCRIPTOR_SIZE);
	uint32_t size = queue->head.length - queue->head.header;
	if (descriptor->type == PACKET_COMPLETION) {
		// iPXE's are empty, so that only the transaction tells what they are of.
		if (size && (size < 8 || get_le32(payload) != NVSP_RNDIS_COMPLETE))
			return TAKEN_SLOW;
		if (net_receive_completed(queue, descriptor->transaction_id))
			return TAKEN_ALL;
		if (!size)
			return TAKEN_SLOW;
		outcome->broken = "a completion of what is not under way";
		return TAKEN_ALL;
	}
	if ((descriptor->type != PACKET_INBAND && descriptor->type != PACKET_GPA_DIRECT) || size < RNDIS_MESSAGE ||
	    get_le32(payload) != NVSP_RNDIS || get_le32(payload + 4) != CHANNEL_DATA)
		return TAKEN_SLOW;
	if (!(descriptor->flags & RING_FLAG_COMPLETION_REQUESTED)) {
		outcome->broken = "an RNDIS packet that wants no completion";
		return TAKEN_ALL;
	}
	uint32_t status;
	enum net_sent sent = net_send(queue, get_le32(payload + 8), get_le32(payload + 12), &status, &outcome->broken);
	set_blocked(queue, sent == NET_SENT_PARTLY);
	if (sent == NET_SENT_PARTLY)
		return TAKEN_BLOCKED;
	if (sent == NET_SENT && !queue->done_count)
		queue->done_since = watch_clock_ns();
	if (sent == NET_SENT)
		queue->done[queue->done_count++] = (struct net_completion){descriptor->transaction_id, status};
	return TAKEN_ALL;
}

// Deals with packets until there are enough for a batch, or something else comes first.
static enum taken take(NetQueueObject *queue, struct net_outcome *outcome, unsigned *count)
{
	RingObject *ring = queue->incoming;
	uint32_t in, out = ring->out;
	*count = 0;
	if (!ring_load_index(ring, &ring->control->in, &in))
		return TAKEN_SLOW;
	enum taken taken = TAKEN_ALL;
	uint32_t available = ring_used(ring, in, out);
	while (available && !outcome->broken) {
		if (*count == BATCH || queue->done_count == NET_BATCH) {
			taken = TAKEN_SOME;
			break;
		}
		bool whole = ring_peek(ring, out, available, &queue->head);
		uint32_t rest = queue->head.length - RING_DESCRIPTOR_SIZE;
		if (!whole || rest > NET_MAX_PACKET) {
			taken = TAKEN_SLOW;
			break;
		}
		uint32_t end =
			ring_copy_out(ring, ring_advance(ring, out, RING_DESCRIPTOR_SIZE), queue->packet, rest);
		taken = deal(queue, outcome);
		if (taken != TAKEN_ALL)
			break;
		(*count)++;
		out = ring_advance(ring, end, RING_FOOTER_SIZE);
		available -= queue->head.length + RING_FOOTER_SIZE;
	}
	if (*count && ring_publish_out(ring, out))
		net_queue_signal(queue);
	atomic_fetch_add_explicit(&queue->packets_in, *count, memory_order_relaxed);
	return taken;
}

static bool ring_has_more(const NetQueueObject *queue)
{
	return atomic_load_explicit(&queue->incoming->control->in, memory_order_acquire) != queue->incoming->out;
}

static void set_mask(NetQueueObject *queue, bool masked)
{
	if (queue->masked != masked)
		ring_set_mask(queue->incoming, queue->masked = masked);
}

static void start(NetQueueObject *queue)
{
	queue->masked = true; // as a channel opens, and as Python leaves it
	pthread_mutex_lock(&queue->outgoing->write_lock);
	queue->running = true;
	pthread_mutex_unlock(&queue->outgoing->write_lock);
}

// Watches the empty ring, and the port, for a while. Returns whether there is something to do. Only what the guest sends
// makes it worth the while, as it saves an exit; whoever sends to the port may want this very CPU.
static bool watch(NetQueueObject *queue, struct net_outcome *outcome)
{
	uint64_t now = watch_clock_ns();
	if (!watch_begin(&queue->watch, now))
		return false;
	for (; watch_goes_on(&queue->watch, now); now = watch_clock_ns()) {
		if (ring_has_more(queue) || (!queue->index && net_receive(queue, outcome)))
			return !outcome->stuck;
		if (atomic_load(&queue->owes_signal) || visit_waits(&queue->lock) ||
		    (queue->done_count && now - queue->done_since > HOLD_NS && !complete(queue)))
			return true;
		__builtin_ia32_pause();
	}
	queue->watch.vain++;
	return false;
}

// Deals with a batch of what there is, both ways.
static enum taken deal_batch(NetQueueObject *queue, struct net_outcome *outcome, unsigned *count)
{
	unsigned done = queue->done_count;
	enum taken taken = take(queue, outcome, count);
	if (queue->done_count > done) {
		queue->watch.vain = 0;
		watch_worked(&queue->watch);
	}
	if (!queue->index && !outcome->broken && net_receive_controls(queue, outcome) && !outcome->drained)
		*count += net_receive(queue, outcome);
	if (*count)
		set_mask(queue, true);
	if (queue->done_count >= HOLD || taken == TAKEN_SLOW)
		outcome->stuck |= !complete(queue);
	return taken;
}

void net_queue_serve(NetQueueObject *queue, struct net_outcome *outcome)
{
	if (!queue->attached) {
		outcome->idle = true;
		return;
	}
	if (!queue->running)
		start(queue);
	for (unsigned round = 0; round < ROUNDS; round++) {
		unsigned count;
		if (round % PORT_ROUNDS == 0)
			outcome->drained = false;
		enum taken taken = deal_batch(queue, outcome, &count);
		outcome->slow = taken == TAKEN_SLOW;
		if (outcome->broken || outcome->stuck || outcome->slow)
			return;
		if (atomic_load(&queue->owes_signal) || visit_waits(&queue->lock))
			break;
		if (count || (taken != TAKEN_BLOCKED && watch(queue, outcome)))
			continue;
		if (!complete(queue) || outcome->stuck)
			break;
		if (taken != TAKEN_BLOCKED)
			set_mask(queue, false);
		if (taken == TAKEN_BLOCKED || !ring_has_more(queue)) {
			outcome->idle = !atomic_load(&queue->owes_signal);
			return;
		}
	}
	outcome->stuck |= !complete(queue);
}
