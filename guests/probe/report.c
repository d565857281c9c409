/* One line for each finding: `probe: topic.name = value ok` or `probe: topic.name = value bad expected`. */
#include "probe.h"

static u32 passed, failed;

static void head(const char *name)
{
    print("probe: ");
    print(name);
}

static void verdict(bool ok, const char *expected)
{
    if (ok) {
        passed++;
        print(" ok\n");
    } else {
        failed++;
        print(" bad ");
        print(expected);
        print("\n");
    }
}

void expect(const char *name, u64 value, bool ok, const char *expected)
{
    head(name);
    print(" = ");
    print_hex(value);
    verdict(ok, expected);
}

void expect_numbered(const char *name, u32 number, u64 value, bool ok, const char *expected)
{
    head(name);
    print_decimal(number);
    print(" = ");
    print_hex(value);
    verdict(ok, expected);
}

void expect_equal(const char *name, u64 value, u64 expected)
{
    head(name);
    print(" = ");
    print_hex(value);
    if (value == expected) {
        verdict(true, "");
    } else {
        failed++;
        print(" bad ");
        print_hex(expected);
        print("\n");
    }
}

void expect_text(const char *name, const char *value, bool ok, const char *expected)
{
    head(name);
    print(" = ");
    print(value);
    verdict(ok, expected);
}

void report_done(void)
{
    print("probe: done ");
    print_decimal(passed);
    print(" ");
    print_decimal(failed);
    print("\n");
}
