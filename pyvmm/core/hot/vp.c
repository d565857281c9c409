// The run loop of one VP: KVM_RUN without the GIL, hot exits answered here, cold ones by Python objects.
// Exits and their fields: Linux Documentation/virt/kvm/api.rst, chapter 5.

#include "vp.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <structmember.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
	KICK_SIGNAL = 44, // a real-time signal that neither glibc nor Python uses

	MSR_TIME_REF_COUNT = 0x40000020,
	MSR_GUEST_IDLE = 0x400000f0,

	// The hypercall page, written by enlightenments/hypercall_page.py, traps here: one port for callers in 64-bit
	// mode, one for all others.
	PORT_HYPERCALL_64 = 0xea,
	PORT_HYPERCALL_32 = 0xeb,
	PORT_SIGNAL = 0xec, // 64-bit HvSignalEvent, unless KVM knows the connection
	PORT_POST_CODE = 0x80, // written as a short delay too
	PORT_IO_DELAY = 0xed,

	// How long to wait, in 100 ns, before looking again whether the guest can take an auto-EOI interrupt.
	FIRST_RETRY = 1000,
	LONGEST_RETRY = 8000,
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
		if (info->si_code == SI_TIMER)
			atomic_store(&self->timer_fired, true);
		atomic_store(&self->scan_requested, true);
		self->run->immediate_exit = 1;
	}
}

bool hot_vp_install_kick(void)
{
	struct sigaction action = {.sa_sigaction = on_kick, .sa_flags = SA_RESTART | SA_SIGINFO};
	return sigaction(KICK_SIGNAL, &action, NULL) == 0;
}

void hot_vp_kick(VpObject *self)
{
	pthread_mutex_lock(&self->thread_lock);
	if (self->running && !pthread_equal(self->thread, pthread_self()))
		pthread_kill(self->thread, KICK_SIGNAL);
	pthread_mutex_unlock(&self->thread_lock);
}

void hot_vp_request_scan(VpObject *self)
{
	atomic_store(&self->scan_requested, true);
	hot_vp_kick(self);
}

// Synthetic timers -------------------------------------------------------------------------------------

static bool make_timer(VpObject *self)
{
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = KICK_SIGNAL};
	event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
	atomic_store(&self->timer_fired, false);
	self->timer_deadline = self->quiet_until = 0;
	return timer_create(CLOCK_MONOTONIC, &event, &self->timer) == 0;
}

static void scan(VpObject *self)
{
	uint64_t now = hot_reference_now(self->reference);
	if (atomic_exchange(&self->timer_fired, false)) {
		// The host's clock may run ahead of the TSC: a timer that fires too early is armed anew.
		if (now >= self->timer_deadline)
			self->quiet_until = now + TICKS_APART;
		self->timer_deadline = 0;
	}
	if (self->direct_fd < 0 && hot_synic_has_direct(self->synic))
		hot_vp_start_direct(self);
	uint64_t deadline = hot_synic_scan(self->synic, now);
	if (deadline && deadline < self->quiet_until)
		deadline = self->quiet_until;
	if (hot_vp_inject(self)) {
		self->retry_time = 0;
	} else {
		if (!self->retry_time || now >= self->retry_time) {
			self->retry_wait = self->retry_time ? 2 * self->retry_wait : FIRST_RETRY;
			if (self->retry_wait > LONGEST_RETRY)
				self->retry_wait = LONGEST_RETRY;
			self->retry_time = now + self->retry_wait;
		}
		if (!deadline || deadline > self->retry_time)
			deadline = self->retry_time;
	}
	if (deadline == self->timer_deadline)
		return;
	self->timer_deadline = deadline;
	struct itimerspec spec = hot_wait_for(deadline, now);
	timer_settime(self->timer, 0, &spec, NULL);
}

// Calls into Python; all want the GIL -------------------------------------------------------------------

PyObject *hot_vp_call(PyObject *object, const char *method, const char *format, ...)
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

