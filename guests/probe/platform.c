/* What the boot loader left: command line and ACPI tables
 * (Linux Documentation/arch/x86/zero-page.rst; ACPI 6.5, chapter 5).
 */
#include "probe.h"

#define BOOT_RSDP 0x70
#define BOOT_COMMAND_LINE 0x228

#define SLEEP_S5 (5u << 10 | 1u << 13)

struct platform platform = {.vp_count = 1, .pm1a_control = 0x604};

static u32 u32_at(const u8 *at)
{
    u32 value;
    memcpy(&value, at, sizeof(value));
    return value;
}

static u64 u64_at(const u8 *at)
{
    u64 value;
    memcpy(&value, at, sizeof(value));
    return value;
}

/* Count the usable local APICs: MADT structures of type 0 (local APIC) and 9 (local x2APIC) with the enabled flag. */
static u32 count_processors(const u8 *madt)
{
    const u8 *end = madt + u32_at(madt + 4);
    u32 count = 0;

    for (const u8 *at = madt + 44; at + 2 <= end && at[1] >= 2; at += at[1]) {
        if (at[0] == 0 && (u32_at(at + 4) & 1))
            count++;
        else if (at[0] == 9 && (u32_at(at + 8) & 1))
            count++;
    }
    return count;
}

/* Revision 0 of the RSDP (old firmware) has only the RSDT, with 32-bit entries. */
static void read_tables(const u8 *rsdp)
{
    u32 entry_size = rsdp[15] ? 8 : 4;
    const u8 *root = (const u8 *)(rsdp[15] ? u64_at(rsdp + 24) : u32_at(rsdp + 16));
    const u8 *end = root + u32_at(root + 4);

    for (const u8 *entry = root + 36; entry + entry_size <= end; entry += entry_size) {
        const u8 *table = (const u8 *)(rsdp[15] ? u64_at(entry) : u32_at(entry));
        if (!memcmp(table, "APIC", 4))
            platform.vp_count = count_processors(table);
        else if (!memcmp(table, "FACP", 4) && u32_at(table + 64))
            platform.pm1a_control = (u16)u32_at(table + 64);
    }
}

void platform_init(const u8 *boot_params)
{
    u64 rsdp = u64_at(boot_params + BOOT_RSDP);

    u32 text = u32_at(boot_params + BOOT_COMMAND_LINE);

    if (text)
        command_line = (const char *)(u64)text;
    if (rsdp)
        read_tables((const u8 *)rsdp);
}

bool topic_selected(const char *topic)
{
    return has_key("probe=") ? lists("probe=", topic) : !has_key("probe.");
}

void halt(void)
{
    for (;;)
        __asm__ volatile("cli; hlt");
}

void power_off(void)
{
    outw(platform.pm1a_control, SLEEP_S5);
    halt();
}
