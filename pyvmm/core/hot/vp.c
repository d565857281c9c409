// The run loop of one VP: KVM_RUN without the GIL, hot exits answered here, cold ones by Python objects.
// Exits and their fields: Linux Documentation/virt/kvm/api.rst, chapter 5.

#include "hot.h"

#include <errno.h>
#include <linux/kvm.h>
#include <signal.h>
#include <structmember.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
	KICK_SIGNAL = 44, // a real-time signal that neither glibc nor Python uses

	EXIT_REASONS = 64,
	HYPERCALL_CODES = 0x200,
	EXTENDED_HYPERCALL_BASE = 0x8000,
	HYPERCALL_SLOTS = HYPERCALL_CODES + 0x10, // the last ones for extended calls

	SYNTHETIC_MSR_BASE = 0x40000000,
	SYNTHETIC_MSR_COUNT = 0x200,
	MSR_TIME_REF_COUNT = 0x40000020,

	// The hypercall page, written by enlightenments/hypercall_page.py, traps here: one port for callers in 64-bit
	// mode, one for all others.
	PORT_HYPERCALL_64 = 0xea,
	PORT_HYPERCALL_32 = 0xeb,
	PORT_POST_CODE = 0x80, // written as a short delay too
	PORT_IO_DELAY = 0xed,

	HVCALL_SIGNAL_EVENT = 0x5d,
};

static const uint64_t CONTROL_FAST = 1 << 16;
static const uint64_t CONTROL_CODE = 0xffff;
static const uint64_t RESULT_STATUS = 0xffff;

// How often something went wrong for the guest, and the last time: reference time, and the value written to an MSR or
// the result of a hypercall.
struct errors {
	uint64_t count;
	uint64_t time;
	uint64_t value;
};

struct VpObject {
	PyObject_HEAD
	int fd;
	unsigned index;
	struct kvm_run *run;
	Py_buffer run_buffer;
	MemoryObject *memory;
	SynICObject *synic;
	DoorbellsObject *doorbells;
	ReferenceTimeObject *reference;
	PyObject *pio;
	PyObject *mmio;
	PyObject *hypervisor;

	atomic_bool stop_requested;
	atomic_bool scan_requested;
	pthread_mutex_t thread_lock; // the two below
	bool running;
	pthread_t thread;

	timer_t timer; // exists while the VP runs
	_Atomic uint64_t timer_deadline; // 0 while it is not armed

	uint8_t msr_offered[SYNTHETIC_MSR_COUNT / 8];
	char hypercalls_enabled;
	char signal_event_offered;
	char trace_msr;
	char trace_hypercall;

	uint64_t exits[EXIT_REASONS];
	uint64_t msr_reads[SYNTHETIC_MSR_COUNT];
	uint64_t msr_writes[SYNTHETIC_MSR_COUNT];
	uint64_t hypercalls[HYPERCALL_SLOTS];
	uint64_t hypercalls_unknown;
	struct errors msr_read_errors[SYNTHETIC_MSR_COUNT];
	struct errors msr_write_errors[SYNTHETIC_MSR_COUNT];
	struct errors hypercall_errors[HYPERCALL_SLOTS];
};

static _Thread_local VpObject *current_vp;

// Leaving the guest ----------------------------------------------------------------------------------

// Runs on the VP's own thread. immediate_exit closes the gap between the loop's last look at the requests and KVM_RUN.
static void on_kick(int signal, siginfo_t *info, void *context)
{
	(void)signal;
	(void)context;
	VpObject *self = current_vp;
	if (self) {
		// The host's clock may run ahead of the TSC: a timer that fires too early is armed anew.
		if (info->si_code == SI_TIMER)
			atomic_store(&self->timer_deadline, 0);
		atomic_store(&self->scan_requested, true);
		self->run->immediate_exit = 1;
	}
}

bool hot_vp_install_kick(void)
{
	struct sigaction action = {.sa_sigaction = on_kick, .sa_flags = SA_RESTART | SA_SIGINFO};
	return sigaction(KICK_SIGNAL, &action, NULL) == 0;
}

static void kick(VpObject *self)
{
	pthread_mutex_lock(&self->thread_lock);
	if (self->running && !pthread_equal(self->thread, pthread_self()))
		pthread_kill(self->thread, KICK_SIGNAL);
	pthread_mutex_unlock(&self->thread_lock);
}

