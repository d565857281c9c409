// A lock between one worker, which takes it again and again, and visitors, which need not wait for luck to get in between.

#ifndef PYVMM_VISIT_H
#define PYVMM_VISIT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

struct visit_lock {
	pthread_mutex_t mutex;
	pthread_cond_t left;
	_Atomic unsigned visitors; // inside or at the door
};

static inline void visit_init(struct visit_lock *lock)
{
	pthread_mutex_init(&lock->mutex, NULL);
	pthread_cond_init(&lock->left, NULL);
}

static inline void visit_destroy(struct visit_lock *lock)
{
	pthread_cond_destroy(&lock->left);
	pthread_mutex_destroy(&lock->mutex);
}

static inline void visit_lock_worker(struct visit_lock *lock)
{
	pthread_mutex_lock(&lock->mutex);
	while (atomic_load(&lock->visitors))
		pthread_cond_wait(&lock->left, &lock->mutex);
}

static inline void visit_unlock_worker(struct visit_lock *lock)
{
	pthread_mutex_unlock(&lock->mutex);
}

// Whether the worker should leave.
static inline bool visit_waits(struct visit_lock *lock)
{
	return atomic_load(&lock->visitors);
}

static inline void visit_lock(struct visit_lock *lock)
{
	atomic_fetch_add(&lock->visitors, 1);
	pthread_mutex_lock(&lock->mutex);
}

static inline void visit_unlock(struct visit_lock *lock)
{
	if (atomic_fetch_sub(&lock->visitors, 1) == 1)
		pthread_cond_signal(&lock->left);
	pthread_mutex_unlock(&lock->mutex);
}

#endif
