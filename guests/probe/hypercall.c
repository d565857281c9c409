/* Bad hypercalls and their status codes, TLFS v6.0b, through both ABIs. */
#include "probe.h"

#define UNKNOWN_CALL 0x3fff
#define NO_SUCH_CONNECTION 0xabcdef
#define VMBUS_CONNECTION 4

static struct post_message_input *input;

void hypercall_enable(void)
{
    wrmsr_safe(MSR_GUEST_OS_ID, GUEST_OS_ID);
    wrmsr_safe(MSR_HYPERCALL, address_of(hypercall_page) | 1);
    input = (struct post_message_input *)scratch;
}

u32 post_message(u32 connection, u32 type, const void *payload, u32 size)
{
    u32 status;

    for (int attempt = 0; attempt < 100; attempt++) {
        input->connection = connection;
        input->reserved = 0;
        input->type = type;
        input->size = size;
        memcpy(input->payload, payload, size);
        status = (u16)hypercall_64(CALL_POST_MESSAGE, address_of(input), 0);
        if (status != STATUS_INSUFFICIENT_BUFFERS)
            break;
        idle();
    }
    return status;
}

static u64 post(u64 control, u32 connection, u32 type, u32 size, u64 gpa)
{
    input->connection = connection;
    input->reserved = 0;
    input->type = type;
    input->size = size;
    return (u16)hypercall_64(control, gpa, 0);
}

void probe_hypercalls(void)
{
    u64 here = address_of(scratch), gpa, status;
    u64 signal = CALL_SIGNAL_EVENT | CALL_FAST;

    if (!(privileges_eax & EAX_HYPERCALL))
        return;
    hypercall_enable();
    expect_equal("hypercall.unknown_code", (u16)hypercall_64(UNKNOWN_CALL, 0, 0), STATUS_INVALID_HYPERCALL_CODE);
    expect_equal("hypercall.unknown_code_fast", (u16)hypercall_64(UNKNOWN_CALL | CALL_FAST, 0, 0),
                 STATUS_INVALID_HYPERCALL_CODE);
    if (privileges_ebx & EBX_POST_MESSAGES) {
        u64 call = CALL_POST_MESSAGE;
        expect_equal("hypercall.post_bad_connection", post(call, NO_SUCH_CONNECTION, 1, 8, here),
                     STATUS_INVALID_CONNECTION_ID);
        expect_equal("hypercall.post_misaligned", post(call, VMBUS_CONNECTION, 1, 8, here + 4),
                     STATUS_INVALID_ALIGNMENT);
        gpa = here + PAGE_SIZE - 8;
        expect_equal("hypercall.post_across_pages", post(call, VMBUS_CONNECTION, 1, 8, gpa), STATUS_INVALID_ALIGNMENT);
        expect_equal("hypercall.post_size_241", post(call, VMBUS_CONNECTION, 1, 241, here), STATUS_INVALID_PARAMETER);
        expect_equal("hypercall.post_type_reserved", post(call, VMBUS_CONNECTION, 0x80000000, 8, here),
                     STATUS_INVALID_PARAMETER);
        expect_equal("hypercall.post_beyond_gpa_space", post(call, VMBUS_CONNECTION, 1, 8, 0xfffffffff000),
                     STATUS_INVALID_ALIGNMENT);
        /* Within the GPA space but no RAM: the TLFS names no status, only that it must fail. */
        status = post(call, VMBUS_CONNECTION, 1, 8, 0xd0000000);
        expect("hypercall.post_outside_ram", status, status != STATUS_SUCCESS, "an error");
        expect_equal("hypercall.post_rep_count", post(call | 1ull << 32, VMBUS_CONNECTION, 1, 8, here),
                     STATUS_INVALID_HYPERCALL_INPUT);
        expect_equal("hypercall.post_reserved_bit", post(call | 1ull << 63, VMBUS_CONNECTION, 1, 8, here),
                     STATUS_INVALID_HYPERCALL_INPUT);
        expect_equal("hypercall.post_fast", post(call | CALL_FAST, VMBUS_CONNECTION, 1, 8, here),
                     STATUS_INVALID_HYPERCALL_INPUT);
        expect_equal("hypercall.32bit_post_misaligned", hypercall_32(call, here + 4, 0), STATUS_INVALID_ALIGNMENT);
    }
    if (privileges_ebx & EBX_SIGNAL_EVENTS) {
        expect_equal("hypercall.signal_bad_connection", (u16)hypercall_64(signal, NO_SUCH_CONNECTION, 0),
                     STATUS_INVALID_CONNECTION_ID);
        memset(scratch, 0, 16);
        memcpy(scratch, &(u32){NO_SUCH_CONNECTION}, 4);
        expect_equal("hypercall.signal_in_memory", (u16)hypercall_64(CALL_SIGNAL_EVENT, here, 0),
                     STATUS_INVALID_CONNECTION_ID);
        expect_equal("hypercall.signal_rep_count", (u16)hypercall_64(signal | 1ull << 32, NO_SUCH_CONNECTION, 0),
                     STATUS_INVALID_HYPERCALL_INPUT);
        expect_equal("hypercall.32bit_signal", hypercall_32(signal, NO_SUCH_CONNECTION, 0),
                     STATUS_INVALID_CONNECTION_ID);
    }
    expect_equal("hypercall.32bit_unknown_code", hypercall_32(UNKNOWN_CALL, 0, 0), STATUS_INVALID_HYPERCALL_CODE);
}
