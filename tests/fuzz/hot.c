// Fuzzes pyvmm/core/hot under the run loop that users run, with a KVM that does anything: its ioctls, timers and reference
// time are replaced (the linker's --wrap) by ones that a seed decides. No /dev/kvm is needed.
// Usage: hot SEED SECONDS LIVES. A life is a partition of three VPs from power-on to its end; life N has the seed SEED + N.
// Ends after SECONDS or LIVES, whichever is first, and prints the numbers of lives, exits and hypercalls.
// Built with -fsanitize=address,undefined: what guest memory, run pages and Python objects hold has red zones.

#include "../../pyvmm/core/hot/synic.h"
#include "../../pyvmm/core/hot/vp.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
	VPS = 3,
	RAM_SIZE = 16 * HOT_PAGE_SIZE,
	ROM_BASE = 0xfffff000,
	IO_DATA = HOT_PAGE_SIZE, // KVM gives one page for the data of port accesses
	RUN_SIZE = sizeof(struct kvm_run) + IO_DATA,
	RUNS = 8,
	EXITS_PER_RUN = 400,
	FIRST_VP_FD = 100,
	VM_FD = 99,
	KICK_SIGNAL = 44,
	SECONDS_PER_LIFE = 60, // a life takes milliseconds
};

static const char INJECTED[] = "a handler's own fault";
static const uint16_t CODES[] = {2, 3, 8, 0xb, 0x13, 0x14, 0x15, 0x50, 0x51, 0x5c, 0x5d, 0x99, 0x9a, 0x8001};

static struct {
	PyObject *memory, *doorbells, *reference, *stubs, *ring;
	PyObject *synics[VPS], *vps[VPS];
	struct kvm_run *runs[VPS];
	uint8_t *ram, *rom;
	uint64_t now;
	unsigned budget; // exits until the run ends
	bool timer_made;
	uint64_t timer_due; // reference time; 0 while the host's timer is not armed
	enum { NOTHING, MSR, CALL_32, CALL_64 } answered; // what the last exit asked for
	uint64_t control;
	uint64_t life;
	uint64_t exits, hypercalls;
} world;

// Chance -----------------------------------------------------------------------------------------------

static uint64_t state;

