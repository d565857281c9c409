/* The calling convention: status codes of bad calls, and that only what is offered answers. */
#include "kit.h"

#define NO_SUCH_CONNECTION 0xabcdef
#define BEYOND_GPA_SPACE 0xfffffffffff000ull

bool xmm_kept;
u8 scratch[2 * PAGE_SIZE] __attribute__((aligned(4096)));

void hypercall_enable(void)
{
    wrmsr_safe(MSR_GUEST_OS_ID, GUEST_OS_ID);
    wrmsr_safe(MSR_HYPERCALL, address_of(hypercall_page) | 1);
}

struct fx_state {
    u16 control, status, tag, opcode;
    u64 instruction, operand;
    u32 mxcsr, mxcsr_mask;
    u64 x87[16];
    u64 xmm[44];
} __attribute__((aligned(16)));

/* KVM's emulator knows no moves to XMM registers, but it knows FXRSTOR and FXSAVE. */
u64 hypercall_xmm(u64 control, u64 input, u64 output, const u64 xmm[12])
{
    static struct fx_state before = {.control = 0x37f, .mxcsr = 0x1f80}, after;
    u64 result;

    memcpy(before.xmm, xmm, 12 * sizeof(*xmm));
    __asm__ volatile("fxrstor %0" : : "m"(before));
    result = hypercall(control, input, output);
    __asm__ volatile("fxsave %0" : "=m"(after));
    xmm_kept = !memcmp(after.xmm, xmm, 12 * sizeof(*xmm));
    return result;
}

u32 status_of(u64 control, u64 input, u64 output)
{
    return (u16)hypercall(control, input, output);
}

/* Not there at all, or no privilege for it. */
void expect_not_offered(const char *name, const char *section, u64 control)
{
    u32 status = status_of(control, address_of(scratch), address_of(scratch) + PAGE_SIZE);

    expect(name, section, status, status == STATUS_INVALID_HYPERCALL_CODE || status == STATUS_ACCESS_DENIED, "2 or 6");
}

static u32 post(u64 control, u32 connection, u32 type, u32 size, u64 gpa)
{
    struct post_message_input *input = (struct post_message_input *)scratch;

    memset(input, 0, sizeof(*input));
    input->connection = connection;
    input->type = type;
    input->size = size;
    return status_of(control, gpa, 0);
}

static void unknown_codes(void)
{
    static const u16 codes[] = {0x0000, 0x0001, 0x003f, 0x00ff, 0x0fff, 0x3fff, 0x7fff, 0x8000, 0x8fff, 0xffff};
    u32 first_wrong = 0, fast_wrong = 0;

    for (u32 i = 0; i < sizeof(codes) / sizeof(codes[0]); i++) {
        if (status_of(codes[i], address_of(scratch), 0) != STATUS_INVALID_HYPERCALL_CODE && !first_wrong)
            first_wrong = codes[i] | 0x10000;
        if (status_of(codes[i] | CALL_FAST, 0, 0) != STATUS_INVALID_HYPERCALL_CODE && !fast_wrong)
            fast_wrong = codes[i] | 0x10000;
    }
    expect_equal("hypercall.unknown_codes", "3.12.3", first_wrong, 0);
    expect_equal("hypercall.unknown_codes_fast", "3.12.3", fast_wrong, 0);
}

static void registers(void)
{
    u64 here = address_of(scratch);

    expect_equal("hypercall.registers_kept", "3.9", hypercall_changes(CALL_SIGNAL_EVENT, here, here + PAGE_SIZE), 0);
    expect_equal("hypercall.registers_kept_fast", "3.9",
                 hypercall_changes(CALL_SIGNAL_EVENT | CALL_FAST, 0x123456789abcdef0, 0xfedcba987654321), 0);
    expect_equal("hypercall.registers_kept_unknown", "3.9", hypercall_changes(0x3fff, ~0ull, ~0ull), 0);
}

