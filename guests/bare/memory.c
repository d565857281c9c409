/* The memory functions that gcc calls, as string instructions: few instructions for KVM's emulator. */
#include "bare.h"

#ifdef __x86_64__
#define STORE_WORDS "rep stosq"
#define MOVE_WORDS "rep movsq"
#else
#define STORE_WORDS "rep stosl"
#define MOVE_WORDS "rep movsl"
#endif

void *memset(void *to, int value, size_t size)
{
    void *at = to;
    size_t words = size / sizeof(ulong);

    size %= sizeof(ulong);
    __asm__ volatile(STORE_WORDS : "+D"(at), "+c"(words) : "a"((u8)value * (~(ulong)0 / 255)) : "memory");
    __asm__ volatile("rep stosb" : "+D"(at), "+c"(size) : "a"(value) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, size_t size)
{
    void *at = to;
    size_t words = size / sizeof(ulong);

    size %= sizeof(ulong);
    __asm__ volatile(MOVE_WORDS : "+D"(at), "+S"(from), "+c"(words) : : "memory");
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
    const volatile ulong *at = page;
    const volatile ulong *end = at + size / sizeof(ulong);

    for (; at < end; at++)
        if (*at)
            return false;
    return true;
}
