/* The memory functions that gcc calls, as string instructions: few instructions for KVM's emulator. */
#include "probe.h"

void *memset(void *to, int value, size_t size)
{
    void *at = to;
    size_t words = size / 8;

    size &= 7;
    __asm__ volatile("rep stosq" : "+D"(at), "+c"(words) : "a"((u8)value * 0x0101010101010101ull) : "memory");
    __asm__ volatile("rep stosb" : "+D"(at), "+c"(size) : "a"(value) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, size_t size)
{
    void *at = to;
    size_t words = size / 8;

    size &= 7;
    __asm__ volatile("rep movsq" : "+D"(at), "+S"(from), "+c"(words) : : "memory");
    __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(size) : : "memory");
    return to;
}

int memcmp(const void *left, const void *right, size_t size)
{
    const u8 *a = left, *b = right;

    for (; size; size--, a++, b++)
        if (*a != *b)
            return *a - *b;
    return 0;
}

bool all_zero(const void *page, size_t size)
{
    const u64 *at = page;
    const u64 *end = at + size / 8;

    for (; at < end; at++)
        if (*(volatile const u64 *)at)
            return false;
    return true;
}
