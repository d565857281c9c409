// Hypercalls: the register convention, the checks that all calls share, and the calls that need no Python.
// TLFS v6.0b, chapter 3; the calls' own chapters stand beside them.

#include "vp.h"

#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>

enum {
	HVCALL_FLUSH_SPACE = 0x02,
	HVCALL_FLUSH_LIST = 0x03,
	HVCALL_LONG_SPIN_WAIT = 0x08,
	HVCALL_SEND_IPI = 0x0b,
	HVCALL_FLUSH_SPACE_EX = 0x13,
	HVCALL_FLUSH_LIST_EX = 0x14,
	HVCALL_SEND_IPI_EX = 0x15,
	HVCALL_SIGNAL_EVENT = 0x5d,

	REGISTER_INPUT = 16,
	XMM_INPUT = 6 * 16,
	FIRST_VALID_VECTOR = 16,
};

static const uint64_t CONTROL_CODE = 0xffff;
static const uint64_t CONTROL_FAST = 1 << 16;
static const uint64_t CONTROL_RESERVED = 0xf000f000f8000000; // nested calls among them: there is no nesting here
static const uint64_t RESULT_STATUS = 0xffff;
static const uint64_t CR3_RESERVED = 0x1ff0000000000000; // on every processor
static const uint64_t CR4_PGE = 1 << 7;

static const uint64_t FLUSH_ALL_PROCESSORS = 1 << 0;
static const uint64_t FLUSH_ALL_SPACES = 1 << 1;
static const uint64_t FLUSH_NON_GLOBAL_ONLY = 1 << 2;
static const uint64_t FLUSH_EXTENDED_RANGES = 1 << 3;

// One call with its input in memory of our own, where no other VP can change it any more.
struct hypercall {
	uint64_t control;
	uint64_t input;
	uint64_t output;
	const uint8_t *xmm; // XMM0 to XMM5, or NULL to ask KVM for them
	const struct hypercall_layout *layout;
	unsigned variable; // bytes
	unsigned rep_count;
	unsigned rep_start;
	size_t size;
	void *out; // NULL if there is no output
	uint8_t in[HOT_PAGE_SIZE];
};

static uint64_t result_of(unsigned status, unsigned completed)
{
	return status | (uint64_t)completed << 32;
}

static uint64_t word(const struct hypercall *call, size_t offset)
{
	uint64_t value;
	memcpy(&value, call->in + offset, sizeof(value));
	return value;
}

// Sets of VPs ------------------------------------------------------------------------------------------------

static uint64_t everybody(const VpObject *self)
{
	return self->peer_count == 64 ? ~0ull : (1ull << self->peer_count) - 1;
}

// The HV_VP_SET whose format stands at `offset`; its banks follow. VPs that do not exist are left out.
static unsigned read_vp_set(const VpObject *self, const struct hypercall *call, size_t offset, uint64_t *set)
{
	uint64_t format = word(call, offset), banks = word(call, offset + 8);
	if (format == 1) {
		*set = everybody(self);
		return HV_STATUS_SUCCESS;
	}
	if (format)
		return HV_STATUS_INVALID_PARAMETER;
	if (call->variable != 8u * (unsigned)__builtin_popcountll(banks))
		return HV_STATUS_INVALID_HYPERCALL_INPUT;
	*set = banks & 1 ? word(call, offset + 16) & everybody(self) : 0;
	return HV_STATUS_SUCCESS;
}

// Interrupts (chapter 10.5) ------------------------------------------------------------------------------------

static uint64_t answer_ipi(VpObject *self, const struct hypercall *call)
{
	uint64_t head = word(call, 0), set;
	uint32_t vector = (uint32_t)head;
	unsigned status = HV_STATUS_SUCCESS;
	if (call->layout->code == HVCALL_SEND_IPI)
		set = word(call, 8) & everybody(self);
	else
		status = read_vp_set(self, call, 8, &set);
	if (status)
		return status;
	if (vector < FIRST_VALID_VECTOR || vector > 0xff || (head >> 32 & 0xff)) // the VTL, which is always 0
		return HV_STATUS_INVALID_PARAMETER;
	for (; set; set &= set - 1)
		hot_synic_interrupt(self->peers[__builtin_ctzll(set)]->synic, (uint8_t)vector);
	return HV_STATUS_SUCCESS;
}

// TLB flushes (chapter 9.4) ------------------------------------------------------------------------------------

