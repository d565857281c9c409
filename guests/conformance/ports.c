/* Messages and event flags by connections, and SINTs that are set: all with QEMU's Hyper-V test device
 * (hw/hyperv/hyperv_testdev.c), which answers on connections that it is told to make.
 */
#include "kit.h"

#define SINT 6
#define VECTOR 0x71
#define MESSAGE_CONNECTION 5
#define EVENT_CONNECTION 37
#define MANY 40

static volatile u32 other_type, other_interrupts, other_flags;

void testdev(u32 control, u32 vp, u32 sint, u32 connection)
{
    outl(TESTDEV_PORT, sint | vp << 8 | control << 16 | connection << 24);
}

static u32 post(u32 number)
{
    struct post_message_input *input = (struct post_message_input *)scratch;

    memset(input, 0, sizeof(*input));
    input->connection = MESSAGE_CONNECTION;
    input->type = 1;
    input->size = sizeof(number);
    memcpy(input->payload, &number, sizeof(number));
    return status_of(CALL_POST_MESSAGE, address_of(input), 0);
}

static u32 signal(void)
{
    return status_of(CALL_SIGNAL_EVENT | CALL_FAST, EVENT_CONNECTION, 0);
}

static void messages(void)
{
    struct message *slot = message_slot(SINT);
    u32 before = this_vp()->interrupts[VECTOR], accepted = 0, received = 0, in_order = 0, status;

    testdev(TESTDEV_MESSAGE_CREATE, 0, SINT, MESSAGE_CONNECTION);
    expect_equal("ports.post", "11.11.1", post(0x1234567), STATUS_SUCCESS);
    expect_equal("ports.message_comes", "11.4",
                 WAIT_UNTIL(slot->type && this_vp()->interrupts[VECTOR] != before, PATIENCE), 1);
    expect_equal("ports.message_type", "11.10.2", slot->type, 1);
    expect_equal("ports.message_size", "11.10.4", slot->size, 4);
    memcpy(&status, slot->payload, 4);
    expect_equal("ports.message_payload", "11.10.4", status, 0x1234567);
    expect_equal("ports.message_interrupts", "11.8.5", this_vp()->interrupts[VECTOR] - before, 1);
    /* With the slot taken, messages wait, and at some number of them there is no room. */
    for (status = STATUS_SUCCESS; accepted < MANY; accepted++) {
        status = post(accepted);
        if (status != STATUS_SUCCESS)
            break;
    }
    expect("ports.message_queue_full", "11.3", status, status == STATUS_INSUFFICIENT_BUFFERS || accepted == MANY,
           "0x13, insufficient buffers");
    expect_equal("ports.message_pending", "11.10.3", WAIT_UNTIL(slot->flags & 1, PATIENCE), 1);
    message_done(slot);
    while (received < accepted && WAIT_UNTIL(slot->type, PATIENCE)) {
        in_order += !memcmp(slot->payload, &received, 4);
        received++;
        message_done(slot);
    }
    expect_equal("ports.messages_after_eom", "11.8.6", received == accepted, 1);
    expect_equal("ports.messages_in_order", "11.4", in_order == received, 1);
    take_interrupts();
    testdev(TESTDEV_MESSAGE_DESTROY, 0, SINT, MESSAGE_CONNECTION);
    expect_equal("ports.post_disconnected", "11.11.1", post(1), STATUS_INVALID_CONNECTION_ID);
}

/* A timer and a port with one slot: none of their messages may be lost or come twice. */
static void shared_slot(void)
{
    struct message *slot = message_slot(SINT);
    u32 timers = 0, posted = 0;

    if (!(privileges_eax & EAX_STIMER))
        return;
    testdev(TESTDEV_MESSAGE_CREATE, 0, SINT, MESSAGE_CONNECTION);
    post(0);
    WAIT_UNTIL(slot->type, PATIENCE);
    wrmsr_safe(MSR_STIMER0_COUNT, 1);
    wrmsr_safe(MSR_STIMER0_CONFIG, TIMER_SINT(SINT) | TIMER_ENABLE);
    post(1);
    let_ticks_pass(1);
    for (u32 i = 0; i < 5; i++) {
        timers += slot->type == MESSAGE_TIMER_EXPIRED;
        posted += slot->type == 1;
        message_done(slot);
        let_ticks_pass(1);
    }
    expect_equal("ports.shared_slot_timer", "11.8.6", timers, 1);
    expect_equal("ports.shared_slot_messages", "11.8.6", posted, 2);
    take_interrupts();
    testdev(TESTDEV_MESSAGE_DESTROY, 0, SINT, MESSAGE_CONNECTION);
}