void hot_vp_request_scan(VpObject *self)
{
	atomic_store(&self->scan_requested, true);
	kick(self);
}

// Synthetic timers -------------------------------------------------------------------------------------

static bool make_timer(VpObject *self)
{
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = KICK_SIGNAL};
	event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
	atomic_store(&self->timer_deadline, 0);
	return timer_create(CLOCK_MONOTONIC, &event, &self->timer) == 0;
}

static void scan(VpObject *self)
{
	uint64_t now = hot_reference_now(self->reference);
	uint64_t deadline = hot_synic_scan(self->synic, now);
	if (deadline == atomic_load(&self->timer_deadline))
		return;
	atomic_store(&self->timer_deadline, deadline);
	struct itimerspec spec = {0};
	if (deadline) {
		uint64_t wait = deadline > now ? deadline - now : 1; // 100 ns
		spec.it_value.tv_sec = (time_t)(wait / 10000000);
		spec.it_value.tv_nsec = (long)(wait % 10000000 * 100);
	}
	timer_settime(self->timer, 0, &spec, NULL);
}

// Calls into Python; all want the GIL -------------------------------------------------------------------

static PyObject *call(PyObject *object, const char *method, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	PyObject *packed = Py_VaBuildValue(format, arguments);
	va_end(arguments);
	PyObject *callable = packed ? PyObject_GetAttrString(object, method) : NULL;
	PyObject *result = callable ? PyObject_Call(callable, packed, NULL) : NULL;
	Py_XDECREF(callable);
	Py_XDECREF(packed);
	return result;
}

static bool call_done(PyObject *result)
{
	Py_XDECREF(result);
	return result != NULL;
}

static bool bus_access(PyObject *bus, bool write, uint64_t address, unsigned size, uint8_t *data)
{
	uint64_t value = 0;
	if (write) {
		memcpy(&value, data, size);
		return call_done(call(bus, "write", "(KIK)", address, size, value));
	}
	PyObject *result = call(bus, "read", "(KI)", address, size);
	if (!result)
		return false;
	value = PyLong_AsUnsignedLongLongMask(result);
	Py_DECREF(result);
	memcpy(data, &value, size);
	return !PyErr_Occurred();
}

// Counting ----------------------------------------------------------------------------------------------------

static void count_error(const VpObject *self, struct errors *errors, uint64_t value)
{
	errors->count++;
	errors->time = hot_reference_now(self->reference);
	errors->value = value;
}

// Where a call code is counted: its position in the arrays, or -1 for one that no hypervisor has.
static int hypercall_slot(uint64_t code)
{
	if (code < HYPERCALL_CODES)
		return (int)code;
	bool counted = code >= EXTENDED_HYPERCALL_BASE &&
		       code - EXTENDED_HYPERCALL_BASE < HYPERCALL_SLOTS - HYPERCALL_CODES;
	return counted ? (int)(code - EXTENDED_HYPERCALL_BASE + HYPERCALL_CODES) : -1;
}

// Hypercalls ------------------------------------------------------------------------------------------------

static uint64_t signal_event(VpObject *self, uint64_t control, uint64_t input)
{
	if (control & ~(CONTROL_CODE | CONTROL_FAST))
		return HV_STATUS_INVALID_HYPERCALL_INPUT;
	uint64_t argument = input;
	if (!(control & CONTROL_FAST)) {
		if (input % 8)
			return HV_STATUS_INVALID_ALIGNMENT;
		const void *block = hot_memory_ptr(self->memory, input, sizeof(argument), false);
		if (!block)
			return HV_STATUS_INVALID_ALIGNMENT;
		memcpy(&argument, block, sizeof(argument));
	}
	return (uint64_t)hot_doorbells_signal(self->doorbells, (uint32_t)argument, argument >> 32 & 0xffff);
}

struct gil {
	PyThreadState *saved;
};

