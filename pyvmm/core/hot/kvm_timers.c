// Synthetic timers that KVM runs, where it has code for them (KVM_CAP_HYPERV_SYNIC2): a tick needs no exit to user space.
// The guest's accesses of COUNT go to KVM itself. All other registers of SynIC and timers stay with us, and KVM hears
// what it needs to raise SINTs and fill message slots, which it does on the VP's own thread like us.
// Source: Linux 6.1 arch/x86/kvm/hyperv.c.

#include "synic.h"
#include "vp.h"

enum {
	MSR_SIMP = 0x40000083,
	MSR_EOM = 0x40000084,
	MSR_SINT0 = 0x40000090,
	MSR_STIMER0_CONFIG = 0x400000b0,
};

static struct kvm_msr_entry entry(unsigned index, uint64_t value)
{
	return (struct kvm_msr_entry){.index = index, .data = value};
}

void kvm_timers_load(SynICObject *self)
{
	struct kvm_msr_entry entries[2 * STIMER_COUNT];
	for (unsigned i = 0; i < 2 * STIMER_COUNT; i++)
		entries[i] = entry(MSR_STIMER0_CONFIG + i, 0);
	if (!self->vp || !hot_vp_kvm_msrs(self->vp, false, entries, 2 * STIMER_COUNT))
		return;
	for (unsigned i = 0; i < STIMER_COUNT; i++) {
		self->timers[i].config = entries[2 * i].data;
		self->timers[i].count = entries[2 * i + 1].data;
		stimer_arm(&self->timers[i], hot_reference_now(self->vp->reference));
	}
}

void kvm_timers_store(SynICObject *self, unsigned first, unsigned count)
{
	struct kvm_msr_entry entries[2 * STIMER_COUNT];
	for (unsigned i = 0; i < count; i++) {
		unsigned config = MSR_STIMER0_CONFIG + 2 * (first + i);
		entries[2 * i] = entry(config + 1, self->timers[first + i].count);
		entries[2 * i + 1] = entry(config, self->timers[first + i].config);
	}
	if (self->vp)
		hot_vp_kvm_msrs(self->vp, true, entries, 2 * count);
}

void kvm_timers_connect(SynICObject *self)
{
	struct kvm_msr_entry entries[SINT_COUNT + 2];
	unsigned wanted = stimers_sints(self);
	uint64_t simp = self->simp;
	for (unsigned sint = 0; sint < SINT_COUNT; sint++) {
		bool timer = wanted >> sint & 1;
		entries[sint] = entry(MSR_SINT0 + sint, synic_sint_for_kvm(self, sint, timer));
		// KVM would fill the slot of a SINT that is masked. Without a page it keeps the message back until EOM.
		if (timer && !synic_sint_open(self, sint))
			simp = 0;
	}
	entries[SINT_COUNT] = entry(MSR_SIMP, simp);
	entries[SINT_COUNT + 1] = entry(MSR_EOM, 0);
	if (self->vp)
		hot_vp_kvm_msrs(self->vp, true, entries, SINT_COUNT + 2);
}

void kvm_timers_eom(SynICObject *self)
{
	struct kvm_msr_entry eom = entry(MSR_EOM, 0);
	if (self->vp && stimers_sints(self))
		hot_vp_kvm_msrs(self->vp, true, &eom, 1);
}

bool hot_synic_kvm_timer_on(const SynICObject *self)
{
	return self->kvm_timers && stimers_on(self);
}
