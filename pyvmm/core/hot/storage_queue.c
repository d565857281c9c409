// A channel's queue at work: requests off the ring, data to and from the file, completions into the ring.
//
// What the page cache has is read at once: asking the kernel for it in a batch costs more than the copy. io_uring gets
// what would wait: reads of what is not cached, durable writes and flushes. Where the host has no io_uring for us, the
// worker waits for reads itself, and Python makes writes durable.

#include "storage.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

enum {
	// Requests taken before the first of them is carried out.
	BATCH = 16,
	// Batches before the worker looks after other things.
	ROUNDS = 32,
	// Bytes to move before the guest gets to know.
	BATCH_BYTES = 64 << 10,
};

// All queues ---------------------------------------------------------------------------------------

static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static StorageQueueObject *list;

void storage_enlist(StorageQueueObject *queue)
{
	pthread_mutex_lock(&list_lock);
	queue->next = list;
	list = queue;
	pthread_mutex_unlock(&list_lock);
}

void storage_delist(StorageQueueObject *queue)
{
	pthread_mutex_lock(&list_lock);
	for (StorageQueueObject **at = &list; *at; at = &(*at)->next) {
		if (*at == queue) {
			*at = queue->next;
			break;
		}
	}
	pthread_mutex_unlock(&list_lock);
}

void hot_storage_drain(const void *of)
{
	pthread_mutex_lock(&list_lock);
	for (StorageQueueObject *queue = list; queue; queue = queue->next) {
		visit_lock(&queue->lock);
		storage_finish(queue, of);
		visit_unlock(&queue->lock);
	}
	pthread_mutex_unlock(&list_lock);
}

// Slots --------------------------------------------------------------------------------------------

void storage_release(StorageQueueObject *queue, uint16_t slot)
{
	queue->free[queue->free_count++] = slot;
}

static uint16_t slot_of(const StorageQueueObject *queue, const struct storage_request *request)
{
	return (uint16_t)(request - queue->slots);
}

static void set_done(StorageQueueObject *queue, struct storage_request *request)
{
	if (request->failed)
		queue->failed[queue->failed_count++] = slot_of(queue, request);
	else
		queue->done[queue->done_count++] = slot_of(queue, request);
}

// Data ---------------------------------------------------------------------------------------------

static uint64_t tag(const StorageQueueObject *queue, const struct storage_request *request, unsigned part)
{
	return (uint64_t)slot_of(queue, request) * DISK_PARTS + part;
}

static void give_to_kernel(StorageQueueObject *queue, struct storage_request *request, unsigned index)
{
	const struct storage_part *part = &request->parts[index];
	struct io_uring_sqe *sqe = uring_next(&queue->uring);
	sqe->fd = atomic_load(&request->disk->fd);
	sqe->user_data = tag(queue, request, index);
	if (request->kind == STORAGE_FLUSH) {
		sqe->opcode = IORING_OP_FSYNC;
		sqe->fsync_flags = IORING_FSYNC_DATASYNC;
	} else {
		sqe->opcode = request->kind == STORAGE_READ ? IORING_OP_READV : IORING_OP_WRITEV;
		sqe->off = part->where;
		sqe->addr = (uintptr_t)&request->pieces[part->first];
		sqe->len = part->count;
		sqe->rw_flags = request->durable ? RWF_DSYNC : 0;
	}
	if (!request->waiting++) {
		queue->in_flight++;
		queue->in_flight_of[request->lun]++;
	}
}

// Reads or writes a part without io_uring. Returns false if the kernel would have to wait for it.
static bool move_at_once(StorageQueueObject *queue, struct storage_request *request, const struct storage_part *part)
{
	FastDiskObject *disk = request->disk;
	const struct iovec *pieces = &request->pieces[part->first];
	bool write = request->kind == STORAGE_WRITE;
	int fd = atomic_load(&disk->fd);
	bool may_wait = queue->uring.fd < 0 || disk->in_memory || (write && atomic_load(&disk->writes_wait));
	ssize_t done;
	for (;;) {
		int flags = may_wait ? 0 : RWF_NOWAIT;
		done = write ? pwritev2(fd, pieces, part->count, (off_t)part->where, flags)
			     : preadv2(fd, pieces, part->count, (off_t)part->where, flags);
		if (done == (ssize_t)part->length)
			return true;
		if (done >= 0 || may_wait)
			break;
		if (errno == EOPNOTSUPP && write) {
			// ext4 for one cannot tell. A write into the page cache seldom waits, and io_uring would take
			// another thread for it.
			atomic_store(&disk->writes_wait, true);
			may_wait = true;
			continue;
		}
		break;
	}
	if (!may_wait)
		return false; // not cached, or only in part
	request->failed = true;
	return true;
}

static void clear_pieces(struct storage_request *request, const struct storage_part *part)
{
	for (unsigned i = 0; i < part->count; i++)
		memset(request->pieces[part->first + i].iov_base, 0, request->pieces[part->first + i].iov_len);
}