static bool hypercall(VpObject *self, struct gil *gil, bool caller_64)
{
	struct kvm_regs *regs = &self->run->s.regs.regs;
	uint64_t control, input, output, result;
	if (caller_64) {
		control = regs->rcx;
		input = regs->rdx;
		output = regs->r8;
	} else {
		control = regs->rdx << 32 | (uint32_t)regs->rax;
		input = regs->rbx << 32 | (uint32_t)regs->rcx;
		output = regs->rdi << 32 | (uint32_t)regs->rsi;
	}
	uint64_t code = control & CONTROL_CODE;
	int slot = hypercall_slot(code);
	if (slot >= 0)
		self->hypercalls[slot]++;
	else
		self->hypercalls_unknown++;

	bool ok = true;
	bool hot = code == HVCALL_SIGNAL_EVENT && self->signal_event_offered;
	if (hot)
		result = signal_event(self, control, input);
	if (!hot || self->trace_hypercall) {
		PyEval_RestoreThread(gil->saved);
		if (!hot) {
			PyObject *value =
				call(self->hypervisor, "hypercall", "(IKKK)", self->index, control, input, output);
			result = value ? PyLong_AsUnsignedLongLongMask(value) : 0;
			Py_XDECREF(value);
			ok = !PyErr_Occurred();
		}
		if (ok && self->trace_hypercall)
			ok = call_done(call(self->hypervisor, "trace_hypercall", "(IKKK)", self->index, control, input,
					    result));
		gil->saved = PyEval_SaveThread();
	}
	if (!ok)
		return false;
	if (slot >= 0 && result & RESULT_STATUS)
		count_error(self, &self->hypercall_errors[slot], result);
	if (caller_64) {
		regs->rax = result;
	} else {
		regs->rax = (uint32_t)result;
		regs->rdx = result >> 32;
	}
	self->run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
	return true;
}

// Exits -----------------------------------------------------------------------------------------------------

static bool on_io(VpObject *self, struct gil *gil)
{
	struct kvm_run *run = self->run;
	uint16_t port = run->io.port;
	bool write = run->io.direction == KVM_EXIT_IO_OUT;
	if (write && run->io.count == 1) {
		if (port == PORT_POST_CODE || port == PORT_IO_DELAY)
			return true;
		if ((port == PORT_HYPERCALL_64 || port == PORT_HYPERCALL_32) && self->hypercalls_enabled)
			return hypercall(self, gil, port == PORT_HYPERCALL_64);
	}
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	bool ok = true;
	PyEval_RestoreThread(gil->saved);
	for (unsigned i = 0; ok && i < run->io.count; i++)
		ok = bus_access(self->pio, write, port, run->io.size, data + i * run->io.size);
	gil->saved = PyEval_SaveThread();
	return ok;
}

static bool on_mmio(VpObject *self, struct gil *gil)
{
	struct kvm_run *run = self->run;
	PyEval_RestoreThread(gil->saved);
	bool ok = bus_access(self->mmio, run->mmio.is_write, run->mmio.phys_addr, run->mmio.len, run->mmio.data);
	gil->saved = PyEval_SaveThread();
	return ok;
}

static bool msr_offered(const VpObject *self, uint32_t index)
{
	uint32_t number = index - SYNTHETIC_MSR_BASE;
	return self->msr_offered[number / 8] >> number % 8 & 1;
}