// Toggling CR4.PGE flushes all, as the guest's own move to CR4 would. The TLFS allows to flush more than was asked for.
void hot_vp_flush_tlb(VpObject *self)
{
	uint64_t wanted = atomic_load(&self->flush_wanted);
	if (wanted == atomic_load(&self->flush_done))
		return;
	struct kvm_sregs sregs;
	if (ioctl(self->fd, KVM_GET_SREGS, &sregs) == 0) {
		sregs.cr4 ^= CR4_PGE;
		ioctl(self->fd, KVM_SET_SREGS, &sregs);
		sregs.cr4 ^= CR4_PGE;
		ioctl(self->fd, KVM_SET_SREGS, &sregs);
	}
	atomic_store(&self->flush_done, wanted);
}

// A VP outside the guest sees its ticket before it enters; one inside is fetched out, and waited for.
static void flush_all(VpObject *self, uint64_t set)
{
	uint64_t tickets[MAX_PEERS];
	for (uint64_t rest = set; rest; rest &= rest - 1) {
		unsigned index = (unsigned)__builtin_ctzll(rest);
		VpObject *peer = self->peers[index];
		tickets[index] = atomic_fetch_add(&peer->flush_wanted, 1) + 1;
		if (atomic_load(&peer->in_guest))
			hot_vp_kick(peer);
	}
	for (uint64_t rest = set; rest; rest &= rest - 1) {
		unsigned index = (unsigned)__builtin_ctzll(rest);
		VpObject *peer = self->peers[index];
		while (atomic_load(&peer->in_guest) && atomic_load(&peer->flush_done) < tickets[index])
			sched_yield();
	}
}

static unsigned flush(VpObject *self, const struct hypercall *call)
{
	unsigned code = call->layout->code;
	bool list = code == HVCALL_FLUSH_LIST || code == HVCALL_FLUSH_LIST_EX;
	uint64_t flags = word(call, 8), set;
	uint64_t known = FLUSH_ALL_PROCESSORS | FLUSH_ALL_SPACES;
	if (!list)
		known |= FLUSH_NON_GLOBAL_ONLY;
	else if (self->extended_ranges)
		known |= FLUSH_EXTENDED_RANGES;
	if ((flags & ~known) || (!(flags & FLUSH_ALL_SPACES) && (word(call, 0) & CR3_RESERVED)))
		return HV_STATUS_INVALID_PARAMETER;
	unsigned status = HV_STATUS_SUCCESS;
	if (code == HVCALL_FLUSH_SPACE || code == HVCALL_FLUSH_LIST) {
		if (!(flags & FLUSH_ALL_PROCESSORS) && !word(call, 16))
			return HV_STATUS_INVALID_PARAMETER;
		set = word(call, 16) & everybody(self);
	} else {
		status = read_vp_set(self, call, 16, &set);
	}
	if (status)
		return status;
	flush_all(self, flags & FLUSH_ALL_PROCESSORS ? everybody(self) : set);
	return HV_STATUS_SUCCESS;
}

// The calls -----------------------------------------------------------------------------------------------------

static uint64_t answer_signal(VpObject *self, const struct hypercall *call)
{
	return (uint64_t)hot_doorbells_signal(self->doorbells, (uint32_t)word(call, 0), word(call, 0) >> 32 & 0xffff);
}

// Chapter 14.5.1: there is no error.
static uint64_t answer_spin_wait(VpObject *self, const struct hypercall *call)
{
	(void)self;
	(void)call;
	sched_yield();
	return HV_STATUS_SUCCESS;
}

static uint64_t answer_flush(VpObject *self, const struct hypercall *call)
{
	unsigned status = flush(self, call);
	return result_of(status, status ? call->rep_start : call->rep_count);
}

typedef uint64_t answer_function(VpObject *self, const struct hypercall *call);

// What answers a call without Python; NULL if nothing does.
static answer_function *answer_of(unsigned code)
{
	switch (code) {
	case HVCALL_FLUSH_SPACE:
	case HVCALL_FLUSH_LIST:
	case HVCALL_FLUSH_SPACE_EX:
	case HVCALL_FLUSH_LIST_EX:
		return answer_flush;
	case HVCALL_SEND_IPI:
	case HVCALL_SEND_IPI_EX:
		return answer_ipi;
	case HVCALL_LONG_SPIN_WAIT:
		return answer_spin_wait;
	case HVCALL_SIGNAL_EVENT:
		return answer_signal;
	default:
		return NULL;
	}
}