static void begin(StorageQueueObject *queue, struct storage_request *request)
{
	if (request->kind == STORAGE_FLUSH)
		give_to_kernel(queue, request, 0);
	for (unsigned i = 0; i < request->parts_count && !request->failed; i++) {
		struct storage_part *part = &request->parts[i];
		if (part->where == DISK_ZEROS)
			clear_pieces(request, part);
		else if (request->durable || !move_at_once(queue, request, part))
			give_to_kernel(queue, request, i);
	}
	if (!request->waiting)
		set_done(queue, request);
}

static void end_part(StorageQueueObject *queue, uint64_t tag, int32_t result)
{
	struct storage_request *request = &queue->slots[tag / DISK_PARTS];
	int64_t whole = request->kind == STORAGE_FLUSH ? 0 : request->parts[tag % DISK_PARTS].length;
	if (request->kind == STORAGE_FLUSH || request->durable) {
		// The kernel tells only once that data could not be written, so Python must not take this for a flush
		// that is still to be done. What was never begun has told nobody.
		bool begun = result != -EAGAIN && result != -EINTR && result != -ECANCELED;
		if (result < 0 && begun)
			atomic_store(&request->disk->flush_failed, true);
		if (atomic_load(&request->disk->flush_failed))
			request->failed = true;
	}
	if (result != whole)
		request->failed = true;
	if (--request->waiting == 0) {
		queue->in_flight--;
		queue->in_flight_of[request->lun]--;
		set_done(queue, request);
	}
}

static void submit(StorageQueueObject *queue)
{
	unsigned left = uring_submit(&queue->uring);
	for (unsigned i = 0; i < left; i++)
		end_part(queue, uring_left(&queue->uring, i), -EAGAIN);
}

static void reap(StorageQueueObject *queue)
{
	uint64_t tag;
	int32_t result;
	while (queue->in_flight && uring_take(&queue->uring, &tag, &result))
		end_part(queue, tag, result);
}

static bool under_way(const StorageQueueObject *queue, const void *of)
{
	if (!of || !queue->in_flight)
		return queue->in_flight;
	for (unsigned lun = 0; lun < STORAGE_LUNS; lun++) {
		const FastDiskObject *disk = queue->disks[lun];
		if (queue->in_flight_of[lun] && (disk == of || disk->table == of))
			return true;
	}
	return false;
}

