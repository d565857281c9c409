/* Registers of VPs by name: lists of them, and where a list stops. */
#include "kit.h"

#define REGISTER_PRIVILEGES 0x200u
#define REGISTER_VP_INDEX 0x90003u
#define REGISTER_ASSIST_PAGE 0x90013u
#define REGISTER_UNKNOWN 0xfff0u
#define NOT_OURS 0x1234u

struct head {
    u64 partition;
    u32 vp;
    u8 vtl;
    u8 reserved[3];
};

struct get_input {
    struct head head;
    u32 names[64];
};

struct set_input {
    struct head head;
    struct {
        u32 name, reserved[3];
        u64 low, high;
    } list[4];
};

struct value {
    u64 low, high;
};

static struct value *const output = (struct value *)(scratch + PAGE_SIZE);
static u8 assist_page[PAGE_SIZE] __attribute__((aligned(4096)));

static u64 get(u64 control, u64 partition, u32 vp, u32 first, u32 second)
{
    struct get_input *input = (struct get_input *)scratch;

    memset(input, 0, sizeof(*input));
    memset(output, 0xff, 4 * sizeof(*output));
    input->head.partition = partition;
    input->head.vp = vp;
    input->names[0] = first;
    input->names[1] = second;
    return hypercall(control, address_of(input), address_of(output));
}

static u64 set(u64 control, u64 partition, u32 vp, u32 first, u64 low, u64 high, u32 second)
{
    struct set_input *input = (struct set_input *)scratch;

    memset(input, 0, sizeof(*input));
    input->head.partition = partition;
    input->head.vp = vp;
    input->list[0].name = first;
    input->list[0].low = low;
    input->list[0].high = high;
    input->list[1].name = second;
    return hypercall(control, address_of(input), 0);
}

static u64 result(u32 status, u32 completed)
{
    return status | CALL_REPS(completed);
}

#define RESULT(value) ((value) & 0xfff0000ffffull)

static void getting(void)
{
    u64 one = CALL_GET_VP_REGISTERS | CALL_REPS(1), two = CALL_GET_VP_REGISTERS | CALL_REPS(2);
    u64 in = address_of(scratch), out = address_of(output);
    u32 leaf[4];

    expect_equal("registers.get", "7.10.2", RESULT(get(one, PARTITION_SELF, VP_SELF, REGISTER_VP_INDEX, 0)),
                 result(STATUS_SUCCESS, 1));
    expect_equal("registers.get_value", "7.8.2", output[0].low | output[0].high, 0);
    expect_equal("registers.get_of_last_vp", "7.10.2",
                 RESULT(get(one, PARTITION_SELF, vp_count - 1, REGISTER_VP_INDEX, 0)), result(STATUS_SUCCESS, 1));
    expect_equal("registers.get_value_of_last_vp", "7.8.2", output[0].low, vp_count - 1);
    expect_equal("registers.get_two", "7.10.2",
                 RESULT(get(two, PARTITION_SELF, VP_SELF, REGISTER_VP_INDEX, REGISTER_PRIVILEGES)),
                 result(STATUS_SUCCESS, 2));
    cpuid(0x40000003, leaf);
    expect_equal("registers.get_128_bits", "7.8.2", !memcmp(&output[1], leaf, sizeof(leaf)), 1);
    expect_equal("registers.get_from_start", "3.8",
                 RESULT(get(two | CALL_START(1), PARTITION_SELF, VP_SELF, REGISTER_UNKNOWN, REGISTER_VP_INDEX)),
                 result(STATUS_SUCCESS, 2));
    expect_equal("registers.get_from_start_value", "3.8", output[0].low == ~0ull && output[1].low == 0, 1);
    expect_equal("registers.get_stops_at_unknown", "7.10.2",
                 RESULT(get(two, PARTITION_SELF, VP_SELF, REGISTER_VP_INDEX, REGISTER_UNKNOWN)),
                 result(STATUS_INVALID_PARAMETER, 1));
    expect_equal("registers.get_unknown", "7.10.2", RESULT(get(one, PARTITION_SELF, VP_SELF, REGISTER_UNKNOWN, 0)),
                 result(STATUS_INVALID_PARAMETER, 0));
    expect_equal("registers.get_bad_partition", "7.10.2", (u16)get(one, NOT_OURS, VP_SELF, REGISTER_VP_INDEX, 0),
                 STATUS_INVALID_PARTITION_ID);
    expect_equal("registers.get_bad_vp", "7.10.2", (u16)get(one, PARTITION_SELF, vp_count, REGISTER_VP_INDEX, 0),
                 STATUS_INVALID_VP_INDEX);
    expect_equal("registers.get_no_reps", "3.12.3",
                 (u16)get(CALL_GET_VP_REGISTERS, PARTITION_SELF, VP_SELF, REGISTER_VP_INDEX, 0),
                 STATUS_INVALID_HYPERCALL_INPUT);
    get(one, PARTITION_SELF, VP_SELF, REGISTER_VP_INDEX, 0);
    expect_equal("registers.get_misaligned_input", "3.6", status_of(one, in + 4, out), STATUS_INVALID_ALIGNMENT);
    expect_equal("registers.get_misaligned_output", "3.6", status_of(one, in, out + 4), STATUS_INVALID_ALIGNMENT);
    expect_equal("registers.get_output_across_pages", "3.6", status_of(two, in, out + PAGE_SIZE - 16),
                 STATUS_INVALID_ALIGNMENT);
    expect_equal("registers.get_output_beyond_gpa_space", "3.12.3", status_of(one, in, 0xfffffffffff000ull),
                 STATUS_INVALID_ALIGNMENT);
    expect("registers.get_fast", "3.7", status_of(one | CALL_FAST, PARTITION_SELF, VP_SELF),
           status_of(one | CALL_FAST, PARTITION_SELF, VP_SELF) != STATUS_SUCCESS, "refused: there is no name in it");
}