bool hot_vp_call_done(PyObject *result)
{
	Py_XDECREF(result);
	return result != NULL;
}

static bool bus_access(PyObject *bus, bool write, uint64_t address, unsigned size, uint8_t *data)
{
	uint64_t value = 0;
	if (write) {
		memcpy(&value, data, size);
		return hot_vp_call_done(hot_vp_call(bus, "write", "(KIK)", address, size, value));
	}
	PyObject *result = hot_vp_call(bus, "read", "(KI)", address, size);
	if (!result)
		return false;
	value = PyLong_AsUnsignedLongLongMask(result);
	Py_DECREF(result);
	memcpy(data, &value, size);
	return !PyErr_Occurred();
}

// A string instruction: several accesses to one port at once.
static bool bus_string(PyObject *bus, bool write, uint64_t address, unsigned size, unsigned count, uint8_t *data)
{
	Py_ssize_t length = (Py_ssize_t)size * count;
	if (write)
		return hot_vp_call_done(hot_vp_call(bus, "write_string", "(KIy#)", address, size, data, length));
	PyObject *result = hot_vp_call(bus, "read_string", "(KII)", address, size, count);
	if (!result)
		return false;
	bool fits = PyBytes_Check(result) && PyBytes_GET_SIZE(result) == length;
	if (fits)
		memcpy(data, PyBytes_AS_STRING(result), length);
	else
		PyErr_Format(PyExc_ValueError, "the bus answers a read of %zd bytes with something else", length);
	Py_DECREF(result);
	return fits;
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
			return hot_vp_hypercall(self, gil, port == PORT_HYPERCALL_64);
		if (port == PORT_SIGNAL && run->io.size == 4 && self->hypercalls_enabled) {
			if (!hot_vp_hypercall(self, gil, true))
				return false;
			run->s.regs.regs.rax += run->s.regs.regs.rdx; // which the page takes off again
			return true;
		}
	}
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	PyEval_RestoreThread(gil->saved);
	bool ok = run->io.count == 1 ? bus_access(self->pio, write, port, run->io.size, data)
				     : bus_string(self->pio, write, port, run->io.size, run->io.count, data);
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
		} else if (hot_vp_owns_apic_msr(index)) {
			handled = true;
			valid = hot_vp_apic_msr(self, write, index, &value);
		} else if (index == MSR_TIME_REF_COUNT && !write) {
			handled = valid = true;
			value = hot_reference_now(self->reference);
		} else if (index == MSR_GUEST_IDLE && !write) {
			handled = valid = true;
			value = 0;
			hot_vp_idle(self);
		}
	}
	if (!handled || self->trace_msr) {
		PyEval_RestoreThread(gil->saved);
		if (!handled && write) {
			PyObject *result = hot_vp_call(self->hypervisor, "write_msr", "(IIK)", self->index, index, value);
			valid = result && PyObject_IsTrue(result) == 1;
			ok = hot_vp_call_done(result) && !PyErr_Occurred();
		} else if (!handled) {
			PyObject *result = hot_vp_call(self->hypervisor, "read_msr", "(II)", self->index, index);
			valid = result && result != Py_None;
			if (valid)
				value = PyLong_AsUnsignedLongLongMask(result);
			ok = hot_vp_call_done(result) && !PyErr_Occurred();
		}
		if (ok && self->trace_msr)
			ok = hot_vp_call_done(hot_vp_call(self->hypervisor, "trace_msr", "(IOIKO)", self->index,
					    write ? Py_True : Py_False, index, value, valid ? Py_True : Py_False));
		gil->saved = PyEval_SaveThread();
	}
	uint32_t number = index - SYNTHETIC_MSR_BASE;
	if (!valid && number < SYNTHETIC_MSR_COUNT)
		hot_vp_count_error(self, &(write ? self->msr_write_errors : self->msr_read_errors)[number], write ? value : 0);
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
	if (atomic_exchange(&self->scan_requested, false) || self->retry_time)
		scan(self);
	atomic_store(&self->in_guest, true);
	hot_vp_flush_tlb(self);
	int done = ioctl(self->fd, KVM_RUN, 0);
	atomic_store(&self->in_guest, false);
	if (done < 0) {
		if (errno != EINTR && errno != EAGAIN)
			return FAILED;
		self->exits[KVM_EXIT_INTR]++;
		run->exit_reason = KVM_EXIT_INTR;
		return GO_ON;
	}
	uint32_t reason = run->exit_reason;
	if (self->quiet_until) {
		self->quiet_until = 0;
		atomic_store(&self->scan_requested, true);
	}
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
	hot_synic_set_direct_fd(self->synic, self->direct_fd);
	atomic_store(&self->scan_requested, true);
	self->run->exit_reason = KVM_EXIT_UNKNOWN; // what the run page says may be from before a reset
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
	hot_synic_set_direct_fd(self->synic, -1);
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
	self->direct_fd = -1;
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
	for (unsigned i = 0; i < self->peer_count; i++)
		Py_VISIT(self->peers[i]);
	return 0;
}

