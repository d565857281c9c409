/* What every guest of Hyper-V does. */
#include "hyperv.h"

u64 reference_time(void)
{
    return rdmsr(MSR_TIME_REF_COUNT);
}

void message_done(struct message *slot)
{
    slot->type = 0;
    fence();
    if (slot->flags & 1)
        wrmsr_safe(MSR_EOM, 0);
}
