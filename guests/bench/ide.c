/* The first disk of a PIIX IDE controller, at the legacy ports, by two drivers: programmed I/O with READ and WRITE MULTIPLE,
 * and bus-master DMA (ATA/ATAPI-6, chapters 8 and 9; Intel 82371AB, "Programming Interface for Bus Master IDE
 * Operation"). One request at a time; both poll.
 */
#include "bench.h"

#define PIIX3_IDE 0x70108086u /* QEMU's pc */
#define PIIX4_IDE 0x71118086u
#define BUS_MASTER_BAR 4

#define DATA 0x1f0
#define SECTOR_COUNT 0x1f2
#define LBA_LOW 0x1f3
#define LBA_MIDDLE 0x1f4
#define LBA_HIGH 0x1f5
#define DEVICE 0x1f6
#define COMMAND_STATUS 0x1f7
#define DEVICE_CONTROL 0x3f6

#define DEVICE_LBA 0xe0
#define NO_INTERRUPTS 2
#define BUSY 0x80
#define DATA_REQUEST 0x08
#define ERROR 0x21 /* or device fault */

#define IDENTIFY_DEVICE 0xec
#define SET_MULTIPLE_MODE 0xc6
#define READ_MULTIPLE 0xc4
#define WRITE_MULTIPLE 0xc5
#define READ_DMA 0xc8
#define WRITE_DMA 0xca
#define MULTIPLE 16u /* sectors in one block of PIO; QEMU has no more */

#define MASTER_COMMAND 0
#define MASTER_STATUS 2
#define MASTER_TABLE 4
#define MASTER_START 1
#define MASTER_TO_MEMORY 8
#define MASTER_ACTIVE 1
#define MASTER_ERROR 2
#define MASTER_INTERRUPT 4

#define REGION (64u << 10) /* of physical memory; an entry of the table stays within one */
#define LAST_ENTRY (1u << 31)

#define ATTEMPTS 1000000u /* 10 s and more */

/* Physical region descriptors of each slot: two regions hold the largest request. */
static struct {
    u32 address, bytes;
} tables[MAX_BYTES / REGION] __attribute__((aligned(4096)));

static u16 master;
static int finished = -1;
static bool finished_well;

static u8 await_status(u8 busy)
{
    u8 status = BUSY;

    for (u32 i = 0; i < ATTEMPTS && (status & busy); i++)
        status = inb(COMMAND_STATUS);
    return status;
}

static void words_in(void *to, u32 count)
{
    __asm__ volatile("rep insw" : "+D"(to), "+c"(count) : "d"((u16)DATA) : "memory");
}

static void words_out(const void *from, u32 count)
{
    __asm__ volatile("rep outsw" : "+S"(from), "+c"(count) : "d"((u16)DATA) : "memory");
}

static void command(u8 code, u64 sector, u32 count)
{
    outb(SECTOR_COUNT, (u8)count); /* 0 is 256 */
    outb(LBA_LOW, (u8)sector);
    outb(LBA_MIDDLE, (u8)(sector >> 8));
    outb(LBA_HIGH, (u8)(sector >> 16));
    outb(DEVICE, (u8)(DEVICE_LBA | sector >> 24));
    outb(COMMAND_STATUS, code);
}

static bool identify(u64 *sectors)
{
    static u16 words[SECTOR_SIZE / 2];
    u8 status;

    outb(DEVICE_CONTROL, NO_INTERRUPTS);
    command(IDENTIFY_DEVICE, 0, 0);
    status = await_status(BUSY);
    if (status == 0 || (status & (ERROR | DATA_REQUEST)) != DATA_REQUEST) {
        fail("no IDE disk at port 0x1f0");
        return false;
    }
    words_in(words, SECTOR_SIZE / 2);
    *sectors = words[60] | (u64)words[61] << 16;
    return true;
}

static int poll(bool *good)
{
    int slot = finished;

    finished = -1;
    *good = finished_well;
    return slot;
}

static void kick(void)
{
}

/* Programmed I/O --------------------------------------------------------------------------------------- */

static bool pio_start(u64 *sectors)
{
    if (!identify(sectors))
        return false;
    command(SET_MULTIPLE_MODE, 0, MULTIPLE);
    if (await_status(BUSY) & ERROR) {
        fail("the IDE disk refuses blocks of 16 sectors");
        return false;
    }
    return true;
}

static void pio_submit(u32 slot, bool write, u64 sector, u32 bytes)
{
    u8 *at = buffers[slot], status;

    command(write ? WRITE_MULTIPLE : READ_MULTIPLE, sector, bytes / SECTOR_SIZE);
    ide_pio.kicks++;
    status = await_status(BUSY);
    while (bytes && (status & (ERROR | DATA_REQUEST)) == DATA_REQUEST) {
        u32 now = bytes < MULTIPLE * SECTOR_SIZE ? bytes : MULTIPLE * SECTOR_SIZE;

        if (write)
            words_out(at, now / 2);
        else
            words_in(at, now / 2);
        at += now;
        bytes -= now;
        status = await_status(BUSY);
    }
    finished = (int)slot;
    finished_well = !bytes && !(status & (ERROR | DATA_REQUEST));
}

/* Bus-master DMA -------------------------------------------------------------------------------------------- */

static bool dma_start(u64 *sectors)
{
    u32 device;

    if (!identify(sectors))
        return false;
    if (!(pci_find(PIIX4_IDE, &device) || pci_find(PIIX3_IDE, &device)) ||
        !(master = pci_ports(device, BUS_MASTER_BAR))) {
        fail("no PIIX IDE controller on PCI");
        return false;
    }
    outl(master + MASTER_TABLE, (u32)address_of(tables));
    outb(DEVICE_CONTROL, 0);
    return true;
}

static void dma_submit(u32 slot, bool write, u64 sector, u32 bytes)
{
    u8 direction = write ? 0 : MASTER_TO_MEMORY, status;
    u32 entry = 0;

    for (u32 done = 0; done < bytes; done += REGION, entry++) {
        tables[entry].address = (u32)address_of(buffers[slot] + done);
        tables[entry].bytes = bytes - done < REGION ? bytes - done : 0; /* 0 is 64 KiB */
    }
    tables[entry - 1].bytes |= LAST_ENTRY;
    outb(master + MASTER_COMMAND, direction);
    outb(master + MASTER_STATUS, MASTER_INTERRUPT | MASTER_ERROR);
    command(write ? WRITE_DMA : READ_DMA, sector, bytes / SECTOR_SIZE);
    outb(master + MASTER_COMMAND, direction | MASTER_START);
    ide_dma.kicks++;
    status = 0;
    for (u32 i = 0; i < ATTEMPTS && !(status & MASTER_INTERRUPT); i++)
        status = inb(master + MASTER_STATUS);
    outb(master + MASTER_COMMAND, direction);
    finished = (int)slot;
    finished_well = (status & (MASTER_INTERRUPT | MASTER_ERROR)) == MASTER_INTERRUPT &&
                    !(inb(COMMAND_STATUS) & (BUSY | ERROR | DATA_REQUEST));
}

struct driver ide_pio = {
    .name = "ide-pio",
    .depth = 1,
    .start = pio_start,
    .submit = pio_submit,
    .kick = kick,
    .poll = poll,
};

struct driver ide_dma = {
    .name = "ide-dma",
    .depth = 1,
    .start = dma_start,
    .submit = dma_submit,
    .kick = kick,
    .poll = poll,
};
