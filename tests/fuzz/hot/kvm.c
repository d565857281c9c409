// A KVM that does anything: its ioctls, the host's timers and reference time, in place of the real ones (--wrap).

#include "world.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { KICK_SIGNAL = 44 };

static const uint16_t CODES[] = {2, 3, 8, 0xb, 0x13, 0x14, 0x15, 0x50, 0x51, 0x5c, 0x5d, 0x99, 0x9a, 0x8001};

// VP sets, vectors and targets that exist, so that calls get past their first checks.
static void write_input(uint64_t gpa)
{
	for (unsigned i = 0; i < 6 && gpa <= RAM_SIZE - 64; i++)
		memcpy(world.ram + gpa + 8 * i, &(uint64_t){one_in(3) ? ~0ull : below(one_in(2) ? 3 : 256)}, 8);
}

static void guest_writes_memory(void)
{
	uint64_t page = below(RAM_SIZE / HOT_PAGE_SIZE) * HOT_PAGE_SIZE;
	switch (below(5)) {
	case 0: // message slots or event flags taken
		for (unsigned i = 0; i < 16; i++)
			memset(world.ram + page + 256 * i, 0, 4);
		break;
	case 1:
		memset(world.ram + page, 0, HOT_PAGE_SIZE);
		break;
	case 2: { // indices, masks and lengths of rings; input of hypercalls
		uint64_t value = one_in(2) ? below(5 * HOT_PAGE_SIZE) : some_value();
		memcpy(world.ram + page + below(HOT_PAGE_SIZE / 8) * (one_in(2) ? 8 : 0), &value, sizeof(value));
		break;
	}
	case 3:
		write_input(page);
		break;
	default:
		fill(world.ram + page + below(HOT_PAGE_SIZE - 64), 64);
	}
}

static void set_control(void)
{
	uint64_t code = one_in(16) ? draw() & 0xffff : CODES[below(sizeof(CODES) / sizeof(CODES[0]))];
	uint64_t control = code | (one_in(2) ? 1 << 16 : 0);
	if (one_in(3))
		control |= below(20) << 17;
	if (one_in(2))
		control |= (below(one_in(8) ? 0x1000 : 12) << 32) | (one_in(4) ? below(16) << 48 : 0);
	if (one_in(24))
		control |= draw();
	world.control = control;
}

static void fake_hypercall(struct kvm_run *run)
{
	struct kvm_regs *regs = &run->s.regs.regs;
	bool wide = one_in(2);
	uint64_t input = one_in(3) ? below(one_in(2) ? 8 : 256) : some_gpa(), output = one_in(3) ? some_value() : some_gpa();
	set_control();
	if (one_in(2))
		write_input(input);
	fill(regs, sizeof(*regs));
	if (wide) {
		regs->rcx = world.control;
		regs->rdx = input;
		regs->r8 = output;
	} else {
		regs->rax = (uint32_t)world.control;
		regs->rdx = world.control >> 32;
		regs->rbx = input >> 32;
		regs->rcx = (uint32_t)input;
		regs->rdi = output >> 32;
		regs->rsi = (uint32_t)output;
	}
	bool signal = wide && one_in(4);
	run->io.port = signal ? 0xec : wide ? 0xea : 0xeb;
	run->io.direction = KVM_EXIT_IO_OUT;
	run->io.size = signal ? 4 : 1;
	run->io.count = 1;
	world.answered = signal ? SIGNAL : wide ? CALL_64 : CALL_32;
	world.hypercalls++;
}

static void fake_io(struct kvm_run *run)
{
	run->exit_reason = KVM_EXIT_IO;
	run->io.data_offset = sizeof(*run);
	if (one_in(2)) {
		fake_hypercall(run);
		return;
	}
	static const uint16_t ports[] = {0x80, 0xea, 0xeb, 0xec, 0xed, 0x3f8};
	run->io.port = one_in(4) ? (uint16_t)draw() : ports[below(6)];
	run->io.direction = (uint8_t)below(2);
	run->io.size = (uint8_t)(1u << below(3));
	run->io.count = one_in(8) ? (uint32_t)(1 + below(IO_DATA / run->io.size)) : 1;
}

