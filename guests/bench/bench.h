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

#define MAX_OPERATIONS 4u

/* The test under way. */
struct test {
    char name[32]; /* as in the report */
    u32 bytes, depth, milliseconds;
    u64 done, ticks;
    u32 kicks, failures, wrong;
};

/* What is measured. */
struct subject {
    const char *key; /* of its word on the command line */
    const char *unit;
    const char *operations[MAX_OPERATIONS];
    bool (*start)(void); /* with the driver that the word names; false after fail() */
    bool (*prepare)(u32 operation); /* whether `test` can be */
    void (*run)(void);              /* in user mode; fills in done, ticks, failures, wrong */
    u32 (*kicks)(void);             /* so far */
    const char *driver;             /* its name, once started */
};

extern struct subject disk, nic;
extern struct test test;

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

/* A NIC's driver. Frames have no checksum behind them. Those to be sent are in slots, as with disks. */
struct nic_driver {
    const char *name;
    u32 depth;
    bool (*start)(void);
    u8 *(*frame)(u32 slot);              /* where to write a frame to be sent */
    void (*submit)(u32 slot, u32 bytes); /* the host need not know yet */
    int (*poll)(void);                   /* a slot whose frame is sent, or -1 */
    const u8 *(*receive)(u32 *bytes);    /* a frame, until the next call, or NULL */
    void (*kick)(void); /* tell the host of all that was submitted, and of room for what is received */
    u32 kicks;
};

extern struct nic_driver netvsc, virtio_net;

#define NIC_DEPTH 128u
#define MAX_FRAME 1514u

/* hyperv.c: enlightenments, and the first device of an interface with its open channel; false after fail(). */
bool hyperv_find(u32 interface, struct channel *channel);
bool hyperv_open(struct channel *channel, void *rings, u32 ring_bytes); /* each with its control page */

/* virtio.c: the legacy PCI interface. */
struct virtio_queue {
    u16 number, mask, submitted, taken;
    struct descriptor *descriptors;
    struct available *available;
    struct used *used;
    volatile u16 *used_event, *available_event;
    u8 memory[16 * PAGE_SIZE] __attribute__((aligned(4096)));
};

struct descriptor {
    u64 address;
    u32 bytes;
    u16 flags;
    u16 next;
};

#define VIRTIO_NEXT 1
#define VIRTIO_DEVICE_WRITES 2
#define VIRTIO_CONFIGURATION 0x14 /* port of the device's own registers */

bool virtio_find(u32 id, u32 *features);   /* `features` are those wanted, and then those there are; event index too */
bool virtio_queue(struct virtio_queue *queue, u16 number, u32 least); /* with at least so many descriptors */
void virtio_ready(void);
u16 virtio_ports(void);
void virtio_submit(struct virtio_queue *queue, u32 descriptor); /* the first of a chain */
bool virtio_publish(struct virtio_queue *queue);                /* whether that took an exit */
int virtio_take(struct virtio_queue *queue, u32 *bytes);        /* a chain that is done, or -1 */

void fail(const char *why); /* reports that there is nothing to measure */

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