// Wants the GIL. False with an exception set.
static bool answer_in_python(VpObject *self, const struct hypercall *call, uint64_t *result)
{
	PyObject *answer = hot_vp_call(self->hypervisor, "hypercall", "(IIy#II)", self->index,
				       (unsigned)call->layout->code, (const char *)call->in, (Py_ssize_t)call->size,
				       call->rep_start, call->rep_count);
	unsigned status, completed;
	Py_buffer output;
	if (!answer || !PyArg_ParseTuple(answer, "IIy*", &status, &completed, &output)) {
		Py_XDECREF(answer);
		return false;
	}
	size_t room = call->layout->output + (size_t)call->layout->element_out * (call->rep_count - call->rep_start);
	if (call->out && (size_t)output.len <= room)
		memcpy((uint8_t *)call->out + (size_t)call->layout->element_out * call->rep_start, output.buf,
		       (size_t)output.len);
	PyBuffer_Release(&output);
	Py_DECREF(answer);
	*result = result_of(status, completed);
	return true;
}

// Parameters ----------------------------------------------------------------------------------------------------

static void *in_one_page(const VpObject *self, uint64_t gpa, size_t size, bool write)
{
	if (gpa % 8 || gpa % HOT_PAGE_SIZE + size > HOT_PAGE_SIZE)
		return NULL;
	return hot_memory_ptr(self->memory, gpa, size, write);
}

static bool read_registers(VpObject *self, struct hypercall *call)
{
	memcpy(call->in, &call->input, 8);
	memcpy(call->in + 8, &call->output, 8);
	if (call->size <= REGISTER_INPUT)
		return true;
	struct kvm_fpu fpu;
	if (!self->xmm_input || call->size > REGISTER_INPUT + XMM_INPUT)
		return false;
	if (!call->xmm && ioctl(self->fd, KVM_GET_FPU, &fpu) < 0)
		return false;
	memcpy(call->in + REGISTER_INPUT, call->xmm ? call->xmm : (const uint8_t *)fpu.xmm, XMM_INPUT);
	return true;
}

// Checks what all calls share and fetches the input; returns a status.
static unsigned prepare(VpObject *self, struct hypercall *call)
{
	const struct hypercall_layout *layout = call->layout;
	uint64_t control = call->control;
	bool rep = layout->element_in || layout->element_out;
	call->variable = (control >> 17 & 0x3ff) * 8;
	call->rep_count = control >> 32 & 0xfff;
	call->rep_start = control >> 48 & 0xfff;
	if ((control & CONTROL_RESERVED) || (call->variable && !layout->variable) ||
	    (rep ? call->rep_start >= call->rep_count : call->rep_start || call->rep_count))
		return HV_STATUS_INVALID_HYPERCALL_INPUT;
	size_t output = layout->output + (size_t)layout->element_out * call->rep_count;
	call->size = layout->header + call->variable + (size_t)layout->element_in * call->rep_count;
	if (control & CONTROL_FAST)
		return output || !read_registers(self, call) ? HV_STATUS_INVALID_HYPERCALL_INPUT : HV_STATUS_SUCCESS;
	if (call->size) {
		const void *block = in_one_page(self, call->input, call->size, false);
		if (!block)
			return HV_STATUS_INVALID_ALIGNMENT;
		memcpy(call->in, block, call->size);
	}
	if (output) {
		call->out = in_one_page(self, call->output, output, true);
		if (!call->out)
			return HV_STATUS_INVALID_ALIGNMENT;
	}
	return HV_STATUS_SUCCESS;
}

// Without the GIL, which `gil` holds. False with a Python exception set.
static bool answer(VpObject *self, struct gil *gil, struct hypercall *call, uint64_t *result)
{
	int slot = hot_vp_hypercall_slot(call->control & CONTROL_CODE);
	unsigned layout = slot < 0 ? 0 : self->layout_of[slot];
	unsigned status = HV_STATUS_INVALID_HYPERCALL_CODE;
	answer_function *here = NULL;
	bool ok = true;
	if (layout) {
		call->layout = &self->layouts[layout - 1];
		here = answer_of(call->layout->code);
		status = prepare(self, call);
	}
	*result = status;
	if (!status && here)
		*result = here(self, call);
	if ((!status && !here) || self->trace_hypercall) {
		PyEval_RestoreThread(gil->saved);
		if (!status && !here)
			ok = answer_in_python(self, call, result);
		if (ok && self->trace_hypercall)
			ok = hot_vp_call_done(hot_vp_call(self->hypervisor, "trace_hypercall", "(IKKK)", self->index,
							  call->control, call->input, *result));
		gil->saved = PyEval_SaveThread();
		atomic_store(&self->scan_requested, true); // it may have set SINTs or timers
	}
	if (slot < 0) {
		self->hypercalls_unknown++;
		return ok;
	}
	self->hypercalls[slot]++;
	if (*result & RESULT_STATUS)
		hot_vp_count_error(self, &self->hypercall_errors[slot], *result);
	return ok;
}