static void fake_msr(struct kvm_run *run)
{
	static const uint32_t first[] = {0x40000080, 0x40000080, 0x40000090, 0x400000b0, 0x40000070, 0x40000000};
	static const uint32_t count[] = {5, 5, 16, 8, 3, 0x200};
	uint64_t group = below(6);
	run->exit_reason = one_in(4) ? KVM_EXIT_X86_RDMSR : KVM_EXIT_X86_WRMSR;
	run->msr.index = one_in(64) ? (uint32_t)draw() : first[group] + (uint32_t)below(count[group]);
	run->msr.data = some_value();
	run->msr.error = 0xff;
	if (group < 2 && !one_in(8))
		run->msr.data |= 1; // mostly on, or little happens
	world.answered = MSR;
}

static void check_answer(const struct kvm_run *run)
{
	const struct kvm_regs *regs = &run->s.regs.regs;
	if (world.answered == MSR && run->msr.error > 1)
		fail("an MSR access was not answered");
	if (world.answered >= CALL_32 && run->kvm_dirty_regs) {
		uint64_t result = world.answered == CALL_32 ? regs->rdx << 32 | regs->rax : regs->rax;
		if (world.answered == SIGNAL)
			result -= regs->rdx; // as the hypercall page does
		if ((result & 0xffffffff) >= 0x100 || result >> 32 > (world.control >> 32 & 0xfff))
			fail("a hypercall has a result that no hypercall has");
	}
	world.answered = NOTHING;
}

// A timer of the guest that is due some time has the host's timer set, for then or sooner, or when it may fire again.
static void check_timer(const VpObject *vp)
{
	if (atomic_load(&vp->scan_requested))
		return;
	for (unsigned i = 0; i < STIMER_COUNT; i++) {
		uint64_t due = vp->synic->timers[i].due;
		uint64_t latest = due > vp->quiet_until ? due : vp->quiet_until;
		if (due > world.now && (!world.timer_due || world.timer_due > latest))
			fail("the host's timer is set too late for the guest's");
	}
}

static void fire_timer(void)
{
	siginfo_t info = {.si_code = SI_TIMER};
	world.timer_due = 0;
	if (syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), KICK_SIGNAL, &info))
		fail("cannot send the timer's signal");
}

static int give_up(int number)
{
	errno = number;
	return -1;
}

static int fake_run(unsigned index)
{
	struct kvm_run *run = world.runs[index];
	const VpObject *vp = (const VpObject *)world.vps[index];
	world.exits++;
	check_answer(run);
	check_timer(vp);
	run->kvm_dirty_regs = 0;
	run->if_flag = one_in(2);
	world.now += one_in(200) ? below(1ull << 40) : below(50000);
	if (world.timer_due && world.now >= world.timer_due)
		fire_timer();
	if (one_in(4))
		guest_writes_memory();
	if (one_in(4)) {
		PyGILState_STATE gil = PyGILState_Ensure();
		others_act();
		PyGILState_Release(gil);
	}
	if (run->immediate_exit && !one_in(4))
		return give_up(EINTR);
	if (!world.budget || !--world.budget) {
		run->exit_reason = one_in(2) ? KVM_EXIT_SHUTDOWN : (uint32_t)draw() | 0x10000;
		return 0;
	}
	switch (below(20)) {
	case 0:
		run->exit_reason = one_in(2) ? KVM_EXIT_INTR : KVM_EXIT_IRQ_WINDOW_OPEN;
		return 0;
	case 1:
		return give_up(one_in(200) ? EFAULT : one_in(2) ? EINTR : EAGAIN);
	case 2:
		run->exit_reason = KVM_EXIT_MMIO;
		run->mmio.phys_addr = draw();
		run->mmio.len = (uint32_t)(1 + below(8));
		run->mmio.is_write = (uint8_t)below(2);
		return 0;
	case 3:
	case 4:
	case 5:
	case 6:
	case 7:
	case 8:
	case 9:
		fake_io(run);
		return 0;
	default:
		fake_msr(run);
		return 0;
	}
}

