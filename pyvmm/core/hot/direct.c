// Direct timers: they interrupt without a message, so nothing of the VP's own thread is needed. Another thread raises the
// vector, and the VP stays in KVM_RUN. It is made when a guest first arms such a timer.

#include "synic.h"
#include "vp.h"

#include <errno.h>
#include <signal.h>
#include <sys/timerfd.h>
#include <unistd.h>

void direct_arm(SynICObject *self, uint64_t deadline, uint64_t now)
{
	if (deadline == self->direct_deadline)
		return;
	self->direct_deadline = deadline;
	struct itimerspec spec = hot_wait_for(deadline, now);
	timerfd_settime(self->direct_fd, 0, &spec, NULL);
}

void hot_synic_expire_direct(SynICObject *self, uint64_t now)
{
	pthread_mutex_lock(&self->lock);
	if (self->direct_fd >= 0) {
		bool early = now < self->direct_deadline; // the host's clock may run ahead of the TSC
		self->direct_deadline = 0;
		uint64_t next = stimers_scan(self, now, true);
		if (next && next < now + TICKS_APART && !early)
			next = now + TICKS_APART;
		direct_arm(self, next, now);
	}
	pthread_mutex_unlock(&self->lock);
}

void hot_synic_set_direct_fd(SynICObject *self, int fd)
{
	pthread_mutex_lock(&self->lock);
	if (self->direct_fd >= 0)
		direct_arm(self, 0, 0);
	self->direct_fd = fd;
	pthread_mutex_unlock(&self->lock);
}

bool hot_synic_has_direct(SynICObject *self)
{
	pthread_mutex_lock(&self->lock);
	bool has = !self->kvm_timers && stimers_wait_direct(self);
	pthread_mutex_unlock(&self->lock);
	return has;
}

static void *direct_main(void *argument)
{
	VpObject *self = argument;
	uint64_t expirations;
	while (read(self->direct_fd, &expirations, sizeof(expirations)) > 0 || errno == EINTR) {
		if (atomic_load(&self->direct_ends))
			break;
		hot_synic_expire_direct(self->synic, hot_reference_now(self->reference));
	}
	return NULL;
}

void hot_vp_start_direct(VpObject *self)
{
	sigset_t all, before;
	self->direct_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
	if (self->direct_fd < 0)
		return;
	sigfillset(&all); // signals are for Python's main thread, and kicks for the VP's
	pthread_sigmask(SIG_BLOCK, &all, &before);
	int error = pthread_create(&self->direct_thread, NULL, direct_main, self);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (error) {
		close(self->direct_fd);
		self->direct_fd = -1;
	}
	hot_synic_set_direct_fd(self->synic, self->direct_fd);
}

void hot_vp_end_direct(VpObject *self)
{
	if (self->direct_fd < 0)
		return;
	const struct itimerspec now = {.it_value = {.tv_nsec = 1}};
	atomic_store(&self->direct_ends, true);
	timerfd_settime(self->direct_fd, 0, &now, NULL);
	pthread_join(self->direct_thread, NULL);
	close(self->direct_fd);
}
