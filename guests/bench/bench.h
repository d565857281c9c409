/* What the parts of the benchmark guest share: drivers of disks behind one interface, and user mode to run them in.
 *
 * Interrupts stay off for good. Drivers are set up in supervisor mode; what is measured runs in user mode with I/O
 * ports, because a KVM without hardware virtualisation (kvm_pvm) runs only that natively.
 */
#ifndef BENCH_H
#define BENCH_H

#include "../bare/vmbus/vmbus.h"

#define MAX_DEPTH 32u
#define MAX_BYTES (STORVSC_PAGES * PAGE_SIZE) /* of one request */
#define SECTOR_SIZE 512u

/* A disk's driver. A request is in one of the slots, 0 to MAX_DEPTH - 1, from submit() until poll() gives it back. */
struct driver {
    const char *name;
    u32 depth;                                                   /* requests at once, at most */
    bool (*start)(u64 *sectors);                                 /* in supervisor mode; false after fail() */
    void (*submit)(u32 slot, bool write, u64 sector, u32 bytes); /* the host need not know yet */
    void (*kick)(void);                                          /* tell the host of all that was submitted */
    int (*poll)(bool *good);                                     /* a slot whose request is over, or -1 */
    u32 kicks;                                                   /* how often the host was told by an exit */
};

extern struct driver storvsc, virtio_blk, ide_pio, ide_dma;

extern u8 buffers[MAX_DEPTH][MAX_BYTES]; /* physically contiguous, as all memory here */

void fail(const char *why); /* reports that there is no disk */

/* pci.c: a device is its bus and function number, 8 bits. */
bool pci_find(u32 id, u32 *device); /* by device and vendor id; lets it decode and be bus master */
u32 pci_read(u32 device, u32 offset);
void pci_write(u32 device, u32 offset, u32 value);
u16 pci_ports(u32 device, u32 bar); /* where an I/O BAR is, or 0 */

/* start.S */
void run_as_user(void (*job)(void)); /* in ring 3, with all I/O ports and interrupts off */
extern u8 trap_stack_end[];

static inline void pause(void)
{
    __asm__ volatile("pause" : : : "memory");
}

#endif