static void fake_lapic(struct kvm_lapic_state *lapic)
{
	static const uint32_t enabled = 0x1ff;
	memset(lapic, 0, sizeof(*lapic));
	if (!one_in(8))
		memcpy(lapic->regs + 0xf0, &enabled, sizeof(enabled)); // the spurious vector register
	if (one_in(2))
		lapic->regs[one_in(2) ? 0x80 : 0x100 + 0x10 * below(16)] = (char)draw(); // TPR, ISR, TMR
}

static void check_injected(const struct kvm_vcpu_events *events)
{
	if (!events->interrupt.injected || events->exception.injected || events->nmi.injected)
		fail("an interrupt is injected beside another event");
}

int __wrap_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	va_start(arguments, request);
	void *argument = va_arg(arguments, void *);
	va_end(arguments);
	if (request == KVM_RUN)
		return fake_run((unsigned)(fd - FIRST_VP_FD));
	if (one_in(32))
		return give_up(EINVAL);
	switch (request) {
	case KVM_GET_MSRS:
	case KVM_SET_MSRS:
		return (int)below(2);
	case KVM_GET_MP_STATE:
		((struct kvm_mp_state *)argument)->mp_state = (uint32_t)below(4);
		return 0;
	case KVM_GET_LAPIC:
		fake_lapic(argument);
		return 0;
	case KVM_GET_VCPU_EVENTS:
		memset(argument, 0, sizeof(struct kvm_vcpu_events));
		if (one_in(2))
			((uint8_t *)argument)[below(sizeof(struct kvm_vcpu_events))] = 1;
		return 0;
	case KVM_SET_VCPU_EVENTS:
		check_injected(argument);
		return 0;
	case KVM_GET_FPU:
	case KVM_GET_SREGS:
		fill(argument, _IOC_SIZE(request));
		return 0;
	default:
		return 0;
	}
}

int __wrap_nanosleep(const struct timespec *time, struct timespec *rest);
int __wrap_nanosleep(const struct timespec *time, struct timespec *rest)
{
	(void)rest;
	world.now += (uint64_t)time->tv_nsec / 100;
	return 0;
}

// Without it, direct timers are expired by the VPs' own thread: one that a seed does not decide would not be repeatable.
int __wrap_timerfd_create(int clock, int flags);
int __wrap_timerfd_create(int clock, int flags)
{
	(void)clock;
	(void)flags;
	return give_up(EMFILE);
}

int __wrap_timer_create(clockid_t clock, struct sigevent *event, timer_t *timer);
int __wrap_timer_create(clockid_t clock, struct sigevent *event, timer_t *timer)
{
	(void)clock;
	(void)event;
	if (world.timer_made)
		fail("a VP has two timers");
	*timer = NULL;
	world.timer_made = true;
	return 0;
}

int __wrap_timer_settime(timer_t timer, int flags, const struct itimerspec *spec, struct itimerspec *old);
int __wrap_timer_settime(timer_t timer, int flags, const struct itimerspec *spec, struct itimerspec *old)
{
	(void)timer;
	(void)flags;
	(void)old;
	const struct timespec *wait = &spec->it_value;
	if (wait->tv_sec < 0 || wait->tv_nsec < 0 || wait->tv_nsec >= 1000000000)
		fail("a time that the host's timer does not take");
	bool off = !wait->tv_sec && !wait->tv_nsec;
	world.timer_due = off ? 0 : world.now + (uint64_t)wait->tv_sec * 10000000 + (uint64_t)wait->tv_nsec / 100;
	return 0;
}

int __wrap_timer_delete(timer_t timer);
int __wrap_timer_delete(timer_t timer)
{
	(void)timer;
	world.timer_made = false;
	world.timer_due = 0;
	return 0;
}

uint64_t __wrap_hot_reference_now(const ReferenceTimeObject *reference);
uint64_t __wrap_hot_reference_now(const ReferenceTimeObject *reference)
{
	(void)reference;
	return world.now;
}
