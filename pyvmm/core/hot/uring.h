// io_uring without liburing: io_uring_setup(2), io_uring_enter(2), io_uring_register(2). One caller at a time.

#ifndef PYVMM_URING_H
#define PYVMM_URING_H

#include <linux/io_uring.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct uring {
	int fd; // -1 if the host has none for us
	void *rings;
	size_t rings_size;
	struct io_uring_sqe *sqes;
	size_t sqes_size;
	_Atomic uint32_t *sq_tail, *cq_head, *cq_tail;
	uint32_t sq_mask, cq_mask;
	struct io_uring_cqe *cqes;
	uint32_t queued; // entries that the kernel has not been told of
};

// Each completion is also told to `eventfd`. Returns false where the host, its kernel or a filter doesn't let us.
bool uring_init(struct uring *uring, unsigned entries, int eventfd);
void uring_deinit(struct uring *uring);
// The next entry, zeroed; the caller never has more under way than there are entries.
struct io_uring_sqe *uring_next(struct uring *uring);
// Tells the kernel of all new entries. Returns how many of the last ones it did not take; they are forgotten.
unsigned uring_submit(struct uring *uring);
// The user data of the first, second ... of those, until the next entry is made.
uint64_t uring_left(const struct uring *uring, unsigned index);
// Waits for a completion.
void uring_wait(struct uring *uring);
bool uring_take(struct uring *uring, uint64_t *user_data, int32_t *result);

#endif
