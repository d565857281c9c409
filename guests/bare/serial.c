/* COM1, a 16550 at 0x3f8, polled: one look at the line status for each 16 bytes, which its FIFO takes. */
#include "bare.h"

#define COM1 0x3f8
#define FIFO_CONTROL (COM1 + 2)
#define LINE_CONTROL (COM1 + 3)
#define LINE_STATUS (COM1 + 5)
#define FIFO_SIZE 16

static u32 room;

static void put(u8 byte)
{
    if (room == 0) {
        while (!(inb(LINE_STATUS) & 0x20))
            ;
        room = FIFO_SIZE;
    }
    room--;
    outb(COM1, byte);
}

void print(const char *text)
{
    static bool ready;

    if (!ready) {
        outb(LINE_CONTROL, 3); /* 8N1 */
        outb(FIFO_CONTROL, 7); /* enable and clear the FIFOs */
        ready = true;
    }
    while (*text)
        put((u8)*text++);
}

void print_hex(u64 value)
{
    char digits[19];
    char *at = digits + sizeof(digits) - 1;

    *at = 0;
    do {
        *--at = "0123456789abcdef"[value & 15];
        value >>= 4;
    } while (value);
    *--at = 'x';
    *--at = '0';
    print(at);
}

void print_decimal(u32 value)
{
    char digits[11];
    char *at = digits + sizeof(digits) - 1;

    *at = 0;
    do {
        *--at = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    print(at);
}