static void setting(void)
{
    u64 one = CALL_SET_VP_REGISTERS | CALL_REPS(1), two = CALL_SET_VP_REGISTERS | CALL_REPS(2);
    u64 page = address_of(assist_page) | 1, old = rdmsr(MSR_VP_ASSIST_PAGE);

    expect_equal("registers.set", "7.10.1",
                 RESULT(set(one, PARTITION_SELF, VP_SELF, REGISTER_ASSIST_PAGE, page, 0, 0)),
                 result(STATUS_SUCCESS, 1));
    expect_equal("registers.set_value", "7.8.7.1", rdmsr(MSR_VP_ASSIST_PAGE), page);
    expect_equal("registers.set_stops_at_readonly", "7.10.1",
                 RESULT(set(two, PARTITION_SELF, VP_SELF, REGISTER_ASSIST_PAGE, old, 0, REGISTER_VP_INDEX)),
                 result(STATUS_INVALID_PARAMETER, 1));
    expect_equal("registers.set_before_readonly", "7.10.1", rdmsr(MSR_VP_ASSIST_PAGE), old);
    expect_equal("registers.set_unknown", "7.10.1",
                 RESULT(set(one, PARTITION_SELF, VP_SELF, REGISTER_UNKNOWN, 0, 0, 0)),
                 result(STATUS_INVALID_PARAMETER, 0));
    expect("registers.set_beyond_its_size", "7.10.1",
           (u16)set(one, PARTITION_SELF, VP_SELF, REGISTER_ASSIST_PAGE, 0, 1, 0),
           (u16)set(one, PARTITION_SELF, VP_SELF, REGISTER_ASSIST_PAGE, 0, 1, 0) != STATUS_SUCCESS, "an error");
    expect_equal("registers.set_bad_partition", "7.10.1",
                 (u16)set(one, NOT_OURS, VP_SELF, REGISTER_ASSIST_PAGE, 0, 0, 0), STATUS_INVALID_PARTITION_ID);
    expect_equal("registers.set_bad_vp", "7.10.1",
                 (u16)set(one, PARTITION_SELF, vp_count, REGISTER_ASSIST_PAGE, 0, 0, 0), STATUS_INVALID_VP_INDEX);
    expect_equal("registers.set_too_many", "3.6",
                 status_of(CALL_SET_VP_REGISTERS | CALL_REPS(128), address_of(scratch), 0), STATUS_INVALID_ALIGNMENT);
    expect_equal("registers.set_no_reps", "3.12.3", status_of(CALL_SET_VP_REGISTERS, address_of(scratch), 0),
                 STATUS_INVALID_HYPERCALL_INPUT);
}

void test_registers(void)
{
    if (!(privileges_eax & EAX_HYPERCALL))
        return;
    hypercall_enable();
    if (!(privileges_ebx & EBX_VP_REGISTERS)) {
        expect_not_offered("registers.get_not_offered", "4.2.2", CALL_GET_VP_REGISTERS | CALL_REPS(1));
        expect_not_offered("registers.set_not_offered", "4.2.2", CALL_SET_VP_REGISTERS | CALL_REPS(1));
        return;
    }
    getting();
    setting();
}
