// What a VP counts: exits, MSR accesses and hypercalls by number, and what went wrong for the guest.

#include "vp.h"

int hot_vp_hypercall_slot(uint64_t code)
{
	if (code < PLAIN_HYPERCALLS)
		return (int)code;
	bool counted = code >= FIRST_EXTENDED_HYPERCALL && code - FIRST_EXTENDED_HYPERCALL < EXTENDED_HYPERCALLS;
	return counted ? (int)(code - FIRST_EXTENDED_HYPERCALL + PLAIN_HYPERCALLS) : -1;
}

void hot_vp_count_error(const VpObject *self, struct errors *errors, uint64_t value)
{
	errors->count++;
	errors->time = hot_reference_now(self->reference);
	errors->value = value;
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
	return slot < PLAIN_HYPERCALLS ? slot : FIRST_EXTENDED_HYPERCALL + slot - PLAIN_HYPERCALLS;
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

PyObject *hot_vp_counts(VpObject *self, PyObject *Py_UNUSED(ignored))
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