static bool on_msr(VpObject *self, struct gil *gil, bool write)
{
	struct kvm_run *run = self->run;
	uint32_t index = run->msr.index;
	uint64_t value = run->msr.data;
	bool valid = false, handled = false, ok = true;
	if (index - SYNTHETIC_MSR_BASE < SYNTHETIC_MSR_COUNT) {
		(write ? self->msr_writes : self->msr_reads)[index - SYNTHETIC_MSR_BASE]++;
		if (!msr_offered(self, index)) {
			handled = true;
		} else if (hot_synic_owns_msr(index)) {
			handled = true;
			if (write)
				valid = hot_synic_write_msr(self->synic, index, value,
							    hot_reference_now(self->reference));
			else
				valid = hot_synic_read_msr(self->synic, index, &value);
			if (write)
				atomic_store(&self->scan_requested, true);
		} else if (index == MSR_TIME_REF_COUNT && !write) {
			handled = valid = true;
			value = hot_reference_now(self->reference);
		}
	}
	if (!handled || self->trace_msr) {
		PyEval_RestoreThread(gil->saved);
		if (!handled && write) {
			PyObject *result = call(self->hypervisor, "write_msr", "(IIK)", self->index, index, value);
			valid = result && PyObject_IsTrue(result) == 1;
			ok = call_done(result) && !PyErr_Occurred();
		} else if (!handled) {
			PyObject *result = call(self->hypervisor, "read_msr", "(II)", self->index, index);
			valid = result && result != Py_None;
			if (valid)
				value = PyLong_AsUnsignedLongLongMask(result);
			ok = call_done(result) && !PyErr_Occurred();
		}
		if (ok && self->trace_msr)
			ok = call_done(call(self->hypervisor, "trace_msr", "(IOIKO)", self->index,
					    write ? Py_True : Py_False, index, value, valid ? Py_True : Py_False));
		gil->saved = PyEval_SaveThread();
	}
	uint32_t number = index - SYNTHETIC_MSR_BASE;
	if (!valid && number < SYNTHETIC_MSR_COUNT)
		count_error(self, &(write ? self->msr_write_errors : self->msr_read_errors)[number], write ? value : 0);
	run->msr.error = !valid;
	if (!write)
		run->msr.data = value;
	return ok;
}

enum outcome {
	GO_ON,
	LEAVE,  // the caller wants to see this exit
	FAILED, // a Python exception is set, or errno if the request itself failed
};

static enum outcome step(VpObject *self, struct gil *gil)
{
	struct kvm_run *run = self->run;
	if (atomic_exchange(&self->scan_requested, false))
		scan(self);
	if (ioctl(self->fd, KVM_RUN, 0) < 0) {
		if (errno != EINTR && errno != EAGAIN)
			return FAILED;
		self->exits[KVM_EXIT_INTR]++;
		run->exit_reason = KVM_EXIT_INTR;
		return GO_ON;
	}
	uint32_t reason = run->exit_reason;
	self->exits[reason < EXIT_REASONS ? reason : 0]++;
	errno = 0;
	switch (reason) {
	case KVM_EXIT_IO:
		return on_io(self, gil) ? GO_ON : FAILED;
	case KVM_EXIT_MMIO:
		return on_mmio(self, gil) ? GO_ON : FAILED;
	case KVM_EXIT_X86_RDMSR:
		return on_msr(self, gil, false) ? GO_ON : FAILED;
	case KVM_EXIT_X86_WRMSR:
		return on_msr(self, gil, true) ? GO_ON : FAILED;
	case KVM_EXIT_INTR:
	case KVM_EXIT_IRQ_WINDOW_OPEN:
		return GO_ON;
	default:
		return LEAVE;
	}
}

// A kick may come as soon as `running` is seen, so `current_vp` is set before and cleared after.
static void enter(VpObject *self)
{
	sigset_t kick_only;
	sigemptyset(&kick_only);
	sigaddset(&kick_only, KICK_SIGNAL);
	pthread_sigmask(SIG_UNBLOCK, &kick_only, NULL); // whoever started this process may have blocked it
	current_vp = self;
	pthread_mutex_lock(&self->thread_lock);
	self->running = true;
	self->thread = pthread_self();
	pthread_mutex_unlock(&self->thread_lock);
}

static void leave(VpObject *self)
{
	pthread_mutex_lock(&self->thread_lock);
	self->running = false;
	pthread_mutex_unlock(&self->thread_lock);
	timer_delete(self->timer);
	current_vp = NULL;
}

static PyObject *vp_run(VpObject *self, PyObject *Py_UNUSED(ignored))
{
	if (self->running) {
		PyErr_SetString(PyExc_RuntimeError, "this VP runs already");
		return NULL;
	}
	if (!make_timer(self))
		return PyErr_SetFromErrno(PyExc_OSError);
	enter(self);
	atomic_store(&self->scan_requested, true);
	enum outcome outcome = GO_ON;
	uint32_t reason = KVM_EXIT_INTR;
	bool stopping = false;
	struct gil gil = {.saved = PyEval_SaveThread()};
	while (outcome == GO_ON) {
		self->run->immediate_exit = stopping;
		atomic_thread_fence(memory_order_seq_cst);
		if (atomic_exchange(&self->stop_requested, false)) {
			// The instruction whose exit was answered last is only finished by another KVM_RUN, which may exit
			// for its next part: go on until KVM would enter the guest.
			stopping = true;
			self->run->immediate_exit = 1;
		}
		outcome = step(self, &gil);
		if (stopping && self->run->exit_reason == KVM_EXIT_INTR)
			break;
	}
	int number = errno;
	PyEval_RestoreThread(gil.saved);
	leave(self);
	if (outcome == FAILED) {
		if (!PyErr_Occurred()) {
			errno = number;
			PyErr_SetFromErrnoWithFilename(PyExc_OSError, "KVM_RUN");
		}
		return NULL;
	}
	if (outcome == LEAVE)
		reason = self->run->exit_reason;
	return PyLong_FromUnsignedLong(reason);
}