void storage_finish(StorageQueueObject *queue, const void *of)
{
	if (!under_way(queue, of))
		return;
	for (reap(queue); under_way(queue, of); reap(queue))
		uring_wait(&queue->uring);
	// The worker has completions to write now.
	uint64_t one = 1;
	while (write(queue->doorbell, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

// The rings ----------------------------------------------------------------------------------------

static void signal_guest(StorageQueueObject *queue, struct storage_outcome *outcome)
{
	if (!queue->target.synic) {
		outcome->signal = true;
		return;
	}
	atomic_fetch_add_explicit(&queue->signals, 1, memory_order_relaxed);
	hot_synic_signal_event(queue->target.synic, queue->target.sint, queue->target.flag);
}

static void count(StorageQueueObject *queue, const struct storage_request *request, uint64_t now)
{
	struct storage_counters *counters = &queue->counters[request->lun][request->kind];
	uint64_t us = (now - request->started) / 1000;
	unsigned bucket = us ? 64 - (unsigned)__builtin_clzll(us) : 0;
	if (bucket >= STORAGE_BUCKETS)
		bucket = STORAGE_BUCKETS - 1;
	atomic_fetch_add_explicit(&counters->count, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&counters->bytes, request->length, memory_order_relaxed);
	atomic_fetch_add_explicit(&counters->latency[bucket], 1, memory_order_relaxed);
}

// Writes completions. Returns false if there is no room for all of them.
static bool complete(StorageQueueObject *queue, struct storage_outcome *outcome)
{
	RingObject *ring = queue->outgoing;
	uint32_t out;
	unsigned written = 0;
	bool signal = false;
	if (!queue->done_count)
		return true;
	uint64_t now = watch_clock_ns();
	pthread_mutex_lock(&ring->write_lock);
	if (ring_load_index(ring, &ring->control->out, &out)) {
		uint32_t in = ring->in, free = ring_free(ring, in, out);
		for (; written < queue->done_count; written++) {
			const struct storage_request *request = &queue->slots[queue->done[written]];
			struct ring_descriptor descriptor;
			uint8_t payload[64];
			storage_answer(request, &descriptor, payload);
			uint32_t total = descriptor.length8 * 8U + RING_FOOTER_SIZE;
			if (total > free)
				break;
			in = ring_put(ring, in, &descriptor, NULL, payload, request->answer);
			free -= total;
		}
		signal = written && ring_publish_in(ring, in);
	}
	pthread_mutex_unlock(&ring->write_lock);
	for (unsigned i = 0; i < written; i++) {
		count(queue, &queue->slots[queue->done[i]], now);
		storage_release(queue, queue->done[i]);
	}
	queue->done_count -= written;
	memmove(queue->done, queue->done + written, queue->done_count * sizeof(queue->done[0]));
	atomic_fetch_add_explicit(&queue->packets_out, written, memory_order_relaxed);
	if (signal)
		signal_guest(queue, outcome);
	return !queue->done_count;
}

enum taken {
	TAKEN_ALL,   // the ring is empty
	TAKEN_SOME,  // there is more
	TAKEN_WAITS, // there is more, but requests under way come first
	TAKEN_SLOW,  // there is more, and it is for Python
};

// Takes requests off the ring until `batch` is full or something else comes first.
static enum taken take(StorageQueueObject *queue, uint16_t batch[BATCH], unsigned *count, bool *signal)
{
	RingObject *ring = queue->incoming;
	uint32_t in, out = ring->out;
	*count = 0;
	if (!ring_load_index(ring, &ring->control->in, &in))
		return TAKEN_SLOW;
	enum taken taken = TAKEN_ALL;
	uint32_t available = ring_used(ring, in, out);
	uint64_t now = available ? watch_clock_ns() : 0;
	while (available && taken == TAKEN_ALL) {
		if (*count == BATCH) {
			taken = TAKEN_SOME;
			break;
		}
		if (!queue->free_count) {
			taken = TAKEN_WAITS;
			break;
		}
		struct storage_request *request = &queue->slots[queue->free[queue->free_count - 1]];
		bool whole = ring_peek(ring, out, available, &request->head);
		uint32_t rest = request->head.length - RING_DESCRIPTOR_SIZE;
		if (!whole || rest > STORAGE_MAX_PACKET) {
			taken = TAKEN_SLOW;
			break;
		}
		uint32_t end = ring_copy_out(ring, ring_advance(ring, out, RING_DESCRIPTOR_SIZE), request->packet, rest);
		if (!storage_parse(request, queue)) {
			// Python answers a reset and its like once there is nothing to reset any more.
			bool first = !*count && !queue->in_flight;
			taken = storage_is_command(request) || first ? TAKEN_SLOW : TAKEN_WAITS;
			break;
		}
		request->started = now;
		batch[(*count)++] = queue->free[--queue->free_count];
		out = ring_advance(ring, end, RING_FOOTER_SIZE);
		available -= request->head.length + RING_FOOTER_SIZE;
	}
	*signal = *count && ring_publish_out(ring, out);
	atomic_fetch_add_explicit(&queue->packets_in, *count, memory_order_relaxed);
	return taken;
}

static bool ring_has_more(const StorageQueueObject *queue)
{
	return atomic_load_explicit(&queue->incoming->control->in, memory_order_acquire) != queue->incoming->out;
}

// Watches the empty ring for a while. Returns whether there is something to do.
static bool watch(StorageQueueObject *queue)
{
	uint64_t now = watch_clock_ns();
	if (!watch_begin(&queue->watch, now))
		return false;
	for (; watch_goes_on(&queue->watch, now); now = watch_clock_ns()) {
		reap(queue);
		if (ring_has_more(queue)) {
			queue->watch.vain = 0;
			return true;
		}
		if (queue->done_count || queue->failed_count || visit_waits(&queue->lock))
			return true;
		__builtin_ia32_pause();
	}
	queue->watch.vain++;
	return false;
}

static void note_work(StorageQueueObject *queue)
{
	if (!queue->masked)
		ring_set_mask(queue->incoming, queue->masked = true);
	watch_worked(&queue->watch);
}

void storage_serve(StorageQueueObject *queue, struct storage_outcome *outcome)
{
	for (unsigned round = 0; round < ROUNDS; round++) {
		uint16_t batch[BATCH];
		unsigned count = 0;
		bool signal = false;
		reap(queue);
		outcome->stuck = !complete(queue, outcome);
		if (outcome->stuck || outcome->signal || queue->failed_count || visit_waits(&queue->lock))
			return;
		enum taken taken = take(queue, batch, &count, &signal);
		if (signal)
			signal_guest(queue, outcome);
		if (count || taken != TAKEN_ALL)
			note_work(queue);
		for (unsigned i = 0, moved = 0; i < count; i++) {
			begin(queue, &queue->slots[batch[i]]);
			moved += queue->slots[batch[i]].length;
			if (moved >= BATCH_BYTES && complete(queue, outcome))
				moved = 0;
		}
		submit(queue);
		if (taken == TAKEN_SLOW) {
			outcome->slow = 1;
			outcome->stuck = !complete(queue, outcome);
			return;
		}
		if (count || queue->done_count || queue->failed_count)
			continue;
		if (taken == TAKEN_WAITS) {
			outcome->idle = true;
			return;
		}
		if (watch(queue))
			continue;
		ring_set_mask(queue->incoming, queue->masked = false);
		if (!ring_has_more(queue)) {
			outcome->idle = true;
			return;
		}
	}
}
