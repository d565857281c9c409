/* VPs started by hypercall, in the mode of the build. This comes before APs start by INIT and SIPI. */
#include "kit.h"

#define NOT_OURS 0x1234u
#define EFER 0xc0000080u

struct segment {
    u64 base;
    u32 limit;
    u16 selector;
    u16 attributes;
};

struct table {
    u16 reserved[3];
    u16 limit;
    u64 base;
} __attribute__((packed));

struct start_input {
    u64 partition;
    u32 vp;
    u8 vtl;
    u8 reserved[3];
    u64 rip, rsp, rflags;
    struct segment cs, ds, es, fs, gs, ss, tr, ldtr;
    struct table idtr, gdtr;
    u64 efer, cr0, cr3, cr4, pat;
};

struct index_input {
    u64 partition;
    u8 vtl;
    u8 reserved[7];
    u32 apic_id;
    u32 second;
};

extern u8 gdt[];

static ulong control_register(u32 number)
{
    ulong value = 0;

    if (number == 0)
        __asm__ volatile("mov %%cr0, %0" : "=r"(value));
    else if (number == 3)
        __asm__ volatile("mov %%cr3, %0" : "=r"(value));
    else
        __asm__ volatile("mov %%cr4, %0" : "=r"(value));
    return value;
}

/* The caller's own mode for another VP, which begins in vp_main on its own stack. */
static struct start_input *fill(u64 partition, u32 vp)
{
    struct start_input *input = (struct start_input *)scratch;
    struct segment data = {.limit = ~0u, .selector = DATA_SELECTOR, .attributes = 0xc093};

    memset(input, 0, sizeof(*input));
    input->partition = partition;
    input->vp = vp;
    input->rip = (ulong)vp_main;
    input->rsp = (ulong)(vp_stacks[vp % MAX_VPS] + STACK_SIZE - 16 - sizeof(ulong));
    input->rflags = 2;
    input->ds = input->es = input->fs = input->gs = input->ss = data;
    input->cs = data;
    input->cs.selector = CODE_SELECTOR;
#ifdef __x86_64__
    input->cs.attributes = 0xa09b;
    input->efer = 1u << 8 | 1u << 10; /* long mode, enabled and active */
#else
    input->cs.attributes = 0xc09b;
#endif
    input->tr = (struct segment){.limit = 0xffff, .attributes = 0x8b};
    input->ldtr = (struct segment){.limit = 0xffff, .attributes = 0x82};
    input->gdtr.base = address_of(gdt);
    input->gdtr.limit = 31;
    input->idtr.limit = 0;
    input->cr0 = control_register(0);
    input->cr3 = control_register(3);
    input->cr4 = control_register(4);
    input->pat = 0x0007040600070406ull;
    return input;
}

static u32 start(void)
{
    return status_of(CALL_START_VP, address_of(scratch), 0);
}

static u32 index_of(u64 partition, u32 apic_id, u32 *index)
{
    struct index_input *input = (struct index_input *)scratch;
    volatile u32 *output = (u32 *)(scratch + PAGE_SIZE);
    u32 status;

    *input = (struct index_input){.partition = partition, .apic_id = apic_id};
    *output = ~0u;
    status = status_of(CALL_VP_INDEX_FROM_APIC_ID | CALL_REPS(1), address_of(input), address_of(output));
    *index = *output;
    return status;
}

static void indices(void)
{
    u32 index, status;

    expect_equal("startvp.index", "7.10.4", index_of(PARTITION_SELF, vp_count - 1, &index), STATUS_SUCCESS);
    expect_equal("startvp.index_value", "7.10.4", index, vp_count - 1);
    status = index_of(PARTITION_SELF, 0x12345, &index);
    expect("startvp.index_of_unknown_apic", "7.10.4", status,
           status == STATUS_INVALID_PARAMETER || status == STATUS_INVALID_VP_INDEX, "5 or 0xe");
    expect_equal("startvp.index_bad_partition", "7.10.4", index_of(NOT_OURS, 0, &index), STATUS_INVALID_PARTITION_ID);
    expect_equal("startvp.index_no_reps", "3.12.3",
                 status_of(CALL_VP_INDEX_FROM_APIC_ID, address_of(scratch), address_of(scratch) + PAGE_SIZE),
                 STATUS_INVALID_HYPERCALL_INPUT);
}

static void refusals(void)
{
    u32 status;

    fill(NOT_OURS, vp_count - 1);
    expect_equal("startvp.bad_partition", "7.10.3", start(), STATUS_INVALID_PARTITION_ID);
    fill(PARTITION_SELF, vp_count);
    expect_equal("startvp.bad_vp", "7.10.3", start(), STATUS_INVALID_VP_INDEX);
    fill(PARTITION_SELF, 0);
    expect_equal("startvp.running_vp", "7.10.3", start(), STATUS_INVALID_VP_STATE);
    fill(PARTITION_SELF, vp_count - 1)->vtl = 1;
    status = start();
    expect("startvp.vtl_1", "7.10.3", status, status != STATUS_SUCCESS, "an error: there is only VTL 0");
    fill(PARTITION_SELF, vp_count - 1);
    expect_equal("startvp.fast", "3.7", status_of(CALL_START_VP | CALL_FAST, PARTITION_SELF, vp_count - 1),
                 STATUS_INVALID_HYPERCALL_INPUT);
    expect_equal("startvp.across_pages", "3.6", status_of(CALL_START_VP, address_of(scratch) + PAGE_SIZE - 232, 0),
                 STATUS_INVALID_ALIGNMENT);
    expect_equal("startvp.rep_count", "3.12.3", status_of(CALL_START_VP | CALL_REPS(1), address_of(scratch), 0),
                 STATUS_INVALID_HYPERCALL_INPUT);
    if (vp_count < 2)
        return;
    fill(PARTITION_SELF, vp_count - 1)->cr0 = 1u << 31; /* paging without protection */
    status = start();
    expect("startvp.impossible_cr0", "7.10.3", status,
           status == STATUS_INVALID_REGISTER_VALUE || status == STATUS_INVALID_PARAMETER, "0x50 or 5");
}

void test_startvp(void)
{
    if (!(privileges_eax & EAX_HYPERCALL))
        return;
    hypercall_enable();
    if (!(privileges_ebx & EBX_START_VP)) {
        expect_not_offered("startvp.not_offered", "4.2.2", CALL_START_VP);
        expect_not_offered("startvp.index_not_offered", "4.2.2", CALL_VP_INDEX_FROM_APIC_ID | CALL_REPS(1));
        return;
    }
    indices();
    refusals();
    if (vp_count < 2) {
        skip("startvp.starts", "7.10.3", "needs 2 VPs");
        return;
    }
    fill(PARTITION_SELF, vp_count - 1);
    expect_equal("startvp.starts", "7.10.3", start(), STATUS_SUCCESS);
    expect_equal("startvp.runs", "7.10.3", WAIT_UNTIL(vp_at(vp_count - 1)->online, 2 * PATIENCE), 1);
    fill(PARTITION_SELF, vp_count - 1);
    expect_equal("startvp.second_start", "7.10.3", start(), STATUS_INVALID_VP_STATE);
}
