/* The kit's order of events. `kit=TOPIC,TOPIC...` on the command line chooses; all topics are the default. */
#include "kit.h"

extern u32 multiboot_information;

static const struct {
    const char *name;
    void (*test)(void);
} topics[] = {
    {"startvp", test_startvp}, /* before the APs start in another way */
    {"cpuid", test_cpuid}, {"msr", test_msr}, {"hypercall", test_hypercall}, {"ext", test_ext},
    {"time", test_time}, {"synic", test_synic}, {"stimer", test_stimer}, {"ports", test_ports},
    {"autoeoi", test_autoeoi}, {"apic", test_apic}, {"idle", test_idle}, {"spinwait", test_spinwait},
    {"ipi", test_ipi}, {"flush", test_flush}, {"registers", test_registers},
    {"lock", test_lock}, /* last, for only a reset undoes it */
};

static void start_others(void)
{
    u32 online = vps_start();

    expect_equal("kit.vps_online", "7.4", online, vp_count);
    if (online != vp_count)
        vp_count = 1;
}

void kit_main(void);
void kit_main(void)
{
    command_line_of_multiboot(multiboot_information); /* low memory is the kit's after this */
    vps_count();
    vp_init(0);
    print("kit: start\n");
    cpuid_read();
    for (u32 i = 0; i < sizeof(topics) / sizeof(topics[0]); i++) {
        if (!has_key("kit=") || lists("kit=", topics[i].name))
            topics[i].test();
        if (i == 0)
            start_others();
    }
    report_done();
}