static int vp_clear(VpObject *self)
{
	Py_CLEAR(self->pio);
	Py_CLEAR(self->mmio);
	Py_CLEAR(self->hypervisor);
	for (unsigned i = 0; i < self->peer_count; i++)
		Py_CLEAR(self->peers[i]);
	self->peer_count = 0;
	return 0;
}

static void vp_dealloc(VpObject *self)
{
	PyObject_GC_UnTrack(self);
	hot_vp_end_direct(self);
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
	hot_vp_kick(self);
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

static PyObject *vp_set_peers(VpObject *self, PyObject *args)
{
	PyObject *peers;
	if (!PyArg_ParseTuple(args, "O!:set_peers", &PyTuple_Type, &peers))
		return NULL;
	Py_ssize_t count = PyTuple_GET_SIZE(peers);
	bool fits = count <= MAX_PEERS && !self->peer_count;
	for (Py_ssize_t i = 0; fits && i < count; i++)
		fits = Py_IS_TYPE(PyTuple_GET_ITEM(peers, i), &Vp_Type);
	if (!fits) {
		PyErr_Format(PyExc_ValueError, "peers are set once and are at most %d VPs", MAX_PEERS);
		return NULL;
	}
	for (Py_ssize_t i = 0; i < count; i++)
		self->peers[i] = (VpObject *)Py_NewRef(PyTuple_GET_ITEM(peers, i));
	self->peer_count = (unsigned)count;
	Py_RETURN_NONE;
}

static PyMethodDef vp_methods[] = {
	{"run", (PyCFunction)vp_run, METH_NOARGS, NULL},
	{"stop", (PyCFunction)vp_stop, METH_NOARGS, NULL},
	{"offer_msrs", (PyCFunction)vp_offer_msrs, METH_VARARGS, NULL},
	{"offer_hypercalls", (PyCFunction)hot_vp_offer_hypercalls, METH_VARARGS, NULL},
	{"hypercall", (PyCFunction)hot_vp_hypercall_method, METH_VARARGS, NULL},
	{"set_peers", (PyCFunction)vp_set_peers, METH_VARARGS, NULL},
	{"set_lazy_eoi", (PyCFunction)hot_vp_set_lazy_eoi, METH_VARARGS, NULL},
	{"counts", (PyCFunction)hot_vp_counts, METH_NOARGS, NULL},
	{0},
};

static PyMemberDef vp_members[] = {
	{"hypercalls_enabled", T_BOOL, offsetof(VpObject, hypercalls_enabled), 0, NULL},
	{"xmm_input", T_BOOL, offsetof(VpObject, xmm_input), 0, NULL},
	{"extended_ranges", T_BOOL, offsetof(VpObject, extended_ranges), 0, NULL},
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
