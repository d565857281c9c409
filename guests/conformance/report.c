/* One line for each test:
 *
 *     kit: topic.name = value ok section
 *     kit: topic.name = value bad section expected
 *     kit: topic.name = - skip section reason
 *
 * A value that differs from run to run begins with '~'.
 */
#include "kit.h"

#define EXIT_PORT 0xf4 /* QEMU's isa-debug-exit */

static u32 passed, failed, skipped;

static void head(const char *name)
{
    print("kit: ");
    print(name);
    print(" = ");
}

static void verdict(const char *section, bool ok)
{
    *(ok ? &passed : &failed) += 1;
    print(ok ? " ok " : " bad ");
    print(section);
}

static void reason(bool ok, const char *expected)
{
    if (!ok) {
        print(" ");
        print(expected);
    }
    print("\n");
}

void expect(const char *name, const char *section, u64 value, bool ok, const char *expected)
{
    head(name);
    print_hex(value);
    verdict(section, ok);
    reason(ok, expected);
}

void expect_measured(const char *name, const char *section, u64 value, bool ok, const char *expected)
{
    head(name);
    print("~");
    print_hex(value);
    verdict(section, ok);
    reason(ok, expected);
}

void expect_equal(const char *name, const char *section, u64 value, u64 expected)
{
    head(name);
    print_hex(value);
    verdict(section, value == expected);
    if (value != expected) {
        print(" ");
        print_hex(expected);
    }
    print("\n");
}

void expect_text(const char *name, const char *section, const char *value, bool ok, const char *expected)
{
    head(name);
    print(value);
    verdict(section, ok);
    reason(ok, expected);
}

void skip(const char *name, const char *section, const char *why)
{
    skipped++;
    head(name);
    print("- skip ");
    print(section);
    print(" ");
    print(why);
    print("\n");
}

void report_done(void)
{
    print("kit: done ");
    print_decimal(passed);
    print(" ");
    print_decimal(failed);
    print(" ");
    print_decimal(skipped);
    print("\n");
    outl(EXIT_PORT, failed != 0);
    for (;;)
        __asm__ volatile("cli; hlt");
}