// The rest of the object ----------------------------------------------------------------------------------------

static PyObject *vp_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
	int fd;
	unsigned index;
	PyObject *run_map, *memory, *synic, *doorbells, *reference, *pio, *mmio, *hypervisor;
	Py_buffer run_buffer;
	if (!PyArg_ParseTuple(args, "iIOO!O!O!O!OOO:Vp", &fd, &index, &run_map, &Memory_Type, &memory, &SynIC_Type,
			      &synic, &Doorbells_Type, &doorbells, &ReferenceTime_Type, &reference, &pio, &mmio,
			      &hypervisor))
		return NULL;
	if (PyObject_GetBuffer(run_map, &run_buffer, PyBUF_WRITABLE) < 0)
		return NULL;
	if ((size_t)run_buffer.len < sizeof(struct kvm_run)) {
		PyBuffer_Release(&run_buffer);
		PyErr_SetString(PyExc_ValueError, "the run page is too small");
		return NULL;
	}
	VpObject *self = (VpObject *)type->tp_alloc(type, 0);
	if (!self) {
		PyBuffer_Release(&run_buffer);
		return NULL;
	}
	self->run_buffer = run_buffer;
	self->run = run_buffer.buf;
	self->run->kvm_valid_regs = KVM_SYNC_X86_REGS;
	self->fd = fd;
	self->index = index;
	self->memory = (MemoryObject *)Py_NewRef(memory);
	self->synic = (SynICObject *)Py_NewRef(synic);
	self->doorbells = (DoorbellsObject *)Py_NewRef(doorbells);
	self->reference = (ReferenceTimeObject *)Py_NewRef(reference);
	self->pio = Py_NewRef(pio);
	self->mmio = Py_NewRef(mmio);
	self->hypervisor = Py_NewRef(hypervisor);
	pthread_mutex_init(&self->thread_lock, NULL);
	hot_synic_attach(self->synic, self);
	return (PyObject *)self;
}

static int vp_traverse(VpObject *self, visitproc visit, void *arg)
{
	Py_VISIT(self->pio);
	Py_VISIT(self->mmio);
	Py_VISIT(self->hypervisor);
	return 0;
}

static int vp_clear(VpObject *self)
{
	Py_CLEAR(self->pio);
	Py_CLEAR(self->mmio);
	Py_CLEAR(self->hypervisor);
	return 0;
}