static uint64_t draw(void)
{
	uint64_t z = (state += 0x9e3779b97f4a7c15); // SplitMix64
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

static uint64_t below(uint64_t limit)
{
	return draw() % limit;
}

static bool one_in(unsigned count)
{
	return below(count) == 0;
}

static uint64_t some_gpa(void)
{
	switch (below(8)) {
	case 0:
		return draw();
	case 1:
		return RAM_SIZE - 8 * below(64) - (one_in(4) ? below(8) : 0);
	case 2:
		return ROM_BASE + below(0x1100);
	case 3:
		return below(RAM_SIZE);
	case 4:
		return below(RAM_SIZE / 8) * 8;
	default:
		return below(RAM_SIZE / HOT_PAGE_SIZE) * HOT_PAGE_SIZE;
	}
}

static uint64_t some_value(void)
{
	switch (below(9)) {
	case 0:
		return draw();
	case 1:
		return below(256);
	case 2:
		return 1ull << below(64);
	case 3:
		return ~0ull << below(64);
	case 4:
		return below(0x20000); // timer configurations, vectors
	case 5:
		return (below(16) << 16) | (below(2) << 12) | below(0x1000);
	case 6:
		return world.now + below(2000) - 1000;
	default:
		return (some_gpa() & ~0xfffull) | below(4);
	}
}

static void fill(void *to, size_t size)
{
	for (uint8_t *at = to; size--; at++)
		*at = (uint8_t)draw();
}

static _Noreturn void fail(const char *what)
{
	fprintf(stderr, "hot: %s\n", what);
	if (PyErr_Occurred())
		PyErr_Print();
	abort();
}

// Sanitizers abort too, if their options say so.
static void on_fatal(int signal)
{
	fprintf(stderr, "hot: repeat with: hot %llu 0 1\n", (unsigned long long)world.life);
	_exit(128 + signal);
}

// What the run loop asks Python for -----------------------------------------------------------------------

static PyObject *answer_value(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
	if (one_in(500))
		return PyErr_Format(PyExc_LookupError, INJECTED);
	return one_in(4) ? Py_NewRef(Py_None) : PyLong_FromUnsignedLongLong(draw());
}

static PyObject *answer_read(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
	return PyLong_FromUnsignedLongLong(draw());
}

static PyObject *answer_done(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
	if (one_in(500))
		return PyErr_Format(PyExc_LookupError, INJECTED);
	return PyBool_FromLong(one_in(2));
}

static PyObject *answer_hypercall(PyObject *Py_UNUSED(module), PyObject *args)
{
	static const uint8_t output[2 * HOT_PAGE_SIZE];
	unsigned vp, code, start, count;
	Py_buffer input;
	if (!PyArg_ParseTuple(args, "IIy*II", &vp, &code, &input, &start, &count))
		fail("a hypercall's arguments are not what they should be");
	if (input.len > HOT_PAGE_SIZE || start > count)
		fail("a hypercall's input is larger than a page, or begins after its end");
	PyBuffer_Release(&input);
	unsigned done = start + (unsigned)below(count - start + 1);
	Py_ssize_t size = one_in(8) ? (Py_ssize_t)below(sizeof(output)) : (Py_ssize_t)(16 * (done - start));
	if (size > (Py_ssize_t)sizeof(output))
		size = sizeof(output);
	return Py_BuildValue("(IIy#)", (unsigned)below(0x60), done, (const char *)output, size);
}

static PyMethodDef stub_methods[] = {
	{"read", answer_read, METH_VARARGS, NULL},
	{"write", answer_done, METH_VARARGS, NULL},
	{"read_msr", answer_value, METH_VARARGS, NULL},
	{"write_msr", answer_done, METH_VARARGS, NULL},
	{"hypercall", answer_hypercall, METH_VARARGS, NULL},
	{"trace_msr", answer_done, METH_VARARGS, NULL},
	{"trace_hypercall", answer_done, METH_VARARGS, NULL},
	{0},
};
static struct PyModuleDef stubs = {PyModuleDef_HEAD_INIT, .m_name = "stubs", .m_size = -1, .m_methods = stub_methods};

// What other threads do ------------------------------------------------------------------------------------

// Drops a result, or the exception of an argument that cannot be.
static void drop(PyObject *result)
{
	if (!result && !PyErr_ExceptionMatches(PyExc_ValueError) && !PyErr_ExceptionMatches(PyExc_RuntimeError))
		fail("an exception that is not documented");
	PyErr_Clear();
	Py_XDECREF(result);
}

static PyObject *some_packets(void)
{
	static const char content[300];
	PyObject *list = PyList_New(0);
	for (uint64_t count = below(5); count--;) {
		PyObject *packet = Py_BuildValue("(IIKy#y#)", (unsigned)below(16), (unsigned)below(2), draw(), content,
						 (Py_ssize_t)below(40), content, (Py_ssize_t)below(sizeof(content)));
		if (!packet || PyList_Append(list, packet) < 0)
			fail("no packet");
		Py_DECREF(packet);
	}
	return list;
}

static void use_ring(void)
{
	if (!world.ring || one_in(20)) {
		Py_CLEAR(world.ring);
		PyObject *pages = PyList_New(0);
		for (uint64_t count = 1 + below(5); count--;) {
			PyObject *page = PyLong_FromUnsignedLongLong(one_in(50) ? draw() : below(RAM_SIZE / HOT_PAGE_SIZE));
			if (PyList_Append(pages, page) < 0)
				fail("no page");
			Py_DECREF(page);
		}
		world.ring = PyObject_CallFunction((PyObject *)&Ring_Type, "OO", world.memory, pages);
		Py_DECREF(pages);
		if (!world.ring) {
			drop(NULL);
			return;
		}
	}
	switch (below(7)) {
	case 0:
		drop(PyObject_CallMethod(world.ring, one_in(2) ? "init_incoming" : "init_outgoing", NULL));
		break;
	case 1:
		drop(PyObject_CallMethod(world.ring, "mask", "O", one_in(2) ? Py_True : Py_False));
		break;
	case 2:
		drop(PyObject_CallMethod(world.ring, "await_space", "I", (unsigned)some_value()));
		break;
	case 3:
		drop(PyObject_CallMethod(world.ring, "write", "N", some_packets()));
		break;
	case 4:
		drop(PyObject_CallMethod(world.ring, "inspect", NULL));
		break;
	default:
		drop(PyObject_CallMethod(world.ring, "read", "I", (unsigned)below(9)));
	}
}

// With the GIL, while the VP is in the guest.
static void others_act(void)
{
	static const char payload[300];
	static const char *const members[] = {"hypercalls_enabled", "xmm_input", "extended_ranges", "trace_msr",
					      "trace_hypercall"};
	PyObject *synic = world.synics[below(VPS)], *vp = world.vps[below(VPS)];
	unsigned sint = (unsigned)below(17);
	switch (below(10)) {
	case 0:
		drop(PyObject_CallMethod(synic, "post", "IIy#", sint, (unsigned)below(4), payload,
					 (Py_ssize_t)below(242)));
		break;
	case 1:
		drop(PyObject_CallMethod(synic, "signal_event", "II", sint, (unsigned)below(2049)));
		break;
	case 2:
		drop(PyObject_CallMethod(synic, "raise_sint", "I", sint));
		break;
	case 3:
		drop(PyObject_CallMethod(synic, "interrupt", "I", (unsigned)below(256)));
		break;
	case 4:
		drop(PyObject_CallMethod(world.doorbells, "connect", "Ii", (unsigned)below(8), -1));
		break;
	case 5:
		drop(PyObject_CallMethod(world.doorbells, "disconnect", "I", (unsigned)below(8)));
		break;
	case 6:
		if (PyObject_SetAttrString(vp, members[below(5)], one_in(4) ? Py_False : Py_True) < 0)
			fail("a member of Vp is not there");
		break;
	case 7:
		drop(PyObject_CallMethod(synic, "take_interrupts", NULL));
		drop(PyObject_CallMethod(one_in(2) ? synic : world.doorbells, "inspect", NULL));
		drop(PyObject_CallMethod(vp, "counts", NULL));
		break;
	case 8:
		if (one_in(20))
			drop(PyObject_CallMethod(vp, "stop", NULL));
		break;
	default:
		use_ring();
	}
}

// KVM ------------------------------------------------------------------------------------------------------

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
	run->io.port = wide ? 0xea : 0xeb;
	run->io.direction = KVM_EXIT_IO_OUT;
	run->io.size = 1;
	run->io.count = 1;
	world.answered = wide ? CALL_64 : CALL_32;
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
	static const uint16_t ports[] = {0x80, 0xea, 0xeb, 0xed, 0x3f8};
	run->io.port = one_in(4) ? (uint16_t)draw() : ports[below(5)];
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
	if ((world.answered == CALL_32 || world.answered == CALL_64) && run->kvm_dirty_regs) {
		uint64_t result = world.answered == CALL_64 ? regs->rax : regs->rdx << 32 | regs->rax;
		if ((result & 0xffffffff) >= 0x100 || result >> 32 > (world.control >> 32 & 0xfff))
			fail("a hypercall has a result that no hypercall has");
	}
	world.answered = NOTHING;
}