bool hot_vp_hypercall(VpObject *self, struct gil *gil, bool caller_64)
{
	struct kvm_regs *regs = &self->run->s.regs.regs;
	struct hypercall call;
	uint64_t result;
	call.xmm = NULL;
	call.out = NULL;
	if (caller_64) {
		call.control = regs->rcx;
		call.input = regs->rdx;
		call.output = regs->r8;
	} else {
		call.control = regs->rdx << 32 | (uint32_t)regs->rax;
		call.input = regs->rbx << 32 | (uint32_t)regs->rcx;
		call.output = regs->rdi << 32 | (uint32_t)regs->rsi;
	}
	if (!answer(self, gil, &call, &result))
		return false;
	if (caller_64) {
		regs->rax = result;
	} else {
		regs->rax = (uint32_t)result;
		regs->rdx = result >> 32;
	}
	self->run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
	return true;
}

// What Python sees ----------------------------------------------------------------------------------------------

PyObject *hot_vp_hypercall_method(VpObject *self, PyObject *args)
{
	Py_buffer xmm = {0};
	struct hypercall call;
	unsigned long long control, input, output;
	if (!PyArg_ParseTuple(args, "KKK|y*:hypercall", &control, &input, &output, &xmm))
		return NULL;
	PyObject *value = NULL;
	if (xmm.buf && xmm.len != XMM_INPUT) {
		PyErr_Format(PyExc_ValueError, "XMM0 to XMM5 have %d bytes", XMM_INPUT);
	} else {
		uint64_t result;
		call.control = control;
		call.input = input;
		call.output = output;
		call.xmm = xmm.buf;
		call.out = NULL;
		struct gil gil = {.saved = PyEval_SaveThread()};
		bool ok = answer(self, &gil, &call, &result);
		PyEval_RestoreThread(gil.saved);
		value = ok ? PyLong_FromUnsignedLongLong(result) : NULL;
	}
	if (xmm.obj)
		PyBuffer_Release(&xmm);
	return value;
}

PyObject *hot_vp_offer_hypercalls(VpObject *self, PyObject *args)
{
	PyObject *sequence;
	if (!PyArg_ParseTuple(args, "O:offer_hypercalls", &sequence))
		return NULL;
	PyObject *list = PySequence_List(sequence);
	if (!list)
		return NULL;
	struct hypercall_layout layouts[MAX_LAYOUTS];
	uint8_t layout_of[HYPERCALL_SLOTS] = {0};
	Py_ssize_t count = PyList_GET_SIZE(list);
	if (count > MAX_LAYOUTS)
		PyErr_Format(PyExc_ValueError, "more than %d hypercalls", MAX_LAYOUTS);
	for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); i++) {
		unsigned short code, header, element_in, element_out, output;
		int variable;
		PyObject *entry = PySequence_Tuple(PyList_GET_ITEM(list, i));
		if (entry && PyArg_ParseTuple(entry, "HHHHHp", &code, &header, &element_in, &element_out, &output,
					      &variable)) {
			if (hot_vp_hypercall_slot(code) < 0 || header > HOT_PAGE_SIZE)
				PyErr_Format(PyExc_ValueError, "hypercall 0x%x cannot be offered", code);
			else
				layout_of[hot_vp_hypercall_slot(code)] = (uint8_t)(i + 1);
			layouts[i] = (struct hypercall_layout){code, header, element_in, element_out, output, variable};
		}
		Py_XDECREF(entry);
	}
	Py_DECREF(list);
	if (PyErr_Occurred())
		return NULL;
	memcpy(self->layouts, layouts, sizeof(layouts[0]) * (size_t)count);
	memcpy(self->layout_of, layout_of, sizeof(layout_of));
	Py_RETURN_NONE;
}