static void post_message(void)
{
    static const u8 reserved_bits[] = {27, 31, 44, 47, 60, 63};
    u64 call = CALL_POST_MESSAGE, here = address_of(scratch);
    u32 status, refused = 0;

    expect_equal("hypercall.post_bad_connection", "11.11.1", post(call, NO_SUCH_CONNECTION, 1, 8, here),
                 STATUS_INVALID_CONNECTION_ID);
    expect_equal("hypercall.post_misaligned", "3.6", post(call, NO_SUCH_CONNECTION, 1, 8, here + 4),
                 STATUS_INVALID_ALIGNMENT);
    expect_equal("hypercall.post_across_pages", "3.6", post(call, NO_SUCH_CONNECTION, 1, 8, here + PAGE_SIZE - 8),
                 STATUS_INVALID_ALIGNMENT);
    /* Which of two errors is reported is free (3.12.2): there is no such connection either. */
    status = post(call, NO_SUCH_CONNECTION, 1, 241, here);
    expect("hypercall.post_size_241", "11.11.1", status,
           status == STATUS_INVALID_PARAMETER || status == STATUS_INVALID_CONNECTION_ID, "5 or 0x12");
    status = post(call, NO_SUCH_CONNECTION, 0x80000000, 8, here);
    expect("hypercall.post_type_of_hypervisor", "11.10.2", status,
           status == STATUS_INVALID_PARAMETER || status == STATUS_INVALID_CONNECTION_ID, "5 or 0x12");
    expect_equal("hypercall.post_beyond_gpa_space", "3.12.3", post(call, NO_SUCH_CONNECTION, 1, 8, BEYOND_GPA_SPACE),
                 STATUS_INVALID_ALIGNMENT);
    /* Within the GPA space but no RAM: no status is named, only that it must fail. */
    status = post(call, NO_SUCH_CONNECTION, 1, 8, 0xd0000000);
    expect("hypercall.post_outside_ram", "3.6", status, status != STATUS_SUCCESS, "an error");
    expect_equal("hypercall.post_rep_count", "3.12.3", post(call | CALL_REPS(1), NO_SUCH_CONNECTION, 1, 8, here),
                 STATUS_INVALID_HYPERCALL_INPUT);
    expect_equal("hypercall.post_rep_start", "3.12.3", post(call | CALL_START(1), NO_SUCH_CONNECTION, 1, 8, here),
                 STATUS_INVALID_HYPERCALL_INPUT);
    expect_equal("hypercall.post_variable_header", "3.7.1",
                 post(call | CALL_VARIABLE_HEADER(1), NO_SUCH_CONNECTION, 1, 8, here), STATUS_INVALID_HYPERCALL_INPUT);
    for (u32 i = 0; i < sizeof(reserved_bits); i++)
        refused += post(call | 1ull << reserved_bits[i], NO_SUCH_CONNECTION, 1, 8, here) ==
                   STATUS_INVALID_HYPERCALL_INPUT;
    expect_equal("hypercall.post_reserved_bits", "3.7", refused, sizeof(reserved_bits));
    status = post(call | CALL_FAST, NO_SUCH_CONNECTION, 1, 8, here);
    expect("hypercall.post_fast", "3.7", status,
           status == STATUS_INVALID_HYPERCALL_INPUT || status == STATUS_INVALID_HYPERCALL_CODE,
           "refused: its input does not fit into registers");
}

static void signal_event(void)
{
    u64 call = CALL_SIGNAL_EVENT, fast = call | CALL_FAST, here = address_of(scratch);
    u32 status;

    expect_equal("hypercall.signal_bad_connection", "11.11.2", status_of(fast, NO_SUCH_CONNECTION, 0),
                 STATUS_INVALID_CONNECTION_ID);
    memset(scratch, 0, 16);
    memcpy(scratch, &(u32){NO_SUCH_CONNECTION}, 4);
    expect_equal("hypercall.signal_in_memory", "11.11.2", status_of(call, here, 0), STATUS_INVALID_CONNECTION_ID);
    expect_equal("hypercall.signal_misaligned", "3.6", status_of(call, here + 1, 0), STATUS_INVALID_ALIGNMENT);
    expect_equal("hypercall.signal_across_pages", "3.6", status_of(call, here + PAGE_SIZE - 4, 0),
                 STATUS_INVALID_ALIGNMENT);
    expect_equal("hypercall.signal_beyond_gpa_space", "3.12.3", status_of(call, BEYOND_GPA_SPACE, 0),
                 STATUS_INVALID_ALIGNMENT);
    expect_equal("hypercall.signal_rep_count", "3.12.3", status_of(fast | CALL_REPS(1), NO_SUCH_CONNECTION, 0),
                 STATUS_INVALID_HYPERCALL_INPUT);
    expect_equal("hypercall.signal_variable_header", "3.7.1",
                 status_of(fast | CALL_VARIABLE_HEADER(1), NO_SUCH_CONNECTION, 0), STATUS_INVALID_HYPERCALL_INPUT);
    expect_equal("hypercall.signal_reserved_bit", "3.7", status_of(fast | 1ull << 62, NO_SUCH_CONNECTION, 0),
                 STATUS_INVALID_HYPERCALL_INPUT);
    /* A flag beyond 2047 cannot be; that the connection is unknown may be found first. */
    status = status_of(fast, NO_SUCH_CONNECTION | 2048ull << 32, 0);
    expect("hypercall.signal_flag_2048", "11.11.2", status,
           status == STATUS_INVALID_PARAMETER || status == STATUS_INVALID_CONNECTION_ID ||
               status == STATUS_INVALID_HYPERCALL_INPUT,
           "3, 5 or 0x12");
}

void test_hypercall(void)
{
    if (!(privileges_eax & EAX_HYPERCALL))
        return;
    hypercall_enable();
    unknown_codes();
    registers();
    if (privileges_ebx & EBX_POST_MESSAGES)
        post_message();
    else
        expect_not_offered("hypercall.post_not_offered", "4.2.2", CALL_POST_MESSAGE);
    if (privileges_ebx & EBX_SIGNAL_EVENTS)
        signal_event();
    else
        expect_not_offered("hypercall.signal_not_offered", "4.2.2", CALL_SIGNAL_EVENT | CALL_FAST);
}