// A timer of the guest that is due some time has the host's timer set, for then or sooner.
static void check_timer(const VpObject *vp)
{
	if (atomic_load(&vp->scan_requested))
		return;
	for (unsigned i = 0; i < STIMER_COUNT; i++) {
		uint64_t due = vp->synic->timers[i].due;
		if (due > world.now && (!world.timer_due || world.timer_due > due))
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

// Lives --------------------------------------------------------------------------------------------------------

static PyObject *made(PyObject *object)
{
	if (!object)
		fail("an object cannot be made");
	return object;
}

static uint8_t *add_memory(uint64_t gpa, Py_ssize_t size, bool readonly)
{
	PyObject *content = made(PyByteArray_FromStringAndSize(NULL, size));
	uint8_t *host = (uint8_t *)PyByteArray_AS_STRING(content);
	fill(host, (size_t)size);
	Py_DECREF(made(PyObject_CallMethod(world.memory, "add", "KOO", gpa, content, readonly ? Py_True : Py_False)));
	Py_DECREF(content); // the region holds it
	return host;
}

static void offer(PyObject *vp)
{
	static const uint16_t layouts[][6] = {
		{2, 24, 0, 0, 0, 0},	{3, 24, 8, 0, 0, 0},   {8, 8, 0, 0, 0, 0},     {0xb, 16, 0, 0, 0, 0},
		{0x13, 32, 0, 0, 0, 1}, {0x14, 32, 8, 0, 0, 1}, {0x15, 24, 0, 0, 0, 1}, {0x50, 16, 4, 16, 0, 0},
		{0x51, 16, 32, 0, 0, 0}, {0x5c, 256, 0, 0, 0, 0}, {0x5d, 8, 0, 0, 0, 0}, {0x99, 240, 0, 0, 0, 0},
		{0x9a, 16, 4, 4, 0, 0}, {0x8001, 0, 0, 0, 8, 0},
	};
	PyObject *list = PyList_New(0);
	for (size_t i = 0; i < sizeof(layouts) / sizeof(layouts[0]); i++) {
		const uint16_t *l = layouts[i];
		PyObject *entry = made(Py_BuildValue("(IIIIIi)", l[0], l[1], l[2], l[3], l[4], l[5]));
		if (PyList_Append(list, entry) < 0)
			fail("no layout");
		Py_DECREF(entry);
	}
	Py_DECREF(made(PyObject_CallMethod(vp, "offer_hypercalls", "N", list)));
	uint8_t bitmap[SYNTHETIC_MSR_COUNT / 8];
	memset(bitmap, 0xff, sizeof(bitmap));
	if (one_in(4))
		fill(bitmap, sizeof(bitmap));
	Py_DECREF(made(PyObject_CallMethod(vp, "offer_msrs", "y#", (const char *)bitmap, (Py_ssize_t)sizeof(bitmap))));
}

static void begin(void)
{
	world.now = 1 + below(1000000);
	world.memory = made(PyObject_CallNoArgs((PyObject *)&Memory_Type));
	world.ram = add_memory(0, RAM_SIZE, false);
	world.rom = add_memory(ROM_BASE, HOT_PAGE_SIZE, true);
	world.doorbells = made(PyObject_CallNoArgs((PyObject *)&Doorbells_Type));
	world.reference = made(PyObject_CallFunction((PyObject *)&ReferenceTime_Type, "II", 2000000, 0));
	for (unsigned i = 0; i < VPS; i++) {
		PyObject *synic = made(PyObject_CallFunction((PyObject *)&SynIC_Type, "OiII", world.memory,
							     one_in(4) ? -1 : VM_FD, i, i));
		((SynICObject *)synic)->direct_timers = !one_in(4);
		PyObject *page = made(PyByteArray_FromStringAndSize(NULL, RUN_SIZE));
		world.runs[i] = (struct kvm_run *)PyByteArray_AS_STRING(page);
		memset(world.runs[i], 0, RUN_SIZE);
		world.vps[i] = made(PyObject_CallFunction((PyObject *)&Vp_Type, "iIOOOOOOOO", FIRST_VP_FD + i, i, page,
							  world.memory, synic, world.doorbells, world.reference,
							  world.stubs, world.stubs, world.stubs));
		Py_DECREF(page);
		world.synics[i] = synic;
		offer(world.vps[i]);
	}
	PyObject *peers = made(PyTuple_New(VPS));
	for (unsigned i = 0; i < VPS; i++)
		PyTuple_SET_ITEM(peers, i, Py_NewRef(world.vps[i]));
	for (unsigned i = 0; i < VPS; i++)
		Py_DECREF(made(PyObject_CallMethod(world.vps[i], "set_peers", "(O)", peers)));
	Py_DECREF(peers);
}

// What is saved comes back the same, in a new object as well.
static void check_saving(void)
{
	PyObject *synic = world.synics[below(VPS)];
	PyObject *saved = made(PyObject_CallMethod(synic, "save", NULL));
	PyObject *other = made(PyObject_CallFunction((PyObject *)&SynIC_Type, "OiII", world.memory, -1, 0, 0));
	Py_DECREF(made(PyObject_CallMethod(other, "restore", "O", saved)));
	PyObject *again = made(PyObject_CallMethod(other, "save", NULL));
	if (PyObject_RichCompareBool(saved, again, Py_EQ) != 1)
		fail("restored state is not what was saved");
	const SynICObject *left = (SynICObject *)synic, *right = (SynICObject *)other;
	if (memcmp(left->timers, right->timers, sizeof(left->timers)) ||
	    memcmp(left->sint, right->sint, sizeof(left->sint)))
		fail("restored timers or SINTs are not what was saved");
	Py_DECREF(again);
	Py_DECREF(other);
	if (one_in(2)) {
		Py_DECREF(made(PyObject_CallMethod(synic, "reset", NULL)));
		Py_DECREF(made(PyObject_CallMethod(synic, "restore", "O", saved)));
	}
	Py_DECREF(saved);
}

static void live(uint64_t seed)
{
	uint8_t rom[HOT_PAGE_SIZE];
	world.life = state = seed;
	alarm(SECONDS_PER_LIFE);
	begin();
	memcpy(rom, world.rom, sizeof(rom));
	for (unsigned run = 0; run < RUNS; run++) {
		world.budget = EXITS_PER_RUN;
		world.answered = NOTHING;
		PyObject *reason = PyObject_CallMethod(world.vps[below(VPS)], "run", NULL);
		if (!reason && !PyErr_ExceptionMatches(PyExc_LookupError) && !PyErr_ExceptionMatches(PyExc_OSError))
			fail("the run loop raised what nobody asked it to");
		PyErr_Clear();
		Py_XDECREF(reason);
		if (world.timer_made)
			fail("a VP that does not run has a timer");
		check_saving();
	}
	if (memcmp(rom, world.rom, sizeof(rom)))
		fail("the ROM has changed");
	Py_CLEAR(world.ring);
	for (unsigned i = 0; i < VPS; i++) {
		Py_CLEAR(world.vps[i]);
		Py_CLEAR(world.synics[i]);
	}
	Py_CLEAR(world.doorbells);
	Py_CLEAR(world.reference);
	Py_CLEAR(world.memory);
	PyGC_Collect(); // peers know each other
}

PyMODINIT_FUNC PyInit__hot(void);

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: hot SEED SECONDS LIVES\n");
		return 2;
	}
	uint64_t seed = strtoull(argv[1], NULL, 0), lives = strtoull(argv[3], NULL, 0), done = 0;
	double seconds = strtod(argv[2], NULL);
	PyPreConfig pre;
	PyPreConfig_InitIsolatedConfig(&pre);
	pre.allocator = PYMEM_ALLOCATOR_MALLOC; // with red zones
	Py_PreInitialize(&pre);
	Py_InitializeEx(0);
	if (!PyInit__hot() || !(world.stubs = PyModule_Create(&stubs)))
		fail("the extension cannot be made");
	signal(SIGABRT, on_fatal);
	signal(SIGALRM, on_fatal);
	struct timespec start, now;
	clock_gettime(CLOCK_MONOTONIC, &start);
	double elapsed = 0;
	while (done < lives && (!seconds || elapsed < seconds)) {
		live(seed + done++);
		clock_gettime(CLOCK_MONOTONIC, &now);
		elapsed = (double)(now.tv_sec - start.tv_sec) + (double)(now.tv_nsec - start.tv_nsec) / 1e9;
	}
	printf("seed %llu: %llu lives, %llu exits, %llu hypercalls in %.1f s\n", (unsigned long long)seed,
	       (unsigned long long)done, (unsigned long long)world.exits, (unsigned long long)world.hypercalls, elapsed);
	return 0;
}