static void events(void)
{
    volatile u32 *flags = event_flags(SINT) + EVENT_CONNECTION / 32;
    u32 before = this_vp()->interrupts[VECTOR], bit = 1u << EVENT_CONNECTION % 32, status;

    testdev(TESTDEV_EVENT_CREATE, 0, SINT, EVENT_CONNECTION);
    expect_equal("ports.signal", "11.11.2", signal(), STATUS_SUCCESS);
    expect_equal("ports.event_comes", "11.5", WAIT_UNTIL(*flags && this_vp()->interrupts[VECTOR] != before, PATIENCE),
                 1);
    expect_equal("ports.event_flag", "11.10.5", *flags, bit);
    expect_equal("ports.event_interrupts", "11.8.5", this_vp()->interrupts[VECTOR] - before, 1);
    *flags = 0;
    fence();
    memset(scratch, 0, 16);
    scratch[0] = EVENT_CONNECTION;
    expect_equal("ports.signal_in_memory", "11.11.2", status_of(CALL_SIGNAL_EVENT, address_of(scratch), 0),
                 STATUS_SUCCESS);
    expect_equal("ports.event_again", "11.5",
                 WAIT_UNTIL(*flags == bit && this_vp()->interrupts[VECTOR] - before == 2, PATIENCE), 1);
    *flags = 0;
    status = status_of(CALL_SIGNAL_EVENT | CALL_FAST, EVENT_CONNECTION | 1ull << 32, 0);
    expect("ports.signal_flag_beyond_port", "11.11.2", status,
           status == STATUS_INVALID_PARAMETER || status == STATUS_INVALID_HYPERCALL_INPUT, "3 or 5");
    testdev(TESTDEV_EVENT_DESTROY, 0, SINT, EVENT_CONNECTION);
    expect_equal("ports.signal_disconnected", "11.11.2", signal(), STATUS_INVALID_CONNECTION_ID);
}

/* A SINT by itself: its interrupt comes if it is open. */
static void set_sint(void)
{
    u32 before = this_vp()->interrupts[VECTOR];

    testdev(TESTDEV_ROUTE_CREATE, 0, SINT, 0);
    testdev(TESTDEV_SET_SINT, 0, SINT, 0);
    WAIT_UNTIL(this_vp()->interrupts[VECTOR] != before, PATIENCE);
    expect_equal("ports.sint", "11.8.5", this_vp()->interrupts[VECTOR] - before, 1);
    wrmsr_safe(MSR_SINT0 + SINT, SINT_MASKED | VECTOR);
    testdev(TESTDEV_SET_SINT, 0, SINT, 0);
    take_interrupts();
    expect_equal("ports.sint_masked", "11.8.5", this_vp()->interrupts[VECTOR] - before, 1);
    wrmsr_safe(MSR_SINT0 + SINT, VECTOR);
    testdev(TESTDEV_ROUTE_DESTROY, 0, SINT, 0);
}

static void receive_on_other(void)
{
    struct message *slot = message_slot(SINT);
    volatile u32 *flags = event_flags(SINT) + EVENT_CONNECTION / 32;

    WAIT_UNTIL(slot->type && *flags && this_vp()->interrupts[VECTOR], PATIENCE);
    other_type = slot->type;
    other_flags = *flags;
    other_interrupts = this_vp()->interrupts[VECTOR];
    message_done(slot);
    synic_disable();
}

static void enable_on_other(void)
{
    synic_enable();
    wrmsr_safe(MSR_SINT0 + SINT, VECTOR);
}

static void to_other_vps(void)
{
    u32 messages = 0, events = 0, interrupts = 0;

    if (vp_count < 2) {
        skip("ports.other_vps_messages", "11.4", "needs 2 VPs");
        return;
    }
    for (u32 number = 1; number < vp_count; number++) {
        vp_run(number, enable_on_other);
        testdev(TESTDEV_MESSAGE_CREATE, number, SINT, MESSAGE_CONNECTION);
        testdev(TESTDEV_EVENT_CREATE, number, SINT, EVENT_CONNECTION);
        vp_begin(number, receive_on_other);
        post(number);
        signal();
        vp_finished(number);
        testdev(TESTDEV_MESSAGE_DESTROY, number, SINT, MESSAGE_CONNECTION);
        testdev(TESTDEV_EVENT_DESTROY, number, SINT, EVENT_CONNECTION);
        messages += other_type == 1;
        events += other_flags == 1u << EVENT_CONNECTION % 32;
        interrupts += other_interrupts >= 1;
    }
    expect_equal("ports.other_vps_messages", "11.4", messages, vp_count - 1);
    expect_equal("ports.other_vps_events", "11.5", events, vp_count - 1);
    expect_equal("ports.other_vps_interrupts", "11.8.5", interrupts, vp_count - 1);
}

void test_ports(void)
{
    if (!(privileges_eax & EAX_SYNIC) || !(privileges_ebx & EBX_POST_MESSAGES))
        return;
    if (!has_word("testdev")) {
        skip("ports.post", "11.11.1", "needs the Hyper-V test device");
        return;
    }
    hypercall_enable();
    synic_enable();
    wrmsr_safe(MSR_SINT0 + SINT, VECTOR);
    messages();
    shared_slot();
    events();
    set_sint();
    synic_disable();
    to_other_vps();
}
