// Interrupts that need more than KVM_SIGNAL_MSI: those without EOI, and the LAPIC's registers as synthetic MSRs.

#include "vp.h"

#include <string.h>
#include <sys/ioctl.h>

enum {
	MSR_EOI = 0x40000070,
	MSR_ICR = 0x40000071,
	MSR_TPR = 0x40000072,
	MSR_KVM_PV_EOI_EN = 0x4b564d04,

	APIC_TPR = 0x80,
	APIC_SPURIOUS = 0xf0,
	APIC_ISR = 0x100,
	APIC_IRR = 0x200,
	APIC_SOFTWARE_ENABLED = 1 << 8,

	IDLE_NAP_NS = 20000,
	IDLE_NAPS = 50,
	IDLE_NAPS_WITH_KVM_TIMER = 5, // it only expires in KVM_RUN
};

static uint32_t apic_register(const struct kvm_lapic_state *lapic, unsigned offset)
{
	uint32_t value;
	memcpy(&value, lapic->regs + offset, sizeof(value));
	return value;
}

// The highest vector in a register of 256 bits, or -1.
static int highest_vector(const struct kvm_lapic_state *lapic, unsigned offset)
{
	for (int i = 7; i >= 0; i--) {
		uint32_t bits = apic_register(lapic, offset + 0x10 * (unsigned)i);
		if (bits)
			return 32 * i + 31 - __builtin_clz(bits);
	}
	return -1;
}

// The priority class below or at which interrupts wait (Intel SDM volume 3, 11.8.3.1).
static unsigned processor_priority(const struct kvm_lapic_state *lapic)
{
	unsigned task = (apic_register(lapic, APIC_TPR) & 0xff) >> 4;
	int vector = highest_vector(lapic, APIC_ISR);
	unsigned service = vector < 0 ? 0 : (unsigned)vector >> 4;
	return service > task ? service : task;
}

static bool may_interrupt(const struct kvm_vcpu_events *events)
{
	return !events->exception.injected && !events->exception.pending && !events->interrupt.injected &&
	       !events->interrupt.shadow && !events->nmi.injected && !events->smi.smm;
}

// An interrupt that needs no EOI must leave no trace in the LAPIC, and KVM has no hook for that: so it goes past the
// LAPIC, as an event that is under way already, once the guest's own state and the LAPIC's priorities let it in.
bool hot_vp_inject(VpObject *self)
{
	int vector = hot_synic_auto_eoi(self->synic);
	if (vector < 0)
		return true;
	struct kvm_run *run = self->run;
	if (run->exit_reason != KVM_EXIT_INTR) {
		// KVM has yet to finish the instruction whose exit was answered last.
		run->immediate_exit = 1;
		return false;
	}
	struct kvm_vcpu_events events;
	struct kvm_lapic_state lapic;
	struct kvm_mp_state mp;
	if (!run->if_flag || ioctl(self->fd, KVM_GET_VCPU_EVENTS, &events) < 0 || !may_interrupt(&events) ||
	    ioctl(self->fd, KVM_GET_LAPIC, &lapic) < 0 || ioctl(self->fd, KVM_GET_MP_STATE, &mp) < 0)
		return false;
	bool running = mp.mp_state == KVM_MP_STATE_RUNNABLE || mp.mp_state == KVM_MP_STATE_HALTED;
	if (running && (apic_register(&lapic, APIC_SPURIOUS) & APIC_SOFTWARE_ENABLED)) {
		if ((unsigned)vector >> 4 <= processor_priority(&lapic))
			return false;
		if (mp.mp_state == KVM_MP_STATE_HALTED) {
			mp.mp_state = KVM_MP_STATE_RUNNABLE;
			ioctl(self->fd, KVM_SET_MP_STATE, &mp);
		}
		events.flags = 0; // what others may change meanwhile, NMIs for one, stays as it is
		events.interrupt.injected = 1;
		events.interrupt.nr = (uint8_t)vector;
		events.interrupt.soft = 0;
		if (ioctl(self->fd, KVM_SET_VCPU_EVENTS, &events) < 0)
			return false;
	}
	hot_synic_auto_eoi_done(self->synic, vector);
	return hot_synic_auto_eoi(self->synic) < 0;
}

// KVM would wait in HLT only for interrupts that the guest can take, so those that are masked are looked for from here.
// A guest that idles looks for itself why it was woken: to wake it without a reason is allowed.
void hot_vp_idle(VpObject *self)
{
	const struct timespec nap = {.tv_nsec = IDLE_NAP_NS};
	struct kvm_lapic_state lapic;
	unsigned most = hot_synic_kvm_timer_on(self->synic) ? IDLE_NAPS_WITH_KVM_TIMER : IDLE_NAPS;
	for (unsigned naps = 0; naps < most; naps++) {
		if (atomic_load(&self->scan_requested) || atomic_load(&self->stop_requested) ||
		    hot_synic_auto_eoi(self->synic) >= 0 || ioctl(self->fd, KVM_GET_LAPIC, &lapic) < 0 ||
		    highest_vector(&lapic, APIC_IRR) >= 0)
			return;
		nanosleep(&nap, NULL);
	}
}

// APIC registers ------------------------------------------------------------------------------------------

bool hot_vp_kvm_msrs(VpObject *self, bool write, struct kvm_msr_entry *entries, unsigned count)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entries[MAX_KVM_MSRS];
	} request = {.head = {.nmsrs = count}};
	memcpy(request.entries, entries, count * sizeof(*entries));
	pthread_mutex_lock(&self->thread_lock); // a VP that is not in `run` cannot enter it now
	bool done = (!self->running || pthread_equal(self->thread, pthread_self())) &&
		    ioctl(self->fd, write ? KVM_SET_MSRS : KVM_GET_MSRS, &request) == (int)count;
	pthread_mutex_unlock(&self->thread_lock);
	if (done)
		memcpy(entries, request.entries, count * sizeof(*entries));
	return done;
}

static bool host_msr(VpObject *self, bool write, uint32_t index, uint64_t *value)
{
	struct kvm_msr_entry entry = {.index = index, .data = *value};
	if (!hot_vp_kvm_msrs(self, write, &entry, 1))
		return false;
	*value = entry.data;
	return true;
}

bool hot_vp_owns_apic_msr(uint32_t index)
{
	return index >= MSR_EOI && index <= MSR_TPR;
}

bool hot_vp_apic_msr(VpObject *self, bool write, uint32_t index, uint64_t *value)
{
	// The same numbers lead to the LAPIC in a KVM with Hyper-V code (arch/x86/kvm/hyperv.c, kvm_hv_vapic_msr_write).
	if (index == MSR_EOI && !write)
		return false;
	if (index == MSR_TPR && write && *value > 0xff)
		return false;
	return host_msr(self, write, index, value);
}

PyObject *hot_vp_set_lazy_eoi(VpObject *self, PyObject *args)
{
	unsigned long long gpa;
	if (!PyArg_ParseTuple(args, "K:set_lazy_eoi", &gpa))
		return NULL;
	// KVM's own paravirtual EOI has the format of the VP assist page's first word (TLFS v6.0b, 10.3.5).
	uint64_t value = gpa ? gpa | 1 : 0;
	return PyBool_FromLong(host_msr(self, true, MSR_KVM_PV_EOI_EN, &value));
}