static void vp_dealloc(VpObject *self)
{
	PyObject_GC_UnTrack(self);
	hot_synic_attach(self->synic, NULL);
	PyBuffer_Release(&self->run_buffer);
	pthread_mutex_destroy(&self->thread_lock);
	vp_clear(self);
	Py_DECREF(self->memory);
	Py_DECREF(self->synic);
	Py_DECREF(self->doorbells);
	Py_DECREF(self->reference);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *vp_stop(VpObject *self, PyObject *Py_UNUSED(ignored))
{
	atomic_store(&self->stop_requested, true);
	kick(self);
	Py_RETURN_NONE;
}

static PyObject *vp_offer_msrs(VpObject *self, PyObject *args)
{
	Py_buffer bitmap;
	if (!PyArg_ParseTuple(args, "y*:offer_msrs", &bitmap))
		return NULL;
	bool fits = bitmap.len == sizeof(self->msr_offered);
	if (fits)
		memcpy(self->msr_offered, bitmap.buf, sizeof(self->msr_offered));
	else
		PyErr_Format(PyExc_ValueError, "the bitmap has %zu bytes", sizeof(self->msr_offered));
	PyBuffer_Release(&bitmap);
	return fits ? Py_NewRef(Py_None) : NULL;
}

// From a position in the arrays to the number that is counted there.
static unsigned long exit_number(unsigned slot)
{
	return slot;
}

static unsigned long msr_number(unsigned slot)
{
	return SYNTHETIC_MSR_BASE + slot;
}

static unsigned long hypercall_number(unsigned slot)
{
	return slot < HYPERCALL_CODES ? slot : EXTENDED_HYPERCALL_BASE + slot - HYPERCALL_CODES;
}

// Takes `value`. Returns false with an exception set.
static bool set_item(PyObject *dict, unsigned long number, PyObject *value)
{
	PyObject *key = PyLong_FromUnsignedLong(number);
	bool done = key && value && PyDict_SetItem(dict, key, value) == 0;
	Py_XDECREF(key);
	Py_XDECREF(value);
	return done;
}

// {number: count} of the counts that are not 0.
static PyObject *count_dict(const uint64_t *counts, unsigned length, unsigned long (*number)(unsigned))
{
	PyObject *result = PyDict_New();
	for (unsigned i = 0; result && i < length; i++) {
		if (counts[i] && !set_item(result, number(i), PyLong_FromUnsignedLongLong(counts[i])))
			Py_CLEAR(result);
	}
	return result;
}

// {number: (count, time, value)} where there were errors.
static PyObject *error_dict(const struct errors *errors, unsigned length, unsigned long (*number)(unsigned))
{
	PyObject *result = PyDict_New();
	for (unsigned i = 0; result && i < length; i++) {
		const struct errors *at = &errors[i];
		if (at->count && !set_item(result, number(i), Py_BuildValue("(KKK)", at->count, at->time, at->value)))
			Py_CLEAR(result);
	}
	return result;
}

static PyObject *vp_counts(VpObject *self, PyObject *Py_UNUSED(ignored))
{
	return Py_BuildValue("{s:N,s:N,s:N,s:N,s:K,s:N,s:N,s:N}", "exits",
			     count_dict(self->exits, EXIT_REASONS, exit_number), "msr_reads",
			     count_dict(self->msr_reads, SYNTHETIC_MSR_COUNT, msr_number), "msr_writes",
			     count_dict(self->msr_writes, SYNTHETIC_MSR_COUNT, msr_number), "hypercalls",
			     count_dict(self->hypercalls, HYPERCALL_SLOTS, hypercall_number), "hypercalls_unknown",
			     self->hypercalls_unknown, "msr_read_errors",
			     error_dict(self->msr_read_errors, SYNTHETIC_MSR_COUNT, msr_number), "msr_write_errors",
			     error_dict(self->msr_write_errors, SYNTHETIC_MSR_COUNT, msr_number), "hypercall_errors",
			     error_dict(self->hypercall_errors, HYPERCALL_SLOTS, hypercall_number));
}

static PyMethodDef vp_methods[] = {
	{"run", (PyCFunction)vp_run, METH_NOARGS, NULL},
	{"stop", (PyCFunction)vp_stop, METH_NOARGS, NULL},
	{"offer_msrs", (PyCFunction)vp_offer_msrs, METH_VARARGS, NULL},
	{"counts", (PyCFunction)vp_counts, METH_NOARGS, NULL},
	{0},
};

static PyMemberDef vp_members[] = {
	{"hypercalls_enabled", T_BOOL, offsetof(VpObject, hypercalls_enabled), 0, NULL},
	{"signal_event_offered", T_BOOL, offsetof(VpObject, signal_event_offered), 0, NULL},
	{"trace_msr", T_BOOL, offsetof(VpObject, trace_msr), 0, NULL},
	{"trace_hypercall", T_BOOL, offsetof(VpObject, trace_hypercall), 0, NULL},
	{0},
};

PyTypeObject Vp_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvmm.core._hot.Vp",
	.tp_basicsize = sizeof(VpObject),
	.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.tp_new = vp_new,
	.tp_traverse = (traverseproc)vp_traverse,
	.tp_clear = (inquiry)vp_clear,
	.tp_dealloc = (destructor)vp_dealloc,
	.tp_methods = vp_methods,
	.tp_members = vp_members,
};
