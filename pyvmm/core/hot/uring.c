#include "uring.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static int enter(const struct uring *uring, unsigned submit, unsigned complete)
{
	long done;
	do
		done = syscall(SYS_io_uring_enter, uring->fd, submit, complete, complete ? IORING_ENTER_GETEVENTS : 0,
			       NULL, 0);
	while (done < 0 && errno == EINTR);
	return (int)done;
}

static void *map(const struct uring *uring, size_t size, off_t what)
{
	void *mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, uring->fd, what);
	return mapped == MAP_FAILED ? NULL : mapped;
}

bool uring_init(struct uring *uring, unsigned entries, int eventfd)
{
	struct io_uring_params params = {0};
	memset(uring, 0, sizeof(*uring));
	uring->fd = (int)syscall(SYS_io_uring_setup, entries, &params);
	if (uring->fd < 0)
		return false;
	const struct io_sqring_offsets *sq = &params.sq_off;
	const struct io_cqring_offsets *cq = &params.cq_off;
	size_t sq_size = sq->array + params.sq_entries * sizeof(uint32_t);
	size_t cq_size = cq->cqes + params.cq_entries * sizeof(struct io_uring_cqe);
	uring->rings_size = sq_size > cq_size ? sq_size : cq_size;
	uring->sqes_size = params.sq_entries * sizeof(struct io_uring_sqe);
	// Without the feature of Linux 5.4 the two rings would be two mappings.
	if (!(params.features & IORING_FEAT_SINGLE_MMAP) ||
	    !(uring->rings = map(uring, uring->rings_size, IORING_OFF_SQ_RING)) ||
	    !(uring->sqes = map(uring, uring->sqes_size, IORING_OFF_SQES)) ||
	    syscall(SYS_io_uring_register, uring->fd, IORING_REGISTER_EVENTFD, &eventfd, 1) < 0) {
		uring_deinit(uring);
		return false;
	}
	uint8_t *base = uring->rings;
	uring->sq_tail = (_Atomic uint32_t *)(base + sq->tail);
	uring->cq_head = (_Atomic uint32_t *)(base + cq->head);
	uring->cq_tail = (_Atomic uint32_t *)(base + cq->tail);
	memcpy(&uring->sq_mask, base + sq->ring_mask, sizeof(uint32_t));
	memcpy(&uring->cq_mask, base + cq->ring_mask, sizeof(uint32_t));
	uring->cqes = (struct io_uring_cqe *)(base + cq->cqes);
	for (uint32_t i = 0; i < params.sq_entries; i++)
		memcpy(base + sq->array + i * sizeof(i), &i, sizeof(i));
	return true;
}

void uring_deinit(struct uring *uring)
{
	if (uring->rings)
		munmap(uring->rings, uring->rings_size);
	if (uring->sqes)
		munmap(uring->sqes, uring->sqes_size);
	if (uring->fd >= 0)
		close(uring->fd);
	memset(uring, 0, sizeof(*uring));
	uring->fd = -1;
}

struct io_uring_sqe *uring_next(struct uring *uring)
{
	uint32_t tail = atomic_load_explicit(uring->sq_tail, memory_order_relaxed) + uring->queued++;
	struct io_uring_sqe *sqe = &uring->sqes[tail & uring->sq_mask];
	memset(sqe, 0, sizeof(*sqe));
	return sqe;
}

unsigned uring_submit(struct uring *uring)
{
	while (uring->queued) {
		uint32_t tail = atomic_load_explicit(uring->sq_tail, memory_order_relaxed);
		atomic_store_explicit(uring->sq_tail, tail + uring->queued, memory_order_release);
		int taken = enter(uring, uring->queued, 0);
		if (taken > 0)
			uring->queued -= (unsigned)taken;
		// The kernel reads the tail only in io_uring_enter.
		atomic_store_explicit(uring->sq_tail, tail + (taken > 0 ? (unsigned)taken : 0), memory_order_release);
		if (taken <= 0)
			break;
	}
	unsigned left = uring->queued;
	uring->queued = 0;
	return left;
}

uint64_t uring_left(const struct uring *uring, unsigned index)
{
	uint32_t tail = atomic_load_explicit(uring->sq_tail, memory_order_relaxed);
	return uring->sqes[(tail + index) & uring->sq_mask].user_data;
}

void uring_wait(struct uring *uring)
{
	enter(uring, 0, 1);
}

bool uring_take(struct uring *uring, uint64_t *user_data, int32_t *result)
{
	uint32_t head = atomic_load_explicit(uring->cq_head, memory_order_relaxed);
	if (head == atomic_load_explicit(uring->cq_tail, memory_order_acquire))
		return false;
	const struct io_uring_cqe *cqe = &uring->cqes[head & uring->cq_mask];
	*user_data = cqe->user_data;
	*result = cqe->res;
	atomic_store_explicit(uring->cq_head, head + 1, memory_order_release);
	return true;
}
